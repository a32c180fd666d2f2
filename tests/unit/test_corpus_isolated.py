"""Parsers in a process of their own: what ends that process, and what does not end a run."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from corpus_samples import record

from megatron_cgn.corpus.formats import Unreadable, html, isolated
from megatron_cgn.corpus.formats.isolated import FileReader
from megatron_cgn.errors import DataError


@pytest.fixture
def page(tmp_path: Path) -> str:
    path = tmp_path / "a.html"
    path.write_text(f"<html><body><p>{record(1)}</p></body></html>", encoding="utf-8")
    return str(path)


def _hang(content: bytes) -> str:
    while True:
        pass


def _work(content: bytes) -> str:
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
    return "done"


def _crash(content: bytes) -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return ""


def _fail(content: bytes) -> str:
    raise TypeError("no such thing")


def _be_killed(content: bytes) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def _serve_badly(connection: object, max_parse_s: int) -> None:
    read_html = html.read_html
    faults = {
        **{b"hang": _hang, b"crash": _crash, b"fail": _fail},
        **{b"killed": _be_killed, b"busy": _work},
    }
    html.read_html = lambda content: faults.get(content, read_html)(content)
    _serve(connection, max_parse_s)  # type: ignore[arg-type]


_serve = isolated._serve


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileReader]:
    monkeypatch.setattr(isolated, "_serve", _serve_badly)
    reader = FileReader(max_parse_s=1)
    yield reader
    reader.close()


def test_what_a_file_does_to_its_parser_is_about_that_file(
    reader: FileReader, page: str, tmp_path: Path
) -> None:
    for fault, reason, evidence in (
        ("crash", "damaged", "SIGSEGV"),
        ("fail", "damaged", "TypeError: no such thing"),
        ("hang", "too_slow", "read.max_parse_s, which is 1"),
    ):
        (tmp_path / f"{fault}.html").write_bytes(fault.encode())
        with pytest.raises(Unreadable) as caught:
            reader(str(tmp_path / f"{fault}.html"))
        assert caught.value.reason == reason and evidence in caught.value.evidence
        assert reader(page) == record(1)


def test_a_parser_that_was_killed_is_no_fault_of_the_file(
    reader: FileReader, tmp_path: Path
) -> None:
    (tmp_path / "a.html").write_bytes(b"killed")
    with pytest.raises(DataError, match="a.html: its parser was killed"):
        reader(str(tmp_path / "a.html"))


def test_the_limit_is_for_each_file(reader: FileReader, tmp_path: Path) -> None:
    """And not for all of them together, which is longer."""
    (tmp_path / "a.html").write_bytes(b"busy")
    assert [reader(str(tmp_path / "a.html")) for _ in range(5)] == ["done"] * 5
