"""Rows of conversations: their layout, and that resuming, ranks and workers change nothing."""

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sft_samples import World, all_ids, random_records, sft_run, source

from megatron_cgn.batch import TokenBatch
from megatron_cgn.data.sft import SftData
from megatron_cgn.data.sft_loader import (
    ROW_MULTIPLE,
    ConversationRow,
    SftLoader,
    SftValidationLoader,
    blank,
    lay_out,
)

LENGTH = 256


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SftData:
    """Two epochs of 67 conversations, so that the last step is filled with blank sequences."""
    world = World.make(tmp_path_factory.mktemp("loader"))
    sources = [
        source(name, world.write(name, random_records(name, count)))
        for name, count in (("a", 60), ("b", 20))
    ]
    data = world.open(
        sft_run(
            sources,
            epochs=2,
            seq_length=LENGTH,
            global_batch_size=12,
            validation_fraction=0.15,
        )
    )
    assert data.plan.sequences % 12, "the last step must hold blank sequences"
    return data


def loader(data: SftData, **how: int | bool) -> SftLoader:
    settings = {
        "micro_batch_size": 2,
        "global_batch_size": 12,
        "dp_rank": 0,
        "dp_size": 1,
        "seq_length": LENGTH,
        "pad_to_full": False,
    }
    return SftLoader(data.train, **{**settings, **how})  # type: ignore[arg-type]


def steps_of(data: SftData, **how: int | bool) -> list[list[TokenBatch]]:
    with contextlib.closing(iter(loader(data, **how))) as steps:
        return list(steps)


def conversations(batch: TokenBatch) -> list[tuple[list[int], ...]]:
    """The conversations of a row, padding left out, each as its fields."""
    assert batch.cu_seqlens is not None and batch.source_ids is not None
    found = []
    for begin, end in itertools.pairwise(batch.cu_seqlens.tolist()):
        assert batch.position_ids[0, begin:end].tolist() == list(range(end - begin))
        if batch.loss_mask[0, begin:end].any():
            fields = (batch.tokens, batch.labels, batch.loss_mask, batch.source_ids)
            found.append(tuple(field[0, begin:end].tolist() for field in fields))
    return found


def of_steps(steps: list[list[TokenBatch]]) -> list[list[tuple[list[int], ...]]]:
    """The conversations of each step in order, however it was cut into rows."""
    return [[c for batch in step for c in conversations(batch)] for step in steps]


@st.composite
def rows(draw: st.DrawFn) -> list[ConversationRow]:
    found = []
    for _ in range(draw(st.integers(1, 4))):
        lengths = draw(st.lists(st.integers(1, 9), max_size=3))
        size = sum(lengths)
        ids = draw(st.lists(st.integers(1, 99), min_size=2 * size, max_size=2 * size))
        mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        found.append(
            ConversationRow(
                tokens=np.array(ids[:size], dtype=np.int64),
                labels=np.array(ids[size:], dtype=np.int64),
                loss_mask=np.array(mask, dtype=bool),
                lengths=tuple(lengths),
                sources=tuple(draw(st.integers(0, 3)) for _ in lengths),
            )
        )
    return found


@settings(max_examples=100, deadline=None)
@given(rows(), st.booleans())
def test_rows_hold_their_conversations_and_padding(
    sequences: list[ConversationRow], full: bool
) -> None:
    most = 27
    batch = lay_out(sequences, seq_length=most, length=most * len(sequences) if full else None)
    used = sum(sum(s.lengths) for s in sequences)
    total = batch.tokens.shape[1]
    if full:
        assert total == most * len(sequences)
    else:
        assert total % ROW_MULTIPLE == 0 and used <= total
        assert total - used < ROW_MULTIPLE or (used == 0 and total == ROW_MULTIPLE)
    for name in ("tokens", "labels", "loss_mask"):
        field = getattr(batch, name)
        assert field.shape == (1, total)
        expected = np.concatenate([getattr(s, name) for s in sequences])
        np.testing.assert_array_equal(field[0, :used], expected)
        assert not field[0, used:].any(), "padding counts nothing and has a valid id"
    assert batch.cu_seqlens is not None and batch.source_ids is not None
    bounds = batch.cu_seqlens.tolist()
    lengths = [length for s in sequences for length in s.lengths]
    assert bounds[: len(lengths) + 1] == [0, *itertools.accumulate(lengths)]
    assert bounds[-1] == total
    assert all(0 < b - a <= most for a, b in itertools.pairwise(bounds))
    positions = [p for a, b in itertools.pairwise(bounds) for p in range(b - a)]
    assert batch.position_ids[0].tolist() == positions
    sources = [x for s in sequences for x in np.repeat(s.sources, s.lengths).tolist()]
    assert batch.source_ids[0, :used].tolist() == sources
    types = (torch.int64, torch.int64, torch.float32, torch.int64, torch.int32)
    fields = dataclasses.astuple(batch)
    assert tuple(field.dtype for field in fields[:5]) == types


def test_a_row_of_blank_sequences_is_small() -> None:
    assert lay_out([blank(), blank()], seq_length=LENGTH).tokens.shape == (1, ROW_MULTIPLE)
    assert lay_out([blank()], seq_length=4, length=4).tokens.shape == (1, 4)


def test_every_step_holds_its_sequences(data: SftData) -> None:
    found = of_steps(steps_of(data))
    assert len(found) == data.plan.total_steps
    for step, conversations_of_step in enumerate(found):
        expected = []
        for sequence in range(12 * step, 12 * step + 12):
            row = data.train[sequence]
            bounds = np.cumsum([0, *row.lengths])
            for begin, end, place in zip(bounds, bounds[1:], row.sources, strict=False):
                fields = (row.tokens, row.labels, row.loss_mask.astype(float))
                expected.append((*(f[begin:end].tolist() for f in fields), [place] * (end - begin)))
        assert conversations_of_step == expected


@pytest.mark.parametrize(
    "how", [{"micro_batch_size": 1}, {"pad_to_full": True}, {"num_workers": 2}]
)
def test_steps_do_not_depend_on_how_they_are_read(
    data: SftData, how: dict[str, int | bool]
) -> None:
    steps = steps_of(data, **how)
    assert of_steps(steps) == of_steps(steps_of(data))
    if "pad_to_full" in how:
        assert {batch.tokens.shape for step in steps for batch in step} == {(1, 2 * LENGTH)}


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_a_step(data: SftData, size: int) -> None:
    ranks = [of_steps(steps_of(data, dp_rank=rank, dp_size=size)) for rank in range(size)]
    together = [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert together == of_steps(steps_of(data))


def test_a_run_goes_on_anywhere(data: SftData) -> None:
    whole = of_steps(steps_of(data))
    epoch = next(
        sequence
        for sequence in range(data.plan.sequences)
        if len({i for ids in all_ids(data)[: sequence + 1] for i in ids})
        < sum(len(ids) for ids in all_ids(data)[: sequence + 1])
    )
    assert 12 < epoch < len(data.train) - 12, "the second epoch begins in between"
    for step in range(len(whole)):
        # A whole step, with another layout from there on.
        how = {"start_sequence": 12 * step, "micro_batch_size": 3, "dp_size": 2}
        ranks = [of_steps(steps_of(data, dp_rank=rank, **how)) for rank in range(2)]
        assert [a + b for a, b in zip(*ranks, strict=True)] == whole[step:]
    with_workers = steps_of(data, start_sequence=24, num_workers=1)
    assert of_steps(with_workers) == whole[2:]


def test_the_position_counts_what_was_handed_out(data: SftData) -> None:
    training = loader(data, start_sequence=12)
    with contextlib.closing(iter(training)) as steps:
        next(steps)
        next(steps)
        assert training.consumed_sequences == 36
    assert training.steps_left == data.plan.total_steps - 3


@pytest.mark.parametrize("size", [1, 2, 5])
def test_validation_holds_each_conversation_once(data: SftData, size: int) -> None:
    for validation in data.validation.values():
        loaders = [
            SftValidationLoader(
                validation,
                micro_batch_size=2,
                dp_rank=rank,
                dp_size=size,
                seq_length=LENGTH,
                pad_to_full=False,
            )
            for rank in range(size)
        ]
        assert len({len(each) for each in loaders}) == 1
        found = [c for each in loaders for batch in each for c in conversations(batch)]
        wanted = [
            c
            for sequence in range(len(validation))
            for c in conversations(lay_out([validation[sequence]], seq_length=LENGTH))
        ]
        assert sorted(found) == sorted(wanted)


def test_validation_of_the_first_sequences(data: SftData) -> None:
    validation = data.validation["a"]
    assert len(validation) > 2
    (batch,) = SftValidationLoader(
        validation,
        micro_batch_size=4,
        dp_rank=0,
        dp_size=1,
        seq_length=LENGTH,
        pad_to_full=True,
        max_sequences=2,
    )
    assert batch.tokens.shape == (1, 4 * LENGTH)
    wanted = lay_out([validation[0], validation[1]], seq_length=LENGTH)
    assert conversations(batch) == conversations(wanted)
