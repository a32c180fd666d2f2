"""Stage ``dpo``: a policy that learns from comparisons of answers, of all weights or of adapters.

Wiring only: the batch source is records of answers, the objective is one of DPO's family, the
reference is the policy as it starts, scored once before training; validation is loss, accuracy and
margin of held-out answers, and fixed prompts are answered.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.config.loss_options import LOSS_OPTIONS, ResolvedLoss, resolve
from megatron_cgn.config.schema import RunConfig
from megatron_cgn.data.collective import on_first_rank, together
from megatron_cgn.data.preference import PreferenceData
from megatron_cgn.data.preference_kto import Mismatched
from megatron_cgn.data.reference_answers import Answers, answers_between, wanted_answers
from megatron_cgn.engine.engine import Engine
from megatron_cgn.engine.metrics import SAMPLES_FILE, read_records
from megatron_cgn.eval.kto import KtoBaseline, with_baseline, with_baselines
from megatron_cgn.eval.preference_watch import PreferenceWatch
from megatron_cgn.eval.preferences import score_preferences
from megatron_cgn.eval.reference import reference_scores
from megatron_cgn.eval.reference_facts import model_facts
from megatron_cgn.eval.self_check import check_first_step, weights_sums
from megatron_cgn.objectives.kto import with_margins
from megatron_cgn.objectives.preference import make_objective
from megatron_cgn.stages import preference
from megatron_cgn.stages.samples import answer_samples, sample_prompts


def run(run: RunConfig) -> None:
    """Run the stage from configuration to export. Collective over all ranks.

    Args:
        run: The validated configuration.

    Raises:
        UserError: If the model, the template, the data or a checkpoint is not usable.
        StoppedBySignal: After saving, if a signal asked for it.
    """
    opened = preference.open_data(run)
    longest = opened.architecture.max_position_embeddings
    prompts = together(
        lambda: sample_prompts(run, opened.chat, opened.data, max_positions=longest),
        None,
    )
    engine = preference.build(opened)
    loss = resolve(run.loss)
    reference = _Reference.of(engine, opened) if loss.needs_reference else None
    weights = weights_sums(engine.chunks)
    preference.prepare(engine)
    baseline = None if reference is None else reference.baseline(engine)
    preference.train(
        engine,
        opened,
        preference.Lesson(
            objective=make_objective(run.loss, opened.data.source_names),
            validate=lambda: _validate(engine, opened.data, reference, baseline),
            ref_logps=None if reference is None else reference.logps,
            wrap=None
            if baseline is None
            else partial(_with_baselines, engine, opened.data, baseline),
            fit=_fit(run, opened, loss),
            describe=[_describe(loss)],
            answer=partial(answer_samples, engine, opened.chat, prompts) if prompts else None,
            derive=None if baseline is None else with_margins,
            check=None
            if reference is None
            else partial(_check, engine, opened, reference, weights),
            watch=partial(_watch, engine, loss),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reference:
    """What the reference says.

    Attributes:
        answers: The answers of the run as it reads them.
        logps: Their log-probabilities, float32 ``[A]``.
        mismatched: Of unpaired data, answers to other prompts.
        mismatched_logps: Their log-probabilities, float32 ``[A]``.
    """

    answers: Answers
    logps: npt.NDArray[np.float32]
    mismatched: Mismatched | None = None
    mismatched_logps: npt.NDArray[np.float32] | None = None

    @classmethod
    def of(cls, engine: Engine, opened: preference.Opened) -> "_Reference":
        """Score what has not been scored yet. Collective over all ranks."""
        data, cache = opened.data, opened.cache
        files, paths = data.records.files, [file.path for file in data.plan.files]
        wanted = wanted_answers(data, validation_sequences=engine.run.train.validation_sequences)
        answers = Answers(files, paths, data.plan.reading)
        logps = reference_scores(engine, answers, wanted, cache=cache)
        if data.kind == "pairs":
            return cls(answers=answers, logps=logps)
        mismatched = together(lambda: Mismatched(files, paths, data.plan.reading), None)
        return cls(
            answers=answers,
            logps=logps,
            mismatched=mismatched,
            mismatched_logps=reference_scores(engine, mismatched, wanted, cache=cache),
        )

    def baseline(self, engine: Engine) -> KtoBaseline | None:
        """KTO's baseline of the policy as it is when asked; None for pairs."""
        if self.mismatched is None or self.mismatched_logps is None:
            return None
        return KtoBaseline(engine, self.mismatched, self.mismatched_logps)


def _with_baselines(
    engine: Engine,
    data: PreferenceData,
    baseline: KtoBaseline,
    steps: Generator[list[PreferenceBatch]],
) -> Generator[list[PreferenceBatch]]:
    """Let each step be measured against the policy right before it."""
    size = engine.run.train.global_batch_size
    starts = range(engine.consumed_sequences, len(data.train), size)
    numbers = (answers_between(data.records, data.train, first, first + size) for first in starts)
    return with_baselines(steps, numbers, baseline)


def _validate(
    engine: Engine,
    data: PreferenceData,
    reference: _Reference | None,
    baseline: KtoBaseline | None,
) -> dict[str, float]:
    """Score every source's held-out answers. Collective over all ranks."""
    objective = make_objective(engine.run.loss)
    found: dict[str, float] = {}
    ref_logps = None if reference is None else reference.logps
    for name, loader in preference.held_out(engine, data, ref_logps).items():
        batches: Iterable[PreferenceBatch] = loader
        if baseline is not None:
            sequences = data.validation[name]
            value = baseline(answers_between(data.records, sequences, 0, loader.num_sequences))
            batches = with_baseline(loader, value)
        scores = score_preferences(engine, batches, objective)
        if baseline is not None:
            scores = with_margins(scores)
        found |= {f"val/{name}/{metric}": score for metric, score in scores.items()}
    return found


def _check(
    engine: Engine,
    opened: preference.Opened,
    reference: _Reference,
    weights: Tensor,
    batches: Sequence[PreferenceBatch],
) -> str:
    """Look whether the policy is its own reference before the first step."""
    return check_first_step(
        engine,
        batches,
        make_objective(engine.run.loss),
        answers=preference.answers_of_first_step(engine, opened.data),
        scored=reference.answers,
        reference=reference.logps,
        weights_before=weights,
        cache=opened.cache,
    )


def _watch(engine: Engine, loss: ResolvedLoss, tell: Callable[[str], None]) -> PreferenceWatch:
    """Who warns, and knows how long answers were before training."""
    path = Path(engine.run.output_dir) / SAMPLES_FILE
    before = [r for r in read_records(path) if r["step"] == 0] if path.is_file() else []
    return PreferenceWatch(
        tell,
        total_steps=engine.total_steps,
        beta=loss.beta,
        has_reference=loss.needs_reference,
        per_token=loss.per_token,
        first_samples=[record["num_tokens"] for record in before],
    )


def _fit(run: RunConfig, opened: preference.Opened, loss: ResolvedLoss) -> dict[str, Any]:
    """What is learned, and from where: another reference would make it another run."""
    fields = {f"loss.{name}": value for name, value in asdict(loss).items()}
    if loss.needs_reference:
        facts = on_first_rank(lambda: model_facts(run, opened.architecture), None)
        fields |= {f"reference.{name}": facts[name] for name in ("weights", "adapter")}
    return fields


def _describe(loss: ResolvedLoss) -> str:
    """Say which loss it is, with every option it uses."""
    given = asdict(loss)
    options = ", ".join(f"{name}={given[name]}" for name in LOSS_OPTIONS[loss.type])
    compared = "means of tokens" if loss.per_token else "sums over answers"
    held = "the policy as it starts" if loss.needs_reference else "none"
    return f"loss: {loss.type} ({options}) of {compared}; reference: {held}"
