"""Finds passages of evaluation files in texts, by n-grams of folded tokens.

Memory: 20 bytes for each n-gram (as many as the evaluation files have tokens) and a table of at
most 32 MiB that answers most look-ups at once; a text takes some 80 bytes for each of at most 2²⁰
characters at a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_cgn.corpus import characters, ngrams
from megatron_cgn.corpus.evaluation import Passage
from megatron_cgn.corpus.passages import PassageReader, ranges

_CHUNK_CHARACTERS = (1 << 20) - 1
_CHUNK_OVERLAP = 1 << 13  # far more than an n-gram is long
_MOST_TABLE_BITS = 25


@dataclass(frozen=True, slots=True)
class Match:
    """A passage found in a text."""

    passage: Passage
    """The passage, without its texts."""
    tokens: int
    """How many of its tokens are in the text."""
    of_tokens: int
    """How many were looked for."""
    spans: tuple[tuple[int, int], ...]
    """Where in the text, in code points: disjoint and in order."""


class OverlapIndex:
    """The n-grams of all passages."""

    def __init__(
        self,
        passages: Iterable[Passage],
        *,
        ngram_tokens: int,
        min_item_tokens: int,
        max_shared_items: int,
        fold_traditional: bool,
    ) -> None:
        """Index passages.

        Args:
            passages: The passages; equal ones count once.
            ngram_tokens: Tokens of an n-gram.
            min_item_tokens: Fewest tokens of a text to index; one below `ngram_tokens` as a whole.
            max_shared_items: Most passages with an n-gram in common for it to count.
            fold_traditional: Whether to fold traditional into simplified characters.

        Raises:
            ConfigError: If OpenCC is needed and missing.
        """
        reader = PassageReader(
            ngram_tokens=ngram_tokens,
            min_item_tokens=min_item_tokens,
            fold_traditional=fold_traditional,
        )
        entries = reader.read(passages)
        self._fold = reader.fold
        self.passages = reader.passages
        """The passages indexed, without their texts."""
        self._copies = reader.copies
        kept = np.flatnonzero(_rare(entries.hashes, entries.owners, max_shared_items))
        order = kept[np.argsort(entries.hashes[kept], kind="stable")]
        self._owners, self._positions = entries.owners[order], entries.positions[order]
        self._lengths = entries.lengths[order]
        self._hashes, self._first = np.unique(entries.hashes[order], return_index=True)
        self._first = np.append(self._first, len(order))
        self._used_lengths = [int(length) for length in np.unique(self._lengths)]
        bits = min(_MOST_TABLE_BITS, max(16, (8 * len(self._hashes)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, np.bool_)
        self._table[self._hashes >> self._shift] = True
        self._totals = self._covered_totals(np.array(reader.short_tokens, np.int64))

    def searched(self) -> list[Passage]:
        """Give the passages that have an n-gram to look for, and their copies."""
        owners = [(passage, owner) for owner, passage in enumerate(self.passages)] + self._copies
        return [passage for passage, owner in owners if self._totals[owner]]

    def search(self, text: str, *, min_coverage: float) -> list[Match]:
        """Find the passages of which a text holds enough.

        Args:
            text: The text.
            min_coverage: Least share of a passage's tokens.

        Returns:
            The matches, best covered first.
        """
        grams, starts, ends = self._hits(text)
        if not len(grams):
            return []
        found = np.unique(grams)
        counts = self._first[found + 1] - self._first[found]
        entries = np.repeat(self._first[found], counts) + ranges(counts)
        matches = []
        for owner, covered in self._coverage(entries).items():
            if covered >= min_coverage * self._totals[owner]:
                mine = np.isin(grams, np.repeat(found, counts)[self._owners[entries] == owner])
                spans = _union(starts[mine], ends[mine])
                total = int(self._totals[owner])
                matches.append(Match(self.passages[owner], covered, total, spans))
        return sorted(matches, key=lambda match: -match.tokens / match.of_tokens)

    def _hits(
        self, text: str
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Look up every n-gram of a text: indices of those known, and where they start and end."""
        found = [(np.empty(0, np.int64),) * 3]
        step = _CHUNK_CHARACTERS - _CHUNK_OVERLAP
        for offset in range(0, max(len(text) - _CHUNK_OVERLAP, 1), step):
            chunk = text[offset : offset + _CHUNK_CHARACTERS]
            tokens = ngrams.tokens(self._fold[characters.code_points(chunk)])
            for length in self._used_lengths:
                hashes = ngrams.ngrams(tokens, length)
                likely = np.flatnonzero(self._table[hashes >> self._shift])
                if len(likely):
                    places = np.searchsorted(self._hashes, hashes[likely])
                    places[places == len(self._hashes)] = 0
                    known = self._hashes[places] == hashes[likely]
                    first = likely[known]
                    starts, ends = tokens.starts[first], tokens.ends[first + length - 1]
                    found.append((places[known], starts + offset, ends + offset))
        grams, starts, ends = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return grams, starts, ends

    def _coverage(self, entries: npt.NDArray[np.int64]) -> dict[int, int]:
        """Count the tokens of each passage that entries of the index cover."""
        owners = self._owners[entries]
        covered = {}
        for owner in np.unique(owners).tolist():
            mine = entries[owners == owner]
            starts = self._positions[mine]
            spans = _union(starts, starts + self._lengths[mine])
            covered[owner] = sum(end - start for start, end in spans)
        return covered

    def _covered_totals(self, short_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Count the tokens of each passage that its entries cover, and those not looked for."""
        sizes = np.zeros(len(self.passages), np.int64)
        ends = self._positions.astype(np.int64) + self._lengths
        np.maximum.at(sizes, self._owners, ends)
        first = np.cumsum(sizes + 1) - (sizes + 1)
        steps = np.zeros(int((sizes + 1).sum()) + 1, np.int32)
        np.add.at(steps, first[self._owners] + self._positions, 1)
        np.add.at(steps, first[self._owners] + ends, -1)
        covered = np.concatenate([[0], np.cumsum(np.cumsum(steps) > 0)])
        totals = covered[first + sizes] - covered[first]
        return np.where(totals > 0, totals + short_tokens, 0)


def _rare(hashes: ngrams.Hashes, owners: npt.NDArray[np.int32], most: int) -> npt.NDArray[np.bool_]:
    """Tell which entries are of n-grams that at most so many passages share."""
    if not len(hashes):
        return np.empty(0, np.bool_)
    _, group = np.unique(hashes, return_inverse=True)
    pairs = np.unique(group.astype(np.int64) * (int(owners.max()) + 1) + owners)
    sharing = np.bincount(pairs // (int(owners.max()) + 1))
    kept: npt.NDArray[np.bool_] = sharing[group] <= most
    return kept


def _union(
    starts: npt.NDArray[np.int64] | npt.NDArray[np.int32],
    ends: npt.NDArray[np.int64] | npt.NDArray[np.int32],
) -> tuple[tuple[int, int], ...]:
    """Join spans that overlap or touch."""
    spans: list[tuple[int, int]] = []
    for start, end in sorted(zip(starts.tolist(), ends.tolist(), strict=True)):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return tuple(spans)
