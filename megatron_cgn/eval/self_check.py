"""The first step of preference learning, looked at before it is taken.

The reference is the policy as it starts. So before the first step every answer has the same
log-probability under both: every margin is 0, and DPO's loss is ln 2. Where it is not, a run may go
on for days and be worth nothing, and none of its figures looks strange. Four things can be wrong:
the template or the mask (training reads other tokens than the reference scored), the weights, the
adapters, or the cache.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.config.schema import Precision
from megatron_cgn.data.reference import Scored
from megatron_cgn.engine.engine import Engine
from megatron_cgn.errors import DataError, ModelError
from megatron_cgn.eval.preferences import score_preferences
from megatron_cgn.eval.reference import reference_scores
from megatron_cgn.model.lora import ADAPTERS
from megatron_cgn.objectives.answers import answer_logps, counted_lengths
from megatron_cgn.objectives.base import ForwardArgs, LossOutput, Objective
from megatron_cgn.parallel.reduce import first_problem

TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.06, "bf16": 0.5}
"""How far an answer's log-probability may be from its reference, in nats times the root of its
counted tokens: the reference may have been scored on another layout, and errors of rounding add up
as a random walk does. Measured with SmolLM2-135M on a CPU, 16 answers of 41 to 163 tokens: BF16 is
at most 0.16 from FP32 (0.025 nats a token), so two layouts in BF16 are not much farther apart; on
one layout, in rows of other lengths, the difference is 0. FP16 has three bits more than BF16, FP32
has 16 more and is given some room."""
_SAME_SUM = 1e-9
"""Relative difference of two sums of the same weights: FP64 in another order, far below what a
changed matrix makes."""

type Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstStep:
    """The first step's answers of all data-parallel ranks, scored before it is taken.

    Attributes:
        numbers: Of each answer, in the run, int64 ``[A]``.
        policy: Log-probability of each under the model as it is, float64 ``[A]``.
        reference: The same by the cache, float64 ``[A]``.
        counted: Tokens of each that count, int64 ``[A]``.
    """

    numbers: Numbers
    policy: npt.NDArray[np.float64]
    reference: npt.NDArray[np.float64]
    counted: npt.NDArray[np.int64]

    def distance(self, other: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """How far the policy is from other log-probabilities, in the measure of `TOLERANCE`."""
        distance = np.abs(self.policy - other) / np.sqrt(np.maximum(self.counted, 1))
        return np.where(np.isnan(distance), np.inf, distance)


def check_first_step(
    engine: Engine,
    batches: Sequence[PreferenceBatch],
    objective: Objective[PreferenceBatch],
    *,
    answers: Sequence[Numbers],
    scored: Scored,
    reference: npt.NDArray[np.float32],
    weights_before: Tensor,
    cache: Path,
) -> str:
    """Compare the policy with its reference on the first step's answers. Collective over all ranks.

    Nothing is changed, and dropout is off.

    Args:
        engine: Ready for its first step.
        batches: This data-parallel rank's micro-batches of it.
        objective: Of the run.
        answers: The numbers of each micro-batch's answers in the run, int64 ``[A]`` each.
        scored: The answers as the reference reads them.
        reference: Their log-probabilities by the cache, float32 over all answers of the run.
        weights_before: `weights_sums` as the reference scored.
        cache: Where the reference's scores are, for messages.

    Returns:
        A line that says how close they are.

    Raises:
        UserError: On every rank, if they differ; it says what is likely to be wrong.
    """
    read = [other_tokens(batch, mine, scored) for batch, mine in zip(batches, answers, strict=True)]
    if problem := first_problem(next((text for text in read if text is not None), None)):
        raise DataError(_told("template or mask", problem, cache))
    recorder = _Recorder(objective)
    metrics = score_preferences(engine, batches, recorder)
    first = _gathered(engine, recorder, np.concatenate(answers), reference)
    if not np.isfinite(first.policy).all():
        bad = int((~np.isfinite(first.policy)).sum())
        raise ModelError(
            _told(
                "weights",
                f"{bad:,} of {len(first.policy):,} log-probabilities are no numbers",
                cache,
            )
        )
    tolerance = TOLERANCE[engine.run.precision]
    distances = first.distance(first.reference)
    if distances.max() <= tolerance:
        return _fine(metrics, first)
    changed = first_problem(_changed_weights(engine, weights_before))
    again = first.distance(_scored_again(engine, scored, first.numbers))
    kind = diagnose(
        changed=changed is not None,
        again=float(again.max()),
        tolerance=tolerance,
        has_adapters=engine.has_adapters,
    )
    seen = _figures(metrics, first, distances, tolerance)
    error = DataError if kind == "cache" else ModelError
    raise error(_told(kind, f"{changed}; {seen}" if kind == "weights" and changed else seen, cache))


type Cause = Literal["template or mask", "weights", "adapters", "cache", "rows"]


def diagnose(*, changed: bool, again: float, tolerance: float, has_adapters: bool) -> Cause:
    """Say why the policy is not its reference though both read the same tokens.

    Args:
        changed: Whether weights are not those with which the reference scored.
        again: Largest distance between the policy and a reference that has just scored again.
        tolerance: Largest distance that rounding makes.
        has_adapters: Whether adapters are trained, without which the reference scores.

    Returns:
        The cause.
    """
    if changed:
        return "weights"
    if again <= tolerance:
        return "cache"
    return "adapters" if has_adapters else "rows"


_CAUSES: dict[Cause, str] = {
    "template or mask": (
        "the template or the mask is likely to be wrong: training reads other tokens than the "
        "reference scored. Delete the encoded data in {cache}, and start again"
    ),
    "weights": (
        "the weights are likely to be wrong: they are not those that the reference scored with. "
        "Look at model.hf_path and checkpoint.load_optimizer; a policy starts as its own reference"
    ),
    "adapters": (
        "the adapters are likely to be wrong: with them the model answers otherwise than without. "
        "New ones change nothing; give those of a run before as lora.adapter_path, or start from "
        "weights that they were added to"
    ),
    "cache": (
        "the cache is likely to be wrong: scored again, the reference agrees with the policy. "
        "Delete the folders reference-* in {cache}, which are made anew"
    ),
    "rows": (
        "the rows are likely to be wrong: the same weights give the same answers other "
        "log-probabilities beside other neighbours, so answers see one another. Try "
        "model.backend=native or data.packing=false, and report it"
    ),
}


def _told(cause: Cause, seen: str, cache: Path) -> str:
    return (
        f"self-check before the first step: the policy is not its own reference ({seen}), and "
        f"{_CAUSES[cause].format(cache=cache)}. Nothing was trained."
    )


def other_tokens(batch: PreferenceBatch, answers: Numbers, scored: Scored) -> str | None:
    """Compare what a micro-batch reads with what the reference scored.

    Args:
        batch: One row.
        answers: The numbers of its answers, in their order.
        scored: The same answers as the reference reads them.

    Returns:
        What differs; None if nothing does.
    """
    if len(answers) != batch.num_answers:
        return f"a row holds {batch.num_answers:,} answers instead of {len(answers):,}"
    if not len(answers):
        return None
    row = scored.row(answers.tolist())
    begin = 0
    for place, (number, length) in enumerate(zip(answers.tolist(), row.lengths, strict=True)):
        there = slice(begin, begin + length)
        begin += length
        mask = (batch.loss_mask[0, there] > 0).numpy()
        places = int((batch.answer_ids[0] == place).sum())
        if places != length:
            return f"answer {number:,} has {places:,} places instead of {length:,}"
        if not np.array_equal(batch.tokens[0, there].numpy(), row.tokens[there]):
            return f"answer {number:,} has other tokens"
        if not np.array_equal(mask, row.loss_mask[there]):
            counted = int(row.loss_mask[there].sum())
            return f"answer {number:,} counts {int(mask.sum()):,} tokens instead of {counted:,}"
        if not np.array_equal(batch.labels[0, there].numpy()[mask], row.labels[there][mask]):
            return f"answer {number:,} has other labels"
    return None


def weights_sums(chunks: Sequence[nn.Module]) -> Tensor:
    """Know weights again: sums of every parameter's values and sizes.

    Args:
        chunks: This rank's model chunks. Their adapters are left out.

    Returns:
        Float64 ``[parameters, 2]`` on the CPU, in the order of the parameters.
    """
    parameters = [
        parameter.detach()
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if not name.startswith(f"{ADAPTERS}.")
    ]
    sums = [
        torch.stack((p.sum(dtype=torch.float64), p.abs().sum(dtype=torch.float64)))
        for p in parameters
    ]
    return torch.stack(sums).cpu()


def _changed_weights(engine: Engine, before: Tensor) -> str | None:
    """Say how many of this rank's weights are others than before; None if all are as they were."""
    now = weights_sums(engine.chunks)
    bound = _SAME_SUM * before[:, 1].abs() + torch.finfo(torch.float32).tiny
    changed = int(((now - before)[:, 0].abs() > bound).sum())
    return f"{changed:,} of {len(now):,} matrices have changed since" if changed else None


def _scored_again(engine: Engine, scored: Scored, numbers: Numbers) -> npt.NDArray[np.float64]:
    """What the reference says of some answers now, whatever the cache has."""
    with tempfile.TemporaryDirectory() as empty:
        wanted = np.unique(numbers)
        logps = reference_scores(engine, scored, wanted, cache=Path(empty), say=lambda line: None)
    return logps[numbers].astype(np.float64)


class _Recorder:
    """An objective that keeps the log-probabilities it is given."""

    def __init__(self, objective: Objective[PreferenceBatch]) -> None:
        self._objective = objective
        self.unit: Literal["token", "pair", "sequence"] = objective.unit
        self.logps: list[Tensor] = []
        self.counted: list[Tensor] = []

    def forward_args(self, batch: PreferenceBatch) -> ForwardArgs:
        return self._objective.forward_args(batch)

    def loss(self, output: Tensor, batch: PreferenceBatch) -> LossOutput:
        self.logps.append(answer_logps(output, batch).double())
        self.counted.append(counted_lengths(batch))
        return self._objective.loss(output, batch)


def _gathered(
    engine: Engine, recorder: _Recorder, numbers: Numbers, reference: npt.NDArray[np.float32]
) -> FirstStep:
    """Put the answers of all data-parallel ranks together. Collective over all ranks."""
    mine = (numbers, torch.cat(recorder.logps).numpy(), torch.cat(recorder.counted).numpy())
    group = engine.state.groups.dp
    parts = [mine] * group.size()
    dist.all_gather_object(parts, mine, group=group)
    all_numbers, policy, counted = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    first = FirstStep(
        numbers=all_numbers,
        policy=policy,
        reference=reference[all_numbers].astype(np.float64),
        counted=counted,
    )
    # Ranks that round differently must not decide differently: some would wait for the others.
    agreed = [first]
    dist.broadcast_object_list(agreed, src=0)
    return agreed[0]


def _fine(metrics: dict[str, float], first: FirstStep) -> str:
    per_token = np.abs(first.policy - first.reference) / np.maximum(first.counted, 1)
    return (
        f"self-check before the first step: {_loss(metrics)}; its {len(first.numbers):,} answers "
        f"agree with the reference to {per_token.max():.1e} nats a token"
    )


def _figures(
    metrics: dict[str, float],
    first: FirstStep,
    distances: npt.NDArray[np.float64],
    tolerance: float,
) -> str:
    worst, many = int(distances.argmax()), int((distances > tolerance).sum())
    return (
        f"{_loss(metrics)}; {many:,} of {len(first.numbers):,} answers differ by more than "
        f"rounding, answer {first.numbers[worst]:,} the most: log-probability "
        f"{first.policy[worst]:.3f} instead of {first.reference[worst]:.3f} over "
        f"{first.counted[worst]:,} tokens"
    )


def _loss(metrics: dict[str, float]) -> str:
    shown = f"loss {metrics['loss']:.4f}" if "loss" in metrics else "no loss"
    margin = metrics.get("rewards/margins")
    return shown if margin is None else f"{shown}, margin {margin:.4f}"
