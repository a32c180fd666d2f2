"""Encodes texts and the words of a corpus, and counts: tokens of each, uses of each new token."""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenizer.extend import Kind
from tokenizer.fast import FastEncoder, NotEqual
from tokenizer.han_segments import Flat
from tokenizer.sentencepiece_fast import bare_backend
from tokenizer.words import Words
from tokenizer.wrapper import Tokenizer

log = logging.getLogger(__name__)

WORD_BYTES = 16 << 20
"""Most bytes of distinct words that are encoded."""

_BATCH_CHARACTERS = 1 << 18
_PROOF_CHARACTERS = 512
_NUM_PROOFS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledWords:
    """Words of a corpus, of which each stands for others as well."""

    spellings: list[str]
    weights: npt.NDArray[np.float64]
    """How many words of the corpus each stands for, ``[n]``."""


def sample_words(words: Words, *, max_bytes: int = WORD_BYTES) -> SampledWords:
    """Take the most frequent words, and every k-th of the others.

    Args:
        words: Words of a corpus, the most frequent first.
        max_bytes: Most UTF-8 bytes of spellings, about: half for the most frequent ones.

    Returns:
        All words with their counts where they fit; else a sample whose weights make sums over it
        estimates of those over all.
    """
    sizes = np.fromiter(
        (len(spelling.encode()) for spelling in words.spellings), np.int64, len(words)
    )
    counts = words.counts.astype(np.float64)
    if int(sizes.sum()) <= max_bytes:
        return SampledWords(spellings=words.spellings, weights=counts)
    head = int(np.searchsorted(np.cumsum(sizes), max_bytes // 2, side="right"))
    step = -(-int(sizes[head:].sum()) // (max_bytes // 2))
    chosen = np.concatenate([np.arange(head), np.arange(head, len(words), step)])
    weights = counts[chosen]
    weights[head:] *= step
    return SampledWords(
        spellings=[words.spellings[place] for place in chosen.tolist()], weights=weights
    )


class Counter:
    """Counts with one tokenizer, by the fastest encoder that gives its own ids on these texts."""

    def __init__(self, tokenizer: Tokenizer, *, old_vocab_size: int, kind: Kind) -> None:
        """Open the encoder.

        Args:
            tokenizer: The old tokenizer, or one that extends it.
            old_vocab_size: The first new id.
            kind: What kind it is.
        """
        self._kind = kind
        self._tokenizer = tokenizer
        self._first = old_vocab_size
        self._num_new = max(0, tokenizer.vocab_size - old_vocab_size)
        self._fast = _fast_encoder(tokenizer)

    def texts(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Count documents.

        Args:
            texts: Valid Unicode.

        Returns:
            Tokens of each document, int64 ``[documents]``, and uses of each new token, int64
            ``[new tokens]``.
        """
        uses = np.zeros(self._num_new, dtype=np.int64)
        lengths = [np.zeros(0, dtype=np.int64)]
        for ids, counts in self._batches(texts):
            new = ids[ids >= self._first].astype(np.int64) - self._first
            uses += np.bincount(new, minlength=self._num_new)
            lengths.append(counts.astype(np.int64))
        return np.concatenate(lengths), uses

    def words(self, words: SampledWords) -> tuple[float, npt.NDArray[np.float64]]:
        """Count the words of a corpus.

        Args:
            words: From `sample_words`.

        Returns:
            Tokens of the corpus, and uses of each new token in it, float64 ``[new tokens]``.
        """
        uses = np.zeros(self._num_new)
        start, tokens = 0, 0.0
        batches = (
            self._batches(words.spellings)
            if self._kind == "byte_level_bpe"
            else self._bare_batches(words.spellings)
        )
        for ids, counts in batches:
            weights = words.weights[start : start + len(counts)]
            start += len(counts)
            tokens += float(weights @ counts)
            is_new = ids >= self._first
            new = ids[is_new].astype(np.int64) - self._first
            of_each = np.repeat(weights, counts.astype(np.int64))[is_new]
            uses += np.bincount(new, weights=of_each, minlength=self._num_new)
        return tokens, uses

    def _batches(self, texts: Sequence[str]) -> Iterator[Flat]:
        """Ids and lengths, of so many texts at a time that memory is bounded."""
        for batch in _batches(texts):
            yield self._encode_fast(batch) or _encode(self._tokenizer, batch)

    def _bare_batches(self, spellings: Sequence[str]) -> Iterator[Flat]:
        """The same for words of SentencePiece, which a tokenizer would normalise a second time."""
        backend = bare_backend(self._tokenizer.definition())
        bare = Tokenizer(backend, name=self._tokenizer.name, eos_token=None)
        for batch in _batches(spellings):
            yield _encode(bare, batch)

    def _encode_fast(self, batch: Sequence[str]) -> Flat | None:
        if self._fast is None:
            return None
        try:
            step = max(1, len(batch) // _NUM_PROOFS)
            self._fast.prove([text[:_PROOF_CHARACTERS] for text in batch[::step]])
            return self._fast.encode(batch, [text.encode() for text in batch])
        except NotEqual as reason:
            log.warning("Encoding with Hugging Face's tokenizers from here on: %s", reason)
            self._fast = None
            return None


def _encode(tokenizer: Tokenizer, batch: Sequence[str]) -> Flat:
    ids = tokenizer.encode_batch(batch)
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    flat = itertools.chain.from_iterable(ids)
    return np.fromiter(flat, dtype=np.uint32, count=int(lengths.sum())), lengths


def _fast_encoder(tokenizer: Tokenizer) -> FastEncoder | None:
    try:
        return FastEncoder(tokenizer)
    except ImportError:
        log.debug("gigatoken is not installed: pip install 'megatron-cgn[fast]'")
    except NotEqual as reason:
        log.debug("gigatoken does not do %s: %s", tokenizer.name, reason)
    return None


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
