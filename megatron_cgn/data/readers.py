"""Reads JSONL (plain, gzip, zstd), Parquet and saved `datasets` directories, a block at a time.

Blocks come in order, hold every line or row exactly once, and are not parsed here: see
``documents.py``. No more than a block is in memory.
"""

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cgn.data.documents import Block
from megatron_cgn.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_BYTES = 1 << 20
"""Raw bytes of a block of lines, about."""
BLOCK_ROWS = 512
"""Rows of a block of a table."""

_JSONL = (".jsonl", ".ndjson", ".json")
_KINDS = "*.jsonl, *.jsonl.gz, *.jsonl.zst, *.parquet or a saved Hugging Face datasets directory"


def check_inputs(paths: Sequence[str | Path]) -> int:
    """Check that every input exists and is of a known kind.

    Args:
        paths: Files and directories.

    Returns:
        Bytes of all inputs on the disk.

    Raises:
        DataError: If one is missing or of an unknown kind.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: there is no such input. Check the path.")
        if path.is_dir():
            _check_datasets_directory(path)
        elif path.suffix != ".parquet" and _inner_suffix(path) not in _JSONL:
            raise DataError(f"{path}: unknown kind of input. Give {_KINDS}.")
    return sum(_disk_bytes(Path(path)) for path in paths)


def read_blocks(paths: Sequence[str | Path], *, field: str) -> Iterator[Block]:
    """Read inputs in order, a block at a time.

    Args:
        paths: Files and directories that `check_inputs` accepts.
        field: Name of the text's field; tables give only that column.

    Yields:
        Blocks that together hold every line or row exactly once, in order.

    Raises:
        DataError: If an input is damaged or lacks the field.
    """
    for source, path in enumerate(map(Path, paths)):
        try:
            if path.is_dir():
                yield from _read_directory(source, path, field)
            elif path.suffix == ".parquet":
                yield from _read_parquet(source, path, field)
            else:
                yield from _read_lines(source, path)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}: cannot be read to its end ({error}). The file is damaged or incomplete: "
                "copy it again."
            ) from error


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
            yield from _read_zstd(path, raw)
            return
        stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        reached = 0
        while piece := stream.read(BLOCK_BYTES):
            reached = reached + len(piece) if stream is raw else raw.tell()  # pipes cannot tell
            yield piece, reached


def _read_zstd(path: Path, raw: Any) -> Iterator[tuple[bytes, int]]:
    """Frames one after another. The library's own stream takes a cut-off file for a whole one."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    started = False
    try:
        while piece := raw.read(BLOCK_BYTES // 4):
            while piece:
                started = True
                if text := frame.decompress(piece):
                    yield text, raw.tell()
                piece = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, started = zstandard.ZstdDecompressor().decompressobj(), False
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if started:
        raise EOFError("it ends within a compressed frame")


def _read_parquet(source: int, path: Path, field: str) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_column(file.schema_arrow, path, field)
            batches = file.iter_batches(batch_size=BLOCK_ROWS, columns=[field])
            rows = file.metadata.num_rows
            yield from _table_blocks(batches, source, path, field=field, rows=rows)
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def _read_directory(source: int, path: Path, field: str) -> Iterator[Block]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(str(error)) from error
    _check_column(dataset.features.arrow_schema, path, field)
    table = dataset.select_columns([field]).with_format("arrow")
    batches = table.iter(batch_size=BLOCK_ROWS)
    yield from _table_blocks(batches, source, path, field=field, rows=len(dataset))


def _check_column(schema: "pa.Schema", path: Path, field: str) -> None:
    import pyarrow as pa

    if field not in schema.names:
        raise DataError(
            f"{path}: no field {field!r}; the fields are {', '.join(map(repr, schema.names))}. "
            "Name the text's field with --field."
        )
    kind = schema.field(field).type
    if not any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    ):
        raise DataError(
            f"{path}: the field {field!r} holds {kind}, not texts. Name the text's field with "
            "--field."
        )


def _table_blocks(
    batches: Iterable[Any], source: int, path: Path, *, field: str, rows: int
) -> Iterator[Block]:
    """Blocks of a table's batches; each counts for its share of the bytes on the disk."""
    size, row = _disk_bytes(path), 0
    for batch in batches:
        values = batch.column(field).to_pylist()
        done = size * (row + len(values)) // rows - size * row // rows
        yield Block(
            source=source, path=str(path), first=row + 1, content=values, progress_bytes=done
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
