"""Cuts the inputs into parts: consecutive documents of one source, the unit of work.

Parts depend on the inputs alone, never on the number of workers; all that comes after is a map over
them. Nothing is parsed here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cgn.corpus.sources import InputFile
from megatron_cgn.data.readers import read_blocks
from megatron_cgn.errors import DataError

_PART_FILES = 64
_PART_ROWS = 20_000
_TABLE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Whole lines of a JSON Lines file."""

    file: InputFile
    """Where they are from."""
    first: int
    """Number of the first line, counted from 1."""
    content: bytes
    """The lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of a table."""

    file: InputFile
    """Where they are from."""
    first: int
    """Number of the first row, counted from 1."""
    batch: Any
    """A `pyarrow.RecordBatch` of the columns that are used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A file that is one document."""

    file: InputFile
    """The file."""


Item = Lines | Rows | Whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Consecutive documents of one source."""

    index: int
    """Place among all parts."""
    source: int
    """Place of the source."""
    items: tuple[Item, ...]
    """What to parse, in order."""
    progress_bytes: int
    """Bytes of the inputs used up, as they lie on the disk."""


def read_parts(
    files: Sequence[InputFile], *, columns: Sequence[str], part_bytes: int
) -> Iterator[Part]:
    """Cut inputs into parts.

    Args:
        files: The inputs in order.
        columns: Columns to read from tables, where they have them.
        part_bytes: Raw bytes at which a part ends; only a single longer line, row or file makes a
            larger one.

    Yields:
        Parts in order, which together hold everything exactly once.

    Raises:
        DataError: If an input is damaged in a way that leaves the rest of it unreadable.
    """
    waiting: list[Item] = []
    index = size = progress = 0
    source = files[0].source if files else 0
    for item, item_source, item_bytes, item_progress in _items(files, columns):
        full = size + item_bytes > part_bytes or len(waiting) >= _PART_FILES
        if waiting and (item_source != source or full):
            yield Part(index=index, source=source, items=tuple(waiting), progress_bytes=progress)
            index, size, progress, waiting = index + 1, 0, 0, []
        waiting.append(item)
        source, size, progress = item_source, size + item_bytes, progress + item_progress
    if waiting:
        yield Part(index=index, source=source, items=tuple(waiting), progress_bytes=progress)


def _items(
    files: Sequence[InputFile], columns: Sequence[str]
) -> Iterator[tuple[Item, int, int, int]]:
    """Items with their source, their bytes, and the bytes on the disk they use up."""
    for file in files:
        if file.kind == "lines":
            for block in read_blocks([file.path], field=columns[0]):
                assert isinstance(block.content, bytes)
                lines = Lines(file=file, first=block.first, content=block.content)
                yield lines, file.source, len(block.content), block.progress_bytes
        elif file.kind == "table":
            for rows, size, progress in _read_table(file, columns):
                yield rows, file.source, size, progress
        else:
            yield Whole(file=file), file.source, file.size_bytes, file.size_bytes


def _read_table(file: InputFile, columns: Sequence[str]) -> Iterator[tuple[Rows, int, int]]:
    import pyarrow as pa

    read = _read_arrow if file.path.lower().endswith(".arrow") else _read_parquet
    done = 0
    try:
        for batch, progress in read(file, columns):
            yield Rows(file=file, first=done + 1, batch=batch), batch.nbytes, progress
            done += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file.path}: cannot be read to its end ({error}). The file is damaged or "
            "incomplete: copy it again."
        ) from error


def _read_parquet(file: InputFile, columns: Sequence[str]) -> Iterator[tuple[Any, int]]:
    """Batches of a Parquet file, and the bytes of the file that each uses up."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file.path, buffer_size=_TABLE_BYTES) as table:
        present = _present(file, table.schema_arrow.names, columns)
        total, done = table.metadata.num_rows, 0
        for batch in table.iter_batches(batch_size=_batch_rows(table), columns=present):
            reached = done + batch.num_rows
            yield batch, file.size_bytes * reached // total - file.size_bytes * done // total
            done = reached


def _read_arrow(file: InputFile, columns: Sequence[str]) -> Iterator[tuple[Any, int]]:
    """The same of an Arrow file: a stream, as `datasets` saves it, or one with an index."""
    import pyarrow as pa

    with pa.memory_map(file.path) as mapped:
        before = 0
        if mapped.read(6) == b"ARROW1":
            indexed = pa.ipc.open_file(mapped)
            schema, stored = (
                indexed.schema,
                map(indexed.get_batch, range(indexed.num_record_batches)),
            )
        else:
            mapped.seek(0)
            stored = pa.ipc.open_stream(mapped)
            schema = stored.schema
        present = _present(file, schema.names, columns)
        for batch in stored:
            narrow = batch.select(present)
            size = max(1, int(_TABLE_BYTES * batch.num_rows / max(1, narrow.nbytes)))
            for start in range(0, batch.num_rows, size):
                rows = range(start, min(start + size, batch.num_rows))
                # A slice would take the whole batch with it to the worker.
                reached = mapped.tell()
                yield narrow.take(pa.array(rows)), reached - before
                before = reached


def _present(file: InputFile, names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Those of the columns that a table has."""
    if columns[0] not in names:
        raise DataError(
            f"{file.path}: no field {columns[0]!r}; the fields are {', '.join(map(repr, names))}. "
            "Name the text's field with --field."
        )
    return [name for name in columns if name in names]


def _batch_rows(table: Any) -> int:
    """Rows that hold about as much as a block of lines, going by the largest row group."""
    groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    row_bytes = max((g.total_byte_size / g.num_rows for g in groups if g.num_rows), default=1.0)
    return max(1, min(_PART_ROWS, int(_TABLE_BYTES / max(row_bytes, 1.0))))


def describe(part: Part) -> str:
    """Name the inputs of a part, for messages."""
    names = sorted({item.file.path for item in part.items})
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
