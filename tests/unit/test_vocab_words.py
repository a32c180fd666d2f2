"""Words as the tokenizer's own pre-tokeniser makes them, counted as a plain loop would."""

import json
import logging
import pickle
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tokenizer.hard_texts import hard_texts
from tokenizer.joined_pairs import byte_characters
from tokenizer.merge_loop import estimate_documents
from tokenizer.splitters import ByteLevelSplitter, NotEqual
from tokenizer.word_encoder import WordEncoder
from tokenizer.words import WordCounter

LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + LETTERS
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(expression: str, **changes: Any) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}
    return step | {"invert": False} | changes


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


PRE_TOKENIZERS = {
    "llama3": sequence(split(LLAMA), BYTES),
    "qwen": sequence(split(LLAMA.replace("{1,3}", "")), BYTES),
    "gpt2": BYTES | {"use_regex": True},
    "gpt2 with a space": BYTES | {"use_regex": True, "add_prefix_space": True},
    "smollm": sequence({"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}),
    "digits together": sequence({"type": "Digits", "individual_digits": False}, BYTES),
    "deepseek": sequence(
        split(r"\p{N}{1,3}"),
        split("[一-龥぀-ゟ゠-ヿ]+"),
        split(
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
            "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
        ),
        BYTES,
    ),
    "deepseek v2": sequence(
        split("[\r\n]"),
        split("\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-Ֆ]+"),
        split("\\s?[!-/:-~！-／：-～‘-‟　-。]+"),
        split("\\s+$"),
        split("[一-龥ࠀ-一가-퟿]+"),
        {"type": "Digits", "individual_digits": True},
        BYTES,
    ),
}


def definition(pre_tokenizer: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {}, "merges": []}
    parts = {"version": "1.0", "normalizer": None, "pre_tokenizer": pre_tokenizer, "model": model}
    return parts | {"added_tokens": []} | changes


def added(token_id: int, content: str, **options: Any) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": token_id, "content": content} | plain | options


def own_words(content: dict[str, Any], text: str) -> list[str]:
    """What the tokenizer's own parts make of a text."""
    backend = Tokenizer.from_str(json.dumps(content))
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    byte_of = {letter: byte for byte, letter in enumerate(byte_characters())}
    pieces = backend.pre_tokenizer.pre_tokenize_str(text)
    return [bytes(byte_of[letter] for letter in piece).decode() for piece, _ in pieces]


@pytest.mark.parametrize(
    ("name", "normalizer"),
    [*((name, None) for name in PRE_TOKENIZERS), ("qwen", "NFC"), ("qwen", "NFKC")],
)
def test_cuts_as_the_tokenizer_itself(name: str, normalizer: str | None) -> None:
    content = definition(PRE_TOKENIZERS[name], normalizer=normalizer and {"type": normalizer})
    splitter = ByteLevelSplitter(content)
    copied = pickle.loads(pickle.dumps(splitter))
    assert splitter.fast and copied.fast
    # Other mixtures than those on which it compares itself.
    for text in hard_texts(["<|x|>", "核电"], count=40):
        assert splitter(text) == copied(text) == own_words(content, text), repr(text)


@pytest.mark.parametrize(
    "step",
    [
        split(r"\p{L}+", behavior="Removed"),
        split(r"\p{L}+", invert=True),
        split(r"(?~abc)"),  # Oniguruma's alone
        {"type": "Punctuation", "behavior": "Isolated"},
    ],
)
def test_what_it_does_not_do_is_left_to_the_tokenizer(step: dict[str, Any]) -> None:
    content = definition(sequence(step, BYTES))
    splitter = ByteLevelSplitter(content)
    assert not splitter.fast
    for text in ("The core, 堆芯 abc.", "a b", ""):
        assert splitter(text) == own_words(content, text)


def test_an_expression_that_means_something_else_is_found_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Oniguruma takes \h for a hexadecimal digit, `regex` for white space in a line.
    content = definition(sequence(split(r"\h+"), BYTES))
    with caplog.at_level(logging.WARNING):
        splitter = ByteLevelSplitter(content)
    assert not splitter.fast
    assert "slow way" in caplog.text
    assert splitter("xyz beef") == ["xyz ", "beef"]


def test_a_difference_that_only_the_corpus_shows_is_found_there() -> None:
    content = definition(sequence(split("a(?i:q)z|b"), BYTES))
    splitter = ByteLevelSplitter(content)
    assert splitter.fast
    splitter._cut_plain = lambda text: [text]  # as if the two dialects came apart
    splitter.check([])
    with pytest.raises(NotEqual, match="aqzb"):
        splitter.check(["x", "xaqzb"])
    slow = splitter.slow()
    slow.check(["xaqzb"])
    assert slow("xaqzb") == ["x", "aqz", "b"]


def test_added_tokens_are_cut_out_unless_special() -> None:
    tokens = [
        added(256, "<think>"),
        added(257, "<thinking>"),
        added(258, "<|end|>", special=True),
        added(259, "Åk", normalized=True),
        added(260, "[S]", lstrip=True, rstrip=True),
    ]
    content = definition(PRE_TOKENIZERS["qwen"], added_tokens=tokens, normalizer={"type": "NFC"})
    letters = byte_characters()
    content["model"] = {
        "type": "BPE",
        "vocab": {letter: number for number, letter in enumerate(letters)},
        "merges": [],
    }
    backend = Tokenizer.from_str(json.dumps(content))
    backend.encode_special_tokens = True
    splitter = ByteLevelSplitter(content)
    texts = [
        "a <think> b<think>\n\n  c<thinking>d",
        "<|end|> x<|end|>",
        "A\u030ak \u212bk Åk",
        "a  [S]  b[S]",
        "<thin k> <thinki",
        *hard_texts([token["content"] for token in tokens], count=60),
    ]
    for text in texts:
        ids = [token for token in backend.encode(text, add_special_tokens=False).ids if token < 256]
        words = b"".join(word.encode() for word in splitter(text))
        assert bytes(ids) == words, repr(text)
    assert splitter("a <think> b<thinking>c") == ["a", " ", " b", "c"]


def test_counts_are_those_of_a_plain_loop() -> None:
    splitter = ByteLevelSplitter(definition(PRE_TOKENIZERS["llama3"]))
    source = random.Random(0)
    texts = [
        " ".join(source.choices(["reactor", "core", "堆芯，压力", "12345", "\n"], k=30))
        for _ in range(200)
    ]
    counter = WordCounter(splitter)
    counter.add(texts)
    words = counter.words()
    plain = Counter(word for text in texts for word in splitter(text))
    order = sorted(plain, key=lambda word: (-plain[word], word))
    assert words.spellings == order
    assert words.counts.tolist() == [plain[word] for word in order]
    assert (words.documents, words.text_bytes) == (200, sum(len(t.encode()) for t in texts))


def test_the_order_and_the_parts_of_a_corpus_do_not_matter() -> None:
    splitter = ByteLevelSplitter(definition(PRE_TOKENIZERS["qwen"]))
    texts = hard_texts([], count=80)
    together = WordCounter(splitter)
    together.add(texts)
    expected = together.words()
    whole = WordCounter(splitter)
    for start in (2, 0, 1):
        part = WordCounter(splitter)
        part.add(texts[start::3])
        whole.update(part if start else part.words())
    words = whole.words()
    assert words.spellings == expected.spellings
    np.testing.assert_array_equal(words.counts, expected.counts)
    np.testing.assert_array_equal(words.sketches, expected.sketches)
    assert (words.documents, words.text_bytes) == (expected.documents, expected.text_bytes)


def test_sketches_tell_in_how_many_documents_a_word_is() -> None:
    splitter = ByteLevelSplitter(definition(PRE_TOKENIZERS["qwen"]))
    counter = WordCounter(splitter)
    counter.add([f"all {'some' if n % 20 == 0 else 'none'} n{n}" for n in range(200)])
    counter.add([" once once once once"] * 3)  # a copy is no other document
    words = counter.words()
    spread = {
        word: estimate_documents(int(sketch))
        for word, sketch in zip(words.spellings, words.sketches, strict=True)
    }
    assert spread[" once"] == 1
    assert 7 <= spread[" some"] <= 13
    assert 140 <= spread["all"] <= 311


def test_words_are_encoded_as_one_by_one(llama_definition: dict[str, Any]) -> None:
    splitter = ByteLevelSplitter(llama_definition)
    counter = WordCounter(splitter)
    counter.add(hard_texts([]))
    words = [*counter.words().spellings, "核电站" * 40, "x" * 20_000]
    model = Tokenizer.from_str(json.dumps(llama_definition)).model
    letters = byte_characters()
    symbols, starts = WordEncoder(llama_definition).encode(words)
    assert len(starts) == len(words) + 1
    for number, word in enumerate(words):
        spelt = "".join(letters[byte] for byte in word.encode())
        expected = [token.id for token in model.tokenize(spelt)]
        assert symbols[starts[number] : starts[number + 1]].tolist() == expected, repr(word)


def test_no_words_are_encoded_to_nothing(llama_definition: dict[str, Any]) -> None:
    symbols, starts = WordEncoder(llama_definition).encode([])
    assert (symbols.tolist(), starts.tolist()) == ([], [0])


@pytest.fixture(scope="module", params=["llama3", "smollm", "deepseek"])
def llama_definition(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A trained tokenizer: of kinds in which runs of ideographs are cut, and of one where not."""
    from tokenizers import models, trainers

    content = definition(PRE_TOKENIZERS[request.param])
    backend = Tokenizer.from_str(json.dumps(content))
    backend.model = models.BPE()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=byte_characters(), show_progress=False
    )
    backend.train_from_iterator(hard_texts([], count=120), trainer)
    trained: dict[str, Any] = json.loads(backend.to_str())
    trained["model"]["ignore_merges"] = request.param == "llama3"
    return trained
