"""A table from short pieces of text to their ids, looked up a whole block at a time with numpy."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
"""Pieces of text, ``[2, n]``: up to eight units of UTF-16 in two words, the first never 0."""
Spans = npt.NDArray[np.int64]
"""Where ids lie, ``[n]``: the place of the first one and, in the lowest byte, how many; or 0."""
Ids = npt.NDArray[np.uint32]

_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93], dtype=np.uint64)
_SPAN_BITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentTable:
    """Open addressing with linear probing, at most half full; never changed, so threads share it.

    Keys are compared whole: what is found is the piece itself, not one with the same hash.
    """

    slots: Keys
    """Keys, ``[2, 2^k]``; a free slot is 0."""
    spans: Spans
    """Of each slot."""
    ids: Ids
    """Ids of all pieces, one piece after another."""
    count: int
    """Pieces in the table."""

    @classmethod
    def empty(cls) -> Self:
        """Make the table of nothing."""
        return cls(
            slots=np.zeros((2, 2), dtype=np.uint64),
            spans=np.zeros(2, dtype=np.int64),
            ids=np.zeros(0, dtype=np.uint32),
            count=0,
        )

    def find(self, keys: Keys) -> Spans:
        """Look pieces up.

        Args:
            keys: Any number of them, repeated or not.

        Returns:
            Where in ``ids`` the ids of each lie, 0 for pieces that are not in the table.
        """
        slot = self._first_slot(keys)
        same = self._holds(slot, keys)
        spans = self.spans.take(slot)
        asked = np.flatnonzero(~same)
        spans[asked] = 0
        keys, slot = keys[:, asked], slot[asked]
        while len(asked := asked[further := np.flatnonzero(self.slots[0].take(slot))]):
            keys, slot = keys[:, further], self._next(slot[further])
            same = self._holds(slot, keys)
            spans[asked[same]] = self.spans.take(slot[same])
            asked, keys, slot = asked[~same], keys[:, ~same], slot[~same]
        return spans

    def with_more(self, keys: Keys, counts: npt.NDArray[np.int64], ids: Ids) -> "SegmentTable":
        """Make a table with more pieces.

        Args:
            keys: Pieces that differ from each other and from those in the table.
            counts: How many ids each has, 1 to 255.
            ids: The ids, piece after piece.
        """
        spans = (np.cumsum(counts) - counts + len(self.ids)) << _SPAN_BITS | counts
        count = self.count + len(counts)
        if 2 * count > len(self.spans):
            used = np.flatnonzero(self.slots[0])
            keys = np.concatenate([self.slots[:, used], keys], axis=1)
            spans = np.concatenate([self.spans[used], spans])
            size = 1 << (2 * count - 1).bit_length()
            slots = np.zeros((2, size), dtype=np.uint64)
            all_spans = np.zeros(size, dtype=np.int64)
        else:
            slots, all_spans = self.slots.copy(), self.spans.copy()
        larger = SegmentTable(
            slots=slots, spans=all_spans, ids=np.concatenate([self.ids, ids]), count=count
        )
        larger._insert(keys, spans)
        return larger

    def _insert(self, keys: Keys, spans: Spans) -> None:
        slot = self._first_slot(keys)
        owner = np.full(len(self.spans), -1, dtype=np.int64)
        waiting = np.arange(len(spans))
        while len(waiting):
            free = self.slots[0, slot] == 0
            owner[slot[free]] = waiting[free]  # of several, one wins
            won = owner[slot] == waiting
            self.slots[:, slot[won]] = keys[:, waiting[won]]
            self.spans[slot[won]] = spans[waiting[won]]
            waiting, slot = waiting[~won], self._next(slot[~won])

    def _holds(self, slot: Spans, keys: Keys) -> npt.NDArray[np.bool_]:
        same: npt.NDArray[np.bool_] = self.slots[0].take(slot) == keys[0]
        same &= self.slots[1].take(slot) == keys[1]
        return same

    def _next(self, slot: Spans) -> Spans:
        following: Spans = np.where(slot + 1 < len(self.spans), slot + 1, 0)
        return following

    def _first_slot(self, keys: Keys) -> Spans:
        mixed = keys[0] * _FACTORS[0]
        mixed ^= keys[1] * _FACTORS[1]
        mixed ^= mixed >> 32
        mixed *= _FACTORS[2]
        mixed >>= np.uint64(65 - len(self.spans).bit_length())
        first: Spans = mixed.astype(np.int64)
        return first


def gather(ids: Ids, spans: Spans) -> tuple[Ids, npt.NDArray[np.int64]]:
    """Put the ids of pieces one after another.

    Args:
        ids: What the spans point into.
        spans: Of the pieces; 0 stands for no ids.

    Returns:
        The ids, and how many each piece has.
    """
    counts = spans & (1 << _SPAN_BITS) - 1
    places = places_of(spans >> _SPAN_BITS, counts)
    return ids.take(places), counts


def places_of(
    starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Count up from every start: ``[3, 7]`` and ``[2, 1]`` give ``[3, 4, 7]``."""
    ends = np.cumsum(counts)
    places = np.repeat(starts - (ends - counts), counts)
    places += np.arange(len(places))
    return places
