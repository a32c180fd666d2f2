"""Continues the merges of a BPE vocabulary over the words of a corpus.

New merges come after all old ones. So a word's encoding is its old one with the new merges applied
in their order, and what is counted here is exactly what the extended tokenizer does. Which words
there are is in ``words.py``; steps towards characters that a vocabulary lacks, which only
byte-level vocabularies need, are in ``merge_steps.py``.

The words lie one after another in one array. Every pair of neighbours that is frequent enough has
the array of its places, made when the younger of its two symbols was. No merge ever makes more of
an existing pair. So the places are only ever too many, a pair's frequency is only ever too high,
and both are put right when the pair comes to the top of the queue, not before.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenizer.merge_steps import Steps, is_whole

Places = npt.NDArray[np.int32]
"""Ascending places of left symbols in the array of all words."""
Pair = tuple[int, int]
Entry = tuple[int, int, int, int]
"""Of the queue: how good (negated), how frequent (negated), left, right. The smallest is first."""

# Places sorted at once, at least: sorting takes 30 bytes for each.
_PLACES_AT_ONCE = 1 << 21

KNOWN = "is already a token"
TOO_FEW_DOCUMENTS = "is in too few documents"
PARTIAL = "is no whole character"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """One new merge, and the symbol that it makes."""

    left: int
    right: int
    symbol: int
    """Consecutive from the number of old symbols on."""
    spelling: bytes
    frequency: int
    """How often it was applied to the words; each time saves one token."""
    spread: int
    """Estimate of the documents in which it was; see `estimate_documents`."""
    step: bool = False
    """Whether it is a part of a character, made for the sake of the merge that follows."""


def estimate_documents(sketch: int) -> int:
    """Estimate a number of documents by linear counting (Whang et al. 1990).

    Args:
        sketch: 64 bits; each document has set the one that the hash of its text chose.

    Returns:
        The estimate. More than about 260 cannot be told apart, and are given as 311.
    """
    empty = max(64 - sketch.bit_count(), 0.5)
    return round(-64 * math.log(empty / 64))


def continue_merges(
    symbols: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int64],
    *,
    counts: npt.NDArray[np.int64],
    sketches: npt.NDArray[np.uint64],
    spellings: Sequence[bytes],
    judge: Callable[[bytes], str | None],
    min_frequency: int,
    min_spread: int,
    first: Sequence[Pair] = (),
    refused: Counter[str] | None = None,
) -> Iterator[Merge]:
    """Find new merges, best first: the most frequent, and of equals the smallest symbols.

    A merge whose spelling is a part of one character is made only where it leads to a whole one
    that is frequent enough and accepted itself; it is as good as the best such character, which is
    completed directly after it. Other spellings that are not valid UTF-8 are never made.

    Args:
        symbols: Old encodings of the words, one after another, ``[n]``.
        starts: Where each word begins, and the end of the last, ``[w + 1]``.
        counts: How often the corpus has each word, ``[w]``.
        sketches: In which documents; see `estimate_documents`, ``[w]``.
        spellings: Bytes of every old symbol.
        judge: Says of a joined spelling why it is not wanted, or None. Asked once a pair.
        min_frequency: Least frequency of a merge; at least 1.
        min_spread: Least number of documents.
        first: Merges made before all others whatever their frequency. Their symbols are numbered
            from the number of old ones on too, so that later ones can name earlier ones.
        refused: Counts, by reason, spellings that were frequent enough and are not made.

    Yields:
        Merges; the caller stops when it has enough. Ends when no frequent pair is left.
    """
    loop = _Loop(symbols, starts, counts, sketches, spellings, min_frequency, frozenset(first))
    del symbols, starts  # copied, and large
    for left, right in first:
        yield loop.make(left, right)
    chooser = _Chooser(loop, judge, min_spread, Counter() if refused is None else refused)
    while (chosen := chooser.next_merges()) is not None:
        last = len(chosen) - 1
        symbol_of_step = -1
        for number, (left, right) in enumerate(chosen):
            # -1 stands for what the merge before has made.
            left = symbol_of_step if left < 0 else left
            right = symbol_of_step if right < 0 else right
            merge = loop.make(left, right, step=number < last)
            symbol_of_step = merge.symbol
            yield merge


class _Loop:
    """The words, the places of their pairs, and the queue of pairs."""

    def __init__(
        self,
        symbols: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        sketches: npt.NDArray[np.uint64],
        spellings: Sequence[bytes],
        min_frequency: int,
        wanted: frozenset[Pair],
    ) -> None:
        size = len(symbols)
        assert size < 2**31 and starts[-1] == size and min_frequency >= 1
        self.symbols = np.array(symbols, dtype=np.int32)  # -1 where merged into the one before
        self.word = np.repeat(np.arange(len(counts), dtype=np.int32), np.diff(starts))
        self.counts = counts
        self.sketches = sketches
        self.spellings = list(spellings)
        self.known = set(spellings)
        self.min_frequency = min_frequency
        self._wanted = wanted
        self.places: dict[Pair, Places] = {}
        self.queue: list[Entry] = []
        occupied = starts[:-1] < starts[1:]
        lasts = starts[1:][occupied] - 1
        self._add_first_pairs(lasts)
        heapq.heapify(self.queue)
        self.next = np.arange(1, size + 1, dtype=np.int32)
        self.previous = np.arange(-1, size - 1, dtype=np.int32)
        self.next[lasts] = -1
        self.previous[starts[:-1][occupied]] = -1

    def _add_first_pairs(self, lasts: npt.NDArray[np.int64]) -> None:
        """Find the pairs of neighbours, a part of all pairs at a time: sorting takes memory.

        Args:
            lasts: Places of the last symbols of words.
        """
        number = min(1 + len(self.symbols) // _PLACES_AT_ONCE, 16)
        part_of = (self.symbols[:-1] * 5 + self.symbols[1:]) % number
        part_of = part_of.astype(np.int8)
        part_of[lasts[:-1]] = -1
        for part in range(number):
            left = np.flatnonzero(part_of == part).astype(np.int32)
            keys = self.symbols[left].astype(np.int64) << 32 | self.symbols[left + 1]
            for key, frequency, places in self._groups(left, keys, _pair_of_key):
                self.places[key] = places
                self.queue.append((-frequency, -frequency, *key))

    def _groups(
        self, places: Places, keys: npt.NDArray[Any], pair_of: Callable[[int], Pair]
    ) -> Iterator[tuple[Pair, int, Places]]:
        """Group places by what pair they are of; only pairs that are frequent enough or wanted."""
        if not len(places):
            return
        order = np.argsort(keys, kind="stable")
        places, keys = places[order], keys[order]
        del order
        bounds = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        frequencies = np.add.reduceat(self.counts[self.word[places]], bounds)
        ends = np.append(bounds[1:], len(places))
        kept = frequencies >= self.min_frequency
        if self._wanted:
            kept |= np.array([pair_of(key) in self._wanted for key in keys[bounds].tolist()])
        for key, frequency, start, end in zip(
            keys[bounds[kept]].tolist(),
            frequencies[kept].tolist(),
            bounds[kept].tolist(),
            ends[kept].tolist(),
            strict=True,
        ):
            # A copy, so that what no frequent pair has need not be held.
            yield pair_of(key), frequency, places[start:end].copy()

    def current_places(self, left: int, right: int) -> Places:
        """Places that the pair still has; of overlapping ones (aaa) every second from the left."""
        places = self.places.get((left, right))
        if places is None:
            return np.empty(0, dtype=np.int32)
        after = self.next[places]
        # A place without a next has the symbol of the last place looked up, which the first test
        # of `after` rules out.
        valid = (self.symbols[places] == left) & (after >= 0) & (self.symbols[after] == right)
        if not valid.all():
            places = self.places[left, right] = places[valid]
        if left == right and len(places) > 1:
            # All are kept: one that has no turn now has it when the one before is gone.
            return places[_every_second(places, self.next[places])]
        return places

    def frequency(self, places: Places) -> int:
        """How often the corpus has these places."""
        return int(self.counts[self.word[places]].sum())

    def spread(self, places: Places) -> int:
        """In how many documents these places are, about."""
        sketch = np.bitwise_or.reduce(self.sketches[self.word[places]]) if len(places) else 0
        return estimate_documents(int(sketch))

    def make(self, left: int, right: int, *, step: bool = False) -> Merge:
        """Merge a pair everywhere, and take in the pairs that this makes."""
        places = self.current_places(left, right)
        self.places.pop((left, right), None)
        symbol = len(self.spellings)
        spelling = self.spellings[left] + self.spellings[right]
        self.spellings.append(spelling)
        self.known.add(spelling)
        merge = Merge(
            left=left,
            right=right,
            symbol=symbol,
            spelling=spelling,
            frequency=self.frequency(places),
            spread=self.spread(places),
            step=step,
        )
        if len(places):
            self._replace(places, symbol)
        return merge

    def _replace(self, places: Places, symbol: int) -> None:
        gone = self.next[places]
        after = self.next[gone]
        self.symbols[places] = symbol
        self.symbols[gone] = -1
        self.next[places] = after
        followed = after >= 0
        self.previous[after[followed]] = places[followed]
        # From here on the neighbours are the new ones: one may be the new symbol itself.
        holders = places[followed]
        self._add_pairs(holders, self.symbols[after[followed]], lambda other: (symbol, other))
        before = self.previous[places]
        before = before[before >= 0]
        others = self.symbols[before]
        different = others != symbol  # else it is among the pairs added above
        self._add_pairs(before[different], others[different], lambda other: (other, symbol))

    def _add_pairs(
        self, places: Places, others: npt.NDArray[np.int32], pair_of: Callable[[int], Pair]
    ) -> None:
        """Add the pairs of the new symbol with others, where frequent enough."""
        for pair, frequency, grouped in self._groups(places, others, pair_of):
            self.places[pair] = grouped
            heapq.heappush(self.queue, (-frequency, -frequency, *pair))


def _pair_of_key(key: int) -> Pair:
    return key >> 32, key & 0xFFFFFFFF


def _every_second(places: Places, after: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Choose, in runs of places that follow one another, the first, third and so on."""
    index = np.arange(len(places))
    begins = np.concatenate(([True], after[:-1] != places[1:]))
    return np.asarray((index - np.maximum.accumulate(np.where(begins, index, 0))) % 2 == 0)


class _Chooser:
    """Takes the best pair from the queue that may be made."""

    def __init__(
        self,
        loop: _Loop,
        judge: Callable[[bytes], str | None],
        min_spread: int,
        refused: Counter[str],
    ) -> None:
        self._loop = loop
        self._judge = judge
        self._min_spread = min_spread
        self._refused = refused
        self._steps = Steps(loop)

    def next_merges(self) -> list[Pair] | None:
        """Give the merges to make now: one, or those that lead to one whole character."""
        loop, queue = self._loop, self._loop.queue
        while queue:
            entry = queue[0]
            left, right = entry[2:]
            if (left, right) not in loop.places:  # made, as a step or at the user's wish
                heapq.heappop(queue)
                continue
            places = loop.current_places(left, right)
            frequency = loop.frequency(places)
            spelling = loop.spellings[left] + loop.spellings[right]
            whole, way, best = is_whole(spelling), None, frequency
            if not whole and frequency >= loop.min_frequency:
                way = self._steps.best(left, right, places)
                best = 0 if way is None else way.frequency
            if best < loop.min_frequency:
                heapq.heappop(queue)
                del loop.places[left, right]
                if not whole and frequency >= loop.min_frequency:
                    self._refused[PARTIAL] += 1
            elif (-best, -frequency) != entry[:2]:
                heapq.heapreplace(queue, (-best, -frequency, left, right))
            elif way is not None:
                if (reason := self._reason(way.spelling, way.places)) is None:
                    return way.merges
                self._refused[reason] += 1
                self._steps.refuse(way.spelling)
            else:
                heapq.heappop(queue)
                if (reason := self._reason(spelling, places)) is None:
                    return [(left, right)]
                self._refused[reason] += 1
                del loop.places[left, right]
        return None

    def _reason(self, spelling: bytes, places: Places) -> str | None:
        if spelling in self._loop.known:
            return KNOWN
        if self._loop.spread(places) < self._min_spread:
            return TOO_FEW_DOCUMENTS
        return self._judge(spelling)
