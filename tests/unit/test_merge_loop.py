"""The merges against a plain count of everything after each one."""

import json
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tokenizer.merge_loop import (
    KNOWN,
    PARTIAL,
    TOO_FEW_DOCUMENTS,
    Merge,
    continue_merges,
    estimate_documents,
)

Pair = tuple[int, int]
Way = tuple[int, bytes, list[tuple[int | None, int | None]]]


def flat(words: Sequence[Sequence[int]]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    symbols = np.array([symbol for word in words for symbol in word], dtype=np.int32)
    return symbols, np.cumsum([0, *map(len, words)])


def run(
    words: Sequence[Sequence[int]],
    *,
    counts: Sequence[int],
    spellings: Sequence[bytes],
    judge: Callable[[bytes], str | None] = lambda _: None,
    sketches: Sequence[int] | None = None,
    min_frequency: int = 1,
    min_spread: int = 0,
    first: Sequence[Pair] = (),
    refused: Counter[str] | None = None,
    most: int = 1000,
) -> list[Merge]:
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


def merge_word(word: Sequence[int], pair: Pair, symbol: int) -> list[int]:
    """Merge from the left, as encoders do."""
    merged: list[int] = []
    i = 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            merged.append(symbol)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def recount(words: Sequence[Sequence[int]], counts: Sequence[int]) -> Counter[Pair]:
    """How often each pair would be merged."""
    found: Counter[Pair] = Counter()
    for word, count in zip(words, counts, strict=True):
        for pair in set(zip(word, word[1:], strict=False)):
            found[pair] += count * (len(word) - len(merge_word(word, pair, -1)))
    return found


def whole(spelling: bytes) -> bool:
    return spelling.decode(errors="ignore").encode() == spelling


def ways(
    words: Sequence[Sequence[int]], counts: Sequence[int], pair: Pair, spellings: Sequence[bytes]
) -> Counter[tuple[tuple[int, ...], int]]:
    """Characters that a pair is a part of: (symbols, place of the pair in them) to how often."""
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for word, count in zip(words, counts, strict=True):
        ends = np.cumsum([0, *(len(spellings[symbol]) for symbol in word)]).tolist()
        size = 0
        character_at: dict[int, int] = {}
        for character in b"".join(spellings[symbol] for symbol in word).decode():
            character_at |= dict.fromkeys(range(size, size + len(character.encode())), size)
            size += len(character.encode())
        i = 0
        while i < len(word) - 1:
            if tuple(word[i : i + 2]) != pair:
                i += 1
                continue
            start = character_at[ends[i]]
            end = next((e for e in range(start + 1, size) if character_at[e] != start), size)
            if start in ends and end in ends and ends[i + 2] <= end:
                symbols = tuple(word[ends.index(start) : ends.index(end)])
                found[symbols, i - ends.index(start)] += count
            i += 2
    return found


def best_way(
    words: Sequence[Sequence[int]],
    counts: Sequence[int],
    pair: Pair,
    spellings: Sequence[bytes],
    refused: set[Pair | bytes],
) -> Way | None:
    """The best character a pair leads to, as (frequency, character, merges), or None."""
    if spellings[pair[0]] + spellings[pair[1]] in spellings:
        return None
    found = ways(words, counts, pair, spellings)
    # Of equals: few symbols on the left, few on the right, small ones.
    order = sorted(
        found, key=lambda w: (-found[w], w[1], len(w[0]), w[0][: w[1]], w[0][w[1] + 2 :])
    )
    for symbols, place in order:
        spelled = [spellings[symbol] for symbol in symbols]
        character = b"".join(spelled)
        low, high = place, place + 2
        merges: list[tuple[int | None, int | None]] = [pair]
        feasible = True
        while (low, high) != (0, len(symbols)):
            feasible &= b"".join(spelled[low:high]) not in spellings
            if high < len(symbols):
                merges.append((None, symbols[high]))
                high += 1
            else:
                low -= 1
                merges.append((symbols[low], None))
        if feasible and character not in refused:
            return found[symbols, place], character, merges
    return None


def expected(
    words: Sequence[Sequence[int]],
    *,
    counts: Sequence[int],
    spellings: Sequence[bytes],
    min_frequency: int,
    allowed: Callable[[bytes], bool],
    first: Sequence[Pair] = (),
) -> tuple[list[tuple[int, int, int, bool]], list[list[int]]]:
    """Byte-pair encoding as the textbook has it: count all, merge the best, count all again."""
    encoded, spelled = [list(word) for word in words], list(spellings)
    made: list[tuple[int, int, int, bool]] = []
    refused: set[Pair | bytes] = set()

    def make(left: int, right: int, *, step: bool = False) -> None:
        nonlocal encoded
        frequency = recount(encoded, counts)[left, right]
        encoded = [merge_word(word, (left, right), len(spelled)) for word in encoded]
        made.append((left, right, frequency, step))
        spelled.append(spelled[left] + spelled[right])

    for pair in first:
        make(*pair)
    while True:
        ranked: list[tuple[int, int, Pair, Way | None]] = []
        for pair, frequency in recount(encoded, counts).items():
            way, best = None, frequency
            if not whole(spelled[pair[0]] + spelled[pair[1]]):
                way = best_way(encoded, counts, pair, spelled, refused)
                best = 0 if way is None else way[0]
            if best >= min_frequency and pair not in refused:
                ranked.append((-best, -frequency, pair, way))
        if not ranked:
            return made, encoded
        _, _, pair, chosen = min(ranked, key=lambda entry: entry[:3])
        spelling = chosen[1] if chosen else spelled[pair[0]] + spelled[pair[1]]
        if spelling in spelled or not allowed(spelling):
            refused.add(spelling if chosen else pair)
        elif chosen is None:
            make(*pair)
        else:
            for number, (left, right) in enumerate(chosen[2]):
                last = len(spelled) - 1
                step = number < len(chosen[2]) - 1
                make(last if left is None else left, last if right is None else right, step=step)


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
def test_merges_are_those_of_counting_everything_anew(
    corpus: list[tuple[list[int], int]], min_frequency: int, denied: set[str], first: list[Pair]
) -> None:
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
    assert [(m.left, m.right, m.frequency, m.step) for m in made] == reference
    assert [m.symbol for m in made] == list(range(4, 4 + len(made)))
    before = sum(len(w) * c for w, c in zip(words, counts, strict=True))
    after = sum(len(w) * c for w, c in zip(encoded, counts, strict=True))
    assert before - sum(m.frequency for m in made) == after


# Bytes of the characters below, and tokens that hold parts of them, alone and with others.
parts = [bytes([b]) for b in sorted(set("a鏊鏋鎊é😀😁𠀀𠀁".encode()))]
parts += [b"\xe9\x8f", b"a\xe9", b"\xf0\x9f", b"\x8f\x8a", b"\x80\xc3"]


def tokens_of(text: str, chosen: list[int]) -> list[int]:
    """Some spelling of a text by `parts`; at each place one of those that fit is chosen."""
    rest = text.encode()
    word: list[int] = []
    while rest:
        fitting = [number for number, part in enumerate(parts) if rest.startswith(part)]
        word.append(fitting[chosen[len(word) % len(chosen)] % len(fitting)])
        rest = rest[len(parts[word[-1]]) :]
    return word


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text("a鏊鏋鎊é😀😁𠀀𠀁", min_size=1, max_size=5),
            st.lists(st.integers(0, 2), min_size=1, max_size=4),
            st.integers(1, 4),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 4),
    st.sets(st.text("a鏊鏋é😀", min_size=1, max_size=2), max_size=4),
)
def test_steps_lead_to_whole_characters_as_counted_anew(
    corpus: list[tuple[str, list[int], int]], min_frequency: int, denied: set[str]
) -> None:
    words = [tokens_of(text, chosen) for text, chosen, _ in corpus]
    counts = [count for _, _, count in corpus]
    denied_bytes = {text.encode() for text in denied}
    made = run(
        words,
        counts=counts,
        spellings=parts,
        min_frequency=min_frequency,
        judge=lambda spelling: "denied" if spelling in denied_bytes else None,
    )
    reference, _ = expected(
        words,
        counts=counts,
        spellings=parts,
        min_frequency=min_frequency,
        allowed=lambda spelling: spelling not in denied_bytes,
    )
    assert [(m.left, m.right, m.frequency, m.step) for m in made] == reference
    for merge in made:
        assert merge.step != whole(merge.spelling)
        if merge.step:
            assert merge.spelling in made[made.index(merge) + 1].spelling


def test_a_step_goes_directly_before_the_character_it_is_for() -> None:
    # 鏊 and 鏋 begin with the same two bytes: the more frequent one pays for the step.
    spellings = [b"\xe9", b"\x8f", b"\x8a", b"\x8b", b"a"]
    words, counts = [[0, 1, 2], [0, 1, 3], [4, 4]], [5, 3, 6]
    made = run(words, counts=counts, spellings=spellings)
    assert [(m.spelling, m.frequency, m.step) for m in made] == [
        (b"aa", 6, False),
        (b"\xe9\x8f", 8, True),
        ("鏊".encode(), 5, False),
        ("鏋".encode(), 3, False),
    ]


def test_no_step_without_a_character_that_is_wanted() -> None:
    spellings = [b"\xe9", b"\x8f", b"\x8a", b"a\xe9"]
    refused: Counter[str] = Counter()
    words = [[0, 1, 2], [3, 1, 2]]
    unwanted = {"鏊".encode(), "a鏊".encode()}
    made = run(
        words,
        counts=[5, 4],
        spellings=spellings,
        judge=lambda spelling: "unwanted" if spelling in unwanted else None,
        refused=refused,
    )
    assert made == []
    # The character itself once, though two pairs lead to it; then these two, and what begins in
    # one character and ends in another.
    assert refused == {"unwanted": 1, PARTIAL: 3}


def test_refusals_are_counted_by_reason_once_a_pair() -> None:
    asked: list[bytes] = []

    def judge(spelling: bytes) -> str | None:
        asked.append(spelling)
        return "denied" if spelling == b"ac" else None

    refused: Counter[str] = Counter()
    made = run(
        [[0, 1], [0, 2], [1, 2]],
        counts=[9, 8, 7],
        sketches=[0b1111, 0b1111, 0b1],
        spellings=letters,
        judge=judge,
        min_spread=3,
        refused=refused,
    )
    assert made == []
    assert refused == {KNOWN: 1, "denied": 1, TOO_FEW_DOCUMENTS: 1}
    assert asked == [b"ac"]


def test_spread_is_that_of_the_words_that_have_the_pair_when_it_is_made() -> None:
    # "bc" is made first, so "ab" is left in the second word alone.
    made = run(
        [[0, 1, 2], [0, 1], [1, 2]],
        counts=[1, 2, 4],
        sketches=[0b1, 0b110, 0b11110000],
        spellings=[b"a", b"b", b"c"],
    )
    assert [(m.spelling, m.frequency, m.spread) for m in made] == [
        (b"bc", 5, estimate_documents(0b11110001)),
        (b"ab", 2, 2),
        (b"abc", 1, 1),
    ]


def test_documents_are_estimated_within_a_fifth_up_to_two_hundred() -> None:
    rng = np.random.default_rng(0)
    for documents in (1, 2, 5, 20, 60, 200):
        sketches = [
            int(np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, documents, np.uint64)))
            for _ in range(400)
        ]
        estimates = [estimate_documents(sketch) for sketch in sketches]
        assert np.mean(estimates) == pytest.approx(documents, rel=0.2)
    assert estimate_documents(2**64 - 1) == 311 > estimate_documents(2**63 - 1)
    assert estimate_documents(0) == 0


def test_first_merges_come_first_whatever_their_frequency() -> None:
    made = run(
        [[0, 1, 2]], counts=[50], spellings=[b"a", b"b", b"c"], first=[(2, 2), (1, 2)], most=4
    )
    assert [(m.left, m.right, m.symbol, m.frequency) for m in made] == [
        (2, 2, 3, 0),
        (1, 2, 4, 50),
        (0, 4, 5, 50),
    ]


def test_overlapping_pairs_come_back_when_the_one_before_them_is_taken() -> None:
    # aaa: at first only its first two can be merged; once "xa" is made, only its last two.
    made = run(
        [[1, 0, 0, 0], [1, 0]], counts=[4, 9], spellings=[b"a", b"x"], min_frequency=4, most=2
    )
    assert [(m.spelling, m.frequency) for m in made] == [(b"xa", 13), (b"aa", 4)]


def test_no_words_and_no_pairs_give_no_merges() -> None:
    assert run([], counts=[], spellings=letters) == []
    assert run([[0], [], [1]], counts=[3, 1, 2], spellings=letters) == []


def test_trainer_of_tokenizers_makes_the_same_merges() -> None:
    # It breaks ties as ours does, and differs only in how it counts aaa: so no letter is doubled.
    rng = np.random.default_rng(1)
    words = ["".join(rng.choice([*"abcde"], rng.integers(2, 9))) for _ in range(12)]
    words = [word for word in dict.fromkeys(words) if not any(2 * c in word for c in "abcde")]
    counts = [2**number for number in range(len(words))]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=5 + 15, min_frequency=1, show_progress=False)
    backend.train_from_iterator(
        (word for word, count in zip(words, counts, strict=True) for _ in range(count)), trainer
    )
    theirs = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    spellings = [letter.encode() for letter in "abcde"]
    made = run(
        [["abcde".index(letter) for letter in word] for word in words],
        counts=counts,
        spellings=spellings,
        most=len(theirs),
    )
    spelled = [*spellings, *(merge.spelling for merge in made)]
    ours = [(spelled[m.left].decode(), spelled[m.right].decode()) for m in made]
    assert len(theirs) == 15
    assert ours == theirs


@pytest.mark.parametrize("seed", [0, 1])
def test_a_tokenizer_with_the_new_merges_encodes_as_the_loop_counted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    old = [("a", "b"), ("c", "a"), ("ab", "c")]
    spelled = [*"abcd", "ab", "ca", "abc"]
    words = ["".join(rng.choice([*"abcd"], rng.integers(1, 12))) for _ in range(200)]
    counts = rng.integers(1, 50, len(words)).tolist()

    def encode(merges: list[tuple[str, str]]) -> list[list[int]]:
        vocab = {token: i for i, token in enumerate([*"abcd", *(a + b for a, b in merges)])}
        backend = Tokenizer(models.BPE(vocab, merges))
        return [backend.encode(word).ids for word in words]

    before = encode(old)
    made = run(
        before, counts=counts, spellings=[s.encode() for s in spelled], min_frequency=20, most=60
    )
    spelled += [merge.spelling.decode() for merge in made]
    after = encode([*old, *((spelled[m.left], spelled[m.right]) for m in made)])
    saved = sum(
        (len(a) - len(b)) * count for a, b, count in zip(before, after, counts, strict=True)
    )
    assert len(made) == 60
    assert saved == sum(merge.frequency for merge in made)
    for merge in made[-3:]:
        assert any(merge.symbol in ids for ids in after)
