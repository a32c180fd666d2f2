"""Stage ``rm``: a reward model of comparisons, of all weights or of adapters beside them.

Wiring only: the batch source is records of ranked answers, read to their very last tokens; the
model ends in a scalar head; the objective is Bradley and Terry's; validation is accuracy, margin,
calibration and rank correlation of held-out answers.
"""

from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_cgn.config.schema import LossConfig, RunConfig
from megatron_cgn.data.preference import PreferencePlan
from megatron_cgn.engine.engine import Engine
from megatron_cgn.errors import ConfigError
from megatron_cgn.eval.preference_watch import PreferenceWatch
from megatron_cgn.eval.rewards import score_answers_by_reward, write_reliability
from megatron_cgn.objectives.reward import BradleyTerry
from megatron_cgn.parallel.reduce import first_problem
from megatron_cgn.stages import preference

RELIABILITY_FILE = "reliability.json"
"""Name of the tables of calibration, in a run's directory."""


def run(run: RunConfig) -> None:
    """Run the stage from configuration to export. Collective over all ranks.

    Args:
        run: The validated configuration.

    Raises:
        UserError: If the model, the template, the data or a checkpoint is not usable.
        StoppedBySignal: After saving, if a signal asked for it.
    """
    opened = preference.open_data(run)
    plan = opened.data.plan
    _check_margins(run.loss, plan)
    engine = preference.build(opened)
    preference.prepare(engine)
    preference.train(
        engine,
        opened,
        preference.Lesson(
            objective=BradleyTerry(run.loss, opened.data.source_names),
            validate=lambda: _validate(engine, opened),
            fit={
                "loss.use_margins": _uses_margins(run.loss),
                "loss.center_rewards": run.loss.center_rewards,
            },
            describe=[_describe(run.loss, plan)],
            watch=partial(PreferenceWatch, total_steps=engine.total_steps),
        ),
    )


def _validate(engine: Engine, opened: preference.Opened) -> dict[str, float]:
    """Score every source's held-out answers, and tell how sure rewards are. Collective."""
    objective = BradleyTerry(engine.run.loss)
    scores = {
        name: score_answers_by_reward(engine, loader, objective)
        for name, loader in preference.held_out(engine, opened.data).items()
    }
    problem: str | None = None
    path = Path(engine.run.output_dir) / RELIABILITY_FILE
    if scores and dist.get_rank() == 0:
        try:
            write_reliability(path, engine.step, scores)
        except OSError as error:
            problem = str(error)
    if first := first_problem(problem):
        raise ConfigError(f"output_dir: {path} cannot be written ({first}). Free space.")
    return {
        f"val/{name}/{metric}": value
        for name, score in scores.items()
        for metric, value in score.metrics.items()
    }


def _uses_margins(loss: LossConfig) -> bool:
    return loss.use_margins is not False


def _check_margins(loss: LossConfig, plan: PreferencePlan) -> None:
    """Refuse to be asked about margins that no record has."""
    if loss.use_margins is not None and not plan.has_margins:
        raise ConfigError(
            f"loss.use_margins: {str(loss.use_margins).lower()} has no effect, since no record has "
            "a 'margin'. Remove it, or add margins to the data."
        )


def _describe(loss: LossConfig, plan: PreferencePlan) -> str:
    margins = "margins of the data are asked for" if plan.has_margins else "no record has a margin"
    if plan.has_margins and not _uses_margins(loss):
        margins = "margins of the data are passed over"
    centred = f", rewards are centred by {loss.center_rewards:g}" if loss.center_rewards else ""
    return f"rewards are read at the last token of each answer; {margins}{centred}"
