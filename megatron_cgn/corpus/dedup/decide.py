"""What each document is: kept, or a duplicate of which other.

A document is dropped if, and only if, it is a duplicate of an earlier document that is kept. The
order is that of the parts handed over: signatures of earlier runs, then sources by priority, then
position. What comes out depends on nothing else: not on the parts' boundaries nor on memory.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from megatron_cgn.config.corpus import DeduplicateConfig
from megatron_cgn.corpus.dedup.lsh import (
    NO_EDGES,
    Edges,
    Flags,
    Indices,
    Rows,
    banding,
    compare_bucket_mates,
    signed,
    sorted_bands,
)
from megatron_cgn.corpus.dedup.signature import Signatures

logger = logging.getLogger(__name__)

# Different documents of one bucket that the others are compared with; what it costs is documented.
_MAX_LEADERS: Final = 32
_MAX_PASSES: Final = 16
_EDGES_AT_ONCE: Final = 1 << 20


class Kind(IntEnum):
    """What a document is. The names in reports are those of ``reason``."""

    KEPT = 0
    EXACT = 1
    NEAR = 2

    @property
    def reason(self) -> str | None:
        """Why it is dropped, as reports say it; None if it is kept."""
        return {Kind.EXACT: "duplicate/exact", Kind.NEAR: "duplicate/near"}.get(self)


@dataclass(frozen=True, slots=True)
class Decisions:
    """What each of N documents is; those of earlier runs are not among them."""

    kinds: npt.NDArray[np.uint8]
    """`[N]`: a `Kind`."""
    of: Indices
    """`[N]`: index of the kept document it duplicates; itself if kept. Documents of earlier runs
    have negative indices: -P is the first of P, -1 the last."""
    similarity: npt.NDArray[np.float32]
    """`[N]`: estimated Jaccard similarity with that one; 1 for kept and equal ones."""
    num_crowded: int = 0
    """Documents not compared with every kept one that shares a bucket, because they are too many
    there; and that no comparison found to be duplicates."""


def find_duplicates(
    parts: Sequence[Signatures],
    settings: DeduplicateConfig,
    *,
    prior: Sequence[Signatures] = (),
    memory_bytes: int = 2**30,
) -> Decisions:
    """Decide on every document.

    Args:
        parts: Signatures in order of priority, N documents in all, fewer than 2^32 with those of
            earlier runs; mapped from files, they are read a block at a time.
        settings: Those of the step; the same that signed.
        prior: Signatures of documents that earlier runs kept: always kept.
        memory_bytes: For the keys of bands. About 100 bytes a document more are in use.

    Returns:
        The decisions, in order.
    """
    everything = [part for part in (*prior, *parts) if len(part)]
    num_prior = sum(map(len, prior))
    total = sum(map(len, everything))
    assert total < 2**32, f"{total} documents: indices have 32 bits"
    first = _first_equal(everything)
    chosen, similarity, num_crowded = first, np.ones(total, dtype=np.float32), 0
    near = np.zeros(total, dtype=np.bool_)
    if settings.near and total:
        search = _Search(everything, num_prior, settings)
        chosen, similarity, num_crowded = _near(search, first, settings, memory_bytes)
        near = chosen != first
    kinds = np.zeros(total, dtype=np.uint8)
    kinds[first != np.arange(total)] = Kind.EXACT
    kinds[near] = Kind.NEAR
    here = slice(num_prior, None)
    return Decisions(kinds[here], chosen[here] - num_prior, similarity[here], num_crowded)


def _first_equal(parts: Sequence[Signatures]) -> Indices:
    """Index of the first document with the same hash, for each."""
    if not parts:
        return np.zeros(0, dtype=np.int64)
    hashes = np.concatenate([part.hashes[:, :2] for part in parts])
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    sorted_hashes = hashes[order]
    new = np.ones(len(order), dtype=np.bool_)
    new[1:] = (sorted_hashes[1:] != sorted_hashes[:-1]).any(axis=1)
    # The sort is stable: the first of a group is the earliest.
    firsts = order[np.flatnonzero(new)]
    first = np.empty(len(order), dtype=np.int64)
    first[order] = firsts[np.cumsum(new) - 1]
    return first


def _near(
    search: "_Search", first: Indices, settings: DeduplicateConfig, memory_bytes: int
) -> tuple[Indices, npt.NDArray[np.float32], int]:
    """Find near-duplicates among the first of each group of equal documents.

    The decision that is wanted is the greedy one: in order, drop what is similar to an earlier
    kept document. Comparing with a bucket's leaders alone may miss it, where a leader itself is
    dropped. So documents that are kept though they have a similar (but dropped) one are compared
    again, among the kept, until no pair of kept documents is found to be similar. Then the
    decision is the greedy one over all pairs that share a bucket.

    Returns:
        `[N]` index of the kept document that each duplicates, `[N]` their similarity, and the
        number of documents in buckets too crowded to compare everything.
    """
    rows, total = search.rows, len(first)
    cut = banding(settings.num_permutations, settings.similarity_threshold)
    candidates = (first == np.arange(total)) & signed(rows)
    dropped = suspects = np.zeros(total, dtype=np.bool_)
    crowded = np.zeros(total, dtype=np.bool_)
    for number in range(_MAX_PASSES):
        num_edges = len(search.edges)
        live = candidates & ~dropped
        for packed in sorted_bands(rows, cut, live, memory_bytes=memory_bytes):
            mates = packed if number == 0 else _with_suspects(packed, suspects)
            left = compare_bucket_mates(
                mates, search, finer=search.numbers, max_leaders=_MAX_LEADERS
            )
            crowded[left] = True
        edges = search.edges
        if len(edges) == num_edges:
            break
        dropped = greedy(edges, total)
        suspects = np.zeros(total, dtype=np.bool_)
        suspects[edges.second] = True
        suspects &= ~dropped
        logger.info(
            "near-duplicates, pass %d: %d pairs, %d documents dropped, %d to compare again",
            number + 1,
            len(edges) - num_edges,
            dropped.sum(),
            suspects.sum(),
        )
        if not suspects.any():
            break
    else:
        logger.warning("near-duplicates: stopped after %d passes; some may be kept", _MAX_PASSES)
    chosen, similarity = best_kept(search.edges, dropped)
    return chosen[first], similarity[first], int((crowded & ~dropped).sum())


class _Search:
    """Compares pairs, and remembers the similar ones.

    Args:
        parts: Signatures of N documents.
        num_prior: How many of them are of earlier runs, which are kept whatever they resemble.
        settings: Those of the step.
    """

    def __init__(
        self, parts: Sequence[Signatures], num_prior: int, settings: DeduplicateConfig
    ) -> None:
        self.rows = Rows(parts)
        self.numbers = np.concatenate([part.hashes[:, 3] for part in parts])
        self._found: list[Edges] = [NO_EDGES]
        self._forms = np.concatenate([part.hashes[:, 2] for part in parts])
        self._num_prior, self._settings = num_prior, settings
        # The leader that each document was last found similar to: the same pair meets in most
        # bands, and need not be compared in each.
        self._leader = np.full(len(self.rows), -1, dtype=np.int64)

    def __call__(self, leaders: Indices, others: Indices) -> Flags:
        """Tell which of these pairs are similar."""
        known: Flags = self._leader[others] == leaders
        ask = ~known & (others >= self._num_prior)
        # They are not equal: what is equal has gone before. So equal forms mean other numbers.
        if self._settings.protect_numbers == "form":
            ask &= self._forms[leaders] != self._forms[others]
        elif self._settings.protect_numbers == "all":
            ask &= self.numbers[leaders] == self.numbers[others]
        asked = np.flatnonzero(ask)
        leaders, others = leaders[asked], others[asked]
        similarity = self.rows.similarities(leaders, others)
        similar = similarity >= self._settings.similarity_threshold
        known[asked[similar]] = True
        self._leader[others[similar]] = leaders[similar]
        if similar.any():
            self._found.append(Edges(leaders[similar], others[similar], similarity[similar]))
        return known

    @property
    def edges(self) -> Edges:
        """The similar pairs found so far."""
        first, second, similarity = (
            np.concatenate([getattr(found, name) for found in self._found])
            for name in ("first", "second", "similarity")
        )
        self._found = [Edges(first, second, similarity)]
        return self._found[0]


def _with_suspects(packed: npt.NDArray[np.uint64], suspects: Flags) -> npt.NDArray[np.uint64]:
    """Leave the buckets of a band that a suspect is in."""
    bucket = packed >> np.uint64(32)
    wanted = bucket[suspects[(packed & np.uint64(0xFFFFFFFF)).astype(np.int64)]]
    if not len(wanted):
        return packed[:0]
    place = np.searchsorted(wanted, bucket)
    found: Flags = wanted[np.minimum(place, len(wanted) - 1)] == bucket
    return packed[found]


def greedy(edges: Edges, total: int) -> Flags:
    """Drop, in order, every document that is similar to an earlier one that is not dropped.

    Args:
        edges: Pairs of similar documents, in any order.
        total: N documents.

    Returns:
        `[N]`: which are dropped.
    """
    dropped = bytearray(total)
    order = np.argsort(edges.second, kind="stable")
    for low in range(0, len(order), _EDGES_AT_ONCE):
        block = order[low : low + _EDGES_AT_ONCE]
        pairs = zip(edges.first[block].tolist(), edges.second[block].tolist(), strict=True)
        for first, second in pairs:
            if not dropped[first]:
                dropped[second] = 1
    return np.frombuffer(dropped, dtype=np.bool_)


def best_kept(edges: Edges, dropped: Flags) -> tuple[Indices, npt.NDArray[np.float32]]:
    """Choose for each dropped document the kept one it is most similar to.

    Args:
        edges: Pairs of similar documents.
        dropped: `[N]`: which of them are dropped.

    Returns:
        `[N]` the index of that one (the earliest of equals; itself if kept), `[N]` the similarity.
    """
    chosen = np.arange(len(dropped), dtype=np.int64)
    similarity = np.ones(len(dropped), dtype=np.float32)
    usable = np.flatnonzero(~dropped[edges.first])
    first, second, alike = (
        values[usable] for values in (edges.first, edges.second, edges.similarity)
    )
    order = np.lexsort((-first, alike, second))
    # Of several values written to one place, the last stays.
    chosen[second[order]] = first[order]
    similarity[second[order]] = alike[order]
    return chosen, similarity
