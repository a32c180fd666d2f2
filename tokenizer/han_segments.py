"""Ids of texts with ideographs, piece by piece, from tables of pieces met before.

A run of ideographs between two marks counts as one word for the encoders, and hardly ever comes
again, so their caches of words do not help. Cut where `HanCuts` proves that it changes nothing, it
becomes pieces of one to a few characters that come again all the time: two in three are a single
one, and most others two.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenizer.han_cuts import HanCuts, Units
from tokenizer.segment_table import UNKNOWN, Codes, IdLists, Ints, Keys, SegmentTable

Flat = tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.int64]]
"""Ids of texts, one after another, and the number of ids of each text."""

_SHORT, _LONG = 4, 8
"""Most units of UTF-16 of pieces in the first table, and in the second."""
_BATCH = 1 << 16
"""Characters encoded at a time: what is made of them on the way stays in the processor's cache."""
_MOST_PIECES = 1 << 19
"""Pieces in the tables: they take about 40 MiB then, and begin anew."""
_MOST_IDS = 255
"""Of a piece in a table."""
# In keys, U+0000 must differ from nothing: this surrogate is not followed by its other half, as it
# is everywhere else.
_NUL = 0xD800
_MASKS = np.array([0, 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF], np.uint64)
"""Those of a word's bits that hold so many units."""
# Bytes in UTF-8 by unit of UTF-16: a pair of surrogates makes four.
_UTF8_BYTES = np.full(0x10000, 3, dtype=np.uint8)
_UTF8_BYTES[:0x800], _UTF8_BYTES[:0x80], _UTF8_BYTES[0xD800:0xE000] = 2, 1, 2


class HanSegments:
    """Encodes texts piece by piece."""

    def __init__(self, cuts: HanCuts, encode: Callable[[Sequence[bytes]], Flat]) -> None:
        """Begin with empty tables.

        Args:
            cuts: Where texts can be cut.
            encode: Gives the ids of texts in UTF-8.
        """
        self._cuts = cuts
        self._encode = encode
        self._begin()

    def _begin(self) -> None:
        self._lists = IdLists()
        self._singles: Codes = np.full(0x10000, UNKNOWN)
        self._short = SegmentTable(words=1)
        self._long = SegmentTable(words=2)

    @property
    def num_pieces(self) -> int:
        """Pieces in the tables, but for those of one unit."""
        return self._short.count + self._long.count

    def encode(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Flat:
        """Give the ids of texts.

        Args:
            texts: Valid Unicode, none of them empty.
            utf8: The same in UTF-8.

        Returns:
            Their ids.
        """
        parts, start, size = [], 0, 0
        for i, text in enumerate(texts):
            size += len(text)
            if size >= _BATCH or i == len(texts) - 1:
                parts.append(self._encode_some(texts[start : i + 1], utf8[start : i + 1]))
                start, size = i + 1, 0
        if len(parts) == 1:
            return parts[0]
        ids, lengths = zip(*parts, strict=True)
        return np.concatenate(ids), np.concatenate(lengths)

    def _encode_some(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Flat:
        if self.num_pieces > _MOST_PIECES:
            self._begin()
        units = np.frombuffer("".join(texts).encode("utf-16-le"), dtype="<u2")
        ends = np.cumsum(_units_of(texts, len(units)))
        is_bound = self._cuts.bounds(units)
        is_bound[ends] = True
        bounds = np.flatnonzero(is_bound)
        lengths = np.diff(bounds)
        windows = _windows(units)
        codes = self._find(units, windows, bounds[:-1], lengths)
        missing = np.flatnonzero(codes == UNKNOWN)
        if len(missing):
            offsets = np.concatenate([[0], np.cumsum(_UTF8_BYTES.take(units), dtype=np.int64)])
            codes[missing] = self._encode_missing(
                b"".join(utf8),
                offsets[bounds[missing]],
                offsets[bounds[missing + 1]],
                _keys(windows, bounds[missing], lengths[missing], words=2),
                lengths[missing],
            )
        return self._lists.read(codes, np.searchsorted(bounds, ends))

    def _find(self, units: Units, windows: Keys, starts: Ints, lengths: Ints) -> Codes:
        """Look pieces up."""
        codes = self._singles.take(units.take(starts))
        longer = np.flatnonzero(lengths > 1)
        starts, lengths = starts[longer], lengths[longer]
        is_short = lengths <= _SHORT
        some = self._short.find(_keys(windows, starts, lengths, words=1))
        if not is_short.all():
            some[~is_short] = UNKNOWN
            long = np.flatnonzero((lengths > _SHORT) & (lengths <= _LONG))
            some[long] = self._long.find(_keys(windows, starts[long], lengths[long], words=2))
        codes[longer] = some
        return codes

    def _encode_missing(
        self, utf8: bytes, starts: Ints, ends: Ints, keys: Keys, lengths: Ints
    ) -> Codes:
        """Encode pieces that the tables have not, and let these have the short ones.

        Args:
            utf8: The text.
            starts: Where each piece begins in it.
            ends: Where each ends.
            keys: Of the pieces, as far as keys go.
            lengths: Of the pieces, in units of UTF-16.

        Returns:
            Their codes, good until the next call.
        """
        # Pieces that no key holds are not compared: each is taken for another.
        number = np.where(lengths > _LONG, np.arange(1, len(lengths) + 1), 0).astype(np.uint64)
        chosen, same_as = _distinct(np.concatenate([keys, number[None]]))
        bounds = zip(starts[chosen].tolist(), ends[chosen].tolist(), strict=True)
        given, counts = self._encode([utf8[a:b] for a, b in bounds])
        ids = given.astype(np.uint32, copy=False)
        keys, lengths = keys[:, chosen], lengths[chosen]
        codes = np.zeros(len(chosen), dtype=np.int32)
        learnt = (lengths <= _LONG) & (counts > 0) & (counts <= _MOST_IDS)
        is_learnt = np.repeat(learnt, counts)
        codes[learnt] = self._lists.put(ids[is_learnt], counts[learnt], keep=True)
        codes[~learnt] = self._lists.put(ids[~is_learnt], counts[~learnt], keep=False)
        one = learnt & (lengths == 1)
        self._singles[np.where(keys[0, one] == _NUL, 0, keys[0, one])] = codes[one]
        short = learnt & (lengths > 1) & (lengths <= _SHORT)
        self._short.add(keys[:1, short], codes[short])
        long = learnt & (lengths > _SHORT)
        self._long.add(keys[:, long], codes[long])
        found: Codes = codes[same_as]
        return found


def _units_of(texts: Sequence[str], total: int) -> Ints:
    """Units of UTF-16 of every text."""
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    if int(lengths.sum()) < total:  # some characters take two
        beyond = (len(text.encode("utf-16-le")) // 2 for text in texts)
        lengths = np.fromiter(beyond, dtype=np.int64, count=len(texts))
    return lengths


def _windows(units: Units) -> Keys:
    """Four units in a word, from every unit on; behind the last come zeros."""
    padded = np.zeros(len(units) + 7, dtype=np.uint16)
    padded[: len(units)] = units
    padded[: len(units)][units == 0] = _NUL
    return np.ndarray(len(units) + 4, dtype="<u8", buffer=padded, strides=(2,))


def _keys(windows: Keys, starts: Ints, lengths: Ints, *, words: int) -> Keys:
    """Pieces, packed, as far as their first four units for every word."""
    keys = np.empty((words, len(starts)), dtype=np.uint64)
    for word in range(words):
        number = lengths if word == 0 else (lengths - 4 * word).clip(min=0)
        keys[word] = windows[starts + 4 * word if word else starts]
        keys[word] &= _MASKS.take(number, mode="clip")
    return keys


def _distinct(keys: Keys) -> tuple[Ints, Ints]:
    """One place of each key, and for every key the place of its like among those."""
    order = np.lexsort(keys)
    in_order = keys[:, order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (in_order[:, 1:] != in_order[:, :-1]).any(axis=0)
    same_as = np.empty(len(order), dtype=np.int64)
    same_as[order] = np.cumsum(is_first) - 1
    return order[is_first], same_as
