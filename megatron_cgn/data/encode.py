"""Blocks of raw lines or rows to ids, by the fastest encoder that gives the tokenizer's own ids.

That the fast one gives the same ids is checked on samples of every block, at the same places
whatever the number of processes. Those that encode have not the original tokenizer: what only it
can say, they leave to the main process, which asks it (``original.py``).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.documents import Block, parse_block
from megatron_cgn.data.facts import Facts
from megatron_cgn.data.indexed import token_dtype
from megatron_cgn.data.lineage import to_batch
from tokenizer.fast import FastIds, sample_ids, with_left, without
from tokenizer.han_segments import Flat
from tokenizer.wrapper import Tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

# Samples of a block and characters of each. The original is slow: these take a twentieth of the
# time.
_FIRST_SAMPLES = 16, 512
_LATER_SAMPLES = 1, 160
_SPENT_BYTES = 72 << 20
"""Growth of a process from which another should take its place; most of it is a cache of words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Ids of the documents of one block."""

    source: int
    """Place of the input among the inputs."""
    tokens: npt.NDArray[np.integer[Any]]
    """Ids, documents one after another, ``[sum(lengths)]``."""
    lengths: npt.NDArray[np.integer[Any]]
    """Tokens of each document, ``[documents]``."""
    lineage: "pa.RecordBatch"
    """Where each document comes from."""
    empty: int
    """Documents skipped because nothing is in them."""
    repaired: int
    """Documents in which lone surrogates were replaced."""
    progress_bytes: int
    """Bytes of the input used up."""
    samples: tuple[list[str], list[list[int]]] | None = None
    """Pieces of the texts and their ids, to be held against the original's."""
    left: tuple[list[int], list[str]] | None = None
    """Documents left to the original: their places and texts. The others are not `complete`."""


class BatchEncoder(Protocol):
    """Makes ids of a batch of texts."""

    def encode(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Flat:
        """Give the ids of texts, which come in UTF-8 besides."""
        ...


class OriginalIds:
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


class BlockEncoder:
    """Turns a block of raw lines or rows into ids."""

    def __init__(self, encoder: BatchEncoder, *, field: str, facts: Facts) -> None:
        """Fix the rules.

        Args:
            encoder: What makes ids; `FastIds` are checked, others are right by definition.
            field: Name of the text's field.
            facts: About the tokenizer.
        """
        self._encoder = encoder
        self._fast = encoder if isinstance(encoder, FastIds) else None
        self._field = field
        self._facts = facts

    def __call__(self, block: Block) -> Encoded:
        """Parse and encode a block.

        Raises:
            DataError: If a line or row is not a document; names it.
            NotEqual: If the fast encoder fails.
        """
        parsed = parse_block(block, field=self._field)
        texts, utf8 = parsed.texts, parsed.utf8
        places = self._fast.unsettled(texts, utf8) if self._fast is not None else []
        ids, lengths = self._encoder.encode(*without(texts, utf8, places))
        encoded = Encoded(
            source=block.source,
            tokens=ids,
            lengths=lengths,
            lineage=to_batch(parsed.lineage),
            empty=parsed.empty,
            repaired=parsed.repaired,
            progress_bytes=block.progress_bytes,
        )
        if self._fast is None:
            return _finished(encoded, self._facts)
        samples = sample_ids(self._fast, _samples(texts, first=block.first))
        if places:
            return replace(encoded, samples=samples, left=(places, [texts[i] for i in places]))
        return replace(_finished(encoded, self._facts), samples=samples)

    def spent(self) -> bool:
        """Say whether this process has grown so large that another should take its place."""
        return self._fast is not None and self._fast.grown_bytes() > _SPENT_BYTES


def complete(encoded: Encoded, own: Sequence[Sequence[int]], facts: Facts) -> Encoded:
    """Put in the ids of the documents that were left to the original.

    Args:
        encoded: Of which some are left.
        own: Their ids.
        facts: About the tokenizer.
    """
    assert encoded.left is not None
    lengths = encoded.lengths.astype(np.int64)
    ids, lengths = with_left((encoded.tokens, lengths), encoded.left[0], own)
    return _finished(replace(encoded, tokens=ids, lengths=lengths, left=None), facts)


def _finished(encoded: Encoded, facts: Facts) -> Encoded:
    """Drop texts of which a tokenizer makes nothing at all, and end each document."""
    ids, lengths, lineage = encoded.tokens, encoded.lengths, encoded.lineage
    kept = lengths > 0
    if not kept.all():
        lengths, lineage = lengths[kept], lineage.filter(kept)
    dtype = token_dtype(facts.vocab_size)
    if facts.eod_id is not None:
        ids, lengths = _append(ids, lengths, facts.eod_id, dtype=dtype)
    return replace(
        encoded,
        tokens=ids.astype(dtype, copy=False),
        lengths=lengths.astype(np.int32),
        lineage=lineage,
        empty=encoded.empty + int((~kept).sum()),
    )


def _append(
    ids: npt.NDArray[np.integer[Any]],
    lengths: npt.NDArray[np.integer[Any]],
    ending: int,
    *,
    dtype: type[np.integer[Any]],
) -> tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.integer[Any]]]:
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
