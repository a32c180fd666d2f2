"""The merges against a plain count of everything after each one."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.merge_loop import continue_merges

Pair = tuple[int, int]


def flat(words):
    symbols = np.array([symbol for word in words for symbol in word], dtype=np.int32)
    return symbols, np.cumsum([0, *map(len, words)])


def run(
    words,
    *,
    counts,
    spellings,
    judge=lambda _: None,
    sketches=None,
    min_frequency=1,
    min_spread=0,
    first=(),
    refused=None,
    most=1000,
):
    symbols, starts = flat(words)
    sketches = [1] * len(words) if sketches is None else sketches
    merges = continue_merges(
        symbols,
        starts,
        counts=np.array(counts, dtype=np.int64),
        sketches=np.array(sketches, dtype=np.uint64),
        spellings=spellings,
        judge=judge,
        min_frequency=min_frequency,
        min_spread=min_spread,
        first=first,
        refused=refused,
    )
    return [merge for merge, _ in zip(merges, range(most), strict=False)]


def merge_word(word, pair, symbol):
    """Merge from the left, as encoders do."""
    merged, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            merged.append(symbol)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def recount(words, counts) -> Counter[Pair]:
    """How often each pair would be merged."""
    found: Counter[Pair] = Counter()
    for word, count in zip(words, counts, strict=True):
        for pair in set(zip(word, word[1:], strict=False)):
            found[pair] += count * (len(word) - len(merge_word(word, pair, -1)))
    return found


def expected(words, *, counts, spellings, min_frequency, allowed, first=()):
    """Byte-pair encoding as the textbook has it: count all, merge the best, count all again."""
    words, spellings, made = [list(word) for word in words], list(spellings), []
    refused: set[Pair] = set()
    for left, right in first:
        frequency = recount(words, counts)[left, right]
        words = [merge_word(word, (left, right), len(spellings)) for word in words]
        made.append((left, right, frequency))
        spellings.append(spellings[left] + spellings[right])
    while True:
        found = recount(words, counts)
        ranked = sorted(
            (-frequency, pair)
            for pair, frequency in found.items()
            if frequency >= min_frequency and pair not in refused
        )
        if not ranked:
            return made, words
        frequency, pair = ranked[0]
        spelling = spellings[pair[0]] + spellings[pair[1]]
        if spelling in spellings or not allowed(spelling):
            refused.add(pair)
            continue
        words = [merge_word(word, pair, len(spellings)) for word in words]
        made.append((*pair, -frequency))
        spellings.append(spelling)


letters = [b"a", b"b", b"c", b"ab"]
corpora = st.lists(
    st.tuples(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4)), min_size=1, max_size=12
)


@settings(max_examples=150, deadline=None)
@given(
    corpora,
    st.integers(1, 4),
    st.sets(st.text("abc", min_size=2, max_size=4), max_size=5),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=2, unique=True),
)
def test_merges_are_those_of_counting_everything_anew(corpus, min_frequency, denied, first):
    words, counts = [word for word, _ in corpus], [count for _, count in corpus]
    denied_bytes = {text.encode() for text in denied}
    first = [pair for pair in first if pair != (0, 1)]  # its spelling is known
    made = run(
        words,
        counts=counts,
        spellings=letters,
        min_frequency=min_frequency,
        judge=lambda spelling: "denied" if spelling in denied_bytes else None,
        first=first,
    )
    reference, encoded = expected(
        words,
        counts=counts,
        spellings=letters,
        min_frequency=min_frequency,
        allowed=lambda spelling: spelling not in denied_bytes,
        first=first,
    )
    assert [(m.left, m.right, m.frequency) for m in made] == reference
    assert [m.symbol for m in made] == list(range(4, 4 + len(made)))
    before = sum(len(w) * c for w, c in zip(words, counts, strict=True))
    after = sum(len(w) * c for w, c in zip(encoded, counts, strict=True))
    assert before - sum(m.frequency for m in made) == after
