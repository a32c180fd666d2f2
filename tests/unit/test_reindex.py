"""Indexes out of indexes: every document once, whole, with its lineage."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cgn.data import lineage, portions
from megatron_cgn.data.describe import describe
from megatron_cgn.data.index_writer import ALL_SUFFIXES, IndexWriter
from megatron_cgn.data.indexed import SourceFile, check_index, map_tokens
from megatron_cgn.data.lineage import read_lineage
from megatron_cgn.data.preprocess import preprocess
from megatron_cgn.data.reindex import merge, split
from megatron_cgn.errors import ConfigError, DataError
from tests.unit.data_samples import FINGERPRINT, TEXTS, byte_level_tokenizer, write_index

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]


def write(
    prefix: Path,
    documents: list[list[int]],
    *,
    sources: list[int],
    eod_id: int = 0,
    fingerprint: str = FINGERPRINT,
) -> Path:
    """Write an index with a lineage; ``sources`` counts the documents of each input."""
    ids = [f"{prefix.name}-{i}" for i in range(len(documents))]
    columns: dict[str, list[Any]] = {"id": ids, "hash": ids, "license": [None] * len(ids)}
    columns |= {"source": [f"s{i % 3}" for i in range(len(ids))], "classification": ids}
    columns |= {"text_bytes": [3 * len(document) + i for i, document in enumerate(documents)]}
    with IndexWriter(prefix, vocab_size=1000, overwrite=True) as writer:
        flat = [token for document in documents for token in document]
        writer.add(np.array(flat, dtype=np.int64), [len(d) for d in documents], lineage=columns)
        writer.finish(
            tokenizer_fingerprint=fingerprint,
            tokenizer_name="tiny",
            eod_id=eod_id,
            text_bytes=sum(columns["text_bytes"]),
            sources=[
                SourceFile(name=f"in{place}.jsonl", documents=count)
                for place, count in enumerate(sources)
            ],
        )
    return prefix


def read(prefix: Path) -> list[tuple[str, list[int]]]:
    """Ids and tokens of the documents of an index."""
    index = check_index(prefix)
    bounds = np.cumsum([0, *index.lengths])
    tokens = map_tokens(index)
    documents = [tokens[a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    names = [row["id"] for batch in read_lineage(prefix) for row in batch.to_pylist()]
    return list(zip(names, documents, strict=True))


def content(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in ALL_SUFFIXES}


@pytest.fixture
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions, "_TOKENS", 7)
    monkeypatch.setattr(portions, "_ROWS", 5)
    monkeypatch.setattr(lineage, "_GROUP_ROWS", 4)


@pytest.mark.usefixtures("small_portions")
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=4, max_size=30),
    cut=st.integers(1, 3),
    parts=st.integers(2, 3),
)
def test_merging_undoes_splitting(tmp_path: Path, lengths: list[int], cut: int, parts: int) -> None:
    documents = [[i % 1000] * length for i, length in enumerate(lengths)]
    whole = write(tmp_path / "whole", documents, sources=[cut, len(documents) - cut])
    outputs = [tmp_path / f"part{i}" for i in range(parts)]
    try:
        sidecars = split(whole, output_prefixes=outputs, overwrite=True)
    except DataError as error:
        assert "would be empty" in str(error)
        assert max(lengths) * parts > sum(lengths)  # one document fills more than a part
        return
    found = [document for output in outputs for document in read(output)]
    assert found == read(whole)
    assert all(
        sum(s.documents for s in sidecar.sources) == sidecar.documents for sidecar in sidecars
    )
    ideal = sum(lengths) / parts
    assert all(abs(sidecar.tokens - ideal) < max(lengths) for sidecar in sidecars)
    merge(outputs, output_prefix=tmp_path / "again", overwrite=True)
    assert content(tmp_path / "again") == content(whole)


@pytest.mark.usefixtures("small_portions")
def test_held_out_documents_stay_so_when_others_are_added(tmp_path: Path) -> None:
    documents = [[i % 1000, 1] * (1 + i % 5) for i in range(600)]
    first = write(tmp_path / "x", documents[:400], sources=[400])
    split(first, output_prefixes=[tmp_path / "a", tmp_path / "b"], hold_out=0.1)
    held = {name for name, _ in read(tmp_path / "b")}
    # The rule, computed here: the first 8 bytes of the id's hash, as a share of all such numbers.
    share = {
        name: int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
        for name, _ in read(first)
    }
    assert held == {name for name in share if share[name] < 0.1}
    assert 20 < len(held) < 60
    assert sorted(read(tmp_path / "a") + read(tmp_path / "b")) == sorted(read(first))
    more = write(tmp_path / "x", documents, sources=[600])
    split(more, output_prefixes=[tmp_path / "a", tmp_path / "b"], hold_out=0.1, overwrite=True)
    assert {name for name, _ in read(tmp_path / "b")} >= held
    assert not {name for name, _ in read(tmp_path / "a")} & held
    total = check_index(more).sidecar.text_bytes
    assert total == sum(check_index(tmp_path / name).sidecar.text_bytes for name in "ab")


def test_indexes_without_lineage_are_merged_but_not_split(tmp_path: Path) -> None:
    write_index(tmp_path / "a", [[1, 2], [3]])
    write_index(tmp_path / "b", [[4]])
    sidecar = merge([tmp_path / "a", tmp_path / "b"], output_prefix=tmp_path / "ab")
    assert (sidecar.documents, sidecar.tokens, sidecar.lineage) == (3, 4, None)
    assert map_tokens(check_index(tmp_path / "ab")).tolist() == [1, 2, 3, 4]
    with pytest.raises(DataError, match=r"a: has no \.documents\.parquet"):
        split(tmp_path / "a", output_prefixes=[tmp_path / "x", tmp_path / "y"])
    write(tmp_path / "c", [[1]], sources=[1])
    with pytest.raises(DataError, match=r"a: has no \.documents\.parquet"):
        merge([tmp_path / "a", tmp_path / "c"], output_prefix=tmp_path / "ac")
    assert not list(tmp_path.glob("ac*")) and not list(tmp_path.glob("x*"))


def test_faults(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [[1, 2], [3, 4]], sources=[2])
    other = write(tmp_path / "o", [[1]], sources=[1], fingerprint="0" * 32)
    bare = write(tmp_path / "e", [[1]], sources=[1], eod_id=5)
    out, two = tmp_path / "out", [tmp_path / "x", tmp_path / "y"]
    with pytest.raises(DataError, match=r"o: made with another tokenizer \('tiny', 0{32}\)"):
        merge([a, other], output_prefix=out)
    with pytest.raises(DataError, match=r"e: ends its documents with 5, .*a with 0"):
        merge([a, bare], output_prefix=out)
    with pytest.raises(DataError, match="is given twice"):
        merge([a, tmp_path / "." / "a"], output_prefix=out)
    with pytest.raises(DataError, match="is an input"):
        merge([a], output_prefix=a, overwrite=True)
    with pytest.raises(DataError, match="is an input or given twice"):
        split(a, output_prefixes=[tmp_path / "x", tmp_path / "x"])
    with pytest.raises(DataError, match=r"y: would be empty: .*a has 2 documents"):
        split(a, output_prefixes=two, hold_out=1e-9)
    with pytest.raises(ConfigError, match=r"--hold-out 2\.0: give a share between 0 and 1"):
        split(a, output_prefixes=two, hold_out=2.0)
    with pytest.raises(ConfigError, match="--output-prefix has 3 names"):
        split(a, output_prefixes=[*two, out], hold_out=0.5)
    lines = Path(f"{a}.documents.parquet")
    lines.write_bytes(Path(f"{other}.documents.parquet").read_bytes())
    with pytest.raises(DataError, match=r"a\.documents\.parquet: belongs to another index"):
        merge([a], output_prefix=out)
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob("x*"))


def test_what_an_index_holds(tmp_path: Path) -> None:
    tokenizer_dir = byte_level_tokenizer(tmp_path / "tokenizer")
    rows = [
        {"text": text * (1 + i), "source": "wiki" if i % 2 else None, "license": "MIT"}
        for i, text in enumerate(TEXTS)
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    preprocess([tmp_path / "c.jsonl"], tokenizer_dir=tokenizer_dir, output_prefix=tmp_path / "p")
    found = describe(tmp_path / "p", tokenizer_dir=tokenizer_dir, sample=2, sample_tokens=5000)
    assert found.counts["source"] == {None: 3, "wiki": 3}
    assert found.counts["license"] == {"MIT": 6}
    assert found.counts["classification"] == {None: 6}
    lengths = check_index(tmp_path / "p").lengths.tolist()
    assert found.longest_tokens == max(lengths) == lengths[found.longest_document]
    assert found.median_tokens == sum(sorted(lengths)[2:4]) / 2
    assert found.sample[0] == (0, TEXTS[0] + "<|endoftext|>")
    assert found.sample[1] == (5, TEXTS[5] * 6 + "<|endoftext|>")


def test_commands(tmp_path: Path) -> None:
    tokenizer_dir = byte_level_tokenizer(tmp_path / "tokenizer")
    lines = (json.dumps({"text": TEXTS[i % 6] * (1 + i % 4), "id": i}) for i in range(90))
    (tmp_path / "c.jsonl").write_text("\n".join(lines))

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
        )

    steps = [
        ("--input", "c.jsonl", "--tokenizer", tokenizer_dir, "--output-prefix", "p"),
        ("split", "--input", "p", "--output-prefix", "a", "b", "c"),
        ("merge", "--input", "a", "b", "c", "--output-prefix", "q"),
        ("info", "--input", "q", "--tokenizer", tokenizer_dir, "--sample", 1),
    ]
    results = [run(*step) for step in steps]
    assert [result.returncode for result in results] == [0] * 4, [r.stderr for r in results]
    assert [result.stderr for result in results] == [""] * 4
    assert content(tmp_path / "q") == content(tmp_path / "p")
    assert "            90  c.jsonl" in results[3].stdout
    assert "            90  not said" in results[3].stdout
    assert TEXTS[0] in results[3].stdout
    again = run(*steps[2])
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    assert len(again.stderr.splitlines()) == 1
