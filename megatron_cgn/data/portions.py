"""An index read from its start to its end, some megabytes at a time, with its lineage."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.indexed import IndexInfo, token_dtype
from megatron_cgn.data.lineage import has_lineage, read_lineage
from megatron_cgn.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_TOKENS = 1 << 20
_ROWS = 1 << 13


@dataclass(frozen=True, slots=True)
class Portion:
    """Consecutive documents of an index."""

    first: int
    """Number of the first document."""
    start: int
    """Tokens before it."""
    lengths: npt.NDArray[np.int32]
    """Tokens of each document."""
    tokens: npt.NDArray[np.integer[Any]]
    """Ids of the documents, one after another."""
    lineage: "pa.RecordBatch | None"
    """Where each document comes from, if the index says so."""


def read_portions(index: IndexInfo) -> Iterator[Portion]:
    """Read an index in order.

    Args:
        index: The index, checked.

    Yields:
        Portions of at most a megatoken, unless a single document is larger.

    Raises:
        DataError: If a file is damaged or belongs to another index.
    """
    dtype = token_dtype(index.sidecar.vocab_size)
    lineage = read_lineage(index.prefix, batch_rows=_ROWS)
    with_lineage = has_lineage(index.prefix)
    first = start = 0
    with Path(index.prefix + ".bin").open("rb") as stream:
        while first < index.documents:
            batch = next(lineage, None) if with_lineage else None
            rows = _ROWS if batch is None else batch.num_rows
            lengths = np.asarray(index.lengths[first : first + rows])
            if with_lineage and len(lengths) != rows:
                raise _other_lineage(index)
            for begin, end in _cuts(lengths):
                portion = Portion(
                    first + begin,
                    start,
                    lengths[begin:end],
                    _read_tokens(stream, int(lengths[begin:end].sum(dtype=np.int64)), dtype, index),
                    None if batch is None else batch.slice(begin, end - begin),
                )
                yield portion
                start += len(portion.tokens)
            first += len(lengths)
    if with_lineage and next(lineage, None) is not None:
        raise _other_lineage(index)


def _other_lineage(index: IndexInfo) -> DataError:
    return DataError(
        f"{index.prefix}.documents.parquet: belongs to another index: it has not "
        f"{index.documents:,} rows. Make the index again with tools/preprocess_data.py --overwrite."
    )


def _cuts(lengths: npt.NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """Cut documents into runs of at most `_TOKENS`, but for single larger ones."""
    ends = np.cumsum(lengths, dtype=np.int64)
    begin = 0
    while begin < len(lengths):
        before = ends[begin] - lengths[begin]
        end = int(np.searchsorted(ends, before + _TOKENS, side="right"))
        end = max(end, begin + 1)
        yield begin, end
        begin = end


def _read_tokens(
    stream: BinaryIO, count: int, dtype: type[np.integer[Any]], index: IndexInfo
) -> npt.NDArray[np.integer[Any]]:
    tokens = np.fromfile(stream, dtype=dtype, count=count)
    if len(tokens) != count:
        raise DataError(
            f"{index.prefix}.bin: became shorter while it was read. Check that nothing replaces it."
        )
    return tokens
