"""The adapter between our objectives and Megatron's ``(output, loss_func)`` protocol.

Megatron's schedules call ``forward_step(iterator, model)`` and then, on the last stage,
``loss_func(output)``. With ``calculate_per_token_loss=True`` they want the *sum* of the loss and
the *count* of its units, and divide the gradients once by the global count. Nothing else in the
project knows this protocol.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_cgn.batch import map_sequences, to_device
from megatron_cgn.model.build import Backend
from megatron_cgn.model.linear_cross_entropy import HeadCall, score_labels
from megatron_cgn.model.packing import pack_row
from megatron_cgn.objectives.base import ForwardArgs, Objective, Ratio
from megatron_cgn.parallel import cpu
from megatron_cgn.parallel.context import gather_whole, shard_sequence
from megatron_cgn.parallel.state import ParallelState

Report = dict[str, Ratio]
LOSS = "loss"


class TrainingForwardStep[B]:
    """Megatron's ``forward_step_func`` for training on an objective.

    A loss of tokens is summed by each context-parallel rank over its own part. One of pairs or
    sequences needs them whole: the output is gathered, every rank computes the same, and the first
    alone counts it.
    """

    def __init__(self, objective: Objective[B], state: ParallelState, *, backend: Backend) -> None:
        """Bind an objective to this process's place in the layout and the model's layers."""
        self._objective = objective
        self._state = state
        self._backend = backend
        self._gathers = state.cp_size > 1 and objective.unit != "token"

    def __call__(
        self, batches: Iterator[B], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Report]]]:
        """Run the model on the next micro-batch.

        Args:
            batches: Micro-batches of this data-parallel rank, on any device.
            model: The model chunk whose turn it is.

        Returns:
            The chunk's output and what turns it into ``(loss sum, count, report)``.
        """
        whole = next(batches)
        batch, args = place_batch(whole, self._objective.forward_args, self._state)
        output = call_model(model, args, state=self._state, backend=self._backend)
        if self._gathers:
            return output, partial(self._loss_of_whole, whole)
        return output, partial(self._loss, batch)

    def _loss(self, batch: B, output: Tensor) -> tuple[Tensor, Tensor, Report]:
        result = self._objective.loss(output, batch)
        report = {LOSS: Ratio(result.loss_sum.detach(), result.count), **result.metrics}
        return result.loss_sum, result.count, report

    def _loss_of_whole(self, batch: B, output: Tensor) -> tuple[Tensor, Tensor, Report]:
        whole = gather_whole(output, self._state.groups.cp)
        loss_sum, count, report = self._loss(to_device(batch, cpu.device()), whole)
        if self._state.cp_rank == 0:
            return loss_sum, count, report
        # Its gradient is asked for all the same: see `gather_whole`.
        nothing = {
            name: Ratio(torch.zeros_like(ratio.sum), torch.zeros_like(ratio.count))
            for name, ratio in report.items()
        }
        return loss_sum, torch.zeros_like(count), nothing


class ScoringForwardStep[B]:
    """Megatron's ``forward_step_func`` for a forward-only pass that keeps the model's output."""

    def __init__(
        self,
        forward_args: Callable[[B], ForwardArgs],
        state: ParallelState,
        *,
        backend: Backend,
        predict: bool = False,
    ) -> None:
        """Bind the function that says what the model is called with.

        Args:
            forward_args: That function.
            state: This process's place in the layout.
            backend: The model's layers.
            predict: Whether to keep the most probable ids too.
        """
        self._forward_args = forward_args
        self._state = state
        self._backend = backend
        self._predict = predict

    def __call__(
        self, batches: Iterator[B], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[..., tuple[Tensor, Tensor | None]]]:
        """Run the model on the next micro-batch; see `TrainingForwardStep`.

        What is kept is the output, and the predicted ids ``[B, S]`` or None.
        """
        _, args = place_batch(next(batches), self._forward_args, self._state)
        head = HeadCall(counted=args.counted, predict=self._predict)
        output = call_model(model, args, state=self._state, backend=self._backend, head=head)
        return output, lambda out, non_loss_data=True: (out.detach(), head.predicted)


def place_batch[B](
    batch: B, forward_args: Callable[[B], ForwardArgs], state: ParallelState
) -> tuple[B, ForwardArgs]:
    """Move a micro-batch to this rank's device and take its context-parallel part.

    A packed row is cut like any other; ``cu_seqlens`` stay those of the whole row, and ``counted``
    where the batch was: how many tokens count decides which kernels are launched.

    Args:
        batch: A micro-batch on any device.
        forward_args: What the model is called with.
        state: This process's place in the layout.

    Returns:
        This rank's part, and what the model is called with for it.
    """
    cut = partial(shard_sequence, cp_rank=state.cp_rank, cp_size=state.cp_size)
    part = map_sequences(batch, cut)
    placed = to_device(part, cpu.device())
    return placed, replace(forward_args(placed), counted=forward_args(part).counted)


def call_model(
    model: torch.nn.Module,
    args: ForwardArgs,
    *,
    state: ParallelState,
    backend: Backend,
    head: HeadCall | None = None,
) -> Tensor:
    """Call a Megatron GPT chunk.

    Args:
        model: The chunk.
        args: This rank's part of the batch.
        state: This process's place in the layout.
        backend: The chunk's layers.
        head: What is asked of the head beside the losses, and takes its answer.

    Returns:
        On the last pipeline stage the per-token negative log-likelihood ``[B, S]`` (or the head's
        output without labels); elsewhere hidden states ``[S, B, H]``.
    """
    if head is None:
        overlap = state.config.overlap_grad_reduce
        head = HeadCall(counted=args.counted, overlap_grad_reduce=overlap)
    packed = None
    if args.cu_seqlens is not None:
        packed = pack_row(
            args.cu_seqlens,
            position_ids=args.position_ids,
            backend=backend,
            cp_rank=state.cp_rank,
            cp_size=state.cp_size,
        )
    output: Tensor = model(
        input_ids=args.tokens,
        position_ids=args.position_ids,
        attention_mask=None,
        labels=args.labels,
        packed_seq_params=packed,
        output_processor=None if args.labels is None else score_labels,
        output_processor_context=head,
    )
    return output


def sum_reports(reports: list[Mapping[str, Ratio]]) -> tuple[list[str], Tensor]:
    """Add up the reports of the micro-batches.

    Args:
        reports: One per micro-batch; empty on stages that compute no loss.

    Returns:
        Names in order, and their sums and counts, float64 ``[len(names), 2]``.
    """
    names = list(reports[0]) if reports else []
    rows: list[Any] = [
        torch.stack([torch.stack((r[name].sum.double(), r[name].count.double())) for r in reports])
        for name in names
    ]
    sums = [row.sum(0) for row in rows]
    return names, torch.stack(sums) if sums else torch.zeros(0, 2, dtype=torch.float64)
