"""Records of preference data: every form of prompt and answers, and every fault."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cgn.data.conversations import Fault
from megatron_cgn.data.preference_formats import AnswerRecord, read_answers
from megatron_cgn.data.preference_records import (
    Preference,
    encode_preferences,
    pairs_of,
    read_preferences,
)
from megatron_cgn.errors import DataError
from tests.unit.chat_samples import LLAMA3, chatml_tokenizer, llama3_tokenizer
from tokenizer.chat import ChatTemplate

Said = tuple[tuple[str, str], ...]

ASK = ("user", "Q")
USER = {"role": "user", "content": "Q"}
GOOD = {"role": "assistant", "content": "A"}
BAD = {"role": "assistant", "content": "B"}
FIRST = [USER, GOOD, {"role": "user", "content": "R"}]
THREE = (ASK, ("assistant", "A"), ("user", "R"))
HUMAN = "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant:"


def said(record: AnswerRecord) -> tuple[Said, list[Said]]:
    """The prompt, and what each answer says."""
    prompt = tuple((m.role, m.content) for m in record.prompt)
    answers = [tuple((m.role, m.content) for m in a.messages) for a in record.answers]
    return prompt, answers


def answers(*texts: str) -> list[Said]:
    return [(("assistant", text),) for text in texts]


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, (ASK,)),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, (ASK,)),
        ({"prompt": "Q", "chosen": GOOD, "rejected": BAD, "system": "S"}, (("system", "S"), ASK)),
        # The prompt is what both begin with.
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, (ASK,)),
        ({"chosen": [*FIRST, GOOD], "rejected": [*FIRST, BAD]}, THREE),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, BAD], "system": "S"},
            (("system", "S"), ASK),
        ),
        # Explicit, and repeated in front of the answers.
        ({"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, (ASK,)),
        (
            {"prompt": "Q", "system": "S", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            (("system", "S"), ASK),
        ),
        ({"prompt": FIRST, "chosen": [*FIRST, GOOD], "rejected": [BAD]}, THREE),
        (  # as published data repeat it once more
            {
                "prompt": "Q",
                "messages": [USER, GOOD],
                "chosen": [USER, GOOD],
                "rejected": [USER, BAD],
            },
            (ASK,),
        ),
        ({"messages": [USER], "chosen": GOOD, "rejected": BAD}, (ASK,)),
        ({"instruction": "Q", "input": "", "chosen": "A", "rejected": "B"}, (ASK,)),
        (
            {"instruction": "Q", "input": "x", "chosen": "A", "rejected": "B"},
            (("user", "Q\nx"),),
        ),
        (
            {"instruction": "R", "history": [["Q", "A"]], "chosen": "A", "rejected": "B"},
            THREE,
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Q"}],
                "chosen": {"from": "gpt", "value": "A"},
                "rejected": {"from": "gpt", "value": "B"},
            },
            (ASK,),
        ),
        # Transcripts.
        ({"chosen": HUMAN + " A", "rejected": HUMAN + " B"}, THREE),
        ({"prompt": HUMAN, "chosen": "A", "rejected": "B"}, THREE),
        ({"prompt": HUMAN, "chosen": HUMAN + " A", "rejected": HUMAN + " B"}, THREE),
        # Fields that say nothing.
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "margin": None, "tools": "[]"}, (ASK,)),
    ],
)
def test_pairs(record: dict[str, Any], prompt: Said) -> None:
    found = read_answers(record)
    assert said(found) == (prompt, answers("A", "B"))
    assert (found.form, found.kind) == ("pair", "pairs")
    assert [a.name for a in found.answers] == ["chosen", "rejected"]
    assert found.answers[0].value > found.answers[1].value
    assert found.margin == 0


def test_a_margin_and_answers_of_several_turns() -> None:
    more = [GOOD, {"role": "user", "content": "more"}, {"role": "assistant", "content": "C"}]
    found = read_answers({"prompt": "Q", "chosen": more, "rejected": "B", "margin": 2})
    assert found.margin == 2.0
    _, (chosen, rejected) = said(found)
    assert chosen == (("assistant", "A"), ("user", "more"), ("assistant", "C"))
    assert rejected == (("assistant", "B"),)


RANKINGS: list[tuple[dict[str, Any], list[str], list[tuple[int, int]]]] = [
    ({"answers": ["A", "B", "C"]}, ["A", "B", "C"], [(0, 1), (0, 2), (1, 2)]),
    ({"answers": [[GOOD], [USER, BAD]]}, ["A", "B"], [(0, 1)]),
    ({"answers": [GOOD, BAD]}, ["A", "B"], [(0, 1)]),
    (
        {"answers": [{"text": "B", "rank": 2}, {"text": "A", "rank": 1}]},
        ["B", "A"],
        [(1, 0)],
    ),
    (
        {"answers": [{"messages": [GOOD], "score": 0.5}, {"answer": "B", "score": -1}]},
        ["A", "B"],
        [(0, 1)],
    ),
    (
        {"answers": [{"content": t, "rank": r} for t, r in zip("ABCD", (1, 2, 2, 3), strict=True)]},
        ["A", "B", "C", "D"],
        [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)],
    ),
    ({"answers": [{**GOOD, "score": 1}, {**BAD, "score": 2}]}, ["A", "B"], [(1, 0)]),
    ({"output": ["A", "B"]}, ["A", "B"], [(0, 1)]),
]


@pytest.mark.parametrize(("record", "texts", "pairs"), RANKINGS)
def test_rankings(record: dict[str, Any], texts: list[str], pairs: list[tuple[int, int]]) -> None:
    found = read_answers({"prompt": "Q", **record})
    assert said(found) == ((ASK,), answers(*texts))
    assert (found.form, found.kind, found.repeated) == ("ranking", "pairs", 0)
    better, worse = pairs_of([answer.value for answer in found.answers])
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == pairs


def test_an_answer_that_a_ranking_gives_twice_is_read_once() -> None:
    items = [{"text": t, "rank": r} for t, r in (("A", 1), ("B", 2), (" B\n", 2), ("C", 2))]
    found = read_answers({"prompt": "Q", "answers": items})
    assert said(found)[1] == answers("A", "B", "C")
    assert found.repeated == 1


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q", "completion": "A"},
        {"prompt": [USER], "completion": [GOOD]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"messages": [USER, GOOD]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    ],
)
@pytest.mark.parametrize("label", [{"label": True}, {"kto_tag": False}, {"label": 0}])
def test_single_answers_with_a_label(record: dict[str, Any], label: dict[str, Any]) -> None:
    found = read_answers({**record, **label})
    assert said(found) == ((ASK,), answers("A"))
    assert (found.form, found.kind) == ("unpaired", "unpaired")
    (value,) = label.values()
    assert found.answers[0].value == float(value)


PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "expected an object, found a list"),
        ({}, "no known form, its fields being none: give prompt, chosen and rejected"),
        ({"prompt": "Q", "completion": "A"}, "no known form.*'prompt', 'completion'"),
        ({"prompt": "Q", "chosen": "A"}, "chosen lacks its rejected: a pair has both"),
        ({"prompt": "Q", "rejected": "A"}, "rejected lacks its chosen"),
        ({**PAIR, "rejected": None}, "chosen lacks its rejected"),
        ({**PAIR, "answers": ["A", "B"]}, r"several forms at once \(pair, ranking\)"),
        ({**PAIR, "label": True}, r"several forms at once \(pair, unpaired\)"),
        ({**PAIR, "instruction": "Q"}, "has prompt and instruction: keep one"),
        ({**PAIR, "tools": [1]}, "'tools', which cannot be trained on"),
        # Equal answers.
        ({**PAIR, "rejected": "A"}, "chosen and rejected are equal: there is nothing to prefer"),
        ({**PAIR, "rejected": " A\n"}, "chosen and rejected are equal"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are equal"),
        # Different prompts.
        (
            {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "R"}, BAD]},
            r"different prompts: message 1 of chosen \(user\) is not in the other",
        ),
        (
            {"chosen": [*FIRST, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            r"different prompts: message 3 of chosen \(user\)",
        ),
        (
            {"prompt": "Q", "chosen": [{"role": "user", "content": "R"}, GOOD], "rejected": "B"},
            "chosen answers another prompt: it begins with a message of the user",
        ),
        ({"chosen": HUMAN + " A", "rejected": "\n\nHuman: R\n\nAssistant: A"}, "different prompts"),
        ({"chosen": [*FIRST, GOOD], "rejected": [USER, GOOD]}, "rejected is how the other"),
        ({"chosen": "A", "rejected": "B"}, "the record has no prompt: give it as prompt"),
        # Empty answers and prompts.
        ({**PAIR, "chosen": ""}, "chosen is empty: an answer must say something"),
        ({**PAIR, "rejected": " \n"}, "rejected is empty"),
        ({**PAIR, "rejected": []}, "rejected is empty"),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER]}, "rejected is empty"),
        ({**PAIR, "prompt": " "}, "the prompt is empty"),
        ({**PAIR, "prompt": [USER, GOOD]}, "the prompt ends with a turn of the assistant"),
        # Answers that are none.
        ({**PAIR, "chosen": 3}, "chosen: expected a text, found a number"),
        ({**PAIR, "chosen": [GOOD, USER]}, "chosen ends with a message of the user"),
        ({**PAIR, "chosen": [{"role": "robot", "content": "A"}]}, "chosen: message 1 has the unk"),
        ({**PAIR, "margin": "1"}, "margin: expected a number, found a text"),
        ({**PAIR, "margin": True}, "margin: expected a number, found true or false"),
        ({**PAIR, "margin": -1}, "margin: -1 says that rejected is the better one"),
        ({**PAIR, "margin": float("nan")}, "margin: nan is not finite"),
        # Rankings.
        ({"prompt": "Q", "answers": []}, "a ranking of 0 has nothing to compare"),
        ({"prompt": "Q", "answers": ["A"]}, "answers: a ranking of 1 has nothing to compare"),
        ({"prompt": "Q", "output": ["A"]}, "output: a ranking of 1 has nothing to compare"),
        ({"prompt": "Q", "answers": "A"}, "answers: expected a list, found a text"),
        ({"answers": ["A", "B"]}, "has no prompt"),
        (
            {"prompt": "Q", "answers": [{"text": t, "rank": 1} for t in "AB"]},
            "all 2 answers have the same rank: there is no pair",
        ),
        ({"prompt": "Q", "answers": ["A", "B", "A"]}, "answer 1 and answer 3 are equal"),
        (
            {"prompt": "Q", "answers": [{"text": "A", "rank": 1}, {"text": "B"}]},
            "answer 2 has no rank, as others have",
        ),
        (
            {"prompt": "Q", "answers": [{"text": "A", "rank": 1}, {"text": "B", "score": 1}]},
            "answers have ranks and scores",
        ),
        (
            {"prompt": "Q", "answers": [{"text": "A", "rank": "1"}, {"text": "B", "rank": 2}]},
            "answer 1: rank: expected a number, found a text",
        ),
        (
            {
                "prompt": "Q",
                "answers": [{"text": "A", "score": 10**400}, {"text": "B", "score": 1}],
            },
            "answer 1: score: inf is not finite",
        ),
        ({"prompt": "Q", "answers": [{"x": 1}, "B"]}, "answer 1: give one of text, answer"),
        (
            {"prompt": "Q", "answers": [{"text": "A", "content": "B"}, "C"]},
            "answer 1: give one of .*its fields are text and content",
        ),
        ({"prompt": "Q", "answers": ["A", "B"], "margin": 1}, "has a margin, which only a pair"),
        ({"prompt": "Q", "answers": ["A", "B"], "output": ["C", "D"]}, "and a list of outputs"),
        # Labels.
        ({"prompt": "Q", "completion": "A", "label": "good"}, "label: expected true or false"),
        ({"prompt": "Q", "completion": "A", "label": 2}, "label: expected true or false, found 2"),
        ({"prompt": "Q", "completion": "A", "label": 1.0}, "label: expected true or false"),
        ({"prompt": "Q", "completion": " ", "label": True}, "completion is empty"),
        ({"prompt": "Q", "label": True}, "has a label and no completion"),
        ({"completion": "A", "label": True}, "has no prompt"),
        ({"messages": [USER], "label": True}, "has a label and no completion"),
        ({"prompt": "Q", "completion": "A", "label": 1, "kto_tag": 1}, "has label and kto_tag"),
        ({"prompt": "Q", "completion": "A", "label": 1, "margin": 1}, "has a margin"),
    ],
)
def test_faults(record: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_answers(record)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-2, 2) | st.text("QA \n", max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    "prompt chosen rejected answers completion label margin role content rank "
                    "score text messages from value system output instruction".split()
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_a_record_is_it_is_read_or_a_fault(record: Any) -> None:
    try:
        found = read_answers(record)
    except DataError as fault:
        assert str(fault)
        return
    values = [answer.value for answer in found.answers]
    assert found.prompt and found.prompt[-1].role != "assistant"
    assert all(a.messages[0].role == a.messages[-1].role == "assistant" for a in found.answers)
    if found.kind == "pairs":
        assert len(values) > 1 and len(set(values)) > 1
    else:
        assert len(values) == 1


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def test_files_give_every_record_in_order_with_its_line(tmp_path: Path) -> None:
    rows = [{**PAIR, "id": "x"}, [], PAIR, {"prompt": "Q", "completion": "A", "label": True}]
    found = list(read_preferences(write(tmp_path / "a.jsonl", *rows)))
    first, fault, second, other = found
    assert isinstance(first, Preference) and (first.id, first.line) == ("x", 1)
    assert isinstance(fault, Fault) and fault.line == 2
    assert isinstance(second, Preference) and (second.id, second.line) == ("a.jsonl:3", 3)
    assert isinstance(other, Fault) and other.line == 4
    assert "one answer with a label, and the first record of the file is a comp" in other.reason


def test_tables_are_read_as_lines_are(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "margin": 1.5, "x": 1},
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD], "margin": None, "x": 2},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [p.record for p in read_preferences(tmp_path / "a.parquet") if type(p) is Preference]
    assert found == [read_answers(row) for row in rows]
    pq.write_table(pa.table({"x": [1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="belongs to a preference"):
        list(read_preferences(tmp_path / "b.parquet"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return ChatTemplate.open(chatml_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_turns_are_those_behind_the_prompt(tmp_path: Path, chat: ChatTemplate) -> None:
    more = [GOOD, {"role": "user", "content": "more"}, {"role": "assistant", "content": "C"}]
    path = write(tmp_path / "a.jsonl", {"prompt": FIRST, "chosen": more, "rejected": "B"})
    (item,) = encode_preferences(read_preferences(path), chat=chat)
    assert not isinstance(item, Fault)
    preference, encoded = item
    for conversation, found in zip(preference.conversations, encoded, strict=True):
        whole = chat.encode(conversation)
        assert (found.ids, found.turns) == (whole.ids, whole.turns[1:])
    assert [len(e.turns) for e in encoded] == [2, 1]


def test_faults_of_the_template_name_the_answer(tmp_path: Path, chat: ChatTemplate) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {**PAIR, "rejected": "a <|im_end|> b"},
        {"prompt": "Q", "answers": ["A", "B", "<|im_start|>"]},
        PAIR,
    )
    first, second, third = encode_preferences(read_preferences(path), chat=chat)
    assert isinstance(first, Fault) and first.line == 1
    assert first.reason.startswith("rejected: message 2 (assistant) spells the special token")
    assert isinstance(second, Fault) and second.reason.startswith("answer 3: message 2")
    assert not isinstance(third, Fault), "faulty answers of others do not shift its tokens"
    assert third[1] == [chat.encode(c) for c in third[0].conversations]


def test_answers_that_the_template_makes_equal_are_refused(tmp_path: Path) -> None:
    """Here the template drops what stands in front of a mark."""
    cut = LLAMA3.replace("m['content'] | trim", "m['content'].split('§')[-1] | trim")
    chat = ChatTemplate.open(llama3_tokenizer(tmp_path / "tokenizer", template=cut))
    path = write(tmp_path / "a.jsonl", {"prompt": "Q", "chosen": "x§A", "rejected": "y§A"})
    (fault,) = encode_preferences(read_preferences(path), chat=chat)
    assert isinstance(fault, Fault)
    assert "chosen and rejected are equal once the chat template has written them" in fault.reason
