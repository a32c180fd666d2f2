"""Signatures: what they estimate, that they are stable, and what they depend on."""

import random
import re
import tracemalloc

import numpy as np
import pytest

from megatron_cgn.config.corpus import DeduplicateConfig
from megatron_cgn.corpus.dedup import Signer
from megatron_cgn.corpus.dedup import signature as module
from megatron_cgn.corpus.dedup.signature import EMPTY

SENTENCE = "主泵1RCP001PO于2026-05-01检修，轴承温度45.5℃，振动2.1mm/s，结论合格，恢复备用。"

# Simplified already, so that folding the script changes nothing.
HAN = "的一是不了人我在有他这中大来上国个到说们为子和你地出道也得就那要下以生会自去之过家学对可她小"
GOLDEN_HASHES = [
    [13118579773766698340, 7409926098011805970, 8943742539231439512, 462087685748475454]
]
GOLDEN_ROW = [527470813, 3227774684, 881672628, 535962289]
GOLDEN_PARAMETERS = {
    "format": 1,
    "rensa_algorithm": 2,
    "characters": 0,
    "num_permutations": 128,
    "ngram_tokens": 5,
    "number_weight": 20,
    "seed": 0,
}


def words_of(rng: random.Random, count: int) -> list[str]:
    """Chinese characters, English words and a few numbers."""
    kinds = (
        lambda: rng.choice(HAN),
        lambda: "".join(rng.choices("abcdefgh", k=4)) + " ",
        lambda: f" {rng.randint(100, 999)} ",
    )
    return [rng.choices(kinds, weights=(6, 3, 1))[0]() for _ in range(count)]


def true_set(text: str, *, size: int, weight: int) -> set[object]:
    """The n-grams and weighted numbers of a plain text, by a regular expression and tuples."""
    tokens = re.findall(r"[\u3400-\u9fff]|[a-z0-9]+", text)
    if len(tokens) < size:
        return set()
    grams: set[object] = {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}
    return grams | {(t, k) for t in tokens if t.isdigit() for k in range(weight)}


def jaccard(first: set[object], second: set[object]) -> float:
    return len(first & second) / len(first | second)


def pairs(count: int) -> list[tuple[str, str]]:
    """Texts and edited copies of many degrees of similarity."""
    rng = random.Random(7)
    made = []
    for number in range(count):
        tokens = words_of(rng, rng.randint(40, 900))
        edited = [
            words_of(rng, 1)[0] if rng.random() < 0.3 * number / count else token
            for token in tokens
        ]
        made.append(("".join(tokens), "".join(edited)))
    return made


@pytest.mark.parametrize(("size", "weight"), [(5, 10), (3, 0), (1, 1)])
def test_elements_have_the_true_similarity(size: int, weight: int) -> None:
    signer = Signer(DeduplicateConfig(ngram_tokens=size, number_weight=weight))
    for left, right in pairs(20):
        hashes, offsets = signer.elements([left, right])
        first, second = (set(part.tolist()) for part in np.split(hashes, offsets[1:-1]))
        truth = [true_set(text, size=size, weight=weight) for text in (left, right)]
        assert (len(first), len(second)) == (len(truth[0]), len(truth[1]))
        assert jaccard(first, second) == jaccard(*truth)


@pytest.mark.parametrize("num_permutations", [64, 128, 256])
def test_signatures_estimate_the_true_similarity(num_permutations: int) -> None:
    settings = DeduplicateConfig(num_permutations=num_permutations, number_weight=10)
    texts = pairs(120)
    rows = Signer(settings).sign([text for pair in texts for text in pair]).minhashes
    estimate = (rows[0::2] == rows[1::2]).mean(axis=1)
    truth = np.array([jaccard(*(true_set(t, size=5, weight=10) for t in p)) for p in texts])
    # In units of MinHash's standard error: R-MinHash's is at most that.
    error = (estimate - truth) / np.sqrt(np.maximum(truth * (1 - truth), 0.01) / num_permutations)
    assert truth.min() < 0.5 < 0.9 < truth.max()
    assert abs(error.mean()) < 0.3
    assert error.std() < 1.2
    assert abs(error).max() < 4.5


def test_signatures_are_stable() -> None:
    # From the first release of the format: what they are must not change with it unchanged.
    signed = Signer(DeduplicateConfig()).sign([SENTENCE])
    assert signed.hashes.tolist() == GOLDEN_HASHES
    assert signed.minhashes[0, :4].tolist() == GOLDEN_ROW
    # The table of characters may differ between versions of Python and opencc.
    parameters = Signer(DeduplicateConfig()).parameters
    assert {**parameters, "characters": 0} == GOLDEN_PARAMETERS


@pytest.mark.parametrize("group", [1, 100, 10**9])
def test_grouping_makes_no_difference(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    texts = [text for pair in pairs(10) for text in pair] + ["", "短", SENTENCE]
    signer = Signer(DeduplicateConfig())
    whole = signer.sign(texts)
    monkeypatch.setattr(module, "_GROUP_CHARACTERS", group)
    parts = signer.sign(texts)
    np.testing.assert_array_equal(whole.hashes, parts.hashes)
    np.testing.assert_array_equal(whole.minhashes, parts.minhashes)
    assert len(signer.sign([])) == 0


def test_a_long_document_is_signed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "。".join("".join(words_of(random.Random(seed), 900)) for seed in range(12))
    signer = Signer(DeduplicateConfig())
    whole = signer.sign([text])
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 4000)
    pieces = signer.sign([text, "x" + text])
    np.testing.assert_array_equal(whole.hashes[0, :2], pieces.hashes[0, :2])
    # At each of the cuts four n-grams are left out, of more than ten thousand.
    assert (whole.minhashes == pieces.minhashes[:1]).mean() > 0.97
    # Cuts are made between words, so that layout makes no difference to the exact hash.
    spaced = signer.sign([text.replace("。", "。\n\n  ")])
    np.testing.assert_array_equal(spaced.hashes[0, :2], pieces.hashes[0, :2])
    assert (pieces.hashes[0, :2] != pieces.hashes[1, :2]).any()


def test_a_long_document_of_numbers_takes_no_more_memory_than_a_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(0)
    text = " ".join(str(rng.randrange(10_000, 100_000)) for _ in range(200_000))
    signer = Signer(DeduplicateConfig())
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 1 << 16)
    signer.sign(["warm up"])
    tracemalloc.start()
    signer.sign([text])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Each number is in the set 20 times, of 8 bytes: 32 MB in all, 1.7 MB in a piece.
    assert peak < 24e6


def test_short_documents_have_no_signature() -> None:
    signed = Signer(DeduplicateConfig(ngram_tokens=5)).sign(["", "12 34", "一二三四", "一二三四五"])
    assert (signed.minhashes == EMPTY).all(axis=1).tolist() == [True, True, True, False]
    assert len({tuple(row) for row in signed.hashes[:, :2].tolist()}) == 4


def test_nothing_but_punctuation_is_hashed_as_it_is() -> None:
    signed = Signer(DeduplicateConfig()).sign(["！！！", "？？？", "！！！", ""])
    hashes = [tuple(row) for row in signed.hashes[:, :2].tolist()]
    assert hashes[0] == hashes[2]
    assert len(set(hashes)) == 3


def test_the_form_is_the_text_without_its_numbers() -> None:
    other_values = SENTENCE.replace("001PO", "002PO").replace("45.5", "47.25")
    other_word = SENTENCE.replace("合格", "不合格")
    one_more = SENTENCE + "7"
    reordered = SENTENCE.replace("恢复备用", "备用恢复")
    texts = [SENTENCE, other_values, other_word, one_more, reordered]
    hashes = Signer(DeduplicateConfig()).sign(texts).hashes
    assert (hashes[:, 2] == hashes[0, 2]).tolist() == [True, True, False, False, False]
    assert (hashes[:, 3] == hashes[0, 3]).tolist() == [True, False, True, False, True]


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from megatron_cgn.errors import ConfigError

    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ConfigError, match=r"rensa.*megatron-cgn\[corpus\]"):
        Signer(DeduplicateConfig())
