"""Cut sequences over the context-parallel group, and put them together again.

The cut is Megatron's: a sequence is split into ``2 * cp`` chunks and rank r takes chunks r and
``2 * cp - 1 - r``, so that causal attention costs every rank the same.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def shard_sequence(tensor: Tensor, *, cp_rank: int, cp_size: int, dim: int = 1) -> Tensor:
    """Take this rank's part of a sequence dimension.

    Args:
        tensor: Any tensor, e.g. ``[B, S]``; ``S`` is a multiple of ``2 * cp_size``.
        cp_rank: Rank in the context-parallel group.
        cp_size: Size of that group.
        dim: The sequence dimension.

    Returns:
        The two chunks of this rank, concatenated, e.g. ``[B, S / cp_size]``.
    """
    if cp_size == 1:
        return tensor
    chunks = tensor.chunk(2 * cp_size, dim=dim)
    return torch.cat((chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]), dim=dim)


def gather_sequence(tensor: Tensor, group: dist.ProcessGroup, *, dim: int = 1) -> Tensor:
    """Undo `shard_sequence`. Collective over cp; not differentiable (`gather_whole` is).

    Args:
        tensor: This rank's part, e.g. ``[B, S / cp]``.
        group: The context-parallel group.
        dim: The sequence dimension.

    Returns:
        The whole, e.g. ``[B, S]``, on every rank.
    """
    cp_size = group.size()
    if cp_size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(cp_size)]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    halves = [part.chunk(2, dim=dim) for part in parts]
    return torch.cat([h[0] for h in halves] + [h[1] for h in reversed(halves)], dim=dim)


def gather_whole(tensor: Tensor, group: dist.ProcessGroup, *, dim: int = 1) -> Tensor:
    """Undo `shard_sequence` differentiably. Collective over cp; the backward pass is not.

    Every rank must compute the same from the whole. So every rank knows the whole gradient, and
    its own part of it is what its own part of the sequence has done: summed over the ranks, the
    parameters' gradients are those of one loss, not of as many as there are ranks.

    Args:
        tensor: This rank's part, e.g. ``[B, S / cp]``.
        group: The context-parallel group.
        dim: The sequence dimension.

    Returns:
        The whole, e.g. ``[B, S]``, on every rank.
    """
    whole: Tensor = _Whole.apply(tensor, group, dim)
    return whole


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return gather_sequence(part, group, dim=dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        part = shard_sequence(
            grads[0], cp_rank=ctx.group.rank(), cp_size=ctx.group.size(), dim=ctx.dim
        )
        return part, None, None
