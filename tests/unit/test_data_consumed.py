"""Documents that a checkpoint consumed, against reading every sequence and counting its labels."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cgn.config.schema import (
    DataConfig,
    FileConfig,
    PhaseConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from megatron_cgn.data import order as order_module
from megatron_cgn.data.account import account_of, write_account
from megatron_cgn.data.consumed import documents_consumed, read_account, tokens_consumed
from megatron_cgn.data.order import ReadingOrder
from megatron_cgn.data.plan import plan_run
from megatron_cgn.data.pretrain import PretrainingData, PretrainingPlan, build_pretraining_data
from megatron_cgn.data.sources import check_sources
from megatron_cgn.errors import DataError
from tests.unit.data_samples import numbered_documents, write_index

FILES = {"a": 1, "b": 10_000, "c": 20_000}
"""First id of each index."""


def lengths_of(name: str) -> list[int]:
    return [int(n) for n in np.random.default_rng(ord(name)).integers(0, 30, 25)]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretrainingData:
    """A source of one file and one of two, in two phases, through several small blocks."""
    monkeypatch.setattr(order_module, "_BLOCK_TOKENS", 500)
    paths = {
        name: write_index(
            tmp_path / name, numbered_documents(lengths_of(name), start=start), vocab_size=30_000
        )
        for name, start in FILES.items()
    }
    sources = (
        SourceConfig(name="one", path=paths["a"]),
        SourceConfig(name="two", files=(FileConfig(path=paths["b"]), FileConfig(path=paths["c"]))),
    )
    phases = (
        PhaseConfig(until=90, mix={"one": 0.7, "two": 0.3}),
        PhaseConfig(mix={"one": 0.2, "two": 0.8}),
    )
    run = RunConfig(
        data=DataConfig(sources=sources, phases=phases, seq_length=8, validation_fraction=0.1),
        train=TrainConfig(train_iters=150, global_batch_size=2),
    )
    checked = check_sources(run.data)
    plan = PretrainingPlan(sources=checked, blend=plan_run(run, checked))
    return build_pretraining_data(plan, eod_id=0, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("consumed", [1, 37, 180, 181, 299, 300])
def test_against_reading_the_sequences(
    data: PretrainingData, tmp_path: Path, consumed: int
) -> None:
    labels: Counter[int] = Counter()
    for sequence in range(consumed):
        labels.update(data.train[sequence]["labels"].tolist())
    write_account(tmp_path / "blend.json", account_of(data.blend, consumed=consumed))
    blend, found = read_account(tmp_path)
    assert found == consumed
    results = {
        Path(result.file.path).name: result for result in documents_consumed(blend, consumed=found)
    }
    for name, start in FILES.items():
        bounds = np.cumsum([start, *lengths_of(name)])
        expected = {
            document: total
            for document in range(25)
            if (total := sum(labels[t] for t in range(bounds[document], bounds[document + 1])))
        }
        if not expected:
            assert name not in results
            continue
        result = results[name]
        assert dict(zip(result.documents.tolist(), result.tokens.tolist(), strict=True)) == expected
        assert result.source == ("one" if name == "a" else "two")
        for document in range(25):
            assert (result.tokens_of(document) > 0) == (document in expected)
            assert result.tokens_of(document) == expected.get(document, 0)
        whole = np.array(lengths_of(name))[result.documents]
        assert result.passes.tolist() == (result.tokens / whole).tolist()
    assert sum(int(result.tokens.sum()) for result in results.values()) == consumed * 8
    held_out = {document for r in results.values() for document in r.documents if document >= 23}
    assert not held_out


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    seq_length=st.integers(1, 50),
    samples=st.integers(0, 60),
)
def test_counts_add_up_for_any_documents(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], seq_length: int, samples: int
) -> None:
    """Label by label along the permuted documents laid end to end."""
    monkeypatch.setattr(order_module, "_BLOCK_TOKENS", 40)
    order = ReadingOrder(
        identity="x",
        num_documents=len(lengths),
        tokens=sum(lengths),
        seq_length=seq_length,
        seed=1,
    )
    sizes = np.array(lengths, dtype=np.int32)
    blocks = [order.build(number, sizes) for number in range(order.blocks_for(samples) + 1)]
    stream = [d for block in blocks for d in np.repeat(block.documents, sizes[block.documents])]
    expected = Counter[int]()
    for number, block in enumerate(blocks):
        bounds = np.cumsum([0, *sizes[block.documents]]) + number * order.block_tokens
        taken = block.starts[: max(0, samples - order.first_sample(number))]
        for place, offset in taken.tolist():
            first = int(bounds[place]) + offset + 1
            expected.update(map(int, stream[first : first + seq_length]))
    found = tokens_consumed(order, sizes, samples=samples)
    assert found.tolist() == [expected[document] for document in range(len(lengths))]
    assert found.sum() == samples * seq_length


def test_an_index_that_moved_or_changed(data: PretrainingData, tmp_path: Path) -> None:
    old = str(tmp_path / "a")
    digest = data.blend.sources[0].files[0].digest
    for file in tmp_path.glob("a.*"):
        file.rename(file.with_name("moved" + file.suffix))
    with pytest.raises(DataError, match=r"a\.bin: there is no such file"):
        list(documents_consumed(data.blend, consumed=9, digest=digest))
    moved = {old: str(tmp_path / "moved")}
    (found,) = documents_consumed(data.blend, consumed=9, prefixes=moved, digest=digest)
    assert (found.source, found.file.path) == ("one", old)
    wrong = {old: str(tmp_path / "b")}
    with pytest.raises(DataError, match=r"b: not the index that was read: its digest is"):
        list(documents_consumed(data.blend, consumed=9, prefixes=wrong))


def test_accounts_that_cannot_be_read(data: PretrainingData, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"blend.json: there is no such file. Give the directory"):
        read_account(tmp_path)
    file = tmp_path / "blend.json"
    account = account_of(data.blend)
    for content in ("{", "[]", "{}", json.dumps({**account, "sequences": 10**6})):
        file.write_text(content)
        with pytest.raises(DataError, match=r"blend.json: not an account of this version"):
            read_account(file)
