"""Documents out of parts, and the parts themselves."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_samples import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cgn.corpus.parts import Part, read_parts
from megatron_cgn.corpus.records import COLUMNS, Raw, parse_part
from megatron_cgn.corpus.sources import Source, find_inputs
from megatron_cgn.errors import DataError


def _parts(*sources: Source, part_bytes: int = 1 << 20) -> list[Part]:
    inputs = find_inputs(sources, output=Path("/nowhere/out"))
    return list(read_parts(inputs.files, columns=("text", *COLUMNS), part_bytes=part_bytes))


def _parse(path: Path, **source: Any) -> list[Raw]:
    given = Source(name="domain", paths=(str(path),), **source)
    return [
        raw for part in _parts(given) for raw in parse_part(part, sources=[given], field="text")
    ]


def test_fields_go_with_the_document(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"id": "a", "text": "甲", "license": "MIT", "classification": "内部", "source": "web"},
        {"id": 7, "text": "乙", "licence": "CC0"},
        {"text": "丙", "source": "web"},
        {"id": "", "text": "丁", "license": None},
    ]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    named = _parse(path, license="default", classification="secret")
    assert [(raw.id, raw.own_id, raw.source, raw.license, raw.classification) for raw in named] == [
        ("a", True, "domain", "MIT", "内部"),
        ("7", True, "domain", "CC0", "secret"),
        ("domain/x.jsonl#3", False, "domain", "default", "secret"),
        ("domain/x.jsonl#4", False, "domain", "default", "secret"),
    ]
    assert [raw.text for raw in named] == ["甲", "乙", "丙", "丁"]
    unnamed = _parse(path, named=False)
    assert [raw.source for raw in unnamed] == ["web", "domain", "web", "domain"]


FAULTS = {
    "{broken": "read/broken_line",
    '{"text": "cut': "read/broken_line",
    "[]": "read/broken_line",
    '"text"': "read/broken_line",
    '{"text": 5}': "read/no_field",
    '{"text": null}': "read/no_field",
    '{"body": "x"}': "read/no_field",
    '{"text": ""}': "read/empty",
    '{"text": " \\n\\u3000"}': "read/empty",
    "[" * 100_000: "read/broken_line",
}


@pytest.mark.parametrize("line", FAULTS, ids=lambda line: line[:12])
def test_a_fault_is_told_and_stops_no_other(tmp_path: Path, line: str) -> None:
    good = json.dumps({"text": "好"})
    path = write_jsonl(tmp_path / "x.jsonl", [good, "", line, good])
    before, fault, after = _parse(path)
    assert (before.text, after.text) == ("好", "好")
    assert (fault.text, fault.reason) == (None, FAULTS[line])
    assert fault.id == "domain/x.jsonl#3"
    assert fault.evidence is not None and fault.evidence.startswith("domain/x.jsonl, line 3: ")
    assert after.id == "domain/x.jsonl#4"


def test_a_field_of_another_name_is_told(tmp_path: Path) -> None:
    (raw,) = _parse(write_jsonl(tmp_path / "x.jsonl", [{"content": "x", "title": "y"}]))
    assert raw.evidence is not None and "'content', 'title'" in raw.evidence


def test_bytes_that_are_no_utf8_are_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + '{"text": "好"}\n'.encode() + '{"text": "坏"}\n'.encode("gb18030")
    )
    first, second = _parse(path)
    assert first.text == "好"
    assert (second.reason, second.id) == ("read/broken_line", "domain/x.jsonl#2")


def test_lone_surrogates_are_repaired(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "x.jsonl", ['{"id": "\\ud800", "text": "a\\ud83d\\ude00\\udc00"}']
    )
    (raw,) = _parse(path)
    assert (raw.text, raw.repaired, raw.id) == ("a😀\ufffd", True, "\ufffd")


def test_numbers_that_only_python_reads(tmp_path: Path) -> None:
    """Json of Python's own making, which stricter parsers refuse."""
    (raw,) = _parse(write_jsonl(tmp_path / "x.jsonl", ['{"text": "a", "score": NaN}']))
    assert raw.text == "a"


def test_rows_of_a_table(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2, 3], "text": ["甲", None, "丙"], "other": [0.5, 1.5, 2.5]})
    pq.write_table(table, tmp_path / "x.parquet")
    raws = _parse(tmp_path / "x.parquet")
    assert [(raw.id, raw.text, raw.reason) for raw in raws] == [
        ("1", "甲", None),
        ("2", None, "read/no_field"),
        ("3", "丙", None),
    ]
    assert raws[1].evidence == "domain/x.parquet, row 2: the field 'text' is null, not a text"


def test_a_table_with_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    binary = pa.array([b"good", b"\xff", b"fine"])
    texts = pa.StringArray.from_buffers(3, binary.buffers()[1], binary.buffers()[2])
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    assert [raw.reason for raw in _parse(tmp_path / "x.parquet")] == [
        None,
        "read/undecodable",
        None,
    ]


def test_a_table_without_the_field_stops(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="--field"):
        _parse(tmp_path / "x.parquet")


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl.gz", "x.jsonl.zst"])
def test_a_damaged_archive_stops(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1 or not")
    with pytest.raises(DataError, match=r"copy it again"):
        _parse(tmp_path / name)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=4),
    part_bytes=st.integers(1, 2000),
    packed=st.booleans(),
)
def test_parts_hold_everything_once(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    cuts: list[int],
    part_bytes: int,
    packed: bool,
) -> None:
    folder = tmp_path_factory.mktemp("in")
    lines = [
        json.dumps({"id": str(place), "text": "x" * size or "y"})
        for place, size in enumerate(sizes)
    ]
    bounds = sorted({0, len(lines), *(cut for cut in cuts if cut < len(lines))})
    for number, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        content = "".join(f"{line}\n" for line in lines[start:end]).encode()
        if packed:
            (folder / f"{number:02d}.jsonl.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"{number:02d}.jsonl").write_bytes(content)
    source = Source(name="domain", paths=(str(folder),))
    parts = _parts(source, part_bytes=part_bytes)
    raws = [raw for part in parts for raw in parse_part(part, sources=[source], field="text")]
    assert [raw.id for raw in raws] == [str(place) for place in range(len(sizes))]
    assert [part.index for part in parts] == list(range(len(parts)))
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    assert sum(part.progress_bytes for part in parts) == on_disk


def test_a_part_has_one_source(tmp_path: Path) -> None:
    sources = [
        Source(name=name, paths=(str(write_jsonl(tmp_path / f"{name}.jsonl", [{"text": "x"}])),))
        for name in ("a", "b")
    ]
    assert [part.source for part in _parts(*sources)] == [0, 1]
