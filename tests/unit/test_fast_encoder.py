"""The fast encoder: the original's ids or none, and bounded memory."""

import json
import os
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from megatron_cgn.data import encode, preprocess
from megatron_cgn.data.index_writer import ALL_SUFFIXES
from tests.unit.data_samples import TEXTS, byte_level_tokenizer, sentencepiece_tokenizer
from tokenizer import fast, fast_definition
from tokenizer.fast import FastEncoder, FastIds, NotEqual
from tokenizer.hard_texts import hard_texts
from tokenizer.wrapper import Tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
REAL_TEXTS = [
    path.read_text(encoding="utf-8")
    for path in sorted(Path(__file__).parents[2].glob("docs/**/*.md"))
]
DEMO = Path(__file__).parents[2] / ".cache" / "smollm2-135m-instruct"


def trained(directory: Path, *, pattern: str, nfc: bool, ignore_merges: bool) -> Path:
    """Train a byte-level BPE that splits as a family does; special and ordinary added tokens."""
    backend = Backend(models.BPE(ignore_merges=ignore_merges))
    if nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*REAL_TEXTS, *TEXTS * 20, "核电站安全壳内压力。" * 20], trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    backend.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    directory.mkdir(parents=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return directory


@pytest.fixture(scope="module", params=["llama3", "qwen", "gpt2"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / request.param
    if request.param == "gpt2":
        return byte_level_tokenizer(folder, vocab_size=1000)
    pattern, nfc = (LLAMA3, False) if request.param == "llama3" else (QWEN, True)
    return trained(folder, pattern=pattern, nfc=nfc, ignore_merges=request.param == "llama3")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> FastEncoder:
    return FastEncoder(tokenizer)


def encode_fast(encoder: FastEncoder, texts: list[str]) -> list[list[int]]:
    ids, lengths = encoder.encode(texts, [text.encode() for text in texts])
    ends = np.cumsum([0, *lengths])
    assert ends[-1] == len(ids)
    return [ids[a:b].tolist() for a, b in zip(ends[:-1], ends[1:], strict=True)]


CHARACTERS = st.characters(exclude_categories=["Cs"]) | st.sampled_from(
    " \n\r\t'’stSTdm0123<>|/核电，。ée\u0301\u0338\u3000\ufeff"
)
PIECES = st.text(CHARACTERS, max_size=30) | st.sampled_from(
    ["<|endoftext|>", "<think>", "</think>", "<think", "<|im_start|>", "核电站", "   ", "\r\n"]
)


@settings(max_examples=400, deadline=None)
@given(texts=st.lists(st.lists(PIECES, max_size=5).map("".join), max_size=4))
def test_ids_are_the_originals(
    encoder: FastEncoder, tokenizer: Tokenizer, texts: list[str]
) -> None:
    assert encode_fast(encoder, texts) == tokenizer.encode_batch(texts)


def test_real_texts(encoder: FastEncoder, tokenizer: Tokenizer) -> None:
    assert sum(map(len, REAL_TEXTS)) > 10_000
    assert encode_fast(encoder, REAL_TEXTS) == tokenizer.encode_batch(REAL_TEXTS)


def test_a_document_cannot_contain_a_special_token(
    encoder: FastEncoder, tokenizer: Tokenizer
) -> None:
    (ids,) = encode_fast(encoder, ["before<|endoftext|>after"])
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode(ids) == "before<|endoftext|>after"


def test_hard_texts_are_fixed_and_settled(tokenizer: Tokenizer) -> None:
    texts = hard_texts(tokenizer.added_tokens())
    assert texts == hard_texts(tokenizer.added_tokens())
    assert sum(map(fast._is_settled, texts)) > 0.95 * len(texts)
    assert any("<|endoftext|>" in text for text in texts)


@pytest.mark.parametrize(
    "text",
    [
        "\U00033333's",  # no version of Unicode known here has it
        "\u0898\u0711",  # a mark of Unicode 14, which decides the order
        "a\u1715\u0323",
    ],
)
def test_characters_known_from_different_versions_are_left_to_the_original(
    encoder: FastEncoder, tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    original = encoder._ids._encode_whole

    def watch(utf8: Any) -> Any:
        seen.extend(utf8)
        return original(utf8)

    monkeypatch.setattr(encoder._ids, "_encode_whole", watch)
    monkeypatch.setattr(encoder._ids, "_segments", None)
    texts = ["before", text, "核电", text * 2, "after"]
    assert encode_fast(encoder, texts) == tokenizer.encode_batch(texts)
    assert seen == [b"before", b"", "核电".encode(), b"", b"after"]


def test_the_bytes_that_need_no_look_begin_no_new_character() -> None:
    """Whatever `_SETTLED_BYTES` lets through must be settled, or be left unassigned for ever."""
    for code in range(0x110000):
        character = chr(code)
        if 0xD800 <= code < 0xE000 or character.encode()[0] not in fast._SETTLED_BYTES:
            continue
        if not fast._is_settled_character(character):
            kind = unicodedata.category(character)
            # Gaps in old blocks, and marks added to them: the two sides agree on these, as was
            # found by trying every character on both (see docs/log.md).
            assert kind in ("Cn", "Mn"), hex(code)


def change(directory: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Tokenizer:
    content = json.loads((directory / "tokenizer.json").read_text())
    edit(content)
    target.mkdir()
    (target / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer.from_pretrained(target)


def add_token(**options: bool) -> Callable[[dict[str, Any]], object]:
    def edit(content: dict[str, Any]) -> None:
        token = dict(content["added_tokens"][-1], id=len(content["model"]["vocab"]) + 50)
        content["added_tokens"].append(token | {"content": "<new>"} | options)

    return edit


def swap_ids(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    first, last = ("".join(content["model"]["merges"][i]) for i in (0, -1))
    vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "ids": (swap_ids, "ids are taken for ranks"),
    "dropout": (lambda c: c["model"].update(dropout=0.1), "'dropout'"),
    "suffix": (lambda c: c["model"].update(end_of_word_suffix="</w>"), "'end_of_word_suffix'"),
    "lstrip": (add_token(lstrip=True), "added token '<new>'"),
    "single word": (add_token(single_word=True), "added token '<new>'"),
    "normalizer": (lambda c: c.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    "no splitting": (lambda c: c.update(pre_tokenizer=None), "the pre-tokenizer is a None"),
    "digits": (
        lambda c: c["pre_tokenizer"]["pretokenizers"].insert(
            0, {"type": "Digits", "individual_digits": True}
        ),
        "the pre-tokenizer is a Digits",
    ),
    "pattern": (
        lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="[a-f]+|."),
        "Unknown pre_tokenizer Split",
    ),
    "merged": (
        lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithNext"),
        "the way in which the pre-tokenizer splits",
    ),
    "prefix space": (
        lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        "options of the byte-level pre-tokenizer",
    ),
    "missing byte": (lambda c: c["model"]["vocab"].pop("Ą"), "no single-byte vocab entry"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_package_passes_over_is_refused(tmp_path: Path, reason: str) -> None:
    directory = trained(tmp_path / "t", pattern=LLAMA3, nfc=False, ignore_merges=True)
    edit, message = REFUSED[reason]
    with pytest.raises(NotEqual, match=message):
        FastEncoder(change(directory, tmp_path / "changed", edit))


def test_other_kinds_of_tokenizers_are_refused(tmp_path: Path) -> None:
    pieces = Tokenizer.from_pretrained(sentencepiece_tokenizer(tmp_path / "pieces"))
    with pytest.raises(NotEqual, match="byte-level BPE alone"):
        FastEncoder(pieces)


def test_a_difference_is_found_before_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that the package ignores and nothing refuses: the hard texts must show it."""
    directory = trained(tmp_path / "t", pattern=LLAMA3, nfc=False, ignore_merges=True)
    monkeypatch.setattr(
        fast_definition, "_check_splitting", lambda component, within_sequence: None
    )
    edit, _ = REFUSED["digits"]
    with pytest.raises(NotEqual, match="it gives other ids for"):
        FastEncoder(change(directory, tmp_path / "changed", edit))


def test_the_cache_is_emptied_when_it_has_grown(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for nothing it is emptied at every call."""
    encoder = FastEncoder(tokenizer)
    monkeypatch.setattr(fast, "_CACHE_BYTES", -(1 << 40))
    opened = 0
    original = FastIds._open

    def count(self: FastIds) -> None:
        nonlocal opened
        opened += 1
        original(self)

    monkeypatch.setattr(FastIds, "_open", count)
    assert encode_fast(encoder, TEXTS) == tokenizer.encode_batch(TEXTS)
    assert opened > 0


def write_corpus(path: Path, *, documents: int) -> Path:
    lines = (
        json.dumps({"text": f"{i} {TEXTS[i % len(TEXTS)] * (1 + i % 9)}"}) for i in range(documents)
    )
    path.write_text("\n".join(lines))
    return path


def index(source: Path, directory: Path, prefix: Path, **options: Any) -> dict[str, bytes]:
    preprocess.preprocess([source], tokenizer_dir=directory, output_prefix=prefix, **options)
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in ALL_SUFFIXES}


def test_the_index_equals_the_originals(
    tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level("INFO")
    source = write_corpus(tmp_path / "c.jsonl", documents=700)
    monkeypatch.setattr(preprocess, "_SMALL_BYTES", 0)
    by_fast = index(source, directory, tmp_path / "fast", workers=3)
    assert not caplog.messages
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    by_original = index(source, directory, tmp_path / "original")
    assert by_fast == by_original
    (message,) = caplog.messages
    assert "gigatoken is not installed: pip install 'megatron-cgn[fast]'" in message


@pytest.mark.parametrize("workers", [1, 3])
def test_a_difference_found_in_the_middle_starts_the_run_again(
    tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, workers: int
) -> None:
    monkeypatch.setattr("megatron_cgn.data.readers.BLOCK_BYTES", 5000)
    source = write_corpus(tmp_path / "c.jsonl", documents=700)
    right = index(source, directory, tmp_path / "right")
    monkeypatch.setattr(preprocess, "_SMALL_BYTES", 0)
    original = FastIds.encode

    def wrong(self: FastIds, texts: Any, utf8: Any) -> Any:
        ids, lengths = original(self, texts, utf8)
        return (ids + 1 if any(b"690 " in text for text in utf8) else ids), lengths

    monkeypatch.setattr(FastIds, "encode", wrong)
    monkeypatch.setattr(encode, "_samples", lambda texts, first: list(texts))
    reported: list[int] = []
    options: dict[str, Any] = {"workers": workers, "report": reported.append}
    assert index(source, directory, tmp_path / "again", **options) == right
    assert sum(reported) == os.path.getsize(source) and min(reported) < 0
    (message,) = caplog.messages
    assert message.startswith("Starting again") and "it gives other ids for" in message


def test_samples_are_of_every_block_and_bounded() -> None:
    texts = [f"{i} " * 1000 for i in range(100)]
    first, later = encode._samples(texts, first=1), encode._samples(texts, first=40_001)
    assert (len(first), len(later)) == (16, 1)
    assert len({piece.split()[1] for piece in first}) == 16
    assert all(0 < len(piece) <= 512 for piece in first + later)
    assert encode._samples([], first=1) == []
    assert encode._samples(["short"], first=1) == ["short"]
    assert encode._samples(texts, first=40_001) == later


@pytest.mark.skipif(not DEMO.is_dir(), reason="make demo-model writes it")
def test_the_demo_tokenizer_is_left_to_the_original(
    tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(preprocess, "_SMALL_BYTES", 0)
    tokenizer = Tokenizer.from_pretrained(DEMO)
    source = tmp_path / "c.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    alone = index(source, DEMO, tmp_path / "alone")
    assert index(source, DEMO, tmp_path / "shared", workers=2) == alone
    assert len(caplog.messages) == 2
    assert all("the pre-tokenizer is a Digits" in message for message in caplog.messages)
    ids = [[*tokenizer.encode(text), tokenizer.eod_id] for text in TEXTS]
    assert alone[".bin"] == np.concatenate(ids).astype("<u2").tobytes()
