"""Pieces of parts to the files of the output: shards, and the table of all documents.

Where a shard ends follows from the sizes of the pieces alone. Pieces are compressed anew, because
many readers of zstd stop after a file's first frame and would lose the rest in silence.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cgn.corpus.work import LinesWriter, Work, fast_json, read_lines, read_rows, sync
from megatron_cgn.corpus.work import read_json as _read_json
from megatron_cgn.data.lineage import file_digest

_LEVEL = 3
_ROW_GROUP_BYTES = 32 << 20
_TABLE_ROWS = 20_000
_OUTPUT_FIELDS = ("id", "text", "source", "license", "classification", "hash", "language")
_DOCUMENT_FIELDS = (
    *("id", "source", "license", "classification", "language"),
    *("raw_hash", "hash", "status", "reason", "changes"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file of the output, and the pieces it is made of."""

    name: str
    """Path within the output, e.g. ``train/domain-00000.jsonl.zst``."""
    pieces: tuple[str, ...]
    """Files to join, in order."""
    num_rows: int
    """Documents in it."""
    first_part: int
    """The first part whose piece is in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A shard on the disk."""

    name: str
    """Path within the output."""
    num_rows: int
    """Documents in it."""
    num_bytes: int
    """Its size."""
    digest: str
    """Blake2b-16 of its bytes, in hexadecimal."""


def plan_shards(
    work: Work, *, stage: str, piece: str, sources: Sequence[str], suffix: str, shard_bytes: int
) -> list[Shard]:
    """Lay pieces out over shards, each of one source: sources are indexed one by one.

    Args:
        work: The work directory.
        stage: The stage that left the pieces.
        piece: Which of them: ``train``, ``validation`` or ``dropped``.
        sources: Name of each part's source.
        suffix: Kind of the shards, e.g. ``jsonl.zst``.
        shard_bytes: Size of the lines at which a shard ends.

    Returns:
        The shards; none if there are no documents.
    """
    shards: list[Shard] = []
    pieces: list[str] = []
    numbers: Counter[str] = Counter()
    rows = size = first = 0
    for part, source in enumerate(sources):
        folder = work.path(stage, part)
        counts = _read_json(folder / "tally.json")["pieces"][piece]
        if counts["rows"]:
            first = part if not pieces else first
            pieces.append(str(folder / f"{piece}.jsonl.zst"))
            rows, size = rows + counts["rows"], size + counts["bytes"]
        last = part + 1 == len(sources) or sources[part + 1] != source
        if pieces and (size >= shard_bytes or last):
            shards.append(
                Shard(
                    name=f"{piece}/{source}-{numbers[source]:05d}.{suffix}",
                    pieces=tuple(pieces),
                    num_rows=rows,
                    first_part=first,
                )
            )
            numbers[source] += 1
            pieces, rows, size = [], 0, 0
    return shards


class ShardWriter:
    """Writes shards; picklable, so that each may be written by a process of its own."""

    def __init__(self, output: Path) -> None:
        """Name the place.

        Args:
            output: Where the shards' folders are.
        """
        self._output = output

    def __call__(self, shard: Shard) -> Written:
        """Write a shard from its pieces."""
        path = self._output / shard.name
        lines = (line for piece in shard.pieces for line in read_lines(Path(piece)))
        if path.suffix == ".parquet":
            _write_parquet(path, lines)
        else:
            # What was dropped may name what must not be seen.
            mode = 0o600 if shard.name.startswith("dropped/") else 0o666
            with LinesWriter(path, level=_LEVEL, mode=mode) as writer:
                for line in lines:
                    writer.write_line(line + b"\n")
        sync(path)
        return Written(
            name=shard.name,
            num_rows=shard.num_rows,
            num_bytes=path.stat().st_size,
            digest=file_digest(path),
        )


def write_documents(
    path: Path, work: Work, *, stage: str, num_parts: int, shards: Sequence[Shard]
) -> None:
    """Write the table of all documents: what became of each, and where it is.

    Args:
        path: The Parquet file.
        work: The work directory.
        stage: The stage that left the tables of the parts.
        num_parts: How many parts there are.
        shards: Of all kinds.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [*((name, pa.string()) for name in _DOCUMENT_FIELDS)]
        + [("shard", pa.string()), ("row", pa.int64())]
    )
    rows: list[dict[str, Any]] = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for row in _placed(work, stage, num_parts, shards):
            rows.append(row)
            if len(rows) == _TABLE_ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        if rows or not num_parts:
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _placed(
    work: Work, stage: str, num_parts: int, shards: Sequence[Shard]
) -> Iterator[dict[str, Any]]:
    """Rows of all documents, the place in a piece turned into that in a shard."""
    starts: dict[str, dict[int, Shard]] = {}
    for shard in shards:
        starts.setdefault(os.path.dirname(shard.name), {})[shard.first_part] = shard
    current: dict[str, Shard] = {}
    before: dict[str, int] = {}
    for part in range(num_parts):
        folder = work.path(stage, part)
        pieces = _read_json(folder / "tally.json")["pieces"]
        for status in pieces:
            if part in starts.get(status, {}):
                current[status], before[status] = starts[status][part], 0
        for row in read_rows(folder / "documents.jsonl.zst"):
            status = row["status"]
            yield row | {"shard": current[status].name, "row": before[status] + row["row"]}
        for status, counts in pieces.items():
            before[status] = before.get(status, 0) + counts["rows"]


def _write_parquet(path: Path, lines: Iterator[bytes]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.large_string()) for name in _OUTPUT_FIELDS])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        rows: list[dict[str, Any]] = []
        loads, size = fast_json().loads, 0
        for line in lines:
            rows.append(loads(line))
            size += len(line)
            if size >= _ROW_GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows, size = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
