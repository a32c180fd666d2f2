"""Blocks of raw lines or rows to ids, by the fastest encoder that gives the tokenizer's own ids.

Which one that is: `choose`. That the fast one goes on giving the same ids is checked on samples of
every block, at the same places whatever the number of threads.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.documents import Block, parse_block
from megatron_cgn.data.indexed import token_dtype
from megatron_cgn.data.lineage import Columns
from tokenizer.fast import FastEncoder, NotEqual
from tokenizer.han_segments import Flat
from tokenizer.wrapper import Tokenizer

log = logging.getLogger(__name__)

# Samples of a block and characters of each. The original is slow: these take a twentieth of the
# time.
_FIRST_SAMPLES = 16, 512
_LATER_SAMPLES = 1, 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Ids of the documents of one block."""

    source: int
    """Place of the input among the inputs."""
    tokens: npt.NDArray[np.integer[Any]]
    """Ids, documents one after another, ``[sum(lengths)]``."""
    lengths: npt.NDArray[np.int32]
    """Tokens of each document, int32 ``[documents]``."""
    lineage: Columns
    """Where each document comes from."""
    text_bytes: int
    """UTF-8 bytes of the documents."""
    empty: int
    """Documents skipped because nothing is in them."""
    repaired: int
    """Documents in which lone surrogates were replaced."""
    progress_bytes: int
    """Bytes of the input used up."""


class BatchEncoder(Protocol):
    """Makes ids of a batch of texts, from several threads at once."""

    def encode(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Flat:
        """Give the ids of texts, which come in UTF-8 besides."""
        ...

    def prove(self, texts: Sequence[str]) -> None:
        """Check texts against the original; raises `NotEqual`."""
        ...


class OriginalEncoder:
    """The Hugging Face tokenizer itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wrap it."""
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Flat:
        """Give the ids of texts."""
        ids = self._tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        flat = itertools.chain.from_iterable(ids)
        return np.fromiter(flat, dtype=np.uint32, count=int(lengths.sum())), lengths

    def prove(self, texts: Sequence[str]) -> None:
        """Do nothing: these ids are right by definition."""


def choose(tokenizer: Tokenizer, *, threads: int) -> BatchEncoder:
    """Give the fastest encoder that does this tokenizer; logs why when it is the slow one.

    Args:
        tokenizer: The tokenizer.
        threads: How many threads will call the encoder.

    Returns:
        The encoder.
    """
    try:
        return FastEncoder(tokenizer, threads=threads)
    except ImportError:
        reason = "gigatoken is not installed: pip install 'megatron-cgn[fast]'"
    except NotEqual as error:
        reason = f"gigatoken does not do {tokenizer.name}: {error}"
    log.info("Encoding with Hugging Face's tokenizers, about ten times slower. (%s)", reason)
    return OriginalEncoder(tokenizer)


class BlockEncoder:
    """Turns a block of raw lines or rows into ids."""

    def __init__(
        self, encoder: BatchEncoder, *, field: str, eod_id: int | None, vocab_size: int
    ) -> None:
        """Fix the rules.

        Args:
            encoder: What makes ids.
            field: Name of the text's field.
            eod_id: Id to end every document with, if any.
            vocab_size: Largest id plus one.
        """
        self._encoder = encoder
        self._field = field
        self._eod_id = eod_id
        self._dtype = token_dtype(vocab_size)

    def __call__(self, block: Block) -> Encoded:
        """Parse and encode a block.

        Raises:
            DataError: If a line or row is not a document; names it.
            NotEqual: If the fast encoder turns out to give other ids.
        """
        parsed = parse_block(block, field=self._field)
        self._encoder.prove(_samples(parsed.texts, first=block.first))
        ids, lengths = self._encoder.encode(parsed.texts, parsed.utf8)
        lineage, text_bytes = parsed.lineage, sum(map(len, parsed.utf8))
        kept = np.flatnonzero(lengths)
        if len(kept) < len(lengths):  # texts of which a tokenizer makes nothing at all
            lengths = lengths[kept]
            text_bytes = sum(len(parsed.utf8[i]) for i in kept)
            lineage = {name: [column[i] for i in kept] for name, column in lineage.items()}
        if self._eod_id is not None:
            ids, lengths = _append(ids, lengths, self._eod_id, dtype=self._dtype)
        return Encoded(
            source=block.source,
            tokens=ids.astype(self._dtype, copy=False),
            lengths=lengths.astype(np.int32),
            lineage=lineage,
            text_bytes=text_bytes,
            empty=parsed.empty + len(parsed.texts) - len(kept),
            repaired=parsed.repaired,
            progress_bytes=block.progress_bytes,
        )


def _append(
    ids: npt.NDArray[np.integer[Any]],
    lengths: npt.NDArray[np.int64],
    ending: int,
    *,
    dtype: type[np.integer[Any]],
) -> Flat:
    """Put an id behind every document."""
    lengths = lengths + 1
    longer = np.empty(len(ids) + len(lengths), dtype=dtype)
    is_ending = np.zeros(len(longer), dtype=bool)
    is_ending[np.cumsum(lengths) - 1] = True
    longer[is_ending] = ending
    longer[~is_ending] = ids
    return longer, lengths


def _samples(texts: Sequence[str], *, first: int) -> list[str]:
    """Pieces of a block's texts, spread over it; more of an input's first block than of others."""
    count, size = _FIRST_SAMPLES if first == 1 else _LATER_SAMPLES
    places = {(first * 7919 + i * len(texts)) // count % len(texts) for i in range(count) if texts}
    pieces = []
    for place in sorted(places):
        text = texts[place]
        start = first * 104_729 % max(1, len(text) - size + 1)
        pieces.append(text[start : start + size])
    return pieces
