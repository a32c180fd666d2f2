"""Where documents start within rows, and indices that do not say."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from megatron_cgn.batch import TokenBatch
from megatron_cgn.data.boundaries import check_boundaries
from megatron_cgn.data.indexed import IndexInfo, Sidecar
from megatron_cgn.data.loader import SequentialLoader, ValidationLoader, collate
from megatron_cgn.data.windows import Sample
from megatron_cgn.errors import DataError

EOD = 9


def _samples(rows: list[list[int]], **more: int) -> list[Sample]:
    """Rows of S + 1 ids as samples."""
    return [
        {
            "tokens": torch.tensor(row[:-1]),
            "labels": torch.tensor(row[1:]),
            "loss_mask": torch.ones(len(row) - 1),
            "position_ids": torch.arange(len(row) - 1),
            **{name: torch.tensor(value) for name, value in more.items()},
        }
        for row in rows
    ]


class _Rows(Dataset[Sample]):
    def __init__(self, rows: list[list[int]]) -> None:
        self._samples = _samples(rows)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def test_a_document_starts_with_a_row_and_behind_each_end_of_document() -> None:
    batch = collate(_samples([[1, 2, EOD, 4, 5], [EOD, EOD, 3, 4, EOD]], source=7), eod_id=EOD)
    assert batch.tokens.tolist() == [[1, 2, EOD, 4, EOD, EOD, 3, 4]]
    assert batch.labels.tolist() == [[2, EOD, 4, 5, EOD, 3, 4, EOD]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 0, 0, 1]]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype is torch.int32
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 5, 6, 8]
    assert batch.loss_mask.tolist() == [[1.0] * 8], "labels behind an end of document count"
    assert batch.source_ids is not None and batch.source_ids.tolist() == [[7] * 8]


def test_joined_documents_are_left_alone() -> None:
    batch = collate(_samples([[1, EOD, 3], [4, 5, EOD]]))
    assert batch.tokens.tolist() == [[1, EOD], [4, 5]]
    assert batch.position_ids.tolist() == [[0, 1], [0, 1]]
    assert batch.cu_seqlens is None and batch.source_ids is None


@given(
    st.integers(1, 4).flatmap(
        lambda rows: st.integers(1, 20).flatmap(
            lambda length: st.lists(
                st.lists(st.sampled_from([1, 2, EOD]), min_size=length + 1, max_size=length + 1),
                min_size=rows,
                max_size=rows,
            )
        )
    )
)
def test_positions_count_from_the_last_start_whatever_the_rows(rows: list[list[int]]) -> None:
    batch = collate(_samples(rows), eod_id=EOD)
    positions, starts = [], []
    for row in rows:
        since = 0
        for place, token in enumerate(row[:-1]):
            if place == 0 or row[place - 1] == EOD:
                since = 0
                starts.append(len(positions))
            positions.append(since)
            since += 1
            assert batch.tokens[0, len(positions) - 1] == token
    assert batch.position_ids.tolist() == [positions]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [*starts, len(positions)]


def test_loaders_separate_what_they_read_also_in_workers_and_in_blank_rows() -> None:
    rows = [[1, EOD, 3, 4], [5, 6, EOD, 7], [EOD, 1, 2, 3]]
    expected = {1: [0, 2, 3, 6], 2: [0, 1, 3]}
    for workers in (0, 1):
        loader = SequentialLoader(
            _Rows(rows),
            micro_batch_size=1,
            global_batch_size=1,
            dp_rank=0,
            dp_size=1,
            start_sequence=2,
            num_workers=workers,
            eod_id=EOD,
        )
        assert [_starts(batch) for (batch,) in loader] == [expected[2]]
    held_out = ValidationLoader(_Rows(rows), micro_batch_size=2, dp_rank=0, dp_size=1, eod_id=EOD)
    first, last = held_out
    assert _starts(first) == expected[1]
    assert _starts(last)[:3] == [0, 1, 3] and last.loss_mask.tolist() == [[1.0] * 3 + [0.0] * 3]


def _starts(batch: TokenBatch) -> list[int]:
    assert batch.cu_seqlens is not None
    found: list[int] = batch.cu_seqlens.tolist()
    return found


def _index(prefix: str, eod_id: int | None) -> IndexInfo:
    sidecar = Sidecar(
        tokenizer_fingerprint="f",
        tokenizer_name="t",
        vocab_size=10,
        eod_id=eod_id,
        documents=1,
        tokens=1,
        text_bytes=1,
        dtype="uint16",
        digest="d",
    )
    return IndexInfo(prefix=prefix, sidecar=sidecar, lengths=np.ones(1, dtype=np.int32))


def test_indices_without_ends_of_documents_are_refused_by_name(tmp_path: Path) -> None:
    good, bad = _index("good", EOD), _index("bad/one", None)
    check_boundaries([good])
    with pytest.raises(DataError, match=r"^bad/one: .*reset_attention_mask=false\.$") as caught:
        check_boundaries([good, bad, bad])
    assert "good" not in str(caught.value)
    worse = dataclasses.replace(bad, prefix="bad/two")
    with pytest.raises(DataError, match=r"bad/one.*\nbad/two"):
        check_boundaries([bad, worse])
