"""Cut sequences over the context-parallel group, and put them together again.

The cut is Megatron's: a sequence is split into ``2 * cp`` chunks and rank r takes chunks r and
``2 * cp - 1 - r``, so that causal attention costs every rank the same.
"""

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
    """Undo `shard_sequence`. Collective over cp; not differentiable.

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
