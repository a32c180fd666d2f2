"""Merges that make single tokens of given words, with as few tokens on the way as can be.

New merges run after all old ones and in their order. So a word is encoded by the old merges, then
by those planned so far, and what is left is joined by new ones: whatever is planned later finds a
single token, and cannot break it.
"""

from collections.abc import Sequence

from tokenizer.bpe_vocabulary import Pair, apply_merges, merge_pair

_MOST_TRIALS = 2_000
"""Ways of joining a word that are tried before it is given up."""


class TermMerges:
    """A growing list of merges.

    Attributes:
        pairs: The merges; each may name the products of those before it, which are numbered from
            the number of old symbols on.
        spellings: Bytes of every symbol, old and new.
    """

    def __init__(self, spellings: Sequence[bytes]) -> None:
        """Start without merges.

        Args:
            spellings: Bytes of the old symbols.
        """
        self.pairs: list[Pair] = []
        self.spellings = list(spellings)
        self._made: dict[Pair, int] = {}
        self._known = set(spellings)

    def apply(self, pieces: Sequence[int]) -> list[int]:
        """Encode a word further, from its old pieces."""
        return apply_merges(pieces, self._made)

    def add(self, forms: Sequence[Sequence[int]]) -> list[int] | None:
        """Make single tokens of some words that share most of their pieces.

        Args:
            forms: Old pieces of each.

        Returns:
            The symbol of each; None if one cannot be made, and then none is: every way leads over
            a spelling that is a token already, by another merge.
        """
        plans = [plan for right in (False, True) if (plan := self._plan(forms, right)) is not None]
        if not plans:
            return None
        for pair in min(plans, key=len):
            self._make(pair)
        return [self.apply(pieces)[0] for pieces in forms]

    def _plan(self, forms: Sequence[Sequence[int]], from_the_right: bool) -> list[Pair] | None:
        """New merges for all forms, if each is joined from one end; the list is as it was after."""
        number = len(self.pairs)
        plan: list[Pair] | None = []
        for pieces in forms:
            search = _Search(self._known, self.spellings, from_the_right)
            found = search.run(self.apply(pieces))
            if found is None:
                plan = None
                break
            for pair in found:
                self._make(pair)
        if plan is not None:
            plan = self.pairs[number:]
        while len(self.pairs) > number:
            del self._made[self.pairs.pop()]
            self._known.discard(self.spellings.pop())
        return plan

    def _make(self, pair: Pair) -> None:
        self._made[pair] = len(self.spellings)
        spelling = self.spellings[pair[0]] + self.spellings[pair[1]]
        self.pairs.append(pair)
        self.spellings.append(spelling)
        self._known.add(spelling)


class _Search:
    """Looks for a way to join pieces over spellings that are no tokens yet."""

    def __init__(self, known: set[bytes], spellings: list[bytes], from_the_right: bool) -> None:
        self._known = known
        self._spellings = spellings
        self._old = len(spellings)
        self._from_the_right = from_the_right
        self._failed: set[tuple[int, ...]] = set()
        self._trials = 0

    def run(self, word: list[int]) -> list[Pair] | None:
        """Give the merges that join a word; what is borrowed is given back as it was."""
        merges = self._join(word)
        del self._spellings[self._old :]
        return merges

    def _join(self, word: list[int]) -> list[Pair] | None:
        if len(word) == 1:
            return []
        lengths = tuple(len(self._spellings[symbol]) for symbol in word)
        self._trials += 1
        if lengths in self._failed or self._trials > _MOST_TRIALS:
            return None
        places = range(len(word) - 1)
        for place in reversed(places) if self._from_the_right else places:
            pair = (word[place], word[place + 1])
            spelling = self._spellings[pair[0]] + self._spellings[pair[1]]
            if spelling in self._known:
                continue
            symbol = len(self._spellings)
            self._spellings.append(spelling)
            self._known.add(spelling)
            rest = self._join(merge_pair(word, pair, symbol))
            self._known.discard(spelling)
            if rest is not None:
                return [pair, *rest]
            self._spellings.pop()
        self._failed.add(lengths)
        return None
