"""Writes an indexed dataset in one pass: see ``indexed.py`` for the files.

Vectorised, and its bytes equal those of Megatron's own builder on the same documents. Writing
ends with ``P.idx``: where it is, all three files are whole.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import uuid
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
from megatron_cgn.data.lock import locked
from megatron_cgn.errors import DataError

_OUR_SIDECAR = re.compile(rb'\s*\{\s*"format":\s*\d+,\s*"tokenizer_fingerprint":')
_BLOCK = 1 << 20  # sequences whose pointers are computed at a time


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
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._hash = hashlib.blake2b(digest_size=16)
        self._bin: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Lock the prefix and create the temporary ``.bin``.

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
            DataError: If the disk refuses. While the files are written, the previous index is
                untouched; once they are put in their places it is gone, and a fault or a kill
                there leaves no ``P.idx``: files that nothing takes for an index.
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
        except OSError as error:
            raise self._write_error(error) from error
        self._put_in_place()
        return sidecar

    def _put_in_place(self) -> None:
        try:
            # A kill between two renames must not leave an old index over new tokens.
            self._path(".idx").unlink(missing_ok=True)
            _sync_directory(self._path(".idx").parent)
            for suffix in SUFFIXES:
                self._temporary(suffix).rename(self._path(suffix))
            _sync_directory(self._path(".idx").parent)
        except OSError as error:
            raise DataError(
                f"{self.prefix}: cannot put the index in its place ({error.strerror or error}). An "
                "earlier one is gone. Mend that and run again with --overwrite."
            ) from error

    def _check_existing(self) -> None:
        existing = [p for p in map(self._path, SUFFIXES) if p.exists()]
        if existing and not self._overwrite:
            raise DataError(
                f"{existing[0]}: exists already. Choose another --output-prefix or add --overwrite."
            )
        sidecar = self._path(".json")
        if sidecar in existing and not _is_sidecar(sidecar):
            raise DataError(
                f"{sidecar}: not the sidecar of an index, so --overwrite does not replace it. "
                "Choose another --output-prefix, or move the file away."
            )

    def _remove_stale(self, folder: Path) -> None:
        """Remove what killed runs left; whoever holds the lock is the only one running."""
        name = re.escape(os.path.basename(self.prefix))
        stale = re.compile(rf"{name}\.(bin|json|idx)\.tmp-[0-9a-f]+")
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
