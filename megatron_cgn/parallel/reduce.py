"""Reduce sums and counts over the processes that hold a share of them."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cgn.parallel import cpu
from megatron_cgn.parallel.state import ParallelState


def sum_over_data(values: Tensor, state: ParallelState) -> Tensor:
    """Sum over data- and context-parallel ranks, as known to the last pipeline stage.

    Collective over all ranks; every rank must call with the same shape. Earlier pipeline stages
    pass zeros and receive the last stage's sums.

    Args:
        values: Sums and counts, any shape; float64.
        state: This process's place in the layout.

    Returns:
        The sums, equal on every rank.
    """
    total = values.to(cpu.device()).clone()
    if state.is_last_stage:
        dist.all_reduce(total, group=state.groups.dp_cp)
    dist.broadcast(total, src=state.loss_rank, group=state.groups.pp)
    return total


def highest(value: int) -> int:
    """The largest of all ranks' values. Collective over all ranks."""
    answer = torch.tensor(value, dtype=torch.int32, device=cpu.device())
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return int(answer.item())


def first_problem(problem: str | None) -> str | None:
    """The first rank's problem, if any rank has one. Collective over all ranks.

    What a rank does alone, such as writing a file, may fail there alone. Then the others must hear
    of it, or they wait for that rank for ever.

    Args:
        problem: What went wrong on this rank; None if nothing did.

    Returns:
        The same on every rank: ``rank 0: …``, or None.
    """
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((f"rank {rank}: {p}" for rank, p in enumerate(problems) if p is not None), None)
