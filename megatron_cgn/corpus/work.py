"""The work directory of a run: what is done stays done, whatever ends the run.

A result is a directory that appears under its name only when it is whole, so its being there says
that it need not be made again. Everything is below ``DIR/.work``, which only its owner may enter:
it holds raw text.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import zstandard

from megatron_cgn.errors import ConfigError

_PER_FOLDER = 1000
# Read back once, soon, on the same machine.
_FAST_LEVEL = 1


def fast_json() -> Any:
    """The module `orjson`.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import orjson
    except ImportError as error:
        raise ConfigError(
            "making a corpus needs the package orjson: install 'megatron-cgn[corpus]'."
        ) from error
    return orjson


class Work:
    """Results of a run, by stage and number."""

    def __init__(self, root: Path) -> None:
        """Name the place.

        Args:
            root: The directory; see `create`.
        """
        self.root = root

    def create(self) -> None:
        """Make the directory, for its owner alone, if it is not there."""
        self.root.mkdir(mode=0o700, exist_ok=True)

    def discard(self) -> None:
        """Remove the directory: at once as far as a later run can see."""
        old = self.root.with_name(f"{self.root.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.root.exists():
            self.root.rename(old)
            shutil.rmtree(old)

    def path(self, stage: str, index: int | None = None) -> Path:
        """Where a result is, or will be: of a stage, or of a part of a stage."""
        if index is None:
            return self.root / stage
        return self.root / stage / f"{index // _PER_FOLDER:04d}" / f"{index:07d}"

    def done(self, stage: str, index: int | None = None) -> bool:
        """Tell whether a result is there."""
        return self.path(stage, index).exists()

    @contextmanager
    def writing(self, stage: str, index: int | None = None) -> Iterator[Path]:
        """Make a result.

        Yields:
            An empty directory, which gets the result's name if the block ends well.
        """
        target = self.path(stage, index)
        beside = target.with_name(f"{target.name}.partial")
        if beside.exists():
            shutil.rmtree(beside)
        beside.mkdir(parents=True)
        yield beside
        for file in beside.iterdir():
            sync(file)
        sync(beside)
        beside.rename(target)
        sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot for directories
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    beside = path.with_name(f"{path.name}.partial")
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    try:
        beside.write_text(text, encoding="utf-8")
    except UnicodeEncodeError:  # the name of a file may be no valid text
        beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    sync(beside)
    beside.rename(path)


def read_json(path: Path) -> Any:
    """Read a file that `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


class LinesWriter:
    """Writes JSON Lines, compressed as one frame: many readers stop after the first."""

    def __init__(self, path: Path, *, level: int = _FAST_LEVEL, mode: int = 0o666) -> None:
        """Open a file.

        Args:
            path: The file; replaced if it is there.
            level: Of zstd.
            mode: Permissions, less the process's umask.
        """
        self.num_rows = 0
        self.num_bytes = 0
        """Bytes of the lines before compression."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        json_module = fast_json()
        self._dumps = partial(json_module.dumps, option=json_module.OPT_APPEND_NEWLINE)
        compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
        self._file = compressor.stream_writer(open(descriptor, "wb"), closefd=True)

    def write(self, row: dict[str, Any]) -> int:
        """Append an object; returns the bytes of its line."""
        return self.write_line(self._dumps(row))

    def write_line(self, line: bytes) -> int:
        """Append a line that ends with a line feed; returns its bytes."""
        self._file.write(line)
        self.num_rows += 1
        self.num_bytes += len(line)
        return len(line)

    def __enter__(self) -> "LinesWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()  # type: ignore[no-untyped-call]


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file that `LinesWriter` wrote, without their line feeds."""
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
        waiting: list[bytes] = []
        while piece := reader.read(1 << 18):
            lines = piece.split(b"\n")
            waiting.append(lines[0])
            if len(lines) > 1:
                yield b"".join(waiting)
                yield from lines[1:-1]
                waiting = [lines[-1]]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file that `LinesWriter` wrote."""
    yield from map(fast_json().loads, read_lines(path))
