"""Which files a corpus is made from."""

import hashlib
import os
from pathlib import Path

import pytest

from megatron_cgn.corpus.sources import Inputs, Source, digest, find_inputs
from megatron_cgn.errors import ConfigError, DataError


def _find(*sources: Source, output: Path) -> Inputs:
    return find_inputs(sources, output=output)


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_folders_are_walked_in_order_and_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    _touch(
        folder / "b.jsonl",
        folder / "a" / "2.PDF",
        folder / "a" / "1.json.gz",
        folder / "c.parquet",
        folder / "d.txt.gz",
        folder / "image.png",
        folder / "no_suffix",
        folder / ".hidden" / "x.txt",
    )
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    found = _find(Source(name="domain", paths=(str(folder),)), output=tmp_path / "out")
    assert [(file.name, file.kind) for file in found.files] == [
        ("domain/a/1.json.gz", "lines"),
        ("domain/a/2.PDF", "file"),
        ("domain/b.jsonl", "lines"),
        ("domain/c.parquet", "table"),
    ]
    assert found.skipped == {
        "domain": {".gz": 1, ".png": 1, "broken link": 1, "hidden": 1, "no suffix": 1}
    }
    assert found.total_bytes == 4


def test_sources_keep_their_order(tmp_path: Path) -> None:
    _touch(tmp_path / "a.txt", tmp_path / "b.txt")
    sources = (
        Source(name="second-in-name", paths=(str(tmp_path / "b.txt"),)),
        Source(name="first-in-name", paths=(str(tmp_path / "a.txt"),)),
    )
    found = _find(*sources, output=tmp_path / "out")
    assert [(file.source, file.name) for file in found.files] == [
        (0, "second-in-name/b.txt"),
        (1, "first-in-name/a.txt"),
    ]


@pytest.mark.timeout(10)
def test_links_in_a_circle_are_entered_once(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    _touch(folder / "sub" / "a.txt")
    (folder / "sub" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "twin").symlink_to(folder / "sub", target_is_directory=True)
    found = _find(Source(name="domain", paths=(str(folder),)), output=tmp_path / "out")
    assert [file.name for file in found.files] == ["domain/sub/a.txt"]


def test_a_name_that_is_no_text_becomes_one(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"\xff.txt")
    with open(path, "wb") as file:
        file.write(b"x")
    found = _find(Source(name="domain", paths=(str(tmp_path),)), output=Path("/nowhere/out"))
    assert [file.name for file in found.files] == ["domain/\ufffd.txt"]
    assert digest(found.files[0].path)


@pytest.mark.parametrize(
    ("inputs", "output", "texts"),
    [
        (["missing"], "out", ("missing", "no such input")),
        (["x" * 300], "out", ("no such input",)),
        (["empty"], "out", ("empty", "nothing to read")),
        (["in/a.png"], "out", ("a.png", "unknown kind")),
        (["in", "in"], "out", ("given twice",)),
        (["in", "in/../in"], "out", ("given twice",)),
        (["in", "in/a.txt"], "out", ("a.txt", "given twice")),
        (["in/a.txt", "in"], "out", ("a.txt", "given twice")),
        (["in"], "in/out", ("inside the input", "--output")),
        (["in"], "in", ("inside the input", "--output")),
        (["in/sub/b.txt"], "in", ("inside the output", "--output")),
        (["pipe.txt"], "out", ("pipe.txt", "no regular file")),
    ],
)
def test_inputs_that_cannot_be_used(
    tmp_path: Path, inputs: list[str], output: str, texts: tuple[str, ...]
) -> None:
    _touch(tmp_path / "in" / "a.txt", tmp_path / "in" / "a.png", tmp_path / "in" / "sub" / "b.txt")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    source = Source(name="domain", paths=tuple(str(tmp_path / name) for name in inputs))
    with pytest.raises(DataError) as caught:
        _find(source, output=tmp_path / output)
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize("names", [("a b",), ("a.b",), ("",), ("a", "a")])
def test_names_that_cannot_be_used(tmp_path: Path, names: tuple[str, ...]) -> None:
    sources = tuple(Source(name=name, paths=()) for name in names)
    with pytest.raises(ConfigError, match="source"):
        _find(*sources, output=tmp_path)


def test_digest(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(content)
    assert digest(str(tmp_path / "a")) == hashlib.blake2b(content, digest_size=16).hexdigest()
    with pytest.raises(DataError, match="cannot be read"):
        digest(str(tmp_path / "b"))
