"""A document's hash and MinHash signature: what deduplication needs to know of it.

The similarity of two documents is the Jaccard similarity of their sets of token n-grams and
weighted numbers: each number (or date, or equipment tag) is in the set ``number_weight`` times, so
that records of one form that differ in their values are not near-duplicates. The share of equal
places in two signatures estimates it with a standard error of at most
``sqrt(J (1 - J) / num_permutations)``. Documents that differ in numbers alone can be told by the
hash of their form.

The signatures come from ``rensa``'s R-MinHash (after Dahlgaard, Knudsen and Thorup, "Fast
Similarity Sketching", FOCS 2017); the hashing of n-grams is here, because making a Python string
of each n-gram would take most of the time.
"""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from megatron_cgn.config.corpus import DeduplicateConfig
from megatron_cgn.corpus.dedup.tokens import (
    PIECE_CHARACTERS,
    Hashes,
    Tokens,
    canonical_bytes,
    folding_table,
    mix,
    token_hashes,
    tokenize,
)
from megatron_cgn.errors import ConfigError

# Changes when the same text gets other hashes; part of what `prior` signatures are checked by.
FORMAT_VERSION: Final = 1
EMPTY: Final = np.uint32(0xFFFFFFFF)
"""In every place of a signature that has none: of a document with fewer tokens than an n-gram."""

# Documents signed together: enough to make numpy's calls cheap, few enough to stay in the cache.
_GROUP_CHARACTERS: Final = 1 << 16
_NGRAM_BASE: Final = np.uint64(0xA0761D6478BD642F)


@dataclass(frozen=True, slots=True)
class Signatures:
    """What deduplication knows of N documents; arrays in memory or mapped from files."""

    hashes: Hashes
    """`[N, 4]` uint64. Columns 0 and 1: of the normalised text; equal for exact duplicates. 2: of
    the form, which is the text with each number replaced by the same mark. 3: of the numbers."""
    minhashes: npt.NDArray[np.uint32]
    """`[N, num_permutations]` uint32: MinHash; all `EMPTY` for one too short to compare."""

    def __len__(self) -> int:
        return len(self.hashes)


class Signer:
    """Signs documents. Cheap to call, deterministic, without state.

    Args:
        settings: Those of the step.

    Raises:
        ConfigError: The packages of the extra ``corpus`` are missing.
    """

    def __init__(self, settings: DeduplicateConfig) -> None:
        try:
            import rensa
        except ImportError:
            raise ConfigError(
                "deduplicate: rensa is not installed; install it with pip install "
                "'megatron-cgn[corpus]'."
            ) from None
        self._minhash = rensa.RMinHash
        self._settings = settings

    @property
    def parameters(self) -> dict[str, int]:
        """Everything that signatures must share to be compared."""
        return {
            "format": FORMAT_VERSION,
            "rensa_algorithm": int(self._minhash.ALGORITHM_VERSION),
            "characters": zlib.crc32(folding_table().tobytes()),
            "num_permutations": self._settings.num_permutations,
            "ngram_tokens": self._settings.ngram_tokens,
            "number_weight": self._settings.number_weight,
            "seed": self._settings.seed,
        }

    def sign(self, texts: Sequence[str]) -> Signatures:
        """Sign documents; many in a call cost far less than one in each of many calls.

        Args:
            texts: N documents, without lone surrogates, of any length.

        Returns:
            Their signatures, in order; the same however the documents are grouped into calls.
        """
        parts = [self._sign(group) for group in _groups(texts)]
        if not parts:
            width = self._settings.num_permutations
            return Signatures(np.zeros((0, 4), np.uint64), np.zeros((0, width), np.uint32))
        return Signatures(
            np.concatenate([part.hashes for part in parts]),
            np.concatenate([part.minhashes for part in parts]),
        )

    def elements(self, texts: Sequence[str]) -> tuple[Hashes, npt.NDArray[np.int64]]:
        """The sets whose Jaccard similarity the signatures estimate, as hashes.

        Args:
            texts: N documents of ordinary length.

        Returns:
            All elements, repeated ones included, and where each document's start: `[N + 1]`.
        """
        tokens = tokenize(texts)
        return self._elements(tokens, token_hashes(tokens))

    def _sign(self, texts: Sequence[str]) -> Signatures:
        """Sign a group of documents, or one of any length."""
        if len(texts) == 1 and len(texts[0]) > PIECE_CHARACTERS:
            return self._long(texts[0])
        tokens = tokenize(texts)
        hashed = token_hashes(tokens)
        pairs = zip(canonical_bytes(tokens), texts, strict=True)
        digests = b"".join(_digest(canonical, text) for canonical, text in pairs)
        exact = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
        hashes = np.column_stack((exact, *form_and_numbers(tokens, hashed)))
        return Signatures(hashes, self._minhashes(*self._elements(tokens, hashed)))

    def _minhashes(
        self, elements: Hashes, offsets: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint32]:
        matrix = self._minhash.digest_matrix_from_flat_token_hashes(
            elements,
            offsets.astype(np.uint64),
            self._settings.num_permutations,
            self._settings.seed,
        )
        return np.array(matrix.to_rows(), dtype=np.uint32)

    def _long(self, text: str) -> Signatures:
        """Sign a document piece by piece: n-grams across a cut are left out.

        The signature of a union of sets is the least of theirs in each place, so that no more than
        a piece's elements are in memory.
        """
        hasher, canonical_size = hashlib.blake2b(digest_size=16), 0
        of_pieces: list[Hashes] = []
        minhashes = np.full((1, self._settings.num_permutations), EMPTY)
        for piece in _pieces(text):
            tokens = tokenize([piece])
            hashed = token_hashes(tokens)
            canonical = next(canonical_bytes(tokens))
            hasher.update(canonical)
            canonical_size += len(canonical)
            of_pieces.append(np.column_stack(form_and_numbers(tokens, hashed)))
            found = self._minhashes(*self._elements(tokens, hashed))
            np.minimum(minhashes, found, out=minhashes)
        digest = hasher.digest() if canonical_size else _digest(b"", text)
        exact = np.frombuffer(digest, dtype="<u8")
        rest = mix(np.concatenate(of_pieces)).sum(axis=0, dtype=np.uint64)
        return Signatures(np.concatenate((exact, rest))[None, :], minhashes)

    def _elements(self, tokens: Tokens, hashed: Hashes) -> tuple[Hashes, npt.NDArray[np.int64]]:
        """Hashes of a document's n-grams, then of its numbers; none if it is too short."""
        size, weight = self._settings.ngram_tokens, self._settings.number_weight
        lengths = np.diff(tokens.offsets)
        left = np.repeat(tokens.offsets[1:], lengths) - np.arange(len(hashed))
        ngrams = _ngrams(hashed, size)[left[: max(0, len(hashed) - size + 1)] >= size]
        num_ngrams = np.maximum(lengths - size + 1, 0)
        is_number = tokens.numbers & (np.repeat(lengths, lengths) >= size)
        counted = np.concatenate(([0], np.cumsum(is_number)))
        num_numbers = np.diff(counted[tokens.offsets]) * weight
        copies = mix(np.arange(1, weight + 1, dtype=np.uint64) * _NGRAM_BASE)
        numbers = mix(hashed[is_number][:, None] ^ copies[None, :]).ravel()
        offsets = np.concatenate(([0], np.cumsum(num_ngrams + num_numbers)))
        elements = np.empty(offsets[-1], dtype=np.uint64)
        # Behind each document's n-grams stand its numbers.
        behind = np.cumsum(num_numbers) - num_numbers
        elements[np.arange(len(ngrams)) + np.repeat(behind, num_ngrams)] = ngrams
        before = np.cumsum(num_ngrams)
        elements[np.arange(len(numbers)) + np.repeat(before, num_numbers)] = numbers
        return elements, offsets


def _ngrams(hashed: Hashes, size: int) -> Hashes:
    """Hash every run of `size` tokens, across documents too."""
    count = max(0, len(hashed) - size + 1)
    total = np.zeros(count, dtype=np.uint64)
    for place in range(size):
        total *= _NGRAM_BASE
        total += hashed[place : place + count]
    return mix(total)


def form_and_numbers(tokens: Tokens, hashed: Hashes) -> tuple[Hashes, Hashes]:
    """Hash each document's form, in order, and its numbers, in any order.

    Args:
        tokens: T tokens of D documents.
        hashed: `[T]`: their hashes.

    Returns:
        `[D]` each.
    """
    place = np.arange(len(hashed)) - np.repeat(tokens.offsets[:-1], np.diff(tokens.offsets))
    form = np.where(tokens.numbers, np.uint64(0), hashed)
    form = mix(form + (place + 1).astype(np.uint64) * _NGRAM_BASE)
    numbers = np.where(tokens.numbers, hashed, np.uint64(0))
    return _sums(form, tokens.offsets), _sums(numbers, tokens.offsets)


def _sums(terms: Hashes, offsets: npt.NDArray[np.int64]) -> Hashes:
    """Sum each document's terms, modulo 2^64."""
    total = np.zeros(len(terms) + 1, dtype=np.uint64)
    np.cumsum(terms, out=total[1:])
    return np.diff(total[offsets])


def _digest(canonical: bytes, text: str) -> bytes:
    """128 bits of the normalised text; of the text as it is where nothing remains of it."""
    if canonical:
        return hashlib.blake2b(canonical, digest_size=16).digest()
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"as it is").digest()


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Consecutive documents of at most `_GROUP_CHARACTERS` together, or one longer one."""
    begin = total = 0
    for index, text in enumerate(texts):
        if index > begin and total + len(text) > _GROUP_CHARACTERS:
            yield texts[begin:index]
            begin, total = index, 0
        total += len(text) + 1
    if begin < len(texts):
        yield texts[begin:]


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text, at white space where there is some nearby."""
    begin = 0
    while begin < len(text):
        end = begin + PIECE_CHARACTERS
        if end < len(text):
            tail = text[end - 1024 : end]
            space = max(tail.rfind(" "), tail.rfind("\n"))
            end = end - 1024 + space if space > 0 else end
        yield text[begin:end]
        begin = end
