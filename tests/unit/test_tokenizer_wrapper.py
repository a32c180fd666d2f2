"""The tokenizer wrapper: ids, identity, byte lengths, faults."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cgn.errors import DataError
from tests.unit.data_samples import TEXTS, byte_level_tokenizer, sentencepiece_tokenizer
from tokenizer.wrapper import Tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(byte_level_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(sentencepiece_tokenizer(tmp_path_factory.mktemp("pieces")))


def edit(directory: Path, change: object) -> str:
    """Apply ``change`` to tokenizer.json and return the new fingerprint."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)  # type: ignore[operator]
    path.write_text(json.dumps(content))
    return Tokenizer.from_pretrained(directory).fingerprint()


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.sampled_from(TEXTS))
def test_byte_lengths_sum_to_the_bytes_of_the_text(byte_level: Tokenizer, text: str) -> None:
    lengths = byte_level.token_byte_lengths()
    assert sum(int(lengths[i]) for i in byte_level.encode(text)) == len(text.encode())


@settings(max_examples=300, deadline=None)
@given(st.text(min_size=1, max_size=60) | st.sampled_from(TEXTS))
def test_sentencepiece_byte_lengths_count_the_space_it_puts_in_front(
    sentencepiece: Tokenizer, text: str
) -> None:
    lengths = sentencepiece.token_byte_lengths()
    assert sum(int(lengths[i]) for i in sentencepiece.encode(text)) == len(text.encode()) + 1


def test_byte_lengths_by_hand(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    lengths = byte_level.token_byte_lengths()
    assert lengths.shape == (byte_level.vocab_size,)
    assert lengths[byte_level.eod_id] == 0
    assert [int(lengths[i]) for i in byte_level.encode("<tool>")] == [6]  # added, not special
    vocabulary = json.loads(sentencepiece._backend.to_str())["model"]["vocab"]
    pieces = sentencepiece.token_byte_lengths()
    assert pieces[vocabulary["<0xE6>"]] == 1
    assert pieces[vocabulary["▁"]] == 1
    assert pieces[vocabulary["</s>"]] == 0


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(byte_level: Tokenizer, sentencepiece: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text)) == text
    assert sentencepiece.decode(sentencepiece.encode(text)) == text


def test_a_document_cannot_contain_a_special_token(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("before<|endoftext|>after")
    assert byte_level.eod_id not in ids
    assert byte_level.decode(ids) == "before<|endoftext|>after"
    (tool,) = byte_level.encode("<tool>")  # added too, but not marked special
    assert tool in byte_level.encode("before<tool>after")


def test_ids_equal_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    directory = byte_level_tokenizer(tmp_path / "t")
    theirs = AutoTokenizer.from_pretrained(str(directory))
    ours = Tokenizer.from_pretrained(directory)
    texts = [text for text in TEXTS if "<|" not in text]
    assert ours.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
    assert ours.eod_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)


def test_files_without_tokenizer_json_are_converted(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    fast = Tokenizer.from_pretrained(byte_level_tokenizer(tmp_path / "fast"))
    slow = tmp_path / "slow"
    slow.mkdir()
    Backend.from_file(str(tmp_path / "fast/tokenizer.json")).model.save(str(slow))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (slow / "tokenizer_config.json").write_text(json.dumps(config))
    converted = Tokenizer.from_pretrained(slow)
    assert converted.encode_batch(TEXTS) == fast.encode_batch(TEXTS)
    assert converted.eod_id == fast.eod_id


def test_end_of_document_is_the_separator_before_the_end_of_a_turn(tmp_path: Path) -> None:
    directory = byte_level_tokenizer(tmp_path)
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<tool>"}}))
    with_separator = Tokenizer.from_pretrained(directory)
    assert with_separator.decode([with_separator.eod_id]) == "<|endoftext|>"

    pieces = sentencepiece_tokenizer(tmp_path / "pieces")
    tokenizer = Tokenizer.from_pretrained(pieces)
    assert tokenizer.eod_id == 2  # </s>, named as eos_token
    (pieces / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="no token ends a document"):
        _ = Tokenizer.from_pretrained(pieces).eod_id


def test_fingerprint_ignores_what_does_not_change_ids(tmp_path: Path) -> None:
    directory = byte_level_tokenizer(tmp_path / "t")
    before = Tokenizer.from_pretrained(directory).fingerprint()

    def harmless(content: dict) -> None:
        content["truncation"] = {
            "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
        }  # fmt: skip
        content["post_processor"] = {
            "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
        }  # fmt: skip
        items = list(content["model"]["vocab"].items())
        random.Random(0).shuffle(items)
        content["model"]["vocab"] = dict(items)
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        del content["model"]["ignore_merges"]

    assert edit(directory, harmless) == before
    assert len(Tokenizer.from_pretrained(directory).encode("a longer text than four")) > 4


def swap_ids(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


CHANGES = {
    "ids": swap_ids,
    "merges": lambda c: c["model"]["merges"].pop(),
    "ignore_merges": lambda c: c["model"].update(ignore_merges=True),
    "normalizer": lambda c: c.update(normalizer={"type": "NFC"}),
    "pre_tokenizer": lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
    "added token": lambda c: c["added_tokens"].append(
        dict(c["added_tokens"][-1], id=len(c["model"]["vocab"]) + 1, content="<new>")
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_changes_with_the_ids(tmp_path: Path, change: str) -> None:
    directory = byte_level_tokenizer(tmp_path / "t")
    before = Tokenizer.from_pretrained(directory).fingerprint()
    assert edit(directory, CHANGES[change]) != before


def test_faults_name_the_path_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: there is no such directory"):
        Tokenizer.from_pretrained(tmp_path / "absent")
    with pytest.raises(DataError, match=r"found neither tokenizer.json nor any of"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer.json: not a readable tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer_config.json: expected a JSON object"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"cannot be read \(File name too long\)"):
        Tokenizer.from_pretrained(tmp_path / ("t" * 300))


@pytest.mark.parametrize("added", [{"abc": {}}, {"9" * 5000: {}}, {"9" * 30: {}}, [1], "x"])
def test_added_tokens_without_ids_are_a_fault(tmp_path: Path, added: object) -> None:
    directory = byte_level_tokenizer(tmp_path)
    (directory / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(DataError, match=r"tokenizer_config\.json: added_tokens_decoder"):
        Tokenizer.from_pretrained(directory)
