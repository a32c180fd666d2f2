"""Reads JSONL (plain, gzip, zstd), Parquet and saved `datasets` directories, a block at a time.

Blocks come in order, hold every line or row exactly once, and are not parsed here: see
``documents.py``; nor are tables taken apart: see ``tables.py``. Blocks, and what is decompressed at
a time, are of bounded size: only a single line or row larger than that is held whole.
"""

import errno
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_cgn.data import tables
from megatron_cgn.data.documents import LINEAGE_FIELDS, Block
from megatron_cgn.errors import DataError

BLOCK_BYTES = 1 << 20
"""Raw bytes of a block, about."""
BLOCK_ROWS = 512
"""Most rows of a block of a table."""
# zstd makes at most 128 KiB out of the 4 bytes of its smallest block: 32 MiB out of this.
_ZSTD_BYTES = 1 << 10
_ZSTD_WINDOW = 1 << 31  # the largest that `zstd --long` writes

_JSONL = (".jsonl", ".ndjson", ".json")
_KINDS = "*.jsonl, *.jsonl.gz, *.jsonl.zst, *.parquet or a saved Hugging Face datasets directory"


def check_inputs(paths: Sequence[str | Path]) -> int:
    """Check that every input exists, is of a known kind and is given once.

    Args:
        paths: Files and directories.

    Returns:
        Bytes of all inputs on the disk.

    Raises:
        DataError: If one is missing, of an unknown kind or given twice.
    """
    total, seen = 0, set()
    for path in map(Path, paths):
        try:
            _check_input(path)
            total += _disk_bytes(path)
        except OSError as error:
            raise _read_error(path, error) from error
        real = os.path.realpath(path)
        if real in seen:
            raise DataError(
                f"{path}: is given twice (as {real}). Its documents would count twice: name it "
                "once, and raise a source's weight to train on it more."
            )
        seen.add(real)
    return total


def _check_input(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path}: there is no such input. Check the path.")
    if path.is_dir():
        _check_datasets_directory(path)
    elif path.suffix != ".parquet" and _inner_suffix(path) not in _JSONL:
        raise DataError(f"{path}: unknown kind of input. Give {_KINDS}.")


def read_blocks(paths: Sequence[str | Path], *, field: str) -> Iterator[Block]:
    """Read inputs in order, a block at a time.

    Args:
        paths: Files and directories that `check_inputs` accepts.
        field: Name of the text's field; tables give only that column and the lineage's.

    Yields:
        Blocks that together hold every line or row exactly once, in order.

    Raises:
        DataError: If an input is damaged or lacks the field.
    """
    for source, path in enumerate(map(Path, paths)):
        try:
            if path.is_dir() or path.suffix == ".parquet":
                yield from _read_table(source, path, field)
            else:
                yield from _read_lines(source, path)
        except (OSError, EOFError, zlib.error) as error:
            raise _read_error(path, error) from error


def _read_error(path: Path, error: Exception) -> DataError:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EPERM):
        return DataError(f"{path}: may not be read ({error}). Ask its owner for permission to.")
    if number is not None and number != errno.EIO:  # nothing that another copy would mend
        return DataError(f"{path}: cannot be read ({os.strerror(number)}). Check the path.")
    return DataError(
        f"{path}: cannot be read to its end ({error}). The file is damaged or incomplete: "
        "copy it again."
    )


def split_lines(pieces: Iterable[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    r"""Regroup bytes so that every piece ends where a line ends.

    Lines end at ``\n`` alone, as JSON Lines says. However the bytes are cut into pieces, every
    line comes out once and whole.

    Args:
        pieces: Bytes and how far they reach into the input.

    Yields:
        One or more whole lines, and how far they reach. The very last may lack its ``\n``.
    """
    waiting: list[bytes] = []
    reached = 0
    for piece, reached in pieces:
        end = piece.rfind(b"\n") + 1
        if not end:
            waiting.append(piece)
            continue
        yield b"".join([*waiting, piece[:end]]), reached
        waiting = [piece[end:]] if end < len(piece) else []
    if rest := b"".join(waiting):
        yield rest, reached


def _read_lines(source: int, path: Path) -> Iterator[Block]:
    line, before = 1, 0
    for content, reached in split_lines(_read_bytes(path)):
        yield Block(
            source=source,
            path=str(path),
            first=line,
            content=content,
            progress_bytes=reached - before,
        )
        line, before = line + content.count(b"\n"), reached


def _read_bytes(path: Path) -> Iterator[tuple[bytes, int]]:
    """Decompressed pieces of a file, and how far into the compressed file each reaches."""
    # Unbuffered: a buffered read of a pipe goes on in C until it is filled, deaf to signals.
    with path.open("rb", buffering=0) as raw:
        if path.suffix == ".zst":
            yield from _regroup(_read_zstd(raw))
            return
        stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        reached = 0
        while piece := stream.read(BLOCK_BYTES):
            reached = reached + len(piece) if stream is raw else raw.tell()  # pipes cannot tell
            yield piece, reached


def _read_zstd(raw: Any) -> Iterator[tuple[bytes, int]]:
    """Frames one after another. The library's own stream takes a cut-off file for a whole one."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame, started, reached = decompressor.decompressobj(), False, 0
    try:
        for piece in _pieces(raw):
            reached += len(piece)
            while piece:
                started = True
                if text := frame.decompress(piece):
                    yield text, reached
                piece = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, started = decompressor.decompressobj(), False
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if started:
        raise EOFError("it ends within a compressed frame")


def _pieces(raw: Any) -> Iterator[bytes]:
    """So little at a time that what comes out is bounded: the library's output has no limit."""
    while content := raw.read(BLOCK_BYTES // 4):
        for start in range(0, len(content), _ZSTD_BYTES):
            yield content[start : start + _ZSTD_BYTES]


def _regroup(pieces: Iterable[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """Pieces of BLOCK_BYTES, and a rest, out of pieces of any size."""
    waiting: list[bytes] = []
    size = reached = 0
    for piece, reached in pieces:
        for start in range(0, len(piece), BLOCK_BYTES):
            part = piece[start : start + BLOCK_BYTES]
            if size + len(part) > BLOCK_BYTES:
                yield b"".join(waiting), reached
                waiting, size = [], 0
            waiting.append(part)
            size += len(part)
    if waiting:
        yield b"".join(waiting), reached


def _read_table(source: int, path: Path, field: str) -> Iterator[Block]:
    """Blocks of a table; each counts for its share of the bytes on the disk."""
    read = tables.read_directory if path.is_dir() else tables.read_parquet
    size, row = _disk_bytes(path), 0
    parts = read(
        path,
        field=field,
        extra=[name for name in LINEAGE_FIELDS if name != field],
        block_bytes=BLOCK_BYTES,
        block_rows=BLOCK_ROWS,
    )
    for values, extra, rows in parts:
        done = size * (row + len(values)) // rows - size * row // rows
        yield Block(
            source=source,
            path=str(path),
            first=row + 1,
            content=values,
            extra=extra,
            progress_bytes=done,
        )
        row += len(values)


def _check_datasets_directory(path: Path) -> None:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise DataError(
            f"{path}: holds several splits ({', '.join(splits)}). Name those to index, e.g. "
            f"{path / splits[0] if splits else path}."
        )
    if not (path / "state.json").is_file():
        raise DataError(f"{path}: not a saved Hugging Face dataset (no state.json). Give {_KINDS}.")


def _inner_suffix(path: Path) -> str:
    """Suffix of a file without that of its compression."""
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


def _disk_bytes(path: Path) -> int:
    if path.is_dir():
        return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
    return path.stat().st_size
