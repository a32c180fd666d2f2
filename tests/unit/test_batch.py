"""Batches mapped over their sequences, and the context-parallel cut and its inverse."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cgn.batch import TokenBatch, map_sequences, to_device
from megatron_cgn.parallel.context import gather_sequence, shard_sequence
from megatron_cgn.testing import run_distributed


def _batch(length: int = 8, *, packed: bool = False) -> TokenBatch:
    ids = torch.arange(2 * length).view(2, length)
    return TokenBatch(
        tokens=ids,
        labels=ids + 1,
        loss_mask=torch.ones(2, length),
        position_ids=ids % length,
        cu_seqlens=torch.tensor([0, 3, length], dtype=torch.int32) if packed else None,
        source_ids=ids % 3,
    )


def test_every_tensor_with_a_sequence_is_mapped_and_no_other() -> None:
    batch = _batch(packed=True)
    half = map_sequences(batch, lambda t: t[:, :4])
    assert isinstance(half, TokenBatch)
    for name in ("tokens", "labels", "loss_mask", "position_ids", "source_ids"):
        assert torch.equal(getattr(half, name), getattr(batch, name)[:, :4])
    assert half.cu_seqlens is batch.cu_seqlens
    assert batch.tokens.shape == (2, 8), "the batch itself must not change"


def test_missing_tensors_stay_missing() -> None:
    assert map_sequences(_batch(), torch.clone).cu_seqlens is None


def test_any_dataclass_of_tensors_is_a_batch() -> None:
    @dataclasses.dataclass(frozen=True)
    class Pair:
        chosen: Tensor
        margin: Tensor
        name: str

    pair = Pair(torch.zeros(2, 4, 3), torch.ones(2), "kept")
    mapped = map_sequences(pair, lambda t: t[:, 1:])
    assert mapped.chosen.shape == (2, 3, 3)
    assert mapped.margin is pair.margin
    assert mapped.name == "kept"


def test_moving_keeps_values_and_types() -> None:
    moved = to_device(_batch(packed=True), torch.device("cpu"))
    for field in dataclasses.fields(TokenBatch):
        before, after = getattr(_batch(packed=True), field.name), getattr(moved, field.name)
        assert torch.equal(before, after) and before.dtype == after.dtype


def test_where_packed_sequences_start_stays_on_the_host() -> None:
    moved = to_device(_batch(packed=True), torch.device("meta"))
    places = {f.name: getattr(moved, f.name).device.type for f in dataclasses.fields(moved)}
    assert places.pop("cu_seqlens") == "cpu"
    assert set(places.values()) == {"meta"}


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_context_parallel_parts_are_balanced_and_complete(cp_size: int) -> None:
    whole = torch.arange(3 * 16).view(3, 16)
    parts = [shard_sequence(whole, cp_rank=r, cp_size=cp_size) for r in range(cp_size)]
    assert all(part.shape == (3, 16 // cp_size) for part in parts)
    assert torch.equal(torch.cat(parts, dim=1).sort(dim=1).values, whole)
    # Causal attention costs a query its position, so every rank must have the same sum of them.
    assert len({int(part[0].sum()) for part in parts}) == 1


def test_context_parallel_cut_is_first_and_last_chunk() -> None:
    whole = torch.arange(8)[None]
    assert shard_sequence(whole, cp_rank=0, cp_size=2).tolist() == [[0, 1, 6, 7]]
    assert shard_sequence(whole, cp_rank=1, cp_size=2).tolist() == [[2, 3, 4, 5]]


def test_cut_may_be_along_another_dimension() -> None:
    whole = torch.arange(16).view(8, 2)
    part = shard_sequence(whole, cp_rank=1, cp_size=2, dim=0)
    assert torch.equal(part, whole[2:6])


def _gather() -> list[Any]:
    from megatron.core import parallel_state as mpu

    from megatron_cgn.config.schema import ParallelConfig
    from megatron_cgn.parallel.reduce import first_problem, highest, sum_over_data
    from megatron_cgn.parallel.state import initialize_parallel, shutdown_parallel

    state = initialize_parallel(ParallelConfig(context_parallel_size=2))
    inverse = []
    for shape, dim in (((3, 16), 1), ((16, 2, 5), 0)):
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        part = shard_sequence(whole, cp_rank=state.cp_rank, cp_size=2, dim=dim)
        inverse.append(torch.equal(gather_sequence(part, state.groups.cp, dim=dim), whole))
    rank = state.rank
    highs = [highest(0), highest(7 * rank), highest(-rank)]
    problems = [
        first_problem(None),
        first_problem("no space" if rank == 1 else None),
        first_problem(f"both {rank}"),
    ]
    values = torch.tensor([[rank + 1.0, 2.0**40 + rank]], dtype=torch.float64)
    summed = sum_over_data(values, state).tolist()
    kept = values.tolist()
    mpu.destroy_model_parallel()
    # Two pipeline stages: only the last one's numbers count, and both learn them.
    state = initialize_parallel(ParallelConfig(pipeline_model_parallel_size=2))
    last = sum_over_data(torch.tensor([10.0 * (rank + 1)], dtype=torch.float64), state).tolist()
    shutdown_parallel()
    return [inverse, highs, problems, summed, kept, last]


def test_two_processes_gather_and_reduce() -> None:
    for rank, result in enumerate(run_distributed(_gather, 2)):
        inverse, highs, problems, summed, kept, last = result
        assert inverse == [True, True]
        assert highs == [0, 7, 0]
        assert problems == [None, "rank 1: no space", "rank 0: both 0"]
        # float64: 2^41 + 1 would be rounded in FP32.
        assert summed == [[3.0, 2.0**41 + 1]]
        assert kept == [[rank + 1.0, 2.0**40 + rank]], "the argument must not change"
        assert last == [20.0]
