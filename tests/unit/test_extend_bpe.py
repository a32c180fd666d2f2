"""Byte-level vocabularies are extended so that Hugging Face's tokenizer does what was counted."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from megatron_cgn.errors import ConfigError, DataError
from tests.unit.data_samples import TEXTS, sentencepiece_tokenizer
from tests.unit.extension_samples import documents, llama_like, qwen_like, write_tokenizer
from tokenizer.bpe_vocabulary import spell
from tokenizer.extend import Extender, kind_of, open_extender
from tokenizer.extend_bpe import pairs_of
from tokenizer.extension import FILE_NAME, Extension
from tokenizer.fast import FastEncoder
from tokenizer.filters import Rules
from tokenizer.hard_texts import hard_texts
from tokenizer.words import WordCounter, Words
from tokenizer.wrapper import Tokenizer

DEMO = Path(".cache/smollm2-135m-instruct")
TERMS = ["反应堆冷却剂", "锆合金", "反应堆", "Inconel", "AP1000", "1号 机组", "℃"]
SIZE = 180
RULES = Rules(min_frequency=5, min_spread=2)
CORPUS = documents(60, seed=1)
HELD_OUT = [*documents(3, seed=2), *TEXTS, "AP1000的反应堆冷却剂，1号 机组 Inconel,Inconel 80℃"]
MAKERS: dict[str, Callable[[Path], Path]] = {
    "llama": llama_like,
    "qwen": qwen_like,
    "demo": lambda _: DEMO,
}


class Case:
    """A tokenizer, extended and written."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self.extender = open_extender(source)
        self.words = count(self.extender, CORPUS, TERMS)
        self.extension = extend(self.extender, self.words, SIZE)
        target.mkdir()
        self.extender.write(self.extension, target)
        self.old, self.new = read(source), read(target)
        merges = self.new["model"]["merges"][len(self.old["model"]["merges"]) :]
        self.merged: dict[tuple[str, ...], list[str]] = {}
        self.merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]


def read(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    return content


def count(extender: Extender, texts: Sequence[str], terms: Sequence[str] = ()) -> Words:
    counter = WordCounter(extender.splitter(terms))
    counter.add(texts)
    return counter.words()


def extend(
    extender: Extender, words: Words, number: int, terms: Sequence[str] = TERMS
) -> Extension:
    return extender.extend(words, num_tokens=number, rules=RULES, terms=terms)


@pytest.fixture(scope="module", params=MAKERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp(request.param)
    return Case(MAKERS[request.param](root / "old"), root / "new")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Extender:
    return open_extender(qwen_like(tmp_path_factory.mktemp("tokenizer") / "qwen"))


def by_hand(case: Case, text: str) -> list[int]:
    """What the old tokenizer gives, word by word, with the new merges made one after another."""
    backend = Backend.from_str(json.dumps(case.old))
    vocabulary = case.new["model"]["vocab"]
    added = [t.text for t in case.extension.terms if t.way == "added_token"]
    ids: list[int] = []
    place = 0
    while place < len(text):  # added terms first, the longest of those at one place
        found = max((t for t in added if text.startswith(t, place)), key=len, default=None)
        if found is not None:
            ids.append(vocabulary[found])
            place += len(found)
            continue
        ends = [text.find(t, place) for t in added if text.find(t, place) >= 0]
        end = min(ends, default=len(text))
        encoding = backend.encode(text[place:end], add_special_tokens=False)
        words: dict[int, list[str]] = {}
        for token, word in zip(encoding.tokens, encoding.word_ids, strict=True):
            words.setdefault(word, []).append(token)
        for word in words.values():
            ids += [vocabulary[token] for token in merge(case, word)]
        place = end
    return ids


def merge(case: Case, word: list[str]) -> list[str]:
    key = tuple(word)
    if key not in case.merged:
        case.merged[key] = _merge(case, word)
    return case.merged[key]


def _merge(case: Case, word: list[str]) -> list[str]:
    whole = "".join(word)
    if case.new["model"].get("ignore_merges") and whole in case.new["model"]["vocab"]:
        return [whole]
    for left, right in case.merges:
        place = 0
        while place < len(word) - 1:
            if (word[place], word[place + 1]) == (left, right):
                word[place : place + 2] = [left + right]
            place += 1
    return word


def test_encoding_is_the_old_one_with_the_new_merges_made_in_order(case: Case) -> None:
    backend = Backend.from_file(str(case.target / "tokenizer.json"))
    new_ids = 0
    for text in HELD_OUT:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert ids == by_hand(case, text), text
        new_ids += sum(i >= case.extension.old_vocab_size for i in ids)
    assert new_ids > 200


def test_old_ids_and_options_stay(case: Case) -> None:
    old, new = (Backend.from_str(json.dumps(content)) for content in (case.old, case.new))
    assert new.get_vocab().items() >= old.get_vocab().items()
    size = old.get_vocab_size()
    assert case.extension.old_vocab_size == size  # no ids are free in these
    ids = sorted(set(new.get_vocab().values()) - set(old.get_vocab().values()))
    assert ids == list(range(size, size + SIZE))
    assert {t.token: t.id for t in case.extension.new_tokens}.items() <= new.get_vocab().items()
    number = len(case.old["added_tokens"])
    assert case.new["added_tokens"][:number] == case.old["added_tokens"]
    added = [t["content"] for t in case.new["added_tokens"][number:]]
    assert added == [term for term in TERMS if term not in ("Inconel", "℃")]
    assert not any(t["special"] for t in case.new["added_tokens"][number:])
    for part in case.old.keys() - {"model", "added_tokens"}:
        assert case.new[part] == case.old[part]
    for option in case.old["model"].keys() - {"vocab", "merges"}:
        assert case.new["model"][option] == case.old["model"][option]
    assert type(case.new["model"]["merges"][-1]) is type(case.old["model"]["merges"][0])


def test_old_ids_of_a_new_token_are_the_pieces_that_it_replaces(case: Case) -> None:
    old = case.extender.tokenizer
    lengths = Tokenizer.from_pretrained(case.target).token_byte_lengths()
    pieces = old.token_byte_lengths()
    for token in case.extension.new_tokens:
        assert len(token.old_ids) >= 2
        assert sum(pieces[i] for i in token.old_ids) == lengths[token.id]
        if token.text is not None:
            assert old.decode(token.old_ids) == token.text


def test_merges_are_found_again_from_the_old_ids(case: Case) -> None:
    names = {i: t for t, i in case.new["model"]["vocab"].items()}
    added = {t.id for t in case.extension.terms if t.way == "added_token"}
    tokens = [t for t in case.extension.new_tokens if t.id not in added]
    assert [(names[a], names[b]) for a, b in pairs_of(tokens)] == case.merges
    with pytest.raises(DataError, match="damaged"):
        pairs_of([replace(tokens[0], old_ids=(1, 2, 3))])


def test_terms_are_single_tokens(case: Case) -> None:
    tokenizer = Tokenizer.from_pretrained(case.target)
    ways = {}
    for term in case.extension.terms:
        assert tokenizer.encode(term.text) == [term.id]
        ways[term.text] = term.way
    assert [t.text for t in case.extension.terms] == TERMS
    assert ways["AP1000"] == ways["1号 机组"] == "added_token"
    assert ways["反应堆冷却剂"] == ways["锆合金"] == "added_token"
    assert ways["Inconel"] == "merges"
    assert len(tokenizer.encode("in Inconel")) == 1 + len(tokenizer.encode("in"))
    by_text = {term.text: term for term in case.extension.terms}
    text = "\n".join(CORPUS)
    # In this corpus no other word has these letters or characters in it.
    assert by_text["锆合金"].occurrences == text.count("锆合金") > 0
    assert by_text["Inconel"].occurrences == by_text["Inconel"].whole == text.count("Inconel")
    assert by_text["AP1000"].occurrences == 0
    ids = [i for ids in tokenizer.encode_batch(CORPUS) for i in ids]
    assert by_text["锆合金"].whole == ids.count(by_text["锆合金"].id)


def test_the_first_tokens_are_those_found_when_fewer_are_wanted(case: Case, tmp_path: Path) -> None:
    fewer = extend(case.extender, case.words, 120)
    assert fewer.new_tokens == case.extension.new_tokens[:120]
    case.extender.write(case.extension, tmp_path, num_tokens=120)
    written = Extension.from_json(json.loads((tmp_path / FILE_NAME).read_text()), name="")
    assert written.new_tokens == fewer.new_tokens
    assert written.new_fingerprint == fewer.new_fingerprint
    assert Tokenizer.from_pretrained(tmp_path).fingerprint() == fewer.new_fingerprint


def test_no_new_tokens_is_the_old_tokenizer(case: Case, tmp_path: Path) -> None:
    case.extender.write(case.extension, tmp_path, num_tokens=0)
    assert read(tmp_path) == case.old
    assert Tokenizer.from_pretrained(tmp_path).fingerprint() == case.extension.old_fingerprint
    terms = 1 + max(i for i, t in enumerate(case.extension.new_tokens) if t.origin == "term")
    with pytest.raises(ConfigError, match="are needed for the terms"):
        case.extender.write(case.extension, tmp_path, num_tokens=terms - 1)


def test_decoding_gives_what_it_gave(case: Case) -> None:
    old, new = case.extender.tokenizer, Tokenizer.from_pretrained(case.target)
    draw = random.Random(3)
    spelt = [t.text for t in case.extension.new_tokens if t.text]
    mixed = [
        "".join(draw.choices([*spelt, "，", " ", "\n", "e\u0301", "7"], k=9)) for _ in range(300)
    ]
    for text in [*HELD_OUT, *hard_texts(old.added_tokens()), *mixed]:
        assert new.decode(new.encode(text)) == old.decode(old.encode(text))


@pytest.mark.parametrize("case", ["llama", "qwen"], indirect=True)  # it does not take the demo's
def test_the_fast_encoder_takes_it(case: Case) -> None:
    tokenizer = Tokenizer.from_pretrained(case.target)
    encoder = FastEncoder(tokenizer)
    encoder.prove([*HELD_OUT, *CORPUS[:10]])


def test_transformers_gives_the_same_ids(case: Case) -> None:
    from transformers import AutoTokenizer

    ours = Tokenizer.from_pretrained(case.target)
    theirs = AutoTokenizer.from_pretrained(str(case.target), local_files_only=True)
    for text in HELD_OUT[:4]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    before = AutoTokenizer.from_pretrained(str(case.source), local_files_only=True)
    chat = [
        {"role": "user", "content": "<think>反应堆冷却剂"},
        {"role": "assistant", "content": "Inconel"},
    ]
    texts = [t.apply_chat_template(chat, tokenize=False) for t in (before, theirs)]
    assert texts[0] == texts[1]
    ids = [t.apply_chat_template(chat, return_dict=True)["input_ids"] for t in (before, theirs)]
    marks = before.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [i for i in ids[0] if i in marks] == [i for i in ids[1] if i in marks]
    assert len([i for i in ids[1] if i in marks]) >= 4
    assert {term.id for term in case.extension.terms[:1]} <= set(ids[1])


@pytest.mark.parametrize("maker", [llama_like, qwen_like])
def test_all_files_say_the_same(tmp_path: Path, maker: Callable[[Path], Path]) -> None:
    case = Case(maker(tmp_path / "old"), tmp_path / "new")
    model = case.new["model"]
    assert json.loads((case.target / "vocab.json").read_text()) == model["vocab"]
    lines = (case.target / "merges.txt").read_text().splitlines()
    assert lines[0] == "#version: 0.2"
    assert [tuple(line.split(" ")) for line in lines[-len(case.merges) :]] == case.merges
    assert len(lines) == 1 + len(model["merges"])
    listed = json.loads((case.target / "added_tokens.json").read_text())
    assert listed == {t["content"]: t["id"] for t in case.new["added_tokens"]}
    config = json.loads((case.target / "tokenizer_config.json").read_text())
    before = json.loads((case.source / "tokenizer_config.json").read_text())
    decoder = config.pop("added_tokens_decoder")
    assert {t["content"]: int(i) for i, t in decoder.items()} == listed
    assert config == {k: v for k, v in before.items() if k != "added_tokens_decoder"}
    names = {path.name for path in case.target.iterdir()}
    assert names == {path.name for path in case.source.iterdir()} - {"README.md"} | {FILE_NAME}


def test_the_older_files_alone_give_the_same_tokenizer(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    case = Case(qwen_like(tmp_path / "old"), tmp_path / "new")
    (case.target / "tokenizer.json").unlink()
    theirs = Qwen2Tokenizer.from_pretrained(str(case.target), local_files_only=True)
    backend = Backend.from_str(json.dumps(case.new))
    for text in HELD_OUT:
        expected = backend.encode(text, add_special_tokens=False).ids
        assert theirs(text, add_special_tokens=False)["input_ids"] == expected
    for token in case.old["added_tokens"]:
        assert theirs.convert_tokens_to_ids(token["content"]) == token["id"]


@pytest.mark.parametrize("terms", [["Inconel"], ["℃"]])
def test_terms_cost_no_more_tokens_than_needed(qwen: Extender, terms: list[str]) -> None:
    longest = max(len(qwen.tokenizer.encode(term)) for term in terms)
    made = extend(qwen, count(qwen, CORPUS), 40, terms)
    tokens = [token for token in made.new_tokens if token.origin == "term"]
    spaced = {" Inconel"} if "Inconel" in terms else set()
    assert {t.text for t in tokens} == {t.text for t in made.terms if t.way == "merges"} | spaced
    # Joining n pieces takes n - 1 merges. A shorter term that a longer one begins with is on the
    # way; the form with a space in front shares all merges but its last.
    needed = tokens[-1].id + 1 - made.old_vocab_size
    assert needed == longest - 1 + len(spaced)


def test_a_chinese_term_is_found_where_old_merges_go_beyond_it(
    qwen: Extender, tmp_path: Path
) -> None:
    # As Qwen has 系统的: a token over the end of the term, made before any new merge is.
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    many = count(qwen, [f"{n}剂的" for n in range(50)])
    beyond = qwen.extend(many, num_tokens=20, rules=RULES, allow_fewer=True)
    assert "剂的" in [token.text for token in beyond.new_tokens]
    qwen.write(beyond, old)
    term = "反应堆冷却剂"
    texts = [f"the {term} is", f"{term}的压力", f"在{term}中", f"（{term}）", f"1{term}2"]
    extender = open_extender(old)
    words = count(extender, texts * 5, [term])
    extension = extender.extend(words, num_tokens=1, rules=RULES, terms=[term])
    extender.write(extension, new)
    ids = Tokenizer.from_pretrained(new).encode_batch(texts)
    assert all(extension.terms[0].id in some for some in ids)
    assert extension.terms[0].whole == extension.terms[0].occurrences == len(texts) * 5


def test_a_term_that_is_a_token_costs_nothing(qwen: Extender) -> None:
    token = next(t for t in ("核", "阀", "堆", "主", "7") if len(qwen.tokenizer.encode(t)) == 1)
    extension = extend(qwen, count(qwen, CORPUS), 20, [token])
    (term,) = extension.terms
    assert (term.way, [term.id]) == ("existing", qwen.tokenizer.encode(token))
    assert all(token.origin == "corpus" for token in extension.new_tokens if token.text)


def test_a_term_whose_spelling_is_taken_becomes_an_added_token(tmp_path: Path) -> None:
    source = qwen_like(tmp_path / "old")
    content = read(source)
    spelt = spell("反应堆".encode())
    content["model"]["vocab"][spelt] = len(content["model"]["vocab"])  # no merge leads to it
    for token in content["added_tokens"]:
        token["id"] += 1
    (source / "tokenizer.json").write_text(json.dumps(content))
    for name in ("tokenizer_config.json", "added_tokens.json"):
        (source / name).unlink()
    extender = open_extender(source)
    terms = ["反应堆", "反应堆冷却剂"]
    extension = extend(extender, count(extender, CORPUS, terms), 60, terms)
    # The longer one would be cut by it, and becomes one too.
    assert [term.way for term in extension.terms] == ["added_token", "added_token"]
    extender.write(extension, tmp_path)
    ids = Tokenizer.from_pretrained(tmp_path).encode_batch(CORPUS)
    for term in extension.terms:
        made = sum(some.count(term.id) for some in ids)
        assert term.whole == made > 0
        assert term.occurrences == "".join(CORPUS).count(term.text)
        assert extension.new_tokens[term.id - extension.old_vocab_size].frequency == made


def test_terms_that_cannot_be_made_are_named_together(qwen: Extender) -> None:
    bad = [
        "",
        " x",
        "<|im_end|>",
        "a<think>b",
        "e\u0301tat",
        "x" * 65,
        "a\x00b",
        "\ud800",
        "锆\ufffd",
    ]
    with pytest.raises(DataError) as caught:
        qwen.splitter([*bad, "锆合金"])
    message = str(caught.value)
    for reason in (
        "it is empty",
        "white space around it",
        "the added token '<think>'",
        "it is a special token",
        "normaliser makes 'état' of it",
        "65 characters",
        "control character",
        "lone surrogate",
        "U+FFFD",
    ):
        assert reason in message
    assert "锆合金" not in message


def test_too_many_terms_for_the_number_of_tokens(qwen: Extender) -> None:
    with pytest.raises(DataError, match=r"need \d+ new ids .* only 2 are asked for"):
        extend(qwen, count(qwen, CORPUS, TERMS), 2)


def test_a_corpus_that_is_too_small_says_so(qwen: Extender) -> None:
    words = count(qwen, CORPUS[:3])
    with pytest.raises(DataError) as caught:
        qwen.extend(words, num_tokens=5000, rules=RULES)
    extension = qwen.extend(words, num_tokens=5000, rules=RULES, allow_fewer=True)
    number = len(extension.new_tokens)
    assert 0 < number < 5000
    assert f"gives {number:,} new tokens, but 5,000 are asked for" in str(caught.value)
    assert f"3 documents with {words.text_bytes:,} bytes" in str(caught.value)
    reason = max(extension.rejected, key=lambda name: extension.rejected[name])
    assert reason in str(caught.value)


def test_an_extension_of_another_tokenizer_is_refused(qwen: Extender, tmp_path: Path) -> None:
    other = open_extender(llama_like(tmp_path / "llama"))
    extension = extend(other, count(other, CORPUS), 20, [])
    with pytest.raises(DataError, match="not the tokenizer that was extended"):
        qwen.write(extension, tmp_path)


def test_a_special_token_that_is_a_word_is_refused_with_ignore_merges(tmp_path: Path) -> None:
    added = [AddedToken("PAD", special=True, normalized=False)]
    source = write_tokenizer(tmp_path / "a", model={"ignore_merges": True}, added=added)
    with pytest.raises(DataError, match="'PAD'.*ignore_merges"):
        open_extender(source)
    open_extender(write_tokenizer(tmp_path / "b", added=added))


def test_options_under_which_merges_cannot_go_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dropout is 0.1"):
        open_extender(write_tokenizer(tmp_path / "a", model={"dropout": 0.1}))


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    assert kind_of(DEMO) == "byte_level_bpe"
    assert kind_of(sentencepiece_tokenizer(tmp_path / "s")) == "sentencepiece_bpe"
    for model, message in (
        ({"type": "WordPiece"}, "a WordPiece tokenizer cannot be extended"),
        ({"type": "Unigram"}, "without its tokenizer.model"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
        with pytest.raises(DataError, match=message):
            kind_of(tmp_path)
    for name, message in (
        ("spiece.model", "Copy it to tokenizer.model"),
        ("sentencepiece.bpe.model", "its ids are not those of the tokenizer"),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=message):
            kind_of(tmp_path)  # beside tokenizer.json
    (tmp_path / "tokenizer.json").unlink()
    for name in ("sentencepiece.bpe.model", "spiece.model"):
        with pytest.raises(DataError, match=name):
            kind_of(tmp_path)  # alone
        (tmp_path / name).unlink()
    (tmp_path / "qwen.tiktoken").write_text("")
    with pytest.raises(DataError, match="tiktoken"):
        kind_of(tmp_path)
    with pytest.raises(DataError, match="no such directory"):
        kind_of(tmp_path / "missing")
