"""Rows of answers: their layout, and that resuming, ranks and workers change nothing."""

import contextlib
import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_samples import data_of, preference_run, random_labels, random_pairs, random_rankings
from sft_samples import World, source

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.data.preference import PreferenceData
from megatron_cgn.data.preference_loader import (
    PreferenceLoader,
    PreferenceValidationLoader,
    lay_out_preferences,
)
from megatron_cgn.data.preference_rows import PreferenceRow, blank_preferences
from megatron_cgn.data.sft_loader import ROW_MULTIPLE

LENGTH = 300
MOST = 30
NUMBERS = 50

type Answer = tuple[object, ...]
"""Tokens, labels, what counts, source, what the reference says; and a label, or pairs."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("loader"))


@pytest.fixture(scope="module")
def data(world: World) -> PreferenceData:
    """Two epochs of pairs and rankings, so that the last step is filled with blank sequences."""
    records = {"a": random_pairs("a", 60, margins=True), "b": random_rankings("b", 30)}
    sources = [source(name, world.write(name, rows)) for name, rows in records.items()]
    run = preference_run(
        sources, epochs=2, seq_length=LENGTH, global_batch_size=8, validation_fraction=0.15
    )
    data = data_of(world, run)
    assert data.plan.sequences % 8, "the last step must hold blank sequences"
    return data


def reference(data: PreferenceData) -> npt.NDArray[np.float32]:
    """A log-probability for each answer that tells which it is."""
    return -np.arange(data.plan.num_answers, dtype=np.float32)


def steps_of(data: PreferenceData, **how: int | bool) -> list[list[PreferenceBatch]]:
    fixed = {
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "dp_rank": 0,
        "dp_size": 1,
        "seq_length": LENGTH,
        "pad_to_full": False,
    }
    loader = PreferenceLoader(
        data.train,
        ref_logps=reference(data),
        **{**fixed, **how},  # type: ignore[arg-type]
    )
    with contextlib.closing(iter(loader)) as steps:
        return list(steps)


def answers_of(batch: PreferenceBatch) -> list[Answer]:
    """The answers of a row, checked to be where the row says that they are."""
    assert batch.ref_logps is not None
    bounds = batch.cu_seqlens.tolist()
    found: list[Answer] = []
    for number in range(batch.num_answers):
        begin, end = bounds[number : number + 2]
        assert batch.last_places[number] == end - 1
        assert (batch.answer_ids[0, begin:end] == number).all()
        assert batch.position_ids[0, begin:end].tolist() == list(range(end - begin))
        fields = (batch.tokens, batch.labels, batch.loss_mask)
        facts = (int(batch.source_ids[number]), float(batch.ref_logps[number]))
        found.append((*(tuple(f[0, begin:end].tolist()) for f in fields), *facts))
    padding = batch.answer_ids[0, bounds[batch.num_answers] :]
    assert (padding == batch.num_answers).all()
    assert not batch.loss_mask[0, bounds[batch.num_answers] :].any()
    return found


def compared(steps: list[list[PreferenceBatch]]) -> list[list[tuple[Answer, Answer, float, float]]]:
    """The pairs of each step in order, however it was cut into rows."""
    found = []
    for step in steps:
        pairs: list[tuple[Answer, Answer, float, float]] = []
        for batch in step:
            answers = answers_of(batch)
            fields = (batch.chosen, batch.rejected, batch.weights, batch.margins)
            pairs += [
                (answers[c], answers[r], w, m)
                for c, r, w, m in zip(*(f.tolist() for f in fields), strict=True)
            ]
        found.append(pairs)
    return found


@st.composite
def rows(draw: st.DrawFn) -> list[PreferenceRow]:
    found = []
    for _ in range(draw(st.integers(1, 4))):
        lengths = draw(st.lists(st.integers(1, 6), max_size=4))
        size, count = sum(lengths), len(lengths)
        ids = np.array(draw(st.lists(st.integers(1, 99), min_size=size, max_size=size)), np.int64)
        place = st.integers(0, max(0, count - 1))
        pairs = draw(st.lists(st.tuples(place, place), max_size=3 if count else 0))
        found.append(
            PreferenceRow(
                tokens=ids,
                labels=ids + 1,
                loss_mask=ids % 2 == 0,
                lengths=tuple(lengths),
                sources=tuple(draw(st.integers(0, 3)) for _ in lengths),
                chosen=np.array([c for c, _ in pairs], np.int64),
                rejected=np.array([r for _, r in pairs], np.int64),
                weights=np.arange(len(pairs), dtype=np.float32),
                margins=np.arange(len(pairs), dtype=np.float32) + 0.5,
                desirable=None,
                answers=np.array(
                    draw(st.lists(st.integers(0, NUMBERS - 1), min_size=count, max_size=count)),
                    np.int64,
                ),
            )
        )
    return found


@settings(max_examples=50, deadline=None)
@given(rows(), st.booleans())
def test_rows_hold_their_answers_and_padding(sequences: list[PreferenceRow], full: bool) -> None:
    scores = np.arange(NUMBERS, dtype=np.float32)
    batch = lay_out_preferences(
        sequences,
        seq_length=MOST,
        length=MOST * len(sequences) if full else None,
        ref_logps=scores,
    )
    total = batch.tokens.shape[1]
    assert total == MOST * len(sequences) if full else total % ROW_MULTIPLE == 0
    answers = answers_of(batch)
    expected = []
    for s in sequences:
        bounds = np.cumsum([0, *s.lengths])
        for place, (begin, end) in enumerate(itertools.pairwise(bounds)):
            fields = (s.tokens, s.labels, s.loss_mask.astype(float))
            facts = (s.sources[place], float(scores[s.answers[place]]))
            expected.append((*(tuple(f[begin:end].tolist()) for f in fields), *facts))
    assert answers == expected
    firsts = list(itertools.accumulate((len(s.lengths) for s in sequences), initial=0))
    for name in ("chosen", "rejected"):
        wanted = [n + f for s, f in zip(sequences, firsts, strict=False) for n in getattr(s, name)]
        assert getattr(batch, name).tolist() == wanted
    for name in ("weights", "margins"):
        assert getattr(batch, name).tolist() == [x for s in sequences for x in getattr(s, name)]
    assert batch.cu_seqlens[-1] == total
    dtypes = {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
        "answer_ids": torch.int64,
        "cu_seqlens": torch.int32,
        "last_places": torch.int64,
        "source_ids": torch.int64,
        "chosen": torch.int64,
        "rejected": torch.int64,
        "weights": torch.float32,
        "margins": torch.float32,
        "ref_logps": torch.float32,
    }
    assert {name: getattr(batch, name).dtype for name in dtypes} == dtypes
    assert batch.desirable is None and batch.baseline is None


def test_a_row_without_answers() -> None:
    for kind, desirable in (("pairs", None), ("unpaired", [])):
        blank = blank_preferences(kind)  # type: ignore[arg-type]
        batch = lay_out_preferences([blank, blank], seq_length=LENGTH)
        assert batch.tokens.shape == (1, ROW_MULTIPLE) and batch.num_answers == 0
        assert batch.ref_logps is None and len(batch.chosen) == len(batch.weights) == 0
        found = None if batch.desirable is None else batch.desirable.tolist()
        assert found == desirable


def test_every_step_holds_its_sequences(data: PreferenceData) -> None:
    steps = steps_of(data)
    assert len(steps) == data.plan.total_steps
    for number, pairs in enumerate(compared(steps)):
        rows = [data.train[sequence] for sequence in range(8 * number, 8 * number + 8)]
        numbers = [(-a[4], -b[4]) for a, b, _, _ in pairs]  # type: ignore[operator]
        assert numbers == [
            (row.answers[c], row.answers[r])
            for row in rows
            for c, r in zip(row.chosen, row.rejected, strict=True)
        ]
        assert [w for *_, w, _ in pairs] == [float(w) for row in rows for w in row.weights]
        assert [m for *_, m in pairs] == [float(m) for row in rows for m in row.margins]


@pytest.mark.parametrize(
    "how", [{"micro_batch_size": 1}, {"pad_to_full": True}, {"num_workers": 2}]
)
def test_steps_do_not_depend_on_how_they_are_read(
    data: PreferenceData, how: dict[str, int | bool]
) -> None:
    steps = steps_of(data, **how)
    assert compared(steps) == compared(steps_of(data))
    if "pad_to_full" in how:
        assert {batch.tokens.shape for step in steps for batch in step} == {(1, 2 * LENGTH)}


def test_ranks_share_a_step_and_a_run_goes_on_anywhere(data: PreferenceData) -> None:
    whole = compared(steps_of(data))
    for start in range(len(whole)):
        how = {"start_sequence": 8 * start, "micro_batch_size": 1, "dp_size": 2}
        ranks = [compared(steps_of(data, dp_rank=rank, **how)) for rank in range(2)]
        assert [a + b for a, b in zip(*ranks, strict=True)] == whole[start:]


@pytest.mark.parametrize("size", [1, 3])
def test_validation_holds_each_record_once(data: PreferenceData, size: int) -> None:
    for sequences in data.validation.values():
        loaders = [
            PreferenceValidationLoader(
                sequences,
                kind=data.kind,
                micro_batch_size=2,
                dp_rank=rank,
                dp_size=size,
                seq_length=LENGTH,
                pad_to_full=False,
                ref_logps=reference(data),
            )
            for rank in range(size)
        ]
        assert len({len(loader) for loader in loaders}) == 1
        found = [-a[4] for each in loaders for batch in each for a in answers_of(batch)]  # type: ignore[operator]
        wanted = np.concatenate([sequences[i].answers for i in range(len(sequences))])
        assert sorted(found) == sorted(wanted.tolist()) and len(found) > 4


def test_labels_reach_the_batches(world: World) -> None:
    path = world.write("labels", random_labels("labels", 21))
    run = preference_run([source("labels", path)], epochs=1, loss="kto", global_batch_size=8)
    data = data_of(world, run)
    labels: dict[float, bool] = {}
    for step in steps_of(data):
        for batch in step:
            assert batch.desirable is not None and batch.ref_logps is not None
            assert len(batch.chosen) == 0
            labels.update(zip(batch.ref_logps.tolist(), batch.desirable.tolist(), strict=True))
    assert labels == {float(-number): number % 3 != 0 for number in range(21)}
