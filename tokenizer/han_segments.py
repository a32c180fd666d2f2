"""Ids of texts with ideographs, piece by piece, from a table of pieces met before.

A run of ideographs between two marks counts as one word for the encoders, and hardly ever comes
again, so their caches of words do not help. Cut where `HanCuts` proves that it changes nothing, it
becomes pieces of one to a few characters that come again all the time.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenizer.han_cuts import HanCuts, Units
from tokenizer.segment_table import Ids, Keys, SegmentTable, gather, places_of

Flat = tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.int64]]
"""Ids of texts, one after another, and the number of ids of each text."""

Places = npt.NDArray[np.int64]

_LONGEST = 8
"""Units of UTF-16 of the longest pieces in the table."""
_BATCH = 1 << 16
"""Characters encoded at a time: what is made of them on the way stays in the processor's cache."""
_MOST_PIECES = 1 << 19
"""Pieces in the table: it takes about 40 MiB then, and begins anew."""
_LEAST_ADDED = 2048
# Bytes in UTF-8 by unit of UTF-16: a pair of surrogates makes four.
_UTF8_BYTES = np.full(0x10000, 3, dtype=np.uint8)
_UTF8_BYTES[:0x800], _UTF8_BYTES[:0x80], _UTF8_BYTES[0xD800:0xE000] = 2, 1, 2


class HanSegments:
    """Encodes texts piece by piece; safe to call from several threads."""

    def __init__(self, cuts: HanCuts, encode: Callable[[Sequence[bytes]], Flat]) -> None:
        """Begin with an empty table.

        Args:
            cuts: Where texts can be cut.
            encode: Gives the ids of texts in UTF-8; safe to call from several threads.
        """
        self._cuts = cuts
        self._encode = encode
        self._table = SegmentTable.empty()
        self._lock = threading.Lock()
        self._waiting: list[tuple[Keys, npt.NDArray[np.int64], Ids]] = []
        self._num_waiting = 0

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
        units = np.frombuffer("".join(texts).encode("utf-16-le"), dtype="<u2")
        ends = np.cumsum(_units_of(texts, len(units)))
        is_bound = np.zeros(len(units) + 1, dtype=bool)
        is_bound[self._cuts.find(units)] = True
        is_bound[0] = True
        is_bound[ends] = True
        bounds = np.flatnonzero(is_bound)
        lengths = np.diff(bounds)
        table = self._table
        is_short = lengths <= _LONGEST
        short = np.flatnonzero(is_short)
        keys = _keys(units, bounds[short], lengths[short])
        spans = np.zeros(len(lengths), dtype=np.int64)
        spans[short] = table.find(keys)
        ids, counts = gather(table.ids, spans)
        is_missing = spans == 0
        missing = np.flatnonzero(is_missing)
        if len(missing):
            offsets = np.concatenate([[0], np.cumsum(_UTF8_BYTES.take(units), dtype=np.int64)])
            places = offsets[bounds]
            fresh, counts[missing] = self._encode_missing(
                b"".join(utf8),
                places[:-1][missing],
                places[1:][missing],
                is_short[missing],
                keys[:, is_missing[short]],
            )
            is_fresh = np.repeat(is_missing, counts)
            merged = np.empty(len(is_fresh), dtype=np.uint32)
            merged[is_fresh], merged[~is_fresh] = fresh, ids
            ids = merged
        total = np.concatenate([[0], np.cumsum(counts)])
        return ids, np.diff(total[np.searchsorted(bounds, ends)], prepend=0)

    def _encode_missing(
        self, utf8: bytes, starts: Places, ends: Places, is_short: npt.NDArray[np.bool_], keys: Keys
    ) -> tuple[Ids, Places]:
        """Encode pieces that the table has not, and let it have the short ones.

        Args:
            utf8: The text.
            starts: Where each piece begins in it.
            ends: Where each ends.
            is_short: Which ones can be in the table.
            keys: Of those.

        Returns:
            Their ids, and how many each has.
        """
        chosen, same_as = _distinct(keys)
        firsts = np.concatenate([np.flatnonzero(is_short)[chosen], np.flatnonzero(~is_short)])
        piece = np.empty(len(starts), dtype=np.int64)
        piece[is_short] = same_as
        piece[~is_short] = np.arange(len(chosen), len(firsts))
        bounds = zip(starts[firsts].tolist(), ends[firsts].tolist(), strict=True)
        given, counts = self._encode([utf8[a:b] for a, b in bounds])
        ids = given.astype(np.uint32, copy=False)
        first = np.cumsum(counts) - counts
        if len(chosen):
            learnt = counts[: len(chosen)]
            self._learn(keys[:, chosen], learnt, ids[: int(learnt.sum())].copy())
        counts_of_all = counts[piece]
        return ids.take(places_of(first[piece], counts_of_all)), counts_of_all

    def _learn(self, keys: Keys, counts: Places, ids: Ids) -> None:
        """Keep pieces. They come into a new table when they are many: the old one is never changed.

        Pieces are met in another order with more threads; only the speed depends on that.
        """
        with self._lock:
            self._waiting.append((keys, counts, ids))
            self._num_waiting += len(counts)
            if self._num_waiting < max(_LEAST_ADDED, self._table.count // 4):
                return
            table = self._table
            if table.count + self._num_waiting > _MOST_PIECES:
                table = SegmentTable.empty()
            for keys, counts, ids in self._waiting:  # threads may have met the same ones
                new = (table.find(keys) == 0) & (counts > 0)
                ids = ids[np.repeat(new, counts)]
                table = table.with_more(keys[:, new], counts[new], ids)
            self._table, self._waiting, self._num_waiting = table, [], 0


def _units_of(texts: Sequence[str], total: int) -> Places:
    """Units of UTF-16 of every text."""
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    if int(lengths.sum()) < total:  # some characters take two
        beyond = (len(text.encode("utf-16-le")) // 2 for text in texts)
        lengths = np.fromiter(beyond, dtype=np.int64, count=len(texts))
    return lengths


def _keys(units: Units, starts: Places, lengths: Places) -> Keys:
    """Pieces of at most `_LONGEST` units, packed."""
    if not units.all():
        # U+0000 must differ from nothing: this surrogate is not followed by its other half, as it
        # is everywhere else.
        units = np.where(units == 0, np.uint16(0xD800), units)
    keys = np.zeros((2, len(starts)), dtype=np.uint64)
    keys[0] = units.take(starts)
    longer = np.arange(len(starts))
    for place in range(1, _LONGEST):
        longer = longer[lengths[longer] > place]
        word, shift = divmod(place, 4)
        unit = units.take(starts[longer] + place).astype(np.uint64)
        keys[word, longer] |= unit << np.uint64(16 * shift)
    return keys


def _distinct(keys: Keys) -> tuple[Places, Places]:
    """One place of each key, and for every key the place of its like among those."""
    order = np.lexsort((keys[1], keys[0]))
    in_order = keys[:, order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (in_order[:, 1:] != in_order[:, :-1]).any(axis=0)
    same_as = np.empty(len(order), dtype=np.int64)
    same_as[order] = np.cumsum(is_first) - 1
    return order[is_first], same_as
