"""Readers: all formats give the same documents, none twice, none lost; faults have a place."""

import gzip
import json
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cgn.data import readers
from megatron_cgn.data.documents import parse_block
from megatron_cgn.data.readers import check_inputs, read_blocks, split_lines
from megatron_cgn.errors import DataError

ROWS = [
    {"text": f"document {i}\u2028with\ra\nbreak 核电 {'x' * (i % 7) * 40}", "id": i}
    for i in range(200)
]
TEXTS = [str(row["text"]) for row in ROWS]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks far smaller than the inputs, so that there are many."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(readers, "BLOCK_ROWS", 7)


def read(*paths: Path, field: str = "text") -> list[str]:
    check_inputs(paths)
    blocks = read_blocks(paths, field=field)
    return [text for block in blocks for text in parse_block(block, field=field).texts]


def jsonl(rows: Sequence[Any], *, ascii_only: bool = False) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=ascii_only).encode() + b"\n" for row in rows)


def write_plain(path: Path) -> Path:
    path = path / "c.jsonl"
    path.write_bytes(jsonl(ROWS))
    return path


def write_gzip(path: Path) -> Path:
    path = path / "c.jsonl.gz"  # two members, as `cat a.gz b.gz` makes them
    path.write_bytes(gzip.compress(jsonl(ROWS[:90])) + gzip.compress(jsonl(ROWS[90:])))
    return path


def write_zstd(path: Path) -> Path:
    path = path / "c.jsonl.zst"  # two frames
    compress = zstandard.ZstdCompressor().compress
    path.write_bytes(compress(jsonl(ROWS[:90])) + compress(jsonl(ROWS[90:])))
    return path


def write_parquet(path: Path) -> Path:
    path = path / "c.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=50)
    return path


def write_datasets(path: Path) -> Path:
    path = path / "saved"
    shuffled = datasets.Dataset.from_list(ROWS[::-1])
    shuffled.select(range(len(ROWS) - 1, -1, -1)).save_to_disk(path)  # indices, not rows, reversed
    return path


WRITERS = [write_plain, write_gzip, write_zstd, write_parquet, write_datasets]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_documents(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    path = write(tmp_path)
    assert read(path) == TEXTS
    blocks = list(read_blocks([path], field="text"))
    assert len(blocks) > 10 or write in (write_gzip, write_zstd)
    assert sum(block.progress_bytes for block in blocks) == check_inputs([path])


def test_inputs_follow_one_another(tmp_path: Path) -> None:
    paths = [write_parquet(tmp_path), write_plain(tmp_path)]
    assert read(*paths) == TEXTS * 2
    sources = [block.source for block in read_blocks(paths, field="text")]
    assert sources == sorted(sources) and set(sources) == {0, 1}


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=8).map(lambda b: b.replace(b"\n", b"")), max_size=12),
    last_newline=st.booleans(),
    cuts=st.lists(st.integers(0, 100), max_size=10),
)
def test_lines_survive_any_cut(lines: list[bytes], last_newline: bool, cuts: list[int]) -> None:
    content = b"\n".join(lines) + (b"\n" if last_newline else b"")
    bounds = sorted({0, len(content), *(min(cut, len(content)) for cut in cuts)})
    pieces = [(content[a:b], b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    blocks = [block for block, _ in split_lines(pieces)]
    assert b"".join(blocks) == content
    assert all(block.endswith(b"\n") for block in blocks[:-1])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 64, 10_000])
def test_no_block_size_loses_or_repeats_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", size)
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS[:9]) + b"\r\n\n" + jsonl(ROWS[9:12]).rstrip())
    assert read(path) == TEXTS[:12]


def test_empty_documents_are_counted_and_surrogates_repaired(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(
        '{"text": ""}\n{"text": " \\n"}\n{"text": "a\\ud800b"}\n{"text": "\\udc00"}\n'
        '{"text": "\\ud83d\\ude00"}\n'
    )
    (block,) = read_blocks([path], field="text")
    parsed = parse_block(block, field="text")
    assert parsed.texts == ["a\ufffdb", "\ufffd", "😀"]
    assert (parsed.empty, parsed.repaired) == (2, 2)


BAD_LINES = {
    b'{"text": "cut': r"c\.jsonl, line 121: not valid JSON",
    b'{"text": "\xff"}': r"line 121: not valid JSON \('utf-8' codec",
    b'{"texts": "x", "id": 1}': r"line 121: no field 'text'; the fields are 'texts', 'id'.*--field",
    b"{}": r"line 121: no field 'text'; the fields are none",
    b'["x"]': r"line 121: expected a JSON object with the field 'text', found a list",
    b'{"text": null}': r"line 121: the field 'text' is null",
    b'{"text": 5}': r"line 121: the field 'text' is a int, not a text",
    b"[": r"line 121: not valid JSON .*\. Give JSON Lines, one object a line",
    b"{": r"line 121: not valid JSON .*\. Give JSON Lines, one object a line",
    b"[" * 200_000: r"line 121: JSON nested too deeply",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20].decode("latin-1"))
def test_bad_lines_are_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(jsonl(ROWS[:119]) + b"\n" + line + b"\n" + jsonl(ROWS))
    with pytest.raises(DataError, match=BAD_LINES[line]):
        read(path)


def test_bad_tables_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.Table.from_pylist([*ROWS[:29], {"text": None}]), path)
    with pytest.raises(DataError, match=r"c\.parquet, row 30: the field 'text' is null"):
        read(path)
    with pytest.raises(DataError, match=r"no field 'body'; the fields are 'text', 'id'"):
        read(path, field="body")
    with pytest.raises(DataError, match=r"the field 'id' holds int64, not texts"):
        read(path, field="id")
    saved = write_datasets(tmp_path)
    with pytest.raises(DataError, match=r"saved: no field 'body'"):
        read(saved, field="body")


@pytest.mark.parametrize("write", [write_gzip, write_zstd, write_parquet])
@pytest.mark.parametrize("part", [0.2, 0.98])
def test_truncated_files_are_faults(
    tmp_path: Path, write: Callable[[Path], Path], part: float
) -> None:
    path = write(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(DataError, match="cannot be read to its end.*copy it again"):
        read(path)


def test_garbage_is_a_fault(tmp_path: Path) -> None:
    for name in ("c.jsonl.gz", "c.jsonl.zst", "c.parquet"):
        (tmp_path / name).write_bytes(b"garbage" * 100)
        with pytest.raises(DataError, match="cannot be read to its end"):
            read(tmp_path / name)
    saved = write_datasets(tmp_path)
    next(saved.glob("*.arrow")).write_bytes(b"garbage")
    with pytest.raises(DataError, match="cannot be read to its end"):
        read(saved)


def test_unknown_inputs_are_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such input"):
        check_inputs([tmp_path / "absent.jsonl"])
    (tmp_path / "c.csv.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"c\.csv\.gz: unknown kind of input"):
        check_inputs([tmp_path / "c.csv.gz"])
    with pytest.raises(DataError, match="not a saved Hugging Face dataset"):
        check_inputs([tmp_path])
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"holds several splits \(test, train\)"):
        check_inputs([tmp_path / "both"])
    assert read(tmp_path / "both" / "train") == TEXTS


def test_an_input_counts_once(tmp_path: Path) -> None:
    path = write_plain(tmp_path)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    for twice in ([path, path], [path, link], [path, tmp_path / "." / ".." / tmp_path.name / path]):
        with pytest.raises(DataError, match=r"\.jsonl: is given twice"):
            check_inputs(twice)


def test_blocks_of_tables_are_bounded(tmp_path: Path) -> None:
    sizes = [10] * 5 + [900] * 6 + [5000] + [300] * 9 + [None] + [1000, 1, 1000]
    texts = [None if size is None else "核" * (size // 3) + "x" * (size % 3) for size in sizes]
    plain = pa.array(texts)
    kinds = {
        "string": plain,
        "large": plain.cast(pa.large_string()),
        "dictionary": plain.dictionary_encode(),
    }
    for kind, column in kinds.items():
        path = tmp_path / f"{kind}.parquet"
        pq.write_table(pa.table({"text": column}), path)
        contents = [block.content for block in read_blocks([path], field="text")]
        assert [text for content in contents for text in content] == texts
        for content in contents:
            size = sum(len(text.encode()) for text in content if text is not None)
            assert size <= 1000 or len(content) == 1, kind
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(saved)
    blocks = list(read_blocks([saved], field="text"))
    assert [text for block in blocks for text in block.content] == texts
    assert all(block.size <= 1000 or len(block.content) == 1 for block in blocks)


def test_dictionary_columns_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    texts = pa.array(["a", "b", "a", "核电"]).dictionary_encode()
    pq.write_table(pa.table({"text": texts, "id": pa.array([1] * 4).dictionary_encode()}), path)
    assert read(path) == ["a", "b", "a", "核电"]
    with pytest.raises(DataError, match=r"the field 'id' holds .*, not texts"):
        read(path, field="id")


def test_broken_texts_of_a_table_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    broken = pa.array([b"fine"] * 20 + [b"\xff\xfe", b"fine"])
    column = pa.StringArray.from_buffers(len(broken), *broken.buffers()[1:])
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(DataError, match=r"c\.parquet, row 21: not valid UTF-8"):
        read(path)


def test_columns_of_one_name_are_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(DataError, match=r"c\.parquet: 2 columns are called 'text'"):
        read(path)


def test_zstd_is_decompressed_in_bounded_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # blocks of the usual size
    line = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    content = line * 64_000
    path = tmp_path / "c.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(content))
    tracemalloc.start()
    try:
        held = tracemalloc.get_traced_memory()[0]
        size = 0
        for block in read_blocks([path], field="text"):
            assert block.size < readers.BLOCK_BYTES + len(line)
            size += block.size
        peak = tracemalloc.get_traced_memory()[1] - held
    finally:
        tracemalloc.stop()
    assert size == len(content)
    assert peak < len(content) / 2


def test_zstd_with_the_longest_window_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.zst"
    content = jsonl(ROWS)
    # Magic, no options, a window of 2**(10 + 21) bytes, and one raw block that is the last.
    header = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3])
    path.write_bytes(header + (len(content) << 3 | 1).to_bytes(3, "little") + content)
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << 31
    assert read(path) == TEXTS


def test_paths_that_cannot_be_read_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"cannot be read \(File name too long\)"):
        check_inputs([tmp_path / ("c" * 300 + ".jsonl")])
    path = write_plain(tmp_path)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(readers, "_read_bytes", refuse)  # to root everything is permitted
    with pytest.raises(DataError, match=r"c\.jsonl: may not be read .*Permission denied"):
        read(path)


def test_an_array_over_lines_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for indent in (None, 2):
        path.write_text(json.dumps(ROWS[:3], indent=indent))
        with pytest.raises(DataError, match=r"c\.json, line 1: .*Give JSON Lines, one object a li"):
            read(path)
