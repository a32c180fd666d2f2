"""Whole characters that a merge of parts of one leads to.

A byte-level vocabulary spells the characters it lacks with tokens of one to three of their bytes.
Two of those may only be merged for the sake of a character that they are in. So for a pair whose
spelling is a part of a character this finds the characters around its places, and the merges that
complete the best of them.

A character counts only where symbols begin and end with it. No other merge changes where that is,
because none whose spelling is a part of characters is ever made but those asked for here.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int32]
_Longs = npt.NDArray[np.int64]
_SYMBOL_BITS = 28
_LONGEST = 4  # bytes of a character in UTF-8


def is_whole(spelling: bytes) -> bool:
    """Whether these bytes are whole characters."""
    try:
        spelling.decode()
    except UnicodeDecodeError:
        return False
    return True


class Loop(Protocol):
    """What is needed of the loop: see ``merge_loop.py``."""

    symbols: _Ints
    next: _Ints
    previous: _Ints
    word: _Ints
    counts: npt.NDArray[np.int64]
    spellings: list[bytes]
    known: set[bytes]


@dataclass(frozen=True, slots=True)
class Way:
    """Merges that lead to a character."""

    spelling: bytes
    """The character."""
    frequency: int
    """How often the words have it, spelled in this way."""
    places: _Ints
    """Places of the first merge that are in it."""
    merges: list[tuple[int, int]]
    """The first is the pair itself; -1 stands for what the merge before has made."""


class Steps:
    """Finds ways from parts of characters to whole ones."""

    def __init__(self, loop: Loop) -> None:
        """Look at the words of a loop, as they are whenever `best` is called."""
        self._loop = loop
        self._refused: set[bytes] = set()
        # Of every symbol: bytes of its character and of itself, where it begins one and no more;
        # its bytes where it is made of such as continue one.
        self._total: npt.NDArray[np.int8] = np.zeros(0, dtype=np.int8)
        self._begins: npt.NDArray[np.int8] = np.zeros(0, dtype=np.int8)
        self._continues: npt.NDArray[np.int8] = np.zeros(0, dtype=np.int8)

    def refuse(self, spelling: bytes) -> None:
        """Never lead to this character."""
        self._refused.add(spelling)

    def best(self, left: int, right: int, places: _Ints) -> Way | None:
        """Find the most frequent character that a pair leads to; of equals the smallest symbols.

        Args:
            left: Symbol on the left.
            right: Symbol on the right.
            places: The pair's current places.

        Returns:
            The way, or None if there is no character to which it leads.
        """
        self._read_spellings()
        spelling = self._loop.spellings[left] + self._loop.spellings[right]
        total, size = _part_of_character(spelling)
        if not size or spelling in self._loop.known:
            return None
        keys, places = self._around(places, total=total, size=size)
        found, which = np.unique(keys, return_inverse=True)
        weights = self._loop.counts[self._loop.word[places]]
        frequencies = np.zeros(len(found), dtype=np.int64)
        np.add.at(frequencies, which, weights)
        for index in np.lexsort((found, -frequencies)).tolist():
            symbols, position = _unpack(int(found[index]), left, right)
            character = b"".join(self._loop.spellings[symbol] for symbol in symbols)
            if character in self._refused or not is_whole(character):
                continue
            merges = self._merges(symbols, position)
            if merges is not None:
                chosen = places[which == index]
                return Way(character, int(frequencies[index]), chosen, merges)
        return None

    def _merges(self, symbols: list[int], position: int) -> list[tuple[int, int]] | None:
        """Merge the pair at a position, then what is on its right, then what is on its left."""
        spelled = [self._loop.spellings[symbol] for symbol in symbols]
        merges = [(symbols[position], symbols[position + 1])]
        joined = spelled[position] + spelled[position + 1]
        for symbol, part in zip(symbols[position + 2 :], spelled[position + 2 :], strict=True):
            if joined in self._loop.known:
                return None
            merges.append((-1, symbol))
            joined += part
        for symbol, part in zip(symbols[:position][::-1], spelled[:position][::-1], strict=True):
            if joined in self._loop.known:
                return None
            merges.append((symbol, -1))
            joined = part + joined
        return merges

    def _around(self, places: _Ints, *, total: int, size: int) -> tuple[_Longs, _Ints]:
        """The other symbols of the character at each place, as numbers; and those places.

        Args:
            places: Where the pair is.
            total: Bytes of its character if it begins one, else 0.
            size: Bytes of the pair.
        """
        number = len(places)
        have = np.full(number, size, dtype=np.int64)
        totals = np.full(number, total, dtype=np.int64)
        before, left = self._to_the_left(places, have, totals)
        covered = (totals > 0) & (have <= totals)
        after, right = self._to_the_right(places, have, np.where(covered, totals, 0))
        covered &= have == totals
        # At most two of the four are there: four bytes less the two of the pair.
        outer = np.where(before == 2, left[1], np.where(before == 1, left[0], right[0]))
        inner = np.where(before == 2, left[0], np.where(before == 1, right[0], right[1]))
        keys = before << 2 | after
        keys = (keys << _SYMBOL_BITS | outer + 1) << _SYMBOL_BITS | inner + 1
        return keys[covered], places[covered]

    def _to_the_left(
        self, places: _Ints, have: _Longs, totals: _Longs
    ) -> tuple[_Longs, list[_Longs]]:
        """Go to where each character begins; adds to what there is of it, and sets its size.

        Returns:
            How many symbols that takes, and the next symbol on the left and the one after; -1 if
            they are no part of the character.
        """
        loop = self._loop
        taken = np.zeros(len(places), dtype=np.int64)
        symbols = []
        seeking, place = totals == 0, places
        for step in (1, 2):
            place = np.where(seeking, loop.previous[place], -1)
            symbol = np.where(place >= 0, loop.symbols[place], -1)
            begins = seeking & (self._begins[symbol] > 0)
            continues = seeking & (self._continues[symbol] > 0)
            have += self._begins[symbol] * begins + self._continues[symbol] * continues
            totals[begins] = self._total[symbol[begins]]
            taken[begins] = step
            symbols.append(np.where(begins | continues, symbol, -1).astype(np.int64))
            seeking = continues
        return taken, symbols

    def _to_the_right(
        self, places: _Ints, have: _Longs, totals: _Longs
    ) -> tuple[_Longs, list[_Longs]]:
        """Go to where each character ends; adds to what there is of it.

        Returns:
            As `_to_the_left`, on the right.
        """
        loop = self._loop
        taken = np.zeros(len(places), dtype=np.int64)
        symbols = []
        seeking, place = np.ones(len(places), dtype=bool), loop.next[places]
        for step in (1, 2):
            seeking = seeking & (have < totals)
            place = np.where(seeking, loop.next[place], -1)
            symbol = np.where(place >= 0, loop.symbols[place], -1)
            seeking &= self._continues[symbol] > 0
            have += self._continues[symbol] * seeking
            taken[seeking] = step
            symbols.append(np.where(seeking, symbol, -1).astype(np.int64))
        return taken, symbols

    def _read_spellings(self) -> None:
        """Learn the symbols that are new since the last call."""
        known = len(self._total) - 1
        spellings = self._loop.spellings[max(known, 0) :]
        if not spellings and known >= 0:
            return
        parts = [_part_of_character(spelling) for spelling in spellings]
        # Symbol -1, none, is the last entry.
        total = [total for total, _ in parts] + [0]
        begins = [size if total else 0 for total, size in parts] + [0]
        continues = [0 if total else size for total, size in parts] + [0]
        self._total = np.append(self._total[:-1], np.array(total, dtype=np.int8))
        self._begins = np.append(self._begins[:-1], np.array(begins, dtype=np.int8))
        self._continues = np.append(self._continues[:-1], np.array(continues, dtype=np.int8))


def _part_of_character(spelling: bytes) -> tuple[int, int]:
    """Bytes of the character that these begin, and of these; zeros if they are no part of one.

    The first is 0 also for bytes that continue a character.
    """
    size = len(spelling)
    if not 0 < size < _LONGEST or not all(0x80 <= byte < 0xC0 for byte in spelling[1:]):
        return 0, 0
    first = spelling[0]
    if 0x80 <= first < 0xC0:
        return 0, size
    total = 2 if 0xC2 <= first < 0xE0 else 3 if 0xE0 <= first < 0xF0 else 0
    total = 4 if 0xF0 <= first < 0xF5 else total
    return (total, size) if size < total else (0, 0)


def _unpack(key: int, left: int, right: int) -> tuple[list[int], int]:
    """The symbols of a character, and where the pair is among them."""
    mask = (1 << _SYMBOL_BITS) - 1
    others = [symbol - 1 for symbol in (key >> _SYMBOL_BITS & mask, key & mask) if symbol]
    before = key >> 2 * _SYMBOL_BITS + 2
    return [*others[:before], left, right, *others[before:]], before
