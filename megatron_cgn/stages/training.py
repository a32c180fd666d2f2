"""The training part of every stage: resume, tell what is about to happen, train, save.

A stage brings a `Course`: an objective, batches, what it validates and what it accounts for.
"""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_cgn.config.data_rules import DOMAIN
from megatron_cgn.data.account import write_account
from megatron_cgn.engine.callbacks import Callback, SampleAnswer
from megatron_cgn.engine.engine import Engine
from megatron_cgn.engine.schedule import learning_rate
from megatron_cgn.engine.trainer import Schedule, Trainer
from megatron_cgn.errors import ConfigError
from megatron_cgn.hf.score_files import write_score_files
from megatron_cgn.objectives.base import Objective
from megatron_cgn.parallel.reduce import first_problem
from megatron_cgn.stages import common


@dataclass(frozen=True, slots=True, kw_only=True)
class Course[B]:
    """What a stage brings to the training loop.

    Attributes:
        objective: What to minimise.
        fit: What a checkpoint must share with this run to go on from it, by dotted name.
        batches: Called once, after resuming: each step's micro-batches of this data-parallel rank,
            from ``engine.consumed_sequences`` on.
        tokens_after: Tokens that all ranks have read after so many steps, padding left out.
        validate: Scores held-out data, by the names of its metrics. Collective.
        answer: Answers fixed prompts at every validation. Collective. None: there are none.
        derive: Adds figures that are made of a step's means, once these are known. None: none.
        account_file: Name of the account, in the run's directory and in every checkpoint.
        account: What was read up to so many sequences, or will be in all (None), as JSON.
        describe: Lines about the data, given the checkpoint that the run goes on from.
        check: Looks at the first step's micro-batches before a new run takes that step, and returns
            a line about it. Collective; raises a `UserError` on every rank if training would be in
            vain. None: nothing is looked at.
        watch: Makes, on rank 0, who warns of training that goes wrong, given how a line is told.
            None: nobody does.
        fill: Completes the Hugging Face directory of a checkpoint; called on rank 0.
    """

    objective: Objective[B]
    fit: Mapping[str, Any]
    batches: Callable[[], Generator[Sequence[B]]]
    tokens_after: Callable[[int], int]
    validate: Callable[[], dict[str, float]]
    answer: Callable[[], Sequence[SampleAnswer]] | None = None
    derive: Callable[[dict[str, float]], dict[str, float]] | None = None
    account_file: str
    account: Callable[[int | None], Mapping[str, Any]]
    describe: Callable[[Path | None], Iterable[str]]
    check: Callable[[Sequence[B]], str] | None = None
    watch: Callable[[Callable[[str], None]], Callback] | None = None
    fill: Callable[[Path], None] | None = None


def train[B](engine: Engine, course: Course[B]) -> None:
    """Train to the last step. Collective over all ranks.

    Args:
        engine: Ready to train.
        course: What on.

    Raises:
        UserError: If a checkpoint does not fit, or files cannot be written.
        StoppedBySignal: After saving, if a signal asked for it.
    """
    run = engine.run

    def write_beside(target: Path) -> None:
        """Fill a checkpoint's ``hf/``, and write what it has consumed next to it."""
        common.copy_hf_files(common.model_path(run), target)
        if course.fill is not None:
            course.fill(target)
        if engine.architecture.head == "score":
            write_score_files(target)
        account = course.account(engine.consumed_sequences)
        write_account(target.parent / course.account_file, account)

    trainer = Trainer[B](
        engine,
        course.objective,
        schedule=Schedule(
            total_steps=engine.total_steps,
            log_interval=run.train.log_interval_steps,
            validation_interval=run.train.validation_interval_steps,
            checkpoint_interval=run.checkpoint.interval_steps,
        ),
        checkpoint_dir=common.checkpoint_dir(run),
        fit=dict(course.fit),
        hf_files=write_beside,
        validate=course.validate,
        answer=course.answer,
        derive=course.derive,
    )
    resumed = trainer.resume(run.checkpoint.resume)
    with contextlib.closing(course.batches()) as steps:
        first, checked = _look_at_first(engine, course, steps)
        callbacks = common.make_callbacks(
            engine, tokens_after=course.tokens_after, resumed_from=resumed
        )
        messages = [
            common.describe_engine(engine),
            *common.describe_trained(engine),
            *common.describe_groups(engine),
            *course.describe(resumed),
            *checked,
        ]
        for callback, message in itertools.product(callbacks, messages):
            callback.on_message(message)
        if course.watch is not None:
            callbacks += [course.watch(callback.on_message) for callback in callbacks]
        _write_plan(engine, course)
        trainer.fit(itertools.chain(first, steps), callbacks)


def _look_at_first[B](
    engine: Engine, course: Course[B], steps: Iterator[Sequence[B]]
) -> tuple[list[Sequence[B]], list[str]]:
    """Check the first step of a new run. Collective over all ranks.

    Before any record is opened: a run that is refused leaves none.

    Returns:
        What was taken of the steps, to be trained on, and what is to be told.
    """
    if course.check is None or engine.step > 0:
        return [], []
    first = next(steps)
    return [first], [course.check(first)]


def describe_epochs(engine: Engine) -> Iterable[str]:
    """Say how many steps ``train.epochs`` makes."""
    run = engine.run
    if run.train.epochs is None:
        return
    mixed = run.data.mix is not None or run.data.phases
    name = repr(run.data.epochs_of or DOMAIN) if mixed else "all sources together"
    yield (
        f"train.epochs={run.train.epochs:g} of {name}: {engine.total_steps:,} whole steps of "
        f"{run.train.global_batch_size:,} sequences"
    )


def describe_length(engine: Engine, steps_before: int) -> Iterable[str]:
    """Say what another length than the checkpoint's changes from here on.

    Args:
        engine: After resuming.
        steps_before: Steps of the run that wrote the checkpoint.
    """
    if steps_before == engine.total_steps:
        return
    old, new = (
        learning_rate(engine.step, engine.run.optim, total_steps=total)
        for total in (steps_before, engine.total_steps)
    )
    yield (
        f"the run now has {engine.total_steps:,} steps instead of {steps_before:,}: the learning "
        f"rate follows the schedule of the new length, and is {new:.3g} at step "
        f"{engine.step + 1:,} " + ("as before" if new == old else f"instead of {old:.3g}")
    )


def _write_plan[B](engine: Engine, course: Course[B]) -> None:
    """Write what the run will read. Collective over all ranks."""
    output_dir = Path(engine.run.output_dir)
    problem: str | None = None
    if dist.get_rank() == 0:
        try:
            write_account(output_dir / course.account_file, course.account(None))
        except OSError as error:
            problem = str(error)
    if first := first_problem(problem):
        raise ConfigError(
            f"output_dir: {output_dir / course.account_file} cannot be written ({first}). Free "
            "space, or choose another directory."
        )
