"""Arrow files and saved `datasets` directories as inputs of a corpus."""

import json
import pickle
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from megatron_cgn.corpus.parts import Part, read_parts
from megatron_cgn.corpus.records import COLUMNS, parse_part
from megatron_cgn.corpus.sources import Source, find_inputs
from megatron_cgn.errors import DataError

ROWS = {"text": [f"{n}" * 300 for n in range(2000)], "id": [f"d{n}" for n in range(2000)]}


def _parts(path: Path, *, part_bytes: int = 1 << 16) -> list[Part]:
    inputs = find_inputs([Source(name="web", paths=(str(path),))], output=path.parent / "out")
    return list(read_parts(inputs.files, columns=("text", *COLUMNS), part_bytes=part_bytes))


def _texts(parts: list[Part]) -> dict[str, str | None]:
    sources = [Source(name="web", paths=())]
    return {
        raw.id: raw.text
        for part in parts
        for raw in parse_part(part, sources=sources, field="text")
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A dataset of two files, with what else is found in such directories."""
    folder = tmp_path / "in" / "saved"
    datasets.Dataset.from_dict(ROWS).save_to_disk(str(folder), num_shards=2)
    (folder / "cache-0123.arrow").write_bytes((folder / "data-00000-of-00002.arrow").read_bytes())
    return folder


@pytest.mark.parametrize("inside", [False, True])
def test_a_saved_dataset(saved: Path, inside: bool) -> None:
    parts = _parts(saved.parent if inside else saved)
    assert _texts(parts) == dict(zip(ROWS["id"], ROWS["text"], strict=True))
    on_disk = sum(path.stat().st_size for path in saved.glob("data-*.arrow"))
    # What follows the last batch is not counted.
    assert 0.99 * on_disk < sum(part.progress_bytes for part in parts) <= on_disk


def test_what_goes_to_a_worker_is_its_part_alone(tmp_path: Path) -> None:
    """And not the batch that it was cut out of."""
    rows = 10_000
    table = pa.table({"text": ["x" * 1000] * rows, "other": ["y" * 1000] * rows})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    parts = _parts(tmp_path / "a.arrow", part_bytes=1 << 20)
    assert len(parts) > 5
    assert max(len(pickle.dumps(part)) for part in parts) < 2 << 20


def test_an_arrow_file_with_an_index(tmp_path: Path) -> None:
    table = pa.table({"text": ["甲", None, "乙"]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    texts = _texts(_parts(tmp_path / "a.arrow"))
    assert texts == {"web/a.arrow#1": "甲", "web/a.arrow#2": None, "web/a.arrow#3": "乙"}


def test_what_cannot_be_read(saved: Path, tmp_path: Path) -> None:
    first = saved / "data-00000-of-00002.arrow"
    content = first.read_bytes()
    for kept in (0, 3, len(content) // 2):
        first.write_bytes(content[:kept])
        with pytest.raises(DataError, match="data-00000.*cannot be read to its end"):
            _parts(saved)
    first.unlink()
    with pytest.raises(DataError, match="data-00000.*missing"):
        _parts(saved)
    (saved / "state.json").write_text(json.dumps({"_data_files": 1}))
    with pytest.raises(DataError, match="state.json"):
        _parts(saved)
    datasets.DatasetDict(test=datasets.Dataset.from_dict(ROWS)).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"several splits \(test\)"):
        _parts(tmp_path / "splits")


def test_a_missing_field(saved: Path) -> None:
    inputs = find_inputs([Source(name="web", paths=(str(saved),))], output=saved.parent / "out")
    with pytest.raises(DataError, match="no field 'body'; the fields are 'text', 'id'"):
        list(read_parts(inputs.files, columns=("body", *COLUMNS), part_bytes=1 << 20))
