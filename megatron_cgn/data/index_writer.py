"""Writes an indexed dataset in one pass: see ``indexed.py`` for the files.

Vectorised, and its bytes equal those of Megatron's own builder on the same documents. Writing
ends with ``P.idx``: where it is, all files are whole. Memory does not depend on the input's size.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.indexed import (
    DTYPE_CODES,
    FORMAT,
    HEADER,
    MAGIC,
    Sidecar,
    SourceFile,
    token_dtype,
)
from megatron_cgn.data.lineage import LINEAGE_SUFFIX, Columns, LineageWriter, is_lineage
from megatron_cgn.data.lock import locked
from megatron_cgn.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

ALL_SUFFIXES = (".bin", LINEAGE_SUFFIX, ".json", ".idx")
"""Files that are written, in the order in which they appear."""

_OUR_SIDECAR = re.compile(rb'\s*\{\s*"format":\s*\d+,\s*"tokenizer_fingerprint":')
_BLOCK = 1 << 18  # sequences whose pointers are computed at a time


class IndexWriter:
    """Writes an index in one pass, beside its place, and puts it there at the end.

    Use as a context manager, `add` documents, then `finish`. Leaving without having finished
    removes everything written. Documents may come in portions of any size: the bytes do not
    depend on the portions.

    While it is open no other writer opens the same prefix: ``.P.lock``, beside the files, is held.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int, overwrite: bool = False) -> None:
        """Settle what to write; nothing is touched yet.

        Args:
            prefix: Path of the files without their suffix.
            vocab_size: Largest id plus one; decides the type of the stored ids.
            overwrite: Replace an existing index. Without it an existing file is an error.

        Raises:
            DataError: If the prefix ends without a name.
        """
        self.prefix = str(prefix)
        self.dtype = token_dtype(vocab_size)
        if os.path.basename(self.prefix) in ("", ".", ".."):
            raise DataError(
                f"--output-prefix {self.prefix!r} ends without a name for the files. Add one, e.g. "
                f"{os.path.join(self.prefix, 'domain')}."
            )
        self._overwrite = overwrite
        self._run = uuid.uuid4().hex  # a process id is not unique: containers count alike
        self._cleanup = contextlib.ExitStack()
        self._vocab_size = vocab_size
        self._documents = self._tokens = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self._bin: BinaryIO | None = None
        self._idx: BinaryIO | None = None
        self._lineage: LineageWriter | None = None

    def __enter__(self) -> Self:
        """Lock the prefix and create the temporary files.

        Raises:
            DataError: If the index exists, another run is writing it, what would be replaced is
                no index, or the directory cannot be written.
        """
        with contextlib.ExitStack() as cleanup:
            try:
                folder = self._path(".bin").parent
                folder.mkdir(parents=True, exist_ok=True)
                lock = folder / f".{os.path.basename(self.prefix)}.lock"
                if cleanup.enter_context(locked(lock)):
                    self._remove_stale(folder)
                self._check_existing()
                self._bin = self._temporary(".bin").open("wb")
                self._idx = self._temporary(".idx").open("w+b")
                self._idx.write(bytes(HEADER.size))  # what belongs here is known at the end
            except BlockingIOError as error:
                raise DataError(
                    f"{self.prefix}: another run is writing this index. Wait for it to end or "
                    "choose another --output-prefix."
                ) from error
            except OSError as error:
                raise self._write_error(error) from error
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove whatever is still temporary and release the lock."""
        with self._cleanup:
            for stream in (self._bin, self._idx):
                with contextlib.suppress(OSError):  # a full disk refuses the last buffer once more
                    if stream is not None:
                        stream.close()
            if self._lineage is not None:
                self._lineage.abandon()
            for suffix in ALL_SUFFIXES:
                self._temporary(suffix).unlink(missing_ok=True)

    def add(
        self,
        tokens: npt.NDArray[np.integer[Any]],
        lengths: npt.ArrayLike,
        *,
        lineage: "Columns | pa.RecordBatch | None" = None,
    ) -> None:
        """Append documents.

        Args:
            tokens: Ids of the documents, one after another, ``[sum(lengths)]``.
            lengths: Tokens of each document, ``[documents]``.
            lineage: Where each document comes from: columns, or a batch that `read_lineage` gave.
                Either every call gives it or none does.

        Raises:
            DataError: If the disk refuses.
        """
        assert self._bin is not None and self._idx is not None, "use it as a context manager"
        counts = np.asarray(lengths, dtype="<i4")
        total = int(counts.sum(dtype=np.int64))
        assert total == len(tokens), "lengths do not add up"
        data = np.ascontiguousarray(tokens, dtype=self.dtype)
        self._hash.update(data)
        try:
            self._bin.write(data)
            self._idx.write(counts.data)
            self._add_lineage(lineage, len(counts))
        except OSError as error:
            raise self._write_error(error) from error
        self._documents += len(counts)
        self._tokens += total

    def _add_lineage(self, lineage: "Columns | pa.RecordBatch | None", documents: int) -> None:
        assert (lineage is not None) == (self._lineage is not None) or not self._documents
        if lineage is None:
            return
        if self._lineage is None:
            self._lineage = LineageWriter(self._temporary(LINEAGE_SUFFIX))
        rows = len(lineage["id"])
        assert rows == documents, "one row a document"
        if isinstance(lineage, dict):
            self._lineage.add(lineage)
        else:
            self._lineage.add_batch(lineage)

    def finish(
        self,
        *,
        tokenizer_fingerprint: str,
        tokenizer_name: str,
        eod_id: int | None,
        text_bytes: int,
        sources: Sequence[SourceFile] = (),
    ) -> Sidecar:
        """Write the index and the sidecar and put all files in their places.

        Args:
            tokenizer_fingerprint: Identity of the tokenizer.
            tokenizer_name: Its directory's name.
            eod_id: Id appended to every document, or None.
            text_bytes: UTF-8 bytes of the documents.
            sources: The inputs.

        Returns:
            What was written to ``P.json``.

        Raises:
            DataError: If the disk refuses. While the files are written, the previous index is
                untouched; once they are put in their places it is gone, and a fault or a kill
                there leaves no ``P.idx``: files that nothing takes for an index.
        """
        assert self._bin is not None and self._idx is not None, "use it as a context manager"
        try:
            _finish_index(self._idx, self._documents, dtype=self.dtype, digest=self._hash)
            lineage = None if self._lineage is None else self._lineage.finish()
            sidecar = Sidecar(
                tokenizer_fingerprint=tokenizer_fingerprint,
                tokenizer_name=tokenizer_name,
                vocab_size=self._vocab_size,
                eod_id=eod_id,
                documents=self._documents,
                tokens=self._tokens,
                text_bytes=text_bytes,
                dtype=np.dtype(self.dtype).name,
                digest=self._hash.hexdigest(),
                sources=tuple(sources),
                lineage=lineage,
            )
            text = json.dumps({"format": FORMAT, **asdict(sidecar)}, ensure_ascii=False, indent=2)
            _sync_and_close(self._bin)
            _sync_and_close(self._idx)
            with self._temporary(".json").open("wb") as stream:
                stream.write(text.encode() + b"\n")
                _sync_and_close(stream)
        except OSError as error:
            raise self._write_error(error) from error
        self._put_in_place()
        return sidecar

    def _put_in_place(self) -> None:
        try:
            # A kill between two renames must not leave an old index over new tokens.
            self._path(".idx").unlink(missing_ok=True)
            _sync_directory(self._path(".idx").parent)
            for suffix in ALL_SUFFIXES:
                if suffix == LINEAGE_SUFFIX and self._lineage is None:
                    self._path(suffix).unlink(missing_ok=True)  # the old index's
                    continue
                self._temporary(suffix).rename(self._path(suffix))
            _sync_directory(self._path(".idx").parent)
        except OSError as error:
            raise DataError(
                f"{self.prefix}: cannot put the index in its place ({error.strerror or error}). An "
                "earlier one is gone. Mend that and run again with --overwrite."
            ) from error

    def _check_existing(self) -> None:
        existing = [p for p in map(self._path, ALL_SUFFIXES) if p.exists()]
        if existing and not self._overwrite:
            raise DataError(
                f"{existing[0]}: exists already. Choose another --output-prefix or add --overwrite."
            )
        for suffix, is_ours in ((".json", _is_sidecar), (LINEAGE_SUFFIX, is_lineage)):
            path = self._path(suffix)
            if path in existing and not is_ours(path):
                raise DataError(
                    f"{path}: not of an index, so --overwrite does not replace it. Choose another "
                    "--output-prefix, or move the file away."
                )

    def _remove_stale(self, folder: Path) -> None:
        """Remove what killed runs left; whoever holds the lock is the only one running."""
        name = re.escape(os.path.basename(self.prefix))
        stale = re.compile(rf"{name}\.(bin|json|idx|documents\.parquet)\.tmp-[0-9a-f]+")
        for path in folder.iterdir():
            if stale.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _path(self, suffix: str) -> Path:
        return Path(self.prefix + suffix)

    def _temporary(self, suffix: str) -> Path:
        return Path(f"{self.prefix}{suffix}.tmp-{self._run}")

    def _write_error(self, error: OSError) -> DataError:
        reason = error.strerror or str(error)
        return DataError(
            f"{self.prefix}: cannot write the index ({reason}). Nothing was left behind. Make room "
            "or choose another --output-prefix, and run again."
        )


def _is_sidecar(path: Path) -> bool:
    """Whether a file begins as our sidecars do, or is empty; a corpus may be large, so no more."""
    with path.open("rb") as stream:
        start = stream.read(256)
    return not start or _OUR_SIDECAR.match(start) is not None


def _sync_directory(folder: Path) -> None:
    """Bring a directory's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can
            raise
    finally:
        os.close(descriptor)


def _sync_and_close(stream: BinaryIO) -> None:
    """Close a file once its bytes are on the disk, so that a rename never outruns them."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def _finish_index(
    stream: BinaryIO,
    count: int,
    *,
    dtype: type[np.integer[Any]],
    digest: "hashlib.blake2b",
) -> None:
    """Complete a ``.idx`` that holds room for the header and the lengths of ``count`` documents.

    Each document is one sequence. Works in blocks, to bound memory; hashes the lengths besides.
    """
    code = next(code for code, known in DTYPE_CODES.items() if known is dtype)
    stream.flush()
    start = 0
    with open(stream.name, "rb") as lengths:
        for block in _read_lengths(lengths, count):
            digest.update(block)
            sizes = block.astype("<i8") * np.dtype(dtype).itemsize
            ends = np.cumsum(sizes, dtype="<i8") + start
            stream.write((ends - sizes).data)
            start = int(ends[-1])
    for first in range(0, count + 1, _BLOCK):
        stream.write(np.arange(first, min(first + _BLOCK, count + 1), dtype="<i8").data)
    stream.seek(0)
    stream.write(HEADER.pack(MAGIC, 1, code, count, count + 1))


def _read_lengths(stream: BinaryIO, count: int) -> Iterator[npt.NDArray[np.int32]]:
    stream.seek(HEADER.size)
    for first in range(0, count, _BLOCK):
        size = min(_BLOCK, count - first)
        yield np.frombuffer(stream.read(4 * size), dtype="<i4", count=size)
