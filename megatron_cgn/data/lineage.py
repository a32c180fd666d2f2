"""Where each document of an index came from: ``P.documents.parquet``, one row a document.

Row *i* is document *i*. Reading, searching and writing the file live here; what a raw document says
of itself is taken from it in ``documents.py``. Nothing here holds a whole file in memory.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron_cgn.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

LINEAGE_SUFFIX = ".documents.parquet"
COLUMNS = ("id", "source", "license", "classification", "hash")
"""Columns, all texts. ``id`` and ``hash`` are never null."""
_REPEATED = ("source", "license", "classification")  # dictionary-coded in the file
_GROUP_ROWS = 1 << 16
_GROUP_BYTES = 16 << 20  # a row group is written when it has so many rows or so much text

Columns = dict[str, list[str | None]]
"""Values of `COLUMNS`, of the same documents."""


def content_hash(text_utf8: bytes) -> str:
    """Identity of a document's text: BLAKE2b of 16 bytes, as 32 hexadecimal digits."""
    return hashlib.blake2b(text_utf8, digest_size=16).hexdigest()


def lineage_schema() -> "pa.Schema":
    """Schema of the file."""
    import pyarrow as pa

    return pa.schema([pa.field(n, pa.string(), nullable=n not in ("id", "hash")) for n in COLUMNS])


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
        self._rows = self._bytes = 0

    def add(self, columns: Columns) -> None:
        """Append documents.

        Args:
            columns: Values of `COLUMNS`, equally many of each.

        Raises:
            OSError: If the disk refuses.
        """
        import pyarrow as pa

        batch = pa.record_batch([columns[name] for name in COLUMNS], schema=self._schema)
        self.add_batch(batch)

    def add_batch(self, batch: "pa.RecordBatch") -> None:
        """Append the documents of a batch that `read_lineage` gave: as `add`."""
        self._waiting.append(batch)
        self._rows += batch.num_rows
        self._bytes += batch.nbytes
        if self._rows >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        # One chunk a column: where the groups are cut must not depend on how the rows came.
        table = pa.Table.from_batches(self._waiting, schema=self._schema).combine_chunks()
        start = 0
        while table.num_rows - start >= _GROUP_ROWS:
            self._writer.write_table(table.slice(start, _GROUP_ROWS), row_group_size=_GROUP_ROWS)
            start += _GROUP_ROWS
        rest = table.slice(start)
        if start == 0 and self._bytes >= _GROUP_BYTES:
            self._writer.write_table(rest, row_group_size=_GROUP_ROWS)
            rest = rest.slice(rest.num_rows)
        self._waiting = rest.combine_chunks().to_batches()
        self._rows = rest.num_rows
        self._bytes = sum(batch.nbytes for batch in self._waiting)

    def finish(self) -> str:
        """Write what is left, make the file durable and close it.

        Returns:
            Hash of the file.

        Raises:
            OSError: If the disk refuses.
        """
        import pyarrow as pa

        if self._rows:
            table = pa.Table.from_batches(self._waiting, schema=self._schema).combine_chunks()
            self._writer.write_table(table, row_group_size=_GROUP_ROWS)
        self._writer.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return _file_digest(self._path)

    def abandon(self) -> None:
        """Close the file as it is; whoever made the writer removes it."""
        self._waiting = []
        try:
            self._writer.close()
        except OSError:
            pass  # a full disk refuses the footer as well
        finally:
            try:
                self._stream.close()
            except OSError:
                pass

    def __enter__(self) -> Self:
        """Give the writer itself."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Close the file if `finish` has not."""
        if not self._stream.closed:
            self.abandon()


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def has_lineage(prefix: str | Path) -> bool:
    """Say whether an index has the file. One made by another tool has none."""
    return Path(f"{prefix}{LINEAGE_SUFFIX}").is_file()


def read_lineage(
    prefix: str | Path, *, columns: Sequence[str] = COLUMNS, batch_rows: int = _GROUP_ROWS
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
