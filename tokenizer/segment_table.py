"""Tables from short pieces of text to their ids, looked up a whole block at a time with numpy.

What a piece stands for is a code: the id, where it is one; else which of the lists of `IdLists`.
"""

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
"""Pieces of text, ``[words, n]``: four units of UTF-16 in a word, the first word never 0."""
Codes = npt.NDArray[np.int32]
"""Of pieces, ``[n]``: an id, or the complement of the number of a list."""
Ids = npt.NDArray[np.uint32]
Ints = npt.NDArray[np.int64]

UNKNOWN = np.int32(np.iinfo(np.int32).min)
"""The code of a piece that is not in the table."""
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], dtype=np.uint64)


class SegmentTable:
    """Open addressing with linear probing, at most half full.

    Keys are compared whole: what is found is the piece itself, not one with the same hash.
    """

    def __init__(self, *, words: int) -> None:
        """Begin with nothing.

        Args:
            words: Words of a key.
        """
        self._slots: Keys = np.zeros((words, 2), dtype=np.uint64)
        self._codes: Codes = np.full(2, UNKNOWN)
        self._shift = np.uint64(63)
        self.count = 0

    def find(self, keys: Keys) -> Codes:
        """Look pieces up.

        Args:
            keys: Any number of them, repeated or not.

        Returns:
            Their codes, `UNKNOWN` for those that are not in the table.
        """
        slot = self._first_slot(keys)
        codes: Codes = self._codes.take(slot)
        asked = np.flatnonzero(~self._holds(slot, keys))
        keys, slot = keys[:, asked], slot[asked]
        while len(asked):
            # A free slot has the code of a piece that is not here.
            codes[asked] = self._codes.take(slot)
            further = ~self._holds(slot, keys) & (self._slots[0].take(slot) != 0)
            asked, keys, slot = asked[further], keys[:, further], self._next(slot[further])
        return codes

    def add(self, keys: Keys, codes: Codes) -> None:
        """Put pieces in.

        Args:
            keys: Pieces that differ from each other and from those in the table.
            codes: What they stand for.
        """
        self.count += len(codes)
        if 2 * self.count > len(self._codes):
            used = np.flatnonzero(self._slots[0])
            keys = np.concatenate([self._slots[:, used], keys], axis=1)
            codes = np.concatenate([self._codes[used], codes])
            size = 1 << (2 * self.count - 1).bit_length()
            self._slots = np.zeros((len(keys), size), dtype=np.uint64)
            self._codes = np.full(size, UNKNOWN)
            self._shift = np.uint64(65 - size.bit_length())
        slot = self._first_slot(keys)
        while len(codes):
            free = np.flatnonzero(self._slots[0].take(slot) == 0)
            taken, first = np.unique(slot[free], return_index=True)  # of several, one wins
            winners = free[first]
            self._slots[:, taken] = keys[:, winners]
            self._codes[taken] = codes[winners]
            waits = np.ones(len(codes), dtype=bool)
            waits[winners] = False
            keys, codes, slot = keys[:, waits], codes[waits], self._next(slot[waits])

    def _holds(self, slot: Ints, keys: Keys) -> npt.NDArray[np.bool_]:
        same: npt.NDArray[np.bool_] = self._slots[0].take(slot) == keys[0]
        for slots, words in zip(self._slots[1:], keys[1:], strict=True):
            same &= slots.take(slot) == words
        return same

    def _next(self, slot: Ints) -> Ints:
        following: Ints = np.where(slot + 1 < len(self._codes), slot + 1, 0)
        return following

    def _first_slot(self, keys: Keys) -> Ints:
        mixed = keys[0] * _FACTORS[0]
        for words in keys[1:]:
            mixed ^= words * _FACTORS[1]
            mixed ^= mixed >> 32
            mixed *= _FACTORS[0]
        mixed >>= self._shift
        first: Ints = mixed.view(np.int64)
        return first


class IdLists:
    """Lists of ids, and what codes stand for."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._ids: Ids = np.zeros(1 << 10, dtype=np.uint32)
        self._starts: Ints = np.zeros(1 << 10, dtype=np.int64)
        self._counts: Ints = np.zeros(1 << 10, dtype=np.int64)
        self._num_ids = self._num_lists = 0

    def put(self, ids: Ids, counts: Ints, *, keep: bool) -> Codes:
        """Give codes to lists of ids.

        Args:
            ids: The ids, list after list.
            counts: How many ids each list has.
            keep: If not, the codes are good until the next call.

        Returns:
            A code for each list.
        """
        starts = np.cumsum(counts) - counts
        codes = np.zeros(len(counts), dtype=np.int32)
        is_one = counts == 1
        codes[is_one] = ids[starts[is_one]]
        others = np.flatnonzero(~is_one)
        codes[others] = ~np.arange(self._num_lists, self._num_lists + len(others))
        end, end_of_ids = self._num_lists + len(others), self._num_ids + len(ids)
        self._starts = _with_room(self._starts, end)
        self._counts = _with_room(self._counts, end)
        self._ids = _with_room(self._ids, end_of_ids)
        self._starts[self._num_lists : end] = starts[others] + self._num_ids
        self._counts[self._num_lists : end] = counts[others]
        self._ids[self._num_ids : end_of_ids] = ids
        if keep:
            self._num_lists, self._num_ids = end, end_of_ids
        return codes

    def read(self, codes: Codes, ends: Ints) -> tuple[Ids, Ints]:
        """Put the ids of pieces one after another.

        Args:
            codes: Of the pieces, ``[n]``.
            ends: Where texts end among the pieces, ascending.

        Returns:
            The ids, and how many each text has.
        """
        lists = np.flatnonzero(codes < 0)
        if not len(lists):
            return codes.view(np.uint32), np.diff(ends, prepend=0)
        numbers = ~codes.take(lists)
        of_list = self._counts.take(numbers)
        counts = np.ones(len(codes), dtype=np.int64)
        counts[lists] = of_list
        ids = np.repeat(codes.view(np.uint32), counts)
        more = np.concatenate([[0], np.cumsum(of_list - 1)])
        ids[places_of(lists + more[:-1], of_list)] = self._ids.take(
            places_of(self._starts.take(numbers), of_list)
        )
        return ids, np.diff(ends + more[np.searchsorted(lists, ends)], prepend=0)


def _with_room[T: np.generic](array: npt.NDArray[T], size: int) -> npt.NDArray[T]:
    if size <= len(array):
        return array
    larger = np.zeros(2 * size, dtype=array.dtype)
    larger[: len(array)] = array
    return larger


def places_of(starts: Ints, counts: Ints) -> Ints:
    """Count up from every start: ``[3, 7]`` and ``[2, 1]`` give ``[3, 4, 7]``."""
    ends = np.cumsum(counts)
    places = np.repeat(starts - (ends - counts), counts)
    places += np.arange(len(places))
    return places
