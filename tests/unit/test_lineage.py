"""Where documents come from: kept for each, through every format, found again."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cgn.data import documents, lineage
from megatron_cgn.data.documents import Block, parse_block
from megatron_cgn.data.index_writer import IndexWriter
from megatron_cgn.data.indexed import check_index
from megatron_cgn.data.lineage import (
    COLUMNS,
    LineageWriter,
    content_hash,
    find_documents,
    read_lineage,
)
from megatron_cgn.data.preprocess import preprocess
from megatron_cgn.data.readers import read_blocks
from megatron_cgn.errors import DataError
from tests.unit.data_samples import byte_level_tokenizer, write_index

ROWS: list[dict[str, Any]] = [
    {
        "id": "manual/1",
        "text": "安全壳",
        "source": "manuals",
        "license": "内部",
        "classification": "restricted",
        "hash": "ab" * 16,
    },
    {"id": 7, "text": "an id that is a number", "licence": "MIT"},
    {"text": "nothing said"},
    {"id": None, "text": "null", "source": None, "license": "", "licence": "CC0-1.0"},
    {"id": "", "text": "no name", "source": {"url": "https://x.org", "页": 3}, "license": ["a"]},
]


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def expected(name: str) -> list[dict[str, Any]]:
    def row(place: int, **known: Any) -> dict[str, Any]:
        text = ROWS[place]["text"]
        empty = {"source": None, "license": None, "classification": None, "hash": digest(text)}
        return {"id": f"{name}#{place + 1}", **empty, "text_bytes": len(text.encode()), **known}

    source = '{"url": "https://x.org", "页": 3}'
    first = {name: ROWS[0][name] for name in ("id", "source", "license", "classification", "hash")}
    return [
        row(0, **first),
        row(1, id="7", license="MIT"),
        row(2),
        row(3, license="CC0-1.0"),
        row(4, source=source, license='["a"]'),
    ]


def rows_of(prefix: Path) -> list[dict[str, Any]]:
    return [row for batch in read_lineage(prefix) for row in batch.to_pylist()]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_every_document_has_its_row(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = tmp_path / "c.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    source.write_text("\n".join(lines[:2]) + "\n" + "\n".join(lines[2:]) + '\n{"text": " "}\n')
    preprocess([source], tokenizer_dir=tokenizer_dir, output_prefix=tmp_path / "p")
    assert rows_of(tmp_path / "p") == expected("c.jsonl")
    path = tmp_path / "p.documents.parquet"
    found = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    assert check_index(tmp_path / "p").sidecar.lineage == found
    assert pq.read_schema(path).names == list(COLUMNS)


def test_lines_that_only_pythons_parser_accepts(tmp_path: Path) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text(
        '{"text": "a", "id": NaN, "source": "\\ud800x"}\n'
        '{"text": "b", "id": 123456789012345678901234567890}\n'
    )
    (block,) = read_blocks([source], field="text")
    parsed = parse_block(block, field="text")
    assert parsed.texts == ["a", "b"]
    assert parsed.lineage["id"] == ["NaN", "123456789012345678901234567890"]
    assert parsed.lineage["source"] == ["\ufffdx", None]


def test_without_orjson_the_same_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in ROWS) + '\n\n{"text": "\\ud800"}')
    lines = source.read_bytes()
    block = Block(source=0, path="c.jsonl", first=1, content=lines, progress_bytes=len(lines))
    fast = parse_block(block, field="text")
    monkeypatch.setitem(sys.modules, "orjson", None)
    documents._fast_loads.cache_clear()
    try:
        assert parse_block(block, field="text") == fast
        assert fast.repaired == 1
    finally:
        documents._fast_loads.cache_clear()


def test_tables_give_the_columns_they_have(tmp_path: Path) -> None:
    rows = [{"id": i, "text": f"text {i}", "source": "s" if i % 2 else None} for i in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=11)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name in ("c.parquet", "saved"):
        parts = [
            parse_block(block, field="text").lineage
            for block in read_blocks([tmp_path / name], field="text")
        ]
        ids = [value for part in parts for value in part["id"]]
        sources = [value for part in parts for value in part["source"]]
        assert ids == [str(i) for i in range(30)]
        assert sources == [None, "s"] * 15


def columns(ids: list[str], source: str | None = "s") -> dict[str, list[Any]]:
    texts = {name: [source] * len(ids) for name in ("source", "license", "classification")}
    return {"id": ids, **texts, "hash": [content_hash(i.encode()) for i in ids]} | {
        "text_bytes": [1] * len(ids)
    }


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(portions=st.lists(st.integers(0, 9), max_size=12))
def test_the_file_does_not_show_how_rows_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, portions: list[int]
) -> None:
    monkeypatch.setattr(lineage, "_GROUP_ROWS", 4)
    ids = [f"d{i}" for i in range(sum(portions))]
    several, single = (LineageWriter(tmp_path / name) for name in "ab")
    start = 0
    for size in portions:
        several.add(columns(ids[start : start + size]))
        start += size
    single.add(columns(ids))
    assert several.finish() == single.finish()
    assert pq.read_table(tmp_path / "a").column("id").to_pylist() == ids
    metadata = pq.read_metadata(tmp_path / "a")
    assert metadata.num_row_groups == -(-len(ids) // 4)


def test_documents_are_found_by_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "_GROUP_ROWS", 4)
    writer = LineageWriter(tmp_path / "p.documents.parquet")
    writer.add(columns(["a", "b", "a", "c", "d", "a"]))
    writer.finish()
    assert find_documents(tmp_path / "p", ["a", "d", "x"]) == {"a": [0, 2, 5], "d": [4], "x": []}


def test_faults_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p\.documents\.parquet: there is no such file"):
        list(read_lineage(tmp_path / "p"))
    (tmp_path / "p.documents.parquet").write_bytes(b"PAR1 garbage")
    with pytest.raises(DataError, match=r"p\.documents\.parquet: cannot be read"):
        list(read_lineage(tmp_path / "p"))
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "p.documents.parquet")
    with pytest.raises(DataError, match=r"no column 'source'"):
        list(read_lineage(tmp_path / "p"))


def test_an_index_without_lineage_removes_the_old_one(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text(json.dumps(ROWS[0]))
    preprocess([source], tokenizer_dir=tokenizer_dir, output_prefix=tmp_path / "p")
    write_index(tmp_path / "p", [[1, 2]], overwrite=True)
    assert check_index(tmp_path / "p").sidecar.lineage is None
    assert not (tmp_path / "p.documents.parquet").exists()


def test_sidecars_made_before_there_was_a_lineage_are_read(tmp_path: Path) -> None:
    write_index(tmp_path / "p", [[1, 2]])
    sidecar = tmp_path / "p.json"
    content = json.loads(sidecar.read_text())
    del content["lineage"]
    sidecar.write_text(json.dumps(content))
    assert check_index(tmp_path / "p").sidecar.lineage is None


def test_a_table_that_is_no_lineage_is_not_replaced(tmp_path: Path) -> None:
    theirs = tmp_path / "p.documents.parquet"
    pq.write_table(pa.table({"text": ["a"]}), theirs)
    before = theirs.read_bytes()
    with (
        pytest.raises(DataError, match=r"p\.documents\.parquet: not of an index"),
        IndexWriter(tmp_path / "p", vocab_size=10, overwrite=True),
    ):
        pass
    assert theirs.read_bytes() == before
    assert list(tmp_path.iterdir()) == [theirs]
