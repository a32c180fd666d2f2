"""The engine: a model and its optimizer on a parallel layout, trained on any objective.

It knows how to take a step and to score without gradients; how to store and restore itself is in
`training_state.py`. It does not know what is trained on (`stages/`), which loss it is
(`objectives/`) or who watches (`callbacks.py`).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_cgn.engine.forward_step import (
    LOSS,
    ScoringForwardStep,
    TrainingForwardStep,
    sum_reports,
)
from megatron_cgn.engine.optim import set_rates
from megatron_cgn.engine.schedule import learning_rate
from megatron_cgn.engine.training_state import TrainingState
from megatron_cgn.objectives.base import ForwardArgs, Objective
from megatron_cgn.parallel import cpu
from megatron_cgn.parallel.context import gather_sequence
from megatron_cgn.parallel.reduce import sum_over_data

_SCORED_PER_STAGE = 4
"""Micro-batches that `Engine.score` sends through the pipeline at once, times its stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one optimizer step was.

    Attributes:
        step: Steps done, this one included.
        metrics: Means over this step's global batch by name, ``loss`` among them; a name that
            nothing of the batch belongs to is absent. Then ``lr/<group>`` of the groups of
            ``optim.param_groups`` with a rate of their own. Empty if they were not asked for.
        count: Units (tokens, pairs, sequences) that the loss was averaged over; 0 likewise.
        lr: Learning rate of this step, of what no group has.
        grad_norm: Norm before clipping of the gradients of all that the step trains; None if the
            step was skipped.
        skipped: Whether FP16 gradients overflowed, so that weights did not change.
    """

    step: int
    metrics: dict[str, float]
    count: int
    lr: float
    grad_norm: float | None
    skipped: bool


class Engine(TrainingState):
    """Steps and scores on a `TrainingState`.

    Every method is collective over all ranks unless it says otherwise.
    """

    def train_step[B](
        self, micro_batches: Sequence[B], objective: Objective[B], *, reduce_metrics: bool = True
    ) -> StepReport:
        """Take one optimizer step.

        Args:
            micro_batches: This data-parallel rank's share of the global batch; every rank brings
                the same number, of the same shapes.
            objective: What to minimise.
            reduce_metrics: Whether the report has metrics, which costs a host synchronisation.

        Returns:
            The step's report, equal on every rank.
        """
        assert self._optimizer is not None, "call prepare_training first"
        for chunk in self._wrapped:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        lr = learning_rate(self.step, self.run.optim, total_steps=self.total_steps)
        set_rates(self._optimizer, lr=lr, weight_decay=self.run.optim.weight_decay)
        function = TrainingForwardStep(objective, self.state, backend=self.backend)
        reports = self._schedule(function, self._wrapped, micro_batches)
        if self._grouped is None:
            success, grad_norm, _ = self._optimizer.step()
        else:
            success, grad_norm = self._grouped.step(self.step + 1)
        self._gather_pending = self.run.parallel.overlap_param_gather
        self.step += 1
        self._optimizer_steps += bool(success)
        metrics, count = self._reduce(reports) if reduce_metrics else ({}, 0)
        if metrics and self._grouped is not None:
            metrics |= self._grouped.rates(lr, self.step)
        return StepReport(
            step=self.step,
            metrics=metrics,
            count=count,
            lr=lr,
            grad_norm=None if grad_norm is None else float(grad_norm),
            skipped=not success,
        )

    @torch.no_grad()
    def score[B](
        self, batches: Iterable[B], forward_args: Callable[[B], ForwardArgs]
    ) -> Iterator[tuple[B, Tensor]]:
        """Run the model forward only, micro-batch by micro-batch.

        With labels in the arguments, the output is the per-token negative log-likelihood, so
        log-probabilities are its negative.

        Args:
            batches: Micro-batches of this data-parallel rank; every rank brings as many.
            forward_args: What the model is called with, e.g. an objective's method.

        Yields:
            Each batch with the model's output for it, float32 ``[B, S]``, on every rank of the
            model-parallel and context-parallel groups.
        """
        for batch, output, _ in self._score(batches, forward_args, predict=False):
            yield batch, self._from_last_stage(output, forward_args(batch), torch.float32)

    @torch.no_grad()
    def score_with_predictions[B](
        self, batches: Iterable[B], forward_args: Callable[[B], ForwardArgs]
    ) -> Iterator[tuple[B, Tensor, Tensor]]:
        """Run the model forward only, and find the ids it finds most probable.

        Args:
            batches: Micro-batches of this data-parallel rank; every rank brings as many.
            forward_args: What the model is called with; it must ask for labels.

        Yields:
            Each batch with the negative log-likelihood of its labels, float32 ``[B, S]``, and the
            most probable ids in their places, int64 ``[B, S]`` (of equals the lowest), on every
            rank of the model-parallel and context-parallel groups. Where
            `ForwardArgs.counted` says no, they are 0 and `NOT_PREDICTED`.
        """
        for batch, output, ids in self._score(batches, forward_args, predict=True):
            args = forward_args(batch)
            nll = self._from_last_stage(output, args, torch.float32)
            yield batch, nll, self._from_last_stage(ids, args, torch.int64)

    def _score[B](
        self, batches: Iterable[B], forward_args: Callable[[B], ForwardArgs], *, predict: bool
    ) -> Iterator[tuple[B, Tensor | None, Tensor | None]]:
        """Each batch with this rank's output and predictions; None but on the last stage."""
        chunks: Sequence[torch.nn.Module] = self._wrapped or self._half_chunks()
        for chunk in chunks:
            chunk.eval()
        function = ScoringForwardStep(
            forward_args, self.state, backend=self.backend, predict=predict
        )
        pp_size = self.state.groups.pp.size()
        # Several at a time keep all pipeline stages busy; their outputs are small.
        group_size = 1 if pp_size == 1 else _SCORED_PER_STAGE * pp_size
        for group in _groups(batches, group_size):
            # The interleaved schedule only takes multiples of the pipeline's size.
            missing = -len(group) % pp_size if len(chunks) > 1 else 0
            padded = [*group, *itertools.repeat(group[-1], missing)]
            outputs = self._schedule(function, chunks, padded, forward_only=True)
            for index, batch in enumerate(group):
                yield batch, *(outputs[index] if self.state.is_last_stage else (None, None))

    def _half_chunks(self) -> Sequence[torch.nn.Module]:
        """The chunks as `prepare_training` would wrap them, for an engine that only scores."""
        if self.run.precision == "fp32":
            return self.chunks
        from megatron.core.transformer.module import Float16Module

        return [Float16Module(self.model_config, chunk) for chunk in self.chunks]

    def _from_last_stage(
        self, scored: Tensor | None, args: ForwardArgs, dtype: torch.dtype
    ) -> Tensor:
        """Bring an output ``[B, S / cp]`` from the last stage to all ranks, as ``[B, S]``."""
        if scored is not None:
            output = scored.to(dtype).contiguous()
        else:
            batch_size, length = args.tokens.shape
            shape = (batch_size, length // self.state.cp_size)
            output = torch.empty(shape, dtype=dtype, device=cpu.device())
        dist.broadcast(output, src=self.state.loss_rank, group=self.state.groups.pp)
        return gather_sequence(output, self.state.groups.cp)

    def _schedule(
        self,
        function: Callable[..., Any],
        chunks: Sequence[torch.nn.Module],
        micro_batches: Sequence[Any],
        *,
        forward_only: bool = False,
    ) -> list[Any]:
        """Run Megatron's pipeline schedule over micro-batches."""
        batch_size, seq_length = _shape(micro_batches[0])
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=function,
            # One iterator a chunk: each runs every micro-batch.
            data_iterator=[iter(micro_batches) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(micro_batches),
            seq_length=seq_length,
            micro_batch_size=batch_size,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return results

    def _reduce(self, reports: list[Any]) -> tuple[dict[str, float], int]:
        """Average a step's reports over micro-batches and data-parallel ranks."""
        names, sums = sum_reports(reports)
        if self.state.groups.pp.size() > 1:  # only the last stage has seen the objective's names
            shared: list[Any] = [names]
            dist.broadcast_object_list(shared, src=self.state.loss_rank, group=self.state.groups.pp)
            names = shared[0]
        if not self.state.is_last_stage:
            sums = torch.zeros(len(names), 2, dtype=torch.float64)
        totals = sum_over_data(sums, self.state).tolist()
        metrics = {
            name: total / count if count else 0.0
            for name, (total, count) in zip(names, totals, strict=True)
            if count or name == LOSS
        }
        return metrics, int(totals[names.index(LOSS)][1])


def _groups[B](batches: Iterable[B], limit: int) -> Iterator[tuple[B, ...]]:
    """Up to `limit` batches at a time, each group of one shape: a pipeline's messages have one."""
    for _, same in itertools.groupby(batches, key=_shape):
        yield from itertools.batched(same, limit)


def _shape(batch: Any) -> tuple[int, int]:
    """Sequences and tokens of a batch, before context parallelism."""
    batch_size, seq_length = batch.tokens.shape
    return int(batch_size), int(seq_length)
