"""Which neighbouring characters the tokens of a byte-level vocabulary hold, whole or in part."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.uint16]
"""Characters by their place in an alphabet; 0 is any character that is not in it."""

_Ints = npt.NDArray[np.int64]
_NONE = 256
"""Stands where a token has no byte."""
_UNKNOWN = -1
"""A character that is not in the alphabet, or bytes that no valid text has."""


def byte_characters() -> list[str]:
    """The characters by which byte-level vocabularies spell the bytes 0 to 255.

    Printable characters of Latin-1 stand for themselves, others for U+0100 onwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class JoinedPairs:
    """Pairs of characters of an alphabet that lie side by side in some token.

    Attributes:
        before: Characters that stand whole in a token, followed by another whole one, ``[pairs]``.
        after: Those others, ``[pairs]``.
        groups: Where a token begins or ends within one of the two: all characters that could stand
            before, and all that could stand after.
        left_traits: Characters with equal numbers are treated alike as the first of a pair.
        right_traits: The same as the second.
    """

    def __init__(self, vocabulary: Iterable[str], alphabet: npt.NDArray[np.uint32]) -> None:
        """Look at every place in every token.

        Args:
            vocabulary: Tokens, spelt in `byte_characters`.
            alphabet: Code points below U+10000 by number, ``[n]``; that at 0 is passed over.
        """
        units = _units(vocabulary)
        places = _places(units)
        sides = []
        for step in (-1, 1):
            sides.append(_Side(_spelt(alphabet, step), *_read(units, places, step)))
        left, right = sides
        known = (left.found != _UNKNOWN) & (right.found != _UNKNOWN)
        whole = known & (left.found > 0) & (right.found > 0) & ~left.partial & ~right.partial
        self.before, self.after = left.found[whole], right.found[whole]
        in_part = known & (left.partial | right.partial)
        pairs = np.unique(np.stack([left.found, right.found])[:, in_part], axis=1)
        self.groups = [(left.members(a), right.members(b)) for a, b in pairs.T.tolist()]
        in_use = whole | in_part
        self.left_traits, self.right_traits = left.traits(in_use), right.traits(in_use)


class _Side:
    """What stands on one side of every place, its bytes read away from the place.

    ``found`` is a number of the alphabet; or, for the beginning of a character that the token does
    not hold whole, a negative number below `_UNKNOWN`.
    """

    def __init__(
        self, spelt: tuple[_Ints, _Ints, _Ints], read: _Ints, size: _Ints, partial: _Ints
    ) -> None:
        packed, *self._starts = spelt
        order = np.argsort(packed)
        place = np.searchsorted(packed, read, sorter=order).clip(max=len(order) - 1)
        numbers = order[place]
        numbers[packed[numbers] != read] = _UNKNOWN
        numbers[numbers == 0] = _UNKNOWN
        self.partial = partial.astype(bool)
        self.found = np.where(self.partial, -2 - (read << 2 | size), numbers)
        self.found[size == 0] = _UNKNOWN
        self._count = len(packed)

    def members(self, found: int) -> _Ints:
        """Numbers of the characters that this may be."""
        if found >= 0:
            return np.array([found])
        start, size = -2 - found >> 2, (-2 - found) & 3
        return np.flatnonzero(self._starts[size - 1] == start)

    def traits(self, in_use: npt.NDArray[np.bool_]) -> _Ints:
        """For each character, its number if it is used whole, and those of its starts in use."""
        found = np.unique(self.found[in_use])
        traits = np.zeros(self._count, dtype=np.int64)
        traits[found[found >= 0]] = found[found >= 0]
        for size, starts in enumerate(self._starts, start=1):
            used = np.isin(-2 - (starts << 2 | size), found)
            traits = traits << 16 | np.where(used, starts, 0)
        return traits


def _spelt(alphabet: npt.NDArray[np.uint32], step: int) -> tuple[_Ints, _Ints, _Ints]:
    """Characters in UTF-8 as one number each, and of those that are longer their first 1, 2 bytes.

    With a step of -1 the last byte comes first.
    """
    codes = alphabet.astype(np.int64)
    codes[0] = 0
    is_two, is_three = (codes >= 0x80) & (codes < 0x800), codes >= 0x800
    lead = np.select([is_two, is_three], [0xC0 | codes >> 6, 0xE0 | codes >> 12], codes)
    last = np.where(is_two | is_three, 0x80 | codes & 0x3F, codes)
    one, end = (lead, last) if step == 1 else (last, lead)
    two = one << 8 | np.where(is_two, end, 0x80 | codes >> 6 & 0x3F)
    packed = np.select([is_two, is_three], [two, two << 8 | end], one)
    return packed, np.where(is_two | is_three, one, 0), np.where(is_three, two, 0)


def _units(vocabulary: Iterable[str]) -> _Ints:
    """All tokens as bytes, with `_NONE` around each and for characters that stand for no byte."""
    table = np.full(0x10000, _NONE, dtype=np.int64)
    table[[ord(character) for character in byte_characters()]] = np.arange(256)
    text = "\n\n\n" + "\n".join(vocabulary) + "\n\n\n"
    return table[np.frombuffer(text.encode("utf-16-le", "surrogatepass"), dtype=np.uint16)]


def _continues(units: _Ints) -> npt.NDArray[np.bool_]:
    return (units >= 0x80) & (units < 0xC0)


def _places(units: _Ints) -> _Ints:
    """Where, within a token, a character may begin behind another, one of them not ASCII."""
    before, after = units[:-1], units[1:]
    ends = (before < 0x80) | _continues(before)
    begins = (after < 0x80) | ((after >= 0xC0) & (after < _NONE))
    return np.flatnonzero(ends & begins & ((before >= 0x80) | (after >= 0x80))) + 1


def _read(units: _Ints, places: _Ints, step: int) -> tuple[_Ints, _Ints, _Ints]:
    """The character before (step -1) or behind (step 1) every place.

    Returns:
        Its bytes, that next to the place first, as one number; how many, 0 if no character of at
        most three bytes can be there; and whether the token ends before it is whole.
    """
    origin = places if step == 1 else places - 1
    one, two, three = (units[origin + step * i] for i in range(3))
    if step == 1:
        needed = np.select([one < 0x80, one < 0xC2, one < 0xE0, one < 0xF0], [1, 0, 2, 3], 0)
        sound = [one < 0x80, _continues(two), _continues(two) & _continues(three)]
        short = [
            (needed >= 2) & (two == _NONE),
            (needed == 3) & _continues(two) & (three == _NONE),
        ]
    else:
        leads = [(units >= 0xC2) & (units < 0xE0), (units >= 0xE0) & (units < 0xF0)]
        leads_two, leads_three = leads[0][origin - 1], leads[1][origin - 2]
        inner = _continues(one) & _continues(two)
        needed = np.select([one < 0x80, leads_two, inner & leads_three], [1, 2, 3], 0)
        sound = [one < 0x80, leads_two, inner & leads_three]
        short = [_continues(one) & (two == _NONE), inner & (three == _NONE)]
    size = np.zeros(len(places), dtype=np.int64)
    for number, is_sound in enumerate(sound, start=1):
        size[(needed == number) & is_sound] = number
    partial = short[0] | short[1]
    size[short[0]], size[short[1]] = 1, 2
    read = np.select([size == 1, size == 2], [one, one << 8 | two], one << 16 | two << 8 | three)
    return read, size, partial.astype(np.int64)
