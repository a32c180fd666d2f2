"""Terms: reading them, finding them, and merges that lead to them."""

import itertools
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from megatron_cgn.errors import DataError
from tokenizer.any_text import any_text
from tokenizer.bpe_vocabulary import apply_merges
from tokenizer.term_merges import TermMerges
from tokenizer.terms import TermFinder, check_terms, read_terms
from tokenizer.words import WordCounter

LETTERS = [bytes([byte]) for byte in b"abcdefgh"]
A, B, C, D, E, F, G, H = range(8)


def test_terms_are_read(tmp_path: Path) -> None:
    path = tmp_path / "terms.txt"
    path.write_text(
        "\ufeff# systems\r\n反应堆\r\n\n  AP1000 \n反应堆\n1 号机组\n", encoding="utf-8"
    )
    assert read_terms(path) == ["反应堆", "AP1000", "1 号机组"]


def test_faults_of_a_file_are_named_together(tmp_path: Path) -> None:
    path = tmp_path / "terms.txt"
    path.write_text(f"ok\n{'x' * 65}\na\x00b\nlost \ufffd\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2.*65 characters.*line 3.*control.*line 4.*U.FFFD"):
        read_terms(path)
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no term"):
        read_terms(path)
    path.write_bytes("核".encode("gb18030"))
    with pytest.raises(DataError, match="UTF-8"):
        read_terms(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_terms(tmp_path / "missing")


def test_terms_are_checked_and_repetitions_dropped() -> None:
    assert check_terms(["b", "a", "b", "<x>"], normalize=str, added=["<x>"]) == ["b", "a", "<x>"]
    with pytest.raises(DataError, match="holds the added token '<x>'.*makes 'A' of it"):
        check_terms(["a<x>", "a"], normalize=str.upper, added=["<x>"])


def test_terms_are_found_as_often_as_they_are_there() -> None:
    terms = ["反应堆", "堆", "rod", "反应", "U-235", "的", "堆芯"]
    texts = ["核反应堆的堆芯", " rods", "(rod", "product", "U-2350", "U-235的rod", "反应反应堆"] * 3
    counter = WordCounter(lambda text: [text])
    counter.add(texts)
    words = counter.words()
    found: Counter[str] = Counter()
    for word, term in TermFinder(terms).find(words):
        found[terms[term]] += int(words.counts[word])
    text = "\n".join(texts)
    chinese = {term: text.count(term) for term in terms if not term.isascii()}
    # Not in rods, product and U-2350.
    assert found == Counter(chinese | {"rod": 6, "U-235": 3})


def test_a_word_is_joined_from_the_left() -> None:
    merges = TermMerges(LETTERS)
    assert merges.add([[A, B, C]]) == [9]
    assert merges.pairs == [(A, B), (8, C)]
    assert merges.spellings[8:] == [b"ab", b"abc"]


def test_a_merge_is_made_once_for_all_its_places() -> None:
    merges = TermMerges(LETTERS)
    merges.add([[A, B, A, B]])
    assert merges.pairs == [(A, B), (8, 8)]


def test_forms_that_end_alike_are_joined_from_the_right() -> None:
    merges = TermMerges(LETTERS)
    symbols = merges.add([[A, C, D, E], [B, C, D, E]])
    assert [merges.spellings[s] for s in symbols or ()] == [b"acde", b"bcde"]
    assert len(merges.pairs) == 4  # de, cde and the two; from the left it would be 6


def test_what_is_a_token_already_is_gone_round() -> None:
    merges = TermMerges([*LETTERS, b"ab"])
    (symbol,) = merges.add([[A, B, C]]) or ()
    assert merges.pairs == [(B, C), (A, 9)]
    assert merges.spellings[symbol] == b"abc"


def test_a_word_to_which_no_way_leads_changes_nothing() -> None:
    merges = TermMerges([*LETTERS, b"ab", b"bc"])
    assert merges.add([[A, B, C]]) is None
    assert merges.add([[D, E], [A, B]]) is None
    assert merges.pairs == []
    assert merges.spellings == [*LETTERS, b"ab", b"bc"]
    assert merges.add([[D, E]]) == [10]


def test_words_that_overlap_all_become_single() -> None:
    draw = random.Random(4)
    for _ in range(200):
        merges = TermMerges(LETTERS)
        words = [draw.choices(range(4), k=draw.randint(1, 7)) for _ in range(12)]
        symbols = [merges.add([word]) for word in words]
        made = {pair: 8 + i for i, pair in enumerate(merges.pairs)}
        for word, symbol in zip(words, symbols, strict=True):
            if symbol is not None:
                assert apply_merges(word, made) == symbol
                assert merges.spellings[symbol[0]] == b"".join(LETTERS[i] for i in word)
        assert len(set(merges.spellings)) == len(merges.spellings)


def test_few_of_such_words_are_impossible() -> None:
    merges = TermMerges(LETTERS)
    words = [list(word) for n in (2, 3) for word in itertools.product(range(4), repeat=n)]
    made = [merges.add([word]) for word in words]
    assert made.count(None) < len(words) / 2


def test_any_text_matches_the_longest_at_the_first_place() -> None:
    draw = random.Random(5)
    for _ in range(300):
        terms = {
            "".join(draw.choices("ab.核", k=draw.randint(1, 5))) for _ in range(draw.randint(1, 9))
        }
        text = "".join(draw.choices("ab.核x", k=60))
        plain = "|".join(map(re.escape, sorted(terms, key=len, reverse=True)))
        assert re.findall(any_text(terms), text) == re.findall(plain, text)


def test_any_text_takes_many_texts_that_begin_alike() -> None:
    terms = ["核" * n for n in range(1, 64)] + ["a*b", "a|b", "a", "[a]"]
    assert re.findall(any_text(terms), "核" * 64 + "a*b.a|b[a]") == [
        "核" * 63, "核", "a*b", "a|b", "[a]",
    ]  # fmt: skip
