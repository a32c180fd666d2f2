"""The language-model head and its loss in one, so that all logits are never in memory at once.

Logits are the largest tensor of a step by far: at 150,000 ids and 8,192 tokens 5 GB in FP32, of
which Megatron's own path holds two or three copies. Here they are made for some tokens at a time,
and only for tokens whose loss is asked for: prompts of instruction tuning cost nothing.

Shapes: s tokens, b sequences, h hidden size, v rows of the output matrix on this tensor-parallel
rank, n tokens whose loss is asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_cgn.model.matmul import product_dtype

NOT_PREDICTED = -1
"""In place of a predicted id where none was asked for."""
_CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}
"""Logits in memory at a time: a CPU's cache and memory allocator like them small, a GPU's
multiplication likes them large."""
_HALF_SCALE = 1024.0
"""Gradients of a unit loss are kept times this in FP16, whose smallest number is 6e-8."""


@dataclass(slots=True, kw_only=True)
class HeadCall:
    """What is asked of the head in one forward pass, and room for its second answer.

    Attributes:
        counted: Whether the loss of a token is asked for, bool ``[b, s]``; None for all. On the
            CPU, because the number of tokens must be known to launch kernels.
        predict: Whether to find the most probable ids.
        overlap_grad_reduce: Whether Megatron reduces gradients during the backward pass: it then
            waits for a gradient of every parameter.
        predicted: The answer: ids int64 ``[b, s]``, of equals the lowest; `NOT_PREDICTED` where
            not counted.
    """

    counted: Tensor | None = None
    predict: bool = False
    overlap_grad_reduce: bool = False
    predicted: Tensor | None = None


def score_labels(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    context: HeadCall,
    **unused: Any,
) -> Tensor:
    """Megatron's ``output_processor``: the loss of each label. Collective over tp.

    Args:
        hidden_states: Last hidden states ``[s, b, h]``; ``[s / tp, b, h]`` under sequence
            parallelism.
        output_layer: Megatron's output layer; see `heads.mask_padded_vocabulary`.
        output_weight: The embedding's weight if it is the output's too, else None.
        labels: Ids int64 ``[b, s]``.
        context: What is asked for; receives the predictions.
        **unused: What else Megatron offers.

    Returns:
        Negative log-likelihood of the labels, float32 ``[b, s]``; 0 where not counted.
    """
    group = output_layer.tp_group
    # The layer itself is never called, and Megatron waits in its hooks for weights that are still
    # being gathered.
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, (hidden_states,))
    weight = output_layer.weight if output_weight is None else output_weight
    if output_layer.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden_states, group=group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden_states, group=group)
    rows, ids = hidden.flatten(0, 1), labels.t().flatten()
    places = None
    if context.counted is not None:
        places = context.counted.t().flatten().nonzero().flatten().to(ids.device, non_blocking=True)
        rows, ids = rows.index_select(0, places), ids.index_select(0, places)
    nll, predicted = linear_cross_entropy(
        rows,
        weight,
        ids,
        group=group,
        num_valid=output_layer.num_valid,
        predict=context.predict,
        overlap_grad_reduce=context.overlap_grad_reduce,
    )
    if predicted is not None:
        context.predicted = _spread(predicted, places, labels, NOT_PREDICTED)
    return _spread(nll, places, labels, 0.0)


def _spread(values: Tensor, places: Tensor | None, labels: Tensor, rest: float) -> Tensor:
    """Put values ``[n]`` to their places of ``[b, s]``."""
    if places is not None:
        values = values.new_full((labels.numel(),), rest).index_copy(0, places, values)
    return values.view(labels.size(1), labels.size(0)).t().contiguous()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup,
    num_valid: int,
    predict: bool = False,
    overlap_grad_reduce: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""Cross-entropy of ``softmax(hidden @ weight.T)``. Collective over tp.

    .. math:: L_i = \log \sum_j e^{w_j \cdot x_i} - w_{y_i} \cdot x_i

    Logarithm and sums are FP32. Where the weight is frozen, the gradient of a unit loss is made
    in the forward pass, from the logits at hand; where it is trained, logits are computed again in
    the backward pass, and the weight's gradient is added to ``weight.main_grad``, if Megatron gave
    it one. The gradient of `hidden` is this rank's part: the caller sums it over tp.

    Args:
        hidden: Last hidden states ``[n, h]``, equal on all ranks of tp.
        weight: This rank's rows of the output matrix, ``[v, h]``.
        labels: Ids int64 ``[n]``.
        group: The tensor-parallel group; the ranks hold rows in their order.
        num_valid: Rows of this rank that are ids; those behind have probability zero.
        predict: Whether to return the most probable ids.
        overlap_grad_reduce: See `HeadCall`.

    Returns:
        Losses float32 ``[n]``; the most probable ids int64 ``[n]``, of equals the lowest, or None.
    """
    head = _Head(
        group=group,
        num_valid=num_valid,
        predict=predict,
        overlap_grad_reduce=overlap_grad_reduce,
        needs_gradient=torch.is_grad_enabled(),
    )
    nll, predicted = _LinearCrossEntropy.apply(hidden, weight, labels, head)
    return nll, predicted if predict else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """What does not change from chunk to chunk."""

    group: dist.ProcessGroup
    num_valid: int
    predict: bool
    overlap_grad_reduce: bool
    needs_gradient: bool

    def logits(self, hidden: Tensor, matrix: Tensor) -> Tensor:
        """Logits of a chunk, FP32 or wider; -inf in columns that are no ids."""
        logits = hidden.to(matrix.dtype) @ matrix.t()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.num_valid < logits.size(1):
            logits[:, self.num_valid :] = -torch.inf
        return logits

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Logarithm of the probabilities over all ranks' columns; may overwrite the logits."""
        if self.group.size() == 1:
            return torch.log_softmax(logits, dim=-1)
        highest = logits.amax(dim=-1, keepdim=True)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.group)
        logits -= highest
        total = logits.exp().sum(dim=-1, keepdim=True)
        dist.all_reduce(total, group=self.group)
        logits -= total.log_()
        return logits

    def columns(self, labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Columns of the labels on this rank ``[n, 1]``, and whether they are on it."""
        local = labels - self.group.rank() * width
        owned = (local >= 0) & (local < width)
        return local.clamp(0, width - 1)[:, None], owned[:, None]

    def losses(self, log_probs: Tensor, labels: Tensor) -> Tensor:
        """Minus the logarithm of the labels' probabilities ``[n]``."""
        columns, owned = self.columns(labels, log_probs.size(1))
        losses = log_probs.gather(1, columns).neg_().masked_fill_(~owned, 0.0).squeeze(1)
        if self.group.size() > 1:
            dist.all_reduce(losses, group=self.group)
        return losses

    def gradient(self, log_probs: Tensor, labels: Tensor) -> Tensor:
        """Derivative of a unit loss by the logits, in place of the logarithms."""
        columns, owned = self.columns(labels, log_probs.size(1))
        slopes = log_probs.exp_()
        return slopes.scatter_add_(1, columns, -owned.to(slopes.dtype))

    def most_probable(self, logits: Tensor) -> Tensor:
        """Ids of the highest logits over all ranks ``[n]``."""
        highest, ids = logits.max(dim=-1)
        if self.group.size() == 1:
            return ids
        ids += self.group.rank() * logits.size(1)
        overall = highest.clone()
        dist.all_reduce(overall, op=dist.ReduceOp.MAX, group=self.group)
        ids = torch.where(highest == overall, ids, torch.iinfo(ids.dtype).max)
        dist.all_reduce(ids, op=dist.ReduceOp.MIN, group=self.group)
        return ids


class _LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor]:
        kind = torch.promote_types(hidden.dtype, torch.float32)
        nll = hidden.new_empty(len(labels), dtype=kind)
        predicted = torch.empty_like(labels if head.predict else labels[:0])
        ctx.head, ctx.scale = head, _HALF_SCALE if hidden.dtype == torch.float16 else 1.0
        by_hidden, by_weight = (head.needs_gradient and need for need in ctx.needs_input_grad[:2])
        ctx.by_weight = by_weight
        slopes = torch.empty_like(hidden) if by_hidden and not by_weight else None
        matrix = weight.to(product_dtype(weight))
        for part in _chunks(hidden, matrix):
            logits = head.logits(hidden[part], matrix)
            if head.predict:
                predicted[part] = head.most_probable(logits)
            log_probs = head.log_probabilities(logits)
            nll[part] = head.losses(log_probs, labels[part])
            if slopes is not None:
                by_logits = head.gradient(log_probs, labels[part]).mul_(ctx.scale)
                slopes[part] = by_logits.to(matrix.dtype) @ matrix
        if by_weight:
            ctx.save_for_backward(hidden, weight, labels)
        else:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(predicted)
        return nll, predicted

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        by_nll = grad_outputs[0]
        if not ctx.by_weight:
            (slopes,) = ctx.saved_tensors
            by_hidden = slopes * (by_nll / ctx.scale)[:, None]
            return by_hidden.to(slopes.dtype), None, None, None
        hidden, weight, labels = ctx.saved_tensors
        by_hidden = torch.empty_like(hidden)
        total = _gradient_sum(weight)
        matrix = weight.to(product_dtype(weight))
        for part in _chunks(hidden, matrix):
            log_probs = ctx.head.log_probabilities(ctx.head.logits(hidden[part], matrix))
            by_logits = ctx.head.gradient(log_probs, labels[part]).mul_(by_nll[part, None])
            by_logits = by_logits.to(matrix.dtype)
            by_hidden[part] = by_logits @ matrix
            _add_product(total, by_logits.t(), hidden[part].to(matrix.dtype))
        return by_hidden, _handed_over(weight, total, ctx.head), None, None


def _chunks(hidden: Tensor, matrix: Tensor) -> Iterator[slice]:
    """Parts of the tokens whose logits are in memory at a time, of nearly one size."""
    limit = max(1, _CHUNK_LOGITS[hidden.device.type] // len(matrix))
    count = -(-len(hidden) // limit)
    bounds = [len(hidden) * i // count for i in range(count + 1)] if count else [0]
    return (slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False))


def _gradient_sum(weight: Tensor) -> Tensor:
    """Where the weight's gradient is summed up: Megatron's buffer, or a tensor of zeros."""
    if hasattr(weight, "main_grad"):
        buffer: Tensor = weight.main_grad
        return buffer
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product of matrices, of the same or a narrower type, to `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _handed_over(weight: Any, total: Tensor, head: _Head) -> Tensor | None:
    """What autograd is given for the weight; nothing if Megatron's buffer has it already."""
    if not hasattr(weight, "main_grad"):
        return total.to(weight.dtype)
    if not head.overlap_grad_reduce:
        return None
    # Megatron's hook wants to see a gradient. If the matrix is the embedding's too, the hook adds
    # what it sees, which then must be the embedding's part alone.
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight)
