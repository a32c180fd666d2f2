"""Columns of Parquet files and saved `datasets` directories, part by part.

Which inputs there are and how parts become blocks is in ``readers.py``.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cgn.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Part = tuple[list[str | None], dict[str, list[Any]], int]
"""Texts of consecutive rows, their values in other columns, and the rows of the whole table."""


def read_parquet(
    path: Path, *, field: str, extra: Sequence[str], block_bytes: int, block_rows: int
) -> Iterator[Part]:
    """Read a column of a Parquet file.

    Args:
        path: The file.
        field: Name of the column.
        extra: Names of columns to read besides, where the table has exactly one of that name.
        block_bytes: Most UTF-8 bytes of a part; a single larger row is a part of its own.
        block_rows: Most rows of a part.

    Yields:
        Parts in order.

    Raises:
        DataError: If the column is missing or holds no texts.
        OSError: If the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=block_bytes) as file:
            _check_column(file.schema_arrow, path, field)
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            row_bytes = max(
                (group.total_byte_size / group.num_rows for group in groups if group.num_rows),
                default=0.0,
            )
            size = _batch_rows(row_bytes, block_bytes, block_rows)
            others = _present(file.schema_arrow, extra)
            batches = file.iter_batches(
                batch_size=size, columns=[field, *others], use_threads=False
            )
            for values, more in _parts(batches, path, field, others, block_bytes):
                yield values, more, file.metadata.num_rows
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def read_directory(
    path: Path, *, field: str, extra: Sequence[str], block_bytes: int, block_rows: int
) -> Iterator[Part]:
    """Read a column of a directory saved by `datasets`: as `read_parquet`."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(str(error)) from error
    _check_column(dataset.features.arrow_schema, path, field)
    row_bytes = dataset.data.nbytes / max(1, dataset.data.num_rows)
    others = _present(dataset.features.arrow_schema, extra)
    table = dataset.select_columns([field, *others]).with_format("arrow")
    batches = table.iter(batch_size=_batch_rows(row_bytes, block_bytes, block_rows))
    for values, more in _parts(batches, path, field, others, block_bytes):
        yield values, more, len(dataset)


def _present(schema: "pa.Schema", names: Sequence[str]) -> list[str]:
    return [name for name in names if schema.names.count(name) == 1]


def _batch_rows(row_bytes: float, block_bytes: int, block_rows: int) -> int:
    """Rows to ask for at a time, given the bytes of a row of all columns."""
    return max(1, min(block_rows, int(block_bytes / max(row_bytes, 1.0))))


def _check_column(schema: "pa.Schema", path: Path, field: str) -> None:
    import pyarrow as pa

    if field not in schema.names:
        raise DataError(
            f"{path}: no field {field!r}; the fields are {', '.join(map(repr, schema.names))}. "
            "Name the text's field with --field."
        )
    if schema.names.count(field) > 1:
        raise DataError(
            f"{path}: {schema.names.count(field)} columns are called {field!r}. Rename all but one."
        )
    kind = schema.field(field).type
    texts = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(
        test(texts)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    ):
        raise DataError(
            f"{path}: the field {field!r} holds {kind}, not texts. Name the text's field with "
            "--field."
        )


def _parts(
    batches: Iterable[Any], path: Path, field: str, others: list[str], block_bytes: int
) -> Iterator[tuple[list[str | None], dict[str, list[Any]]]]:
    first = 1
    for batch in batches:
        start = 0
        for part in _slices(batch.column(field), block_bytes):
            size = len(part)
            more = {name: batch.column(name).slice(start, size).to_pylist() for name in others}
            yield _values(part, path, first=first), more
            first, start = first + size, start + size


def _slices(column: Any, block_bytes: int) -> Iterator[Any]:
    """Cut a column so that no part but a single row holds more than ``block_bytes``."""
    for chunk in getattr(column, "chunks", [column]):
        start = total = 0
        for row, size in enumerate(_text_bytes(chunk)):
            if row > start and total + size > block_bytes:
                yield chunk.slice(start, row - start)
                start, total = row, 0
            total += size
        if start < len(chunk):
            yield chunk.slice(start)


def _text_bytes(chunk: Any) -> list[int]:
    """UTF-8 bytes of each row of an array of texts, dictionary-encoded or not."""
    import pyarrow as pa
    import pyarrow.compute as pc

    encoded = pa.types.is_dictionary(chunk.type)
    texts = chunk.dictionary if encoded else chunk
    lengths = pc.binary_length(texts.cast(pa.large_binary()))
    if encoded:
        lengths = lengths.take(chunk.indices)
    sizes: list[int] = lengths.fill_null(0).to_pylist()
    return sizes


def _values(part: Any, path: Path, *, first: int) -> list[str | None]:
    """Texts of a part of a column, of which ``first`` is the first row."""
    try:
        values: list[str | None] = part.to_pylist()
    except UnicodeDecodeError:
        for row, cell in enumerate(part, start=first):
            try:
                cell.as_py()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, row {row}: not valid UTF-8 ({error}). Mend or remove it."
                ) from error
        raise
    return values
