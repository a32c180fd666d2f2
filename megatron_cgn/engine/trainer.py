"""The training loop: steps, validation, checkpoints and signals, for every stage."""

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import methodcaller
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from megatron_cgn.engine.callbacks import Callback, SampleAnswer
from megatron_cgn.engine.checkpoint import find_latest
from megatron_cgn.engine.engine import Engine
from megatron_cgn.errors import CheckpointError, ConfigError, StoppedBySignal
from megatron_cgn.objectives.base import Objective
from megatron_cgn.parallel.reduce import first_problem, highest

logger = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When things other than steps happen.

    Attributes:
        total_steps: Steps of the whole run.
        log_interval: Steps between reports with metrics; the last step always has them.
        validation_interval: Steps between validations; None for only first and last.
        checkpoint_interval: Steps between checkpoints; None for only the last.
    """

    total_steps: int
    log_interval: int
    validation_interval: int | None
    checkpoint_interval: int | None


class Trainer[B]:
    """Trains an engine on batches of one objective."""

    def __init__(
        self,
        engine: Engine,
        objective: Objective[B],
        *,
        schedule: Schedule,
        checkpoint_dir: Path,
        fit: dict[str, Any],
        hf_files: Callable[[Path], None],
        validate: Callable[[], dict[str, float]],
        answer: Callable[[], Sequence[SampleAnswer]] | None = None,
        derive: Callable[[dict[str, float]], dict[str, float]] | None = None,
    ) -> None:
        """Put a run together.

        Args:
            engine: Ready to train.
            objective: What to minimise.
            schedule: When to validate and save.
            checkpoint_dir: Where checkpoints go.
            fit: What a run must share with this one to go on from its checkpoints.
            hf_files: Writes configuration and tokenizer into a checkpoint.
            validate: Scores held-out data; collective. Returns metrics by name.
            answer: Answers fixed prompts at every validation; collective. None: there are none.
            derive: Adds figures that are made of a step's means, once these are known. None: none.
        """
        self._engine = engine
        self._objective = objective
        self._schedule = schedule
        self._checkpoint_dir = checkpoint_dir
        self._fit = fit
        self._hf_files = hf_files
        self._validate = validate
        self._answer = answer
        self._derive = derive
        self._callbacks: Sequence[Callback] = ()
        self._stop_signal: int | None = None
        self._problem: str | None = None
        self._saved_step: int | None = None

    def resume(self, mode: str) -> Path | None:
        """Go on from the latest checkpoint, as ``checkpoint.resume`` says. Collective.

        Args:
            mode: ``auto``, ``never`` or ``required``.

        Returns:
            The checkpoint's directory, or None if there was none.

        Raises:
            CheckpointError: If one is required and missing, or does not fit, or if ``never``
                would overwrite one.
        """
        latest = _agreed_latest(self._checkpoint_dir)
        if mode == "never" and latest is not None:
            raise CheckpointError(
                f"{self._checkpoint_dir}: holds {latest.name}, and checkpoint.resume=never would "
                "overwrite it. Choose another output_dir or checkpoint.dir, or resume=auto."
            )
        if latest is None:
            if mode == "required":
                raise CheckpointError(
                    f"{self._checkpoint_dir}: no complete checkpoint, and "
                    "checkpoint.resume=required. Use auto to start anew."
                )
            return None
        self._engine.resume(latest, fit=self._fit)
        self._saved_step = self._engine.step
        return latest

    def fit(self, steps: Iterator[Sequence[B]], callbacks: Sequence[Callback]) -> None:
        """Train to the last step. Collective over all ranks.

        Args:
            steps: Each optimizer step's micro-batches of this data-parallel rank.
            callbacks: Who watches.

        Raises:
            StoppedBySignal: After saving, if SIGTERM or SIGUSR1 reached any rank.
        """
        self._callbacks = callbacks
        previous = {s: signal.signal(s, self._remember) for s in _STOP_SIGNALS}
        try:
            self._loop(steps)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._tell(methodcaller("on_end"))
        self._stop_on_problem()

    def _loop(self, steps: Iterator[Sequence[B]]) -> None:
        engine, schedule = self._engine, self._schedule
        if engine.step == 0:
            self._run_validation()
        while engine.step < schedule.total_steps:
            last = engine.step + 1 == schedule.total_steps
            logged = last or _due(engine.step + 1, schedule.log_interval)
            report = engine.train_step(next(steps), self._objective, reduce_metrics=logged)
            if self._derive is not None and report.metrics:
                report = replace(report, metrics=self._derive(report.metrics))
            engine.consumed_sequences += engine.run.train.global_batch_size
            self._tell(methodcaller("on_step", report))
            if last or _due(engine.step, schedule.validation_interval):
                self._run_validation()
            if last or _due(engine.step, schedule.checkpoint_interval):
                self._save()
            # Every rank must see a signal or a problem at the same step: one asks, all answer.
            state = highest(2 if self._problem else int(self._stop_signal is not None))
            if state == 2:
                self._stop_on_problem()
            if state == 1 and not last:
                self._save(to_go_on=True)
                raise StoppedBySignal(
                    f"stopped by a signal after step {engine.step}; a checkpoint was saved"
                )

    def _run_validation(self) -> None:
        metrics = self._validate()
        if metrics:
            self._tell(methodcaller("on_validation", self._engine.step, metrics))
        if self._answer is not None:
            self._tell(methodcaller("on_samples", self._engine.step, self._answer()))

    def _save(self, *, to_go_on: bool = False) -> None:
        if self._saved_step == self._engine.step:
            return
        # A signal to the whole job, as Slurm sends it, must not end what a save has started (such
        # as a program that a file system calls); this process answers after it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            path = self._engine.save(
                self._checkpoint_dir,
                fit=self._fit,
                hf_files=self._hf_files,
                with_optimizer=to_go_on or self._engine.run.checkpoint.save_optimizer,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        self._saved_step = self._engine.step
        self._say(f"saved {path}")

    def _say(self, message: str) -> None:
        self._tell(methodcaller("on_message", message))

    def _tell(self, what: Callable[[Callback], None]) -> None:
        """Call every callback. A disk that refuses is remembered, for all ranks to stop together.

        Raising here would end this rank alone, and the others would wait for it.
        """
        try:
            for callback in self._callbacks:
                what(callback)
        except OSError as error:
            self._problem = self._problem or str(error)

    def _stop_on_problem(self) -> None:
        """End the run on every rank if a callback failed on any. Collective over all ranks."""
        if problem := first_problem(self._problem):
            raise ConfigError(
                f"output_dir: the run's records cannot be written ({problem}). Free space or "
                "choose another output_dir; checkpoints saved so far are untouched."
            )

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._stop_signal = number


def _agreed_latest(root: Path) -> Path | None:
    """What rank 0 finds: directory listings of a shared file system may differ over nodes."""
    found = [find_latest(root)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0
