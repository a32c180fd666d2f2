"""The bundled answers to compare: read as they are written, unlike one another, fair of length."""

import math
import re
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from bundled_samples import SAMPLES, alike, records, turns

from megatron_cgn.data.preference_records import Preference, read_preferences

TRAIN = ("preference_zh.jsonl", "preference_en.jsonl")
HELD_OUT = "preference_held_out.jsonl"
PAIRS = (*TRAIN, HELD_OUT)
RANKING = "preference_ranking.jsonl"
FILES = (*PAIRS, RANKING)
CONVERSATIONS = ("sft_zh.jsonl", "sft_en.jsonl", "sft_held_out.jsonl")
FAULTS = {
    "wrong figure",
    "wrong unit",
    "wrong fact",
    "unsafe",
    "invented",
    "vague",
    "off the question",
    "over-long",
    "ill-formed",
    "refuses",
}
FIELDS = {"id", "prompt", "chosen", "rejected", "answers", "why", "lang", "source", "license"}
# A coin that falls 60 times of 100 is no rule to go by; means differ by less than a clause.
LONGER, MEANS = (0.4, 0.6), 0.1
# Of sums in the answers, which are rounded to two figures at least.
ROUNDED = 0.03
_SUM = re.compile(
    r"(?<![\d.,])(?<![×/+−π] )(\d[\d.,]*(?: ?[×/+−] ?\d[\d.,]*)+) ?[=≈] ?(\d[\d.,]*)(/\d+)?(%| %)?"
)
_DOCUMENT = re.compile(r"\b(GB|GBZ|HAF|HAD|NB|EJ|DL|IEC|ISO|IEEE|ASME|RCC)\b[ /-]?[A-Z]*[ -]?\d")

Said = tuple[str, str]


def _messages(value: str | list[dict[str, str]], role: str) -> list[Said]:
    if isinstance(value, str):
        return [(role, value)]
    return [(message["role"], message["content"]) for message in value]


def prompt_of(record: dict[str, Any]) -> list[Said]:
    """What is asked, read without the code that trains."""
    if "prompt" in record:
        return _messages(record["prompt"], "user")
    return _messages(record["chosen"], "assistant")[:-1]


def answers_of(record: dict[str, Any]) -> list[str]:
    """What is answered, the better answer first."""
    given = record.get("answers") or [record["chosen"], record["rejected"]]
    texts = [answer["text"] if isinstance(answer, dict) else answer for answer in given]
    return [_messages(text, "assistant")[-1][1] for text in texts]


def pairs_of(record: dict[str, Any]) -> list[Said]:
    """Better and worse answers."""
    answers = answers_of(record)
    given = record.get("answers", answers)
    ranks = [a["rank"] if isinstance(a, dict) else n for n, a in enumerate(given)]
    places = combinations(range(len(answers)), 2)
    return [(answers[i], answers[j]) for i, j in places if ranks[i] < ranks[j]]


def _question(record: dict[str, Any]) -> str:
    return "\n".join(text for role, text in prompt_of(record) if role != "system")


def test_there_are_enough_and_two_thirds_are_chinese() -> None:
    languages = Counter(record["lang"] for record in records(*TRAIN))
    assert languages.total() >= 120
    assert 0.6 <= languages["zh"] / languages.total() <= 0.72
    held_out = Counter(record["lang"] for record in records(HELD_OUT))
    assert held_out.total() >= 30 and min(held_out["zh"], held_out["en"]) >= 10
    assert len(records(RANKING)) >= 10


@pytest.mark.parametrize("name", FILES)
def test_lines_are_whole_and_say_their_licence(name: str) -> None:
    for record in records(name):
        assert set(record) <= FIELDS, record["id"]
        assert record["license"] == "CC0-1.0" and record["source"] == "megatron-cgn-sample"
        said = [text for _, text in prompt_of(record)] + answers_of(record)
        assert all(text and text == text.strip() for text in said), record["id"]
        has_han = any("\u4e00" <= c <= "\u9fff" for c in "".join(said))
        assert has_han == (record["lang"] == "zh"), record["id"]


@pytest.mark.parametrize("name", FILES)
def test_what_training_reads_is_what_is_written(name: str) -> None:
    read = list(read_preferences(SAMPLES / name))
    for record, found in zip(records(name), read, strict=True):
        assert isinstance(found, Preference), found
        assert found.id == record["id"]
        assert [(m.role, m.content) for m in found.record.prompt] == prompt_of(record)
        answers = found.record.answers
        assert [a.messages[-1].content for a in answers] == answers_of(record)
        assert all(len(a.messages) == 1 for a in answers)
        better = [
            (a.messages[0].content, b.messages[0].content)
            for a, b in combinations(answers, 2)
            if a.value > b.value
        ]
        assert better == pairs_of(record)


def test_every_form_of_record_is_there() -> None:
    forms: Counter[str] = Counter()
    for record in records(*TRAIN):
        roles = [role for role, _ in prompt_of(record)]
        forms["text"] += isinstance(record.get("prompt"), str)
        forms["messages"] += isinstance(record.get("prompt"), list)
        forms["implicit"] += "prompt" not in record
        forms["system"] += "system" in roles
        forms["turns"] += "assistant" in roles
    assert min(forms.values()) >= 3 and len(forms) == 5, forms


def test_every_fault_is_named_and_trained_on() -> None:
    for record in records(*PAIRS):
        kind, _, what = record["why"].partition(": ")
        assert kind in FAULTS and what, record["id"]
    kinds, held_out = (
        Counter(record["why"].partition(":")[0] for record in records(*names))
        for names in (TRAIN, (HELD_OUT,))
    )
    assert set(kinds) == set(held_out) == FAULTS
    assert min(kinds.values()) >= 3, kinds


@pytest.mark.parametrize("names", [*((name,) for name in PAIRS), TRAIN, (RANKING,)])
def test_length_alone_does_not_decide(names: tuple[str, ...]) -> None:
    pairs = [pair for record in records(*names) for pair in pairs_of(record)]
    lengths = np.array([[len(text) for text in pair] for pair in pairs])
    chosen, rejected = lengths.mean(axis=0)
    longer, shorter = (lengths[:, 0] > lengths[:, 1]).mean(), (lengths[:, 0] < lengths[:, 1]).mean()
    assert abs(chosen / rejected - 1) < MEANS, (chosen, rejected)
    assert LONGER[0] < longer / (longer + shorter) < LONGER[1], (longer, shorter)


def test_rankings_have_three_or_four_answers_and_some_ties() -> None:
    for record in records(RANKING):
        answers = record["answers"]
        assert 3 <= len(answers) <= 4 and len(set(answers_of(record))) == len(answers)
        if isinstance(answers[0], dict):
            ranks = [answer["rank"] for answer in answers]
            assert ranks == sorted(ranks) and ranks[:2] == [1, 2], record["id"]
            kinds = {answer["why"].partition(": ")[0] for answer in answers}
            assert kinds <= FAULTS | {"good"}, record["id"]
    rankings = records(RANKING)
    ties = [r for r in rankings if len(pairs_of(r)) < math.comb(len(r["answers"]), 2)]
    plain = [r for r in rankings if isinstance(r["answers"][0], str)]
    assert min(len(ties), len(plain)) >= 2


def test_ids_are_unique_and_no_question_is_asked_twice() -> None:
    everything = records(*FILES)
    assert len({record["id"] for record in everything}) == len(everything)
    questions = [_question(record) for record in everything]
    found = [place for place in alike(questions, questions) if place[0] < place[1]]
    assert not found, [(everything[a]["id"], everything[b]["id"]) for a, b in found]


def test_no_question_is_one_of_the_conversations() -> None:
    everything, conversations = records(*FILES), records(*CONVERSATIONS)
    questions = [_question(record) for record in everything]
    found = alike(questions, ["\n".join(turns(record)[:1]) for record in conversations])
    assert not found.size, [(everything[a]["id"], conversations[b]["id"]) for a, b in found]


def test_no_answer_is_in_both_parts() -> None:
    train, held_out = records(*TRAIN), records(HELD_OUT, RANKING)
    one = [(record["id"], text) for record in held_out for text in answers_of(record)]
    other = [(record["id"], text) for record in train for text in answers_of(record)]
    found = alike([text for _, text in one], [text for _, text in other])
    assert not found.size, [(one[a], other[b]) for a, b in found]


def test_sums_of_the_better_answers_are_right() -> None:
    checked = 0
    for record in records(*FILES):
        better = answers_of(record)[0]
        for sum_, result, divisor, percent in _SUM.findall(better):
            expected = _value(sum_)
            told = float(result.rstrip(".,").replace(",", ""))
            told /= float(divisor[1:] or 1)
            # "30 × 0.3 = 9 %" is a product of percents, "1 / 4 = 25 %" is a share.
            values = (told, told / 100) if percent else (told,)
            fits = [value == pytest.approx(expected, rel=ROUNDED) for value in values]
            assert any(fits), (record["id"], sum_, result)
            checked += 1
    assert checked >= 15


def test_the_better_answers_cite_no_document_by_number() -> None:
    for record in records(*FILES):
        assert not _DOCUMENT.search(answers_of(record)[0]), record["id"]
    assert _DOCUMENT.search("见 HAF 102") and _DOCUMENT.search("GB/T 15945")


def _value(sum_: str) -> float:
    """Of numbers with ``× / + −`` between them."""
    total = 0.0
    for term in re.split(r"(?=[+−])", sum_.replace(" ", "").replace(",", "")):
        sign = -1.0 if term.startswith("−") else 1.0
        product = 1.0
        for operator, factor in re.findall(r"([×/]?)([\d.]+)", term.lstrip("+−")):
            product = product / float(factor) if operator == "/" else product * float(factor)
        total += sign * product
    return total
