r"""Megatron's indexed dataset on disk: ``P.bin``, ``P.idx`` and our sidecar ``P.json``.

``P.bin`` holds the tokens of all documents, one after another. ``P.idx`` holds, little-endian::

    9 bytes   magic "MMIDIDX\0\0"
    uint64    version 1
    uint8     code of the token type (8 uint16, 4 int32)
    uint64    S, sequences           uint64   D, length of the document index
    int32[S]  tokens of each sequence
    int64[S]  byte at which each sequence starts in P.bin
    int64[D]  first sequence of each document, and S

Here a sequence is a document, so D = S + 1. ``P.json`` says what the other two cannot: which
tokenizer made them, from what. ``P.documents.parquet``, which training does not read, says where
each document came from: see ``lineage.py``. Reading and checking live here, writing in
``index_writer.py``. Needs neither PyTorch nor Megatron.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cgn.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
FORMAT = 1
"""Version of the sidecar."""

DTYPE_CODES: Mapping[int, type[np.integer[Any]]] = {4: np.int32, 8: np.uint16}
SUFFIXES = (".bin", ".json", ".idx")
"""Files that every index has, in the order in which they appear."""

_REBUILD = "Make the index again with tools/preprocess_data.py --overwrite."


def token_dtype(vocab_size: int) -> type[np.integer[Any]]:
    """Type in which Megatron stores ids of a vocabulary of this size."""
    return np.uint16 if vocab_size < 65500 else np.int32


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One input of an index, for the record."""

    name: str
    """File or directory name, without its directory."""
    documents: int
    """Documents it gave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """Content of ``P.json``. Holds no times, paths or machine names: equal inputs, equal bytes."""

    tokenizer_fingerprint: str
    """`tokenizer.wrapper.Tokenizer.fingerprint` of the tokenizer that made the ids."""
    tokenizer_name: str
    """Name of its directory; only for messages."""
    vocab_size: int
    """Largest id of that tokenizer plus one."""
    eod_id: int | None
    """Id that ends every document, or None if none was appended."""
    documents: int
    """Documents in the index."""
    tokens: int
    """Tokens in the index, end-of-document tokens included."""
    text_bytes: int
    """UTF-8 bytes of the documents."""
    dtype: str
    """Type of the stored ids: ``uint16`` or ``int32``."""
    digest: str
    """Hash of the tokens and the document lengths: what caches are keyed by."""
    sources: tuple[SourceFile, ...] = field(default_factory=tuple)
    """The inputs, in order."""
    lineage: str | None = None
    """Hash of ``P.documents.parquet``; None where there is none, as in indexes made before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexInfo:
    """A checked index."""

    prefix: str
    """Path of the files without their suffix."""
    sidecar: Sidecar
    """What ``P.json`` says."""
    lengths: npt.NDArray[np.int32]
    """Tokens of each document, int32 ``[documents]``, mapped from ``P.idx``."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.sidecar.documents

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.sidecar.tokens

    def tokens_of(self, start: int, stop: int) -> int:
        """Number of tokens in the documents ``start`` to ``stop``."""
        return int(self.lengths[start:stop].sum(dtype=np.int64))


def check_index(prefix: str | Path, *, tokenizer_fingerprint: str | None = None) -> IndexInfo:
    """Check that an index is whole, not empty, and made with the expected tokenizer.

    Args:
        prefix: Path of the files without their suffix.
        tokenizer_fingerprint: Identity of the tokenizer in use; None skips that check.

    Returns:
        What the index holds.

    Raises:
        DataError: If something is wrong; the message says what was found, what was expected and
            what to do.
    """
    try:
        return _check_index(str(prefix), tokenizer_fingerprint)
    except OSError as error:
        raise _unreadable(str(prefix), error) from error


def _check_index(prefix: str, tokenizer_fingerprint: str | None) -> IndexInfo:
    for suffix in SUFFIXES:
        if not Path(prefix + suffix).is_file():
            raise DataError(_missing(prefix, suffix))
    sidecar = _read_sidecar(Path(prefix + ".json"))
    lengths, dtype = _read_lengths(Path(prefix + ".idx"))
    tokens = int(lengths.sum(dtype=np.int64))
    found, expected = Path(prefix + ".bin").stat().st_size, tokens * np.dtype(dtype).itemsize
    if found != expected:
        state = "truncated" if found < expected else "not the one the .idx was written for"
        raise DataError(
            f"{prefix}.bin: {state}: {found:,} bytes, but {prefix}.idx counts {tokens:,} tokens "
            f"({expected:,} bytes). {_REBUILD}"
        )
    facts = (len(lengths), tokens, np.dtype(dtype).name)
    if facts != (sidecar.documents, sidecar.tokens, sidecar.dtype):
        raise DataError(
            f"{prefix}.json: belongs to another index: it says {sidecar.documents:,} documents, "
            f"{sidecar.tokens:,} tokens, {sidecar.dtype}; the .idx {facts[0]:,}, {facts[1]:,}, "
            f"{facts[2]}. {_REBUILD}"
        )
    if not len(lengths) or not tokens:
        raise DataError(
            f"{prefix}: the source is empty ({len(lengths)} documents, {tokens} tokens). Remove it "
            "from data.sources or index documents into it."
        )
    if tokenizer_fingerprint not in (None, sidecar.tokenizer_fingerprint):
        raise DataError(
            f"{prefix}: made with another tokenizer: {sidecar.tokenizer_name!r} "
            f"({sidecar.vocab_size:,} ids, fingerprint {sidecar.tokenizer_fingerprint}), but the "
            f"model's has fingerprint {tokenizer_fingerprint}. Index the documents again with "
            "tools/preprocess_data.py --tokenizer and the model's own directory; after an "
            "extension of the vocabulary, `tools/preprocess_data.py retokenize` does it from the "
            "index alone."
        )
    return IndexInfo(prefix=prefix, sidecar=sidecar, lengths=lengths)


def map_tokens(index: IndexInfo) -> npt.NDArray[np.integer[Any]]:
    """Map the tokens of all documents, one after another, ``[tokens]``, without reading them.

    Raises:
        DataError: If the file cannot be read, or has become empty since it was checked.
    """
    dtype = token_dtype(index.sidecar.vocab_size)
    try:
        return np.memmap(index.prefix + ".bin", dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise _unreadable(index.prefix, error) from error


def _unreadable(prefix: str, error: OSError | ValueError) -> DataError:
    return DataError(
        f"{prefix}: the index cannot be read ({error}). Check that this process may read its "
        "files and that nothing is replacing them."
    )


def _missing(prefix: str, suffix: str) -> str:
    """Say which file is missing, and what was probably meant."""
    if Path(prefix).is_file():
        stem = Path(prefix).suffix in SUFFIXES
        hint = (
            f"Give the prefix alone: {str(Path(prefix).with_suffix(''))!r}."
            if stem
            else f"{prefix} is a file, not the prefix of an index: run tools/preprocess_data.py "
            "on it first."
        )
    elif suffix == ".json" and Path(prefix + ".idx").is_file():
        hint = f"The sidecar says which tokenizer made the index. {_REBUILD}"
    else:
        hint = "Check the path, or make the index with tools/preprocess_data.py."
    return f"{prefix}{suffix}: there is no such file. {hint}"


def _read_sidecar(path: Path) -> Sidecar:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        content["sources"] = tuple(SourceFile(**source) for source in content["sources"])
        return Sidecar(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a sidecar of this version ({error}). {_REBUILD}") from error


def _read_lengths(path: Path) -> tuple[npt.NDArray[np.int32], type[np.integer[Any]]]:
    """Check a ``.idx`` and map its document lengths."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise DataError(
            f"{path}: not a Megatron index: it starts with {header[: len(MAGIC)]!r}, not {MAGIC!r}."
            f" {_REBUILD}"
        )
    if size < HEADER.size:
        raise DataError(f"{path}: truncated: {size} bytes, less than its header. {_REBUILD}")
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != 1 or code not in DTYPE_CODES:
        raise DataError(
            f"{path}: version {version} with token type {code}; expected version 1 with token type "
            f"{' or '.join(map(str, DTYPE_CODES))}. {_REBUILD}"
        )
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size != expected or documents != sequences + 1:
        raise DataError(
            f"{path}: {'truncated' if size < expected else 'damaged'}: {size:,} bytes; its header "
            f"({sequences:,} sequences, {documents:,} document bounds) asks for {expected:,} bytes "
            f"and {sequences + 1:,} bounds. {_REBUILD}"
        )
    if not sequences:
        return np.zeros(0, dtype=np.int32), DTYPE_CODES[code]
    lengths = np.memmap(path, dtype="<i4", mode="r", offset=HEADER.size, shape=(sequences,))
    return lengths, DTYPE_CODES[code]
