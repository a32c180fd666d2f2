"""The bundled conversations: that every line is one, once, and none is in both parts."""

from collections import Counter

import numpy as np
import pytest
from bundled_samples import ALIKE, SAMPLES, records, similarities, turns

from megatron_cgn.data.conversations import Conversation, read_conversations

TRAIN = ("sft_zh.jsonl", "sft_en.jsonl")
HELD_OUT = "sft_held_out.jsonl"
FILES = (*TRAIN, HELD_OUT)
LONGEST_ANSWER = 400
"""Characters: with its question it has to fit the quickstart's 512 tokens."""


def test_there_are_enough_and_more_of_them_chinese() -> None:
    languages = Counter(record["lang"] for record in records(*TRAIN))
    assert languages.total() >= 240
    assert 0.55 <= languages["zh"] / languages.total() <= 0.75
    held_out = Counter(record["lang"] for record in records(HELD_OUT))
    assert held_out.total() >= 30 and min(held_out["zh"], held_out["en"]) >= 10


@pytest.mark.parametrize("name", FILES)
def test_the_language_is_what_the_record_says(name: str) -> None:
    for record in records(name):
        said = "".join(turns(record))
        has_han = any("\u4e00" <= c <= "\u9fff" for c in said)
        assert record["lang"] == "en" or has_han, record["id"]
        if name != HELD_OUT:
            assert record["lang"] == name[4:6], record["id"]


def test_ids_and_opening_questions_are_unique() -> None:
    everything = records(*FILES)
    assert len({record["id"] for record in everything}) == len(everything)
    opening = Counter("".join(turns(record)[0].split()).casefold() for record in everything)
    assert opening.most_common(1)[0][1] == 1, opening.most_common(3)


def test_every_kind_of_record_is_there() -> None:
    kinds = Counter(
        key
        for record in records(*TRAIN)
        for key in ("system", "history", "conversations", "messages", "output")
        if key in record
    )
    assert min(kinds.values()) >= 3 and len(kinds) == 5, kinds
    assert sum(bool(record.get("input")) for record in records(*TRAIN)) >= 20


@pytest.mark.parametrize("name", FILES)
def test_lines_are_whole_and_say_their_licence(name: str) -> None:
    for record in records(name):
        assert record["license"] == "CC0-1.0" and record["source"] == "megatron-cgn-sample"
        said = turns(record)
        assert len(said) % 2 == 0, record["id"]
        assert all(turn and turn == turn.strip() for turn in said), record["id"]
        assert max(map(len, said[1::2])) <= LONGEST_ANSWER, record["id"]


@pytest.mark.parametrize("name", FILES)
def test_what_training_reads_is_what_is_written(name: str) -> None:
    read = list(read_conversations(SAMPLES / name))
    for record, found in zip(records(name), read, strict=True):
        assert isinstance(found, Conversation), found
        said = [m.content for m in found.messages if m.role != "system"]
        assert (found.id, said) == (record["id"], turns(record))


def test_answers_differ_in_length() -> None:
    lengths = sorted(len(answer) for record in records(*TRAIN) for answer in turns(record)[1::2])
    assert lengths[len(lengths) // 20] < 40 and lengths[-len(lengths) // 20] > 180


def test_no_question_and_no_answer_is_in_both_parts() -> None:
    train, held_out = records(*TRAIN), records(HELD_OUT)
    for what, part in (("question", slice(0, 1)), ("answer", slice(1, None, 2))):
        found = similarities(
            ["\n".join(turns(record)[part]) for record in held_out],
            ["\n".join(turns(record)[part]) for record in train],
        )
        place = np.unravel_index(found.argmax(), found.shape)
        pair = held_out[int(place[0])]["id"], train[int(place[1])]["id"]
        assert found.max() < ALIKE, f"{what}s of {pair}: {found.max():.2f}"


def test_no_two_conversations_to_train_on_are_nearly_the_same() -> None:
    texts = ["\n".join(turns(record)) for record in records(*TRAIN)]
    found = similarities(texts, texts)
    np.fill_diagonal(found, 0.0)
    assert found.max() < ALIKE, np.unravel_index(found.argmax(), found.shape)


def test_a_reworded_question_would_be_seen() -> None:
    question = turns(records(TRAIN[0])[3])[0]
    reworded = "请问，" + question.replace("？", "呢？")
    assert similarities([reworded], [question])[0, 0] > ALIKE
