"""Held-out windows: every token is a label exactly once, in order, after its predecessor."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cgn.data.indexed import check_index
from megatron_cgn.data.sources import Documents
from megatron_cgn.data.windows import WindowDataset
from tests.unit.data_samples import numbered_documents, write_index

EOD = 999


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_every_token_counts_once(tmp_path: Path, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=10))
    start = data.draw(st.integers(0, len(lengths) - 1))
    stop = data.draw(st.integers(start + 1, len(lengths)))
    seq_length = data.draw(st.integers(1, 20))
    documents = numbered_documents(lengths)
    index = check_index(write_index(tmp_path / "p", documents, overwrite=True))
    middle = data.draw(st.integers(start, stop))  # over the end of one of two files
    bounds = [(start, middle), (middle, stop)]
    parts = [Documents(index=index, start=a, stop=b) for a, b in bounds]
    windows = WindowDataset(parts, seq_length=seq_length, eod_id=EOD)
    held_out = [token for document in documents[start:stop] for token in document]

    scored, inputs, total = [], [], 0
    for window in (windows[i] for i in range(len(windows))):
        assert {name: tuple(value.shape) for name, value in window.items()} == dict.fromkeys(
            ("tokens", "labels", "loss_mask", "position_ids"), (seq_length,)
        )
        assert window["position_ids"].tolist() == list(range(seq_length))
        assert ((window["labels"] >= 0) & (window["labels"] <= EOD)).all()
        counted = window["loss_mask"].bool()
        assert set(window["loss_mask"].tolist()) <= {0.0, 1.0}
        scored += window["labels"][counted].tolist()
        inputs += window["tokens"][counted].tolist()
        total += int(counted.sum())
    assert scored == held_out
    assert inputs == [EOD, *held_out[:-1]]
    assert total == windows.num_tokens == len(held_out)


def test_outside_is_an_index_error(tmp_path: Path) -> None:
    index = check_index(write_index(tmp_path / "p", [[1, 2, 3]]))
    windows = WindowDataset([Documents(index=index, start=0, stop=1)], seq_length=2, eod_id=EOD)
    assert len(windows) == 2
    for outside in (-1, 2):
        with pytest.raises(IndexError):
            windows[outside]
