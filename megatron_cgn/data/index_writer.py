"""Writes an indexed dataset in one pass: see ``indexed.py`` for the files.

Vectorised, and its bytes equal those of Megatron's own builder on the same documents. Writing
ends with ``P.idx``: where it is, all three files are whole.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.indexed import (
    DTYPE_CODES,
    FORMAT,
    HEADER,
    MAGIC,
    SUFFIXES,
    Sidecar,
    SourceFile,
    token_dtype,
)
from megatron_cgn.errors import DataError

_BLOCK = 1 << 20  # sequences whose pointers are computed at a time


class IndexWriter:
    """Writes an index in one pass, beside its place, and puts it there at the end.

    Use as a context manager, `add` documents, then `finish`. Leaving without having finished
    removes everything written. Documents may come in portions of any size: the bytes do not
    depend on the portions.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int, overwrite: bool = False) -> None:
        """Open the temporary files.

        Args:
            prefix: Path of the files without their suffix.
            vocab_size: Largest id plus one; decides the type of the stored ids.
            overwrite: Replace an existing index. Without it an existing file is an error.

        Raises:
            DataError: If the index exists or its directory cannot be written.
        """
        self.prefix = str(prefix)
        self.dtype = token_dtype(vocab_size)
        existing = [p for p in map(self._path, SUFFIXES) if p.exists()]
        if existing and not overwrite:
            raise DataError(
                f"{existing[0]}: exists already. Choose another --output-prefix or add --overwrite."
            )
        self._vocab_size = vocab_size
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._hash = hashlib.blake2b(digest_size=16)
        self._bin: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Create the temporary ``.bin``."""
        try:
            self._path(".bin").parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._temporary(".bin").open("wb")
        except OSError as error:
            raise self._write_error(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove whatever is still temporary."""
        if self._bin is not None:
            with contextlib.suppress(OSError):  # a full disk refuses the last buffer once more
                self._bin.close()
        for suffix in SUFFIXES:
            self._temporary(suffix).unlink(missing_ok=True)

    def add(self, tokens: npt.NDArray[np.integer[Any]], lengths: npt.ArrayLike) -> None:
        """Append documents.

        Args:
            tokens: Ids of the documents, one after another, ``[sum(lengths)]``.
            lengths: Tokens of each document, ``[documents]``.

        Raises:
            DataError: If the disk refuses.
        """
        assert self._bin is not None, "use IndexWriter as a context manager"
        counts = np.asarray(lengths, dtype=np.int32)
        assert int(counts.sum(dtype=np.int64)) == len(tokens), "lengths do not add up"
        data = np.ascontiguousarray(tokens, dtype=self.dtype)
        self._hash.update(data)
        self._lengths.append(counts)
        try:
            self._bin.write(data)
        except OSError as error:
            raise self._write_error(error) from error

    def finish(
        self,
        *,
        tokenizer_fingerprint: str,
        tokenizer_name: str,
        eod_id: int | None,
        text_bytes: int,
        sources: Sequence[SourceFile] = (),
    ) -> Sidecar:
        """Write the index and the sidecar and put all three files in their places.

        Args:
            tokenizer_fingerprint: Identity of the tokenizer.
            tokenizer_name: Its directory's name.
            eod_id: Id appended to every document, or None.
            text_bytes: UTF-8 bytes of the documents.
            sources: The inputs.

        Returns:
            What was written to ``P.json``.

        Raises:
            DataError: If the disk refuses; the previous index, if any, is then untouched.
        """
        assert self._bin is not None, "use IndexWriter as a context manager"
        lengths = np.concatenate([np.zeros(0, dtype=np.int32), *self._lengths])
        self._hash.update(lengths)
        sidecar = Sidecar(
            tokenizer_fingerprint=tokenizer_fingerprint,
            tokenizer_name=tokenizer_name,
            vocab_size=self._vocab_size,
            eod_id=eod_id,
            documents=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            text_bytes=text_bytes,
            dtype=np.dtype(self.dtype).name,
            digest=self._hash.hexdigest(),
            sources=tuple(sources),
        )
        text = json.dumps({"format": FORMAT, **asdict(sidecar)}, ensure_ascii=False, indent=2)
        try:
            _sync_and_close(self._bin)
            with self._temporary(".idx").open("wb") as stream:
                _write_index(stream, lengths, dtype=self.dtype)
                _sync_and_close(stream)
            with self._temporary(".json").open("wb") as stream:
                stream.write(text.encode() + b"\n")
                _sync_and_close(stream)
            # A kill between two renames must not leave an old index over new tokens.
            self._path(".idx").unlink(missing_ok=True)
            for suffix in SUFFIXES:
                self._temporary(suffix).rename(self._path(suffix))
        except OSError as error:
            raise self._write_error(error) from error
        return sidecar

    def _path(self, suffix: str) -> Path:
        return Path(self.prefix + suffix)

    def _temporary(self, suffix: str) -> Path:
        return Path(f"{self.prefix}{suffix}.tmp-{os.getpid()}")

    def _write_error(self, error: OSError) -> DataError:
        reason = error.strerror or str(error)
        return DataError(
            f"{self.prefix}: cannot write the index ({reason}). Nothing was left behind. Make room "
            "or choose another --output-prefix, and run again."
        )


def _sync_and_close(stream: BinaryIO) -> None:
    """Close a file once its bytes are on the disk, so that a rename never outruns them."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def _write_index(
    stream: BinaryIO, lengths: npt.NDArray[np.int32], *, dtype: type[np.integer[Any]]
) -> None:
    """Write ``.idx`` for one sequence per document, in blocks to bound memory."""
    count = len(lengths)
    code = next(code for code, known in DTYPE_CODES.items() if known is dtype)
    stream.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
    stream.write(lengths.astype("<i4", copy=False).data)
    start = 0
    for first in range(0, count, _BLOCK):
        sizes = lengths[first : first + _BLOCK].astype(np.int64) * np.dtype(dtype).itemsize
        ends = np.cumsum(sizes) + start
        stream.write((ends - sizes).astype("<i8", copy=False).data)
        start = int(ends[-1])
    for first in range(0, count + 1, _BLOCK):
        stream.write(np.arange(first, min(first + _BLOCK, count + 1), dtype="<i8").data)
