"""Where each document of an index came from: ``P.documents.parquet``, one row a document.

Row *i* is document *i*. Reading, searching and writing the file live here; what a raw document says
of itself is taken from it in ``documents.py``. Nothing here holds a whole file in memory.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cgn.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

LINEAGE_SUFFIX = ".documents.parquet"
COLUMNS = ("id", "source", "license", "classification", "hash", "text_bytes")
"""Columns: texts, of which ``id`` and ``hash`` are never null, and the UTF-8 bytes of the text."""
_REPEATED = ("source", "license", "classification")  # dictionary-coded in the file
_GROUP_ROWS = 1 << 14  # rows written, and held, at a time

Columns = dict[str, list[Any]]
"""Values of `COLUMNS`, of the same documents."""


def content_hash(text_utf8: bytes) -> str:
    """Identity of a document's text: BLAKE2b of 16 bytes, as 32 hexadecimal digits."""
    return hashlib.blake2b(text_utf8, digest_size=16).hexdigest()


def lineage_schema() -> "pa.Schema":
    """Schema of the file."""
    import pyarrow as pa

    texts = [pa.field(name, pa.string(), nullable=name in _REPEATED) for name in COLUMNS[:-1]]
    return pa.schema([*texts, pa.field("text_bytes", pa.int64(), nullable=False)])


def to_batch(columns: Columns) -> "pa.RecordBatch":
    """Make a batch of columns.

    Args:
        columns: Values of `COLUMNS`, equally many of each.
    """
    import pyarrow as pa

    return pa.record_batch([columns[name] for name in COLUMNS], schema=lineage_schema())


class LineageWriter:
    """Writes the file in one pass, a row group at a time."""

    def __init__(self, path: Path) -> None:
        """Create the file.

        Args:
            path: Where to write; an existing file is replaced.

        Raises:
            OSError: If the file cannot be made.
        """
        import pyarrow.parquet as pq

        self._path = path
        self._schema = lineage_schema()
        self._stream = path.open("wb")
        self._writer = pq.ParquetWriter(
            self._stream, self._schema, use_dictionary=list(_REPEATED), compression="zstd"
        )
        self._waiting: list[pa.RecordBatch] = []
        self._rows = 0

    def add(self, columns: Columns) -> None:
        """Append documents.

        Args:
            columns: Values of `COLUMNS`, equally many of each.

        Raises:
            OSError: If the disk refuses.
        """
        self.add_batch(to_batch(columns))

    def add_batch(self, batch: "pa.RecordBatch") -> None:
        """Append the documents of a batch that `read_lineage` gave: as `add`."""
        self._waiting.append(batch)
        self._rows += batch.num_rows
        if self._rows >= _GROUP_ROWS:
            self._flush()

    def _flush(self, *, all_rows: bool = False) -> None:
        """Write full row groups: how the rows came must not show in the file."""
        import pyarrow as pa

        table = pa.Table.from_batches(self._waiting, schema=self._schema).combine_chunks()
        end = self._rows if all_rows else self._rows - self._rows % _GROUP_ROWS
        for start in range(0, end, _GROUP_ROWS):
            group = table.slice(start, min(_GROUP_ROWS, end - start))
            self._writer.write_table(group, row_group_size=_GROUP_ROWS)
        self._waiting = table.slice(end).to_batches()
        self._rows -= end

    def finish(self) -> str:
        """Write what is left, make the file durable and close it.

        Returns:
            Hash of the file.

        Raises:
            OSError: If the disk refuses.
        """
        self._flush(all_rows=True)
        self._writer.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return file_digest(self._path)

    def abandon(self) -> None:
        """Close the file as it is, unless `finish` has; whoever made the writer removes it."""
        if self._stream.closed:
            return
        self._waiting = []
        with contextlib.suppress(OSError):  # a full disk refuses the footer as well
            self._writer.close()
        with contextlib.suppress(OSError):
            self._stream.close()


def file_digest(path: Path) -> str:
    """BLAKE2b of 16 bytes of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def is_lineage(path: Path) -> bool:
    """Say whether a file has no columns but ours: others are never written over."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return {"id", "hash"} <= set(pq.read_schema(path).names) <= set(COLUMNS)
    except (pa.ArrowException, OSError):
        return False


def has_lineage(prefix: str | Path) -> bool:
    """Say whether an index has the file. One made by another tool has none."""
    return Path(f"{prefix}{LINEAGE_SUFFIX}").is_file()


def read_lineage(
    prefix: str | Path, *, columns: Sequence[str] = COLUMNS, batch_rows: int = 1 << 14
) -> Iterator["pa.RecordBatch"]:
    """Read the file in document order.

    Args:
        prefix: Path of the index without suffix.
        columns: Those wanted, of `COLUMNS`.
        batch_rows: Most documents of a batch.

    Yields:
        Batches of the columns, in document order.

    Raises:
        DataError: If the file is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(f"{prefix}{LINEAGE_SUFFIX}")
    if not path.is_file():
        raise DataError(
            f"{path}: there is no such file: this index does not say where its documents came "
            "from. Make it again with tools/preprocess_data.py --overwrite."
        )
    try:
        with pq.ParquetFile(path) as file:
            if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
                raise DataError(
                    f"{path}: no column {', '.join(map(repr, missing))}: not written by "
                    "tools/preprocess_data.py. Make the index again with it."
                )
            yield from file.iter_batches(batch_size=batch_rows, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Make the index again with "
            "tools/preprocess_data.py --overwrite."
        ) from error


def find_documents(prefix: str | Path, ids: Iterable[str]) -> dict[str, list[int]]:
    """Find documents by their ids, reading the file once.

    Args:
        prefix: Path of the index without suffix.
        ids: Ids to look for.

    Returns:
        For every id the numbers of its documents, ascending; none where it does not occur, and
        several where the inputs gave it to several.

    Raises:
        DataError: If the file is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    found: dict[str, list[int]] = {name: [] for name in ids}
    wanted = pa.array(list(found), pa.string())
    first = 0
    for batch in read_lineage(prefix, columns=["id"]):
        column: Any = batch.column(0)
        hits = pc.indices_nonzero(pc.is_in(column, value_set=wanted))
        for row, name in zip(hits.to_pylist(), column.take(hits).to_pylist(), strict=True):
            found[name].append(first + row)
        first += batch.num_rows
    return found
