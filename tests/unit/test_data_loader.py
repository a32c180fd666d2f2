"""Loaders: which sequences a step holds does not depend on ranks, micro-batches or restarts."""

import pytest
import torch
from torch.utils.data import Dataset

from megatron_cgn.batch import TokenBatch
from megatron_cgn.data.loader import SequentialLoader, ValidationLoader
from megatron_cgn.data.windows import Sample
from megatron_cgn.errors import ConfigError


class Counted(Dataset[Sample]):
    """Sequence i holds the token i, three times."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        assert 0 <= index < self.length
        tokens = torch.full((3,), index)
        return {
            "tokens": tokens,
            "labels": tokens + 1,
            "loss_mask": torch.ones(3),
            "position_ids": torch.arange(3),
        }


def ids(batch: TokenBatch) -> list[int]:
    return batch.tokens[:, 0].tolist()


def steps(
    length: int, *, mbs: int, gbs: int, dp: int, start: int = 0, workers: int = 0
) -> list[list[int]]:
    """The sequences of each step, ranks in order."""
    loaders = [
        SequentialLoader(
            Counted(length),
            micro_batch_size=mbs,
            global_batch_size=gbs,
            dp_rank=rank,
            dp_size=dp,
            start_sequence=start,
            num_workers=workers,
        )
        for rank in range(dp)
    ]
    found = []
    for ranks in zip(*loaders, strict=True):
        assert all(len(batch.tokens) == mbs for batches in ranks for batch in batches)
        found.append([i for batches in ranks for batch in batches for i in ids(batch)])
    return found


@pytest.mark.parametrize(("mbs", "dp"), [(1, 1), (2, 1), (4, 3), (3, 4), (1, 12)])
def test_steps_hold_the_same_sequences_on_any_layout(mbs: int, dp: int) -> None:
    expected = [list(range(12 * t, 12 * t + 12)) for t in range(4)]  # 50 = 4 * 12 + 2
    assert steps(50, mbs=mbs, gbs=12, dp=dp) == expected


@pytest.mark.parametrize("start", [0, 12, 24, 7, 38, 39, 60])
def test_a_run_goes_on_where_it_stopped_on_another_layout(start: int) -> None:
    whole = [i for step in steps(50, mbs=2, gbs=12, dp=2) for i in step]
    resumed = [i for step in steps(50, mbs=1, gbs=12, dp=3, start=start) for i in step]
    count = max(0, 50 - start) // 12 * 12
    assert resumed == list(range(start, start + count))
    assert resumed[: 48 - start] == whole[start : start + count]


def test_position_and_stopping_between_steps() -> None:
    loader = SequentialLoader(
        Counted(20), micro_batch_size=1, global_batch_size=4, dp_rank=1, dp_size=2
    )
    assert loader.steps_left == 5
    for number, batches in enumerate(loader, start=1):
        assert loader.consumed_sequences == 4 * number
        assert [ids(batch) for batch in batches] == [[4 * number - 2], [4 * number - 1]]
        if number == 3:
            break
    assert (loader.consumed_sequences, loader.steps_left) == (12, 2)
    assert [ids(batches[0]) for batches in loader] == [[14], [18]]  # iterating again goes on


def test_worker_processes_keep_the_order() -> None:
    assert steps(30, mbs=2, gbs=6, dp=1, start=6, workers=2) == steps(
        30, mbs=2, gbs=6, dp=1, start=6
    )


def test_batches_are_whole_token_batches() -> None:
    loader = SequentialLoader(
        Counted(4), micro_batch_size=2, global_batch_size=4, dp_rank=0, dp_size=1
    )
    (batch, _), *_ = loader
    assert batch.labels.tolist() == [[1, 1, 1], [2, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert (batch.tokens.dtype, batch.loss_mask.dtype) == (torch.int64, torch.float32)
    assert batch.cu_seqlens is None


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generator_alone(workers: int) -> None:
    before = torch.random.get_rng_state()
    steps(8, mbs=1, gbs=4, dp=1, workers=workers)
    list(
        ValidationLoader(Counted(3), micro_batch_size=1, dp_rank=0, dp_size=1, num_workers=workers)
    )
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_batch_that_does_not_divide_is_a_fault() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size=10 .*=2 x 3 .* a multiple of 6"):
        SequentialLoader(Counted(4), micro_batch_size=2, global_batch_size=10, dp_rank=0, dp_size=3)


@pytest.mark.parametrize(("length", "mbs", "dp"), [(1, 4, 3), (12, 2, 3), (13, 2, 3), (5, 1, 1)])
def test_validation_covers_each_sequence_once_and_evenly(length: int, mbs: int, dp: int) -> None:
    counted, lengths = [], set()
    for rank in range(dp):
        loader = ValidationLoader(Counted(length), micro_batch_size=mbs, dp_rank=rank, dp_size=dp)
        batches = list(loader)
        assert len(batches) == len(loader)
        lengths.add(len(batches))
        for batch in batches:
            assert batch.tokens.shape == (mbs, 3)
            assert batch.position_ids.tolist() == [[0, 1, 2]] * mbs
            counted += batch.tokens[batch.loss_mask.bool()].tolist()
    assert sorted(counted) == sorted(list(range(length)) * 3)
    assert lengths == {-(-length // (mbs * dp))}


def test_validation_of_a_part() -> None:
    loader = ValidationLoader(Counted(9), micro_batch_size=2, dp_rank=0, dp_size=1, max_sequences=3)
    assert loader.num_sequences == 3
    assert [ids(batch) for batch in loader] == [[0, 1], [2, 0]]
    assert [batch.loss_mask.sum().item() for batch in loader] == [6.0, 3.0]
    whole = ValidationLoader(
        Counted(3), micro_batch_size=1, dp_rank=0, dp_size=1, max_sequences=100
    )
    assert len(whole) == 3
