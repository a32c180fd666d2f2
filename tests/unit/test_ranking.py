"""From candidates and their rewards to preference data: what is kept, left out and counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cgn.data.preference_formats import read_answers
from megatron_cgn.errors import ConfigError, DataError
from megatron_cgn.rollout.candidates import Candidates, left_out, read_candidates
from megatron_cgn.rollout.files import Question
from megatron_cgn.rollout.rank_task import RankSettings
from megatron_cgn.rollout.ranking import Keep, Tally, prefer
from tokenizer.chat import Message

PROMPT = (Message("system", "s"), Message("user", "什么是反应性？"))


def _candidates(*answers: str, cut_off: tuple[int, ...] = ()) -> Candidates:
    return Candidates(
        question=Question(id="q", place="c.jsonl:1", number=0, record={}, messages=PROMPT),
        answers=answers,
        ended=tuple(place not in cut_off for place in range(len(answers))),
    )


def _prefer(
    rewards: list[float | None], keep: Keep, min_margin: float = 0.0
) -> tuple[list[dict[str, Any]], Tally]:
    tally = Tally()
    answers = "abcdefgh"[: len(rewards)]
    records = prefer(_candidates(*answers), rewards, keep=keep, min_margin=min_margin, tally=tally)
    return json.loads(json.dumps(records)), tally


def _pairs(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Every pair that the training data's reader finds in records: better, worse."""
    found = []
    for record in records:
        read = read_answers(record)
        assert read.prompt == PROMPT
        said = [(answer.value, answer.messages[0].content) for answer in read.answers]
        found += [(b, w) for vb, b in said for vw, w in said if vb > vw]
    return found


def test_best_against_worst() -> None:
    records, tally = _prefer([0.5, -1.0, 2.0, 0.0], "best-worst")
    assert _pairs(records) == [("c", "b")]
    assert (records[0]["reward_chosen"], records[0]["reward_rejected"]) == (2.0, -1.0)
    assert (tally.records, tally.pairs, tally.margin) == (1, 1, 3.0)


@pytest.mark.parametrize("keep", ["all", "ranking"])
def test_every_pair_but_those_of_equals(keep: Keep) -> None:
    records, tally = _prefer([0.5, -1.0, 2.0, 0.5], keep)
    expected = {("c", "a"), ("c", "d"), ("c", "b"), ("a", "b"), ("d", "b")}
    found = _pairs(records)
    assert set(found) == expected and len(found) == tally.pairs == 5
    assert tally.margin == pytest.approx(1.5 + 1.5 + 3.0 + 1.5 + 1.5)
    assert tally.records == len(records) == (1 if keep == "ranking" else 5)
    assert len({record["id"] for record in records}) == len(records)


def test_no_pair_is_closer_than_the_least_margin() -> None:
    rewards: list[float | None] = [0.0, 0.4, 0.8, 2.0, None]
    cases: dict[Keep, set[tuple[str, str]]] = {
        "best-worst": {("d", "a")},
        # 0.8 − 0.0 is more than 0.5, too.
        "all": {("d", "a"), ("d", "b"), ("d", "c"), ("c", "a")},
        # But a, b and c are each too close to the next to be ordered.
        "ranking": {("d", "a"), ("d", "b"), ("d", "c")},
    }
    for keep, expected in cases.items():
        records, tally = _prefer(rewards, keep, min_margin=0.5)
        assert set(_pairs(records)) == expected and tally.pairs == len(expected), keep
    exactly, _ = _prefer([1.0, 0.5], "best-worst", min_margin=0.5)
    assert len(exactly) == 1


@pytest.mark.parametrize("keep", ["best-worst", "all", "ranking"])
def test_prompts_without_a_pair_are_counted(keep: Keep) -> None:
    cases: list[tuple[list[float | None], int, int]] = [
        ([1.0], 1, 0),
        ([None, 1.0, None], 1, 0),
        ([None], 1, 0),
        ([1.0, 1.0], 0, 1),
        ([1.0, 1.1], 0, 1),
    ]
    for rewards, few, close in cases:
        records, tally = _prefer(rewards, keep, min_margin=0.2)
        assert not records and (tally.too_few, tally.too_close) == (few, close), rewards
        assert (tally.prompts, tally.answers) == (1, len(rewards))


@pytest.mark.parametrize(("keep", "longer"), [("best-worst", 1), ("all", 2), ("ranking", 2)])
def test_how_often_the_longer_answer_wins_is_counted(keep: Keep, longer: int) -> None:
    tally = Tally()
    prefer(_candidates("水水水", "a", "b  "), [3.0, 2.0, 1.0], keep=keep, tally=tally)
    assert tally.longer == longer


def test_what_is_not_compared() -> None:
    candidates = _candidates("x", "", "y", " x\n", "z", "y", "\u3000", cut_off=(2, 4))
    assert left_out(candidates, keep_cut_off=False) == [
        None,
        "empty",
        "cut off",
        "duplicate",
        "cut off",
        None,  # the same words as one that was cut off, and ended
        "empty",
    ]
    assert left_out(candidates, keep_cut_off=True) == [
        None,
        "empty",
        None,
        "duplicate",
        None,
        "duplicate",
        "empty",
    ]


def test_a_tally_says_what_became_of_everything() -> None:
    tally = Tally(prompts=3, answers=9, records=1, pairs=4, margin=2.0, too_few=1, too_close=1)
    tally.longer = 3
    tally.left_out.update(["duplicate", "empty", "duplicate"])
    assert tally.describe().splitlines() == [
        "prompts: 3, answers: 9; records: 1, pairs: 4, mean margin 0.500",
        "the better answer is the longer one in 75%",
        "answers left out: empty 1, duplicate 2",
        "prompts left out: fewer than two answers to compare 1, answers too close 1",
    ]


def _write(path: Path, *records: Any) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), "utf-8")
    return path


def test_candidates_of_every_origin(tmp_path: Path) -> None:
    messages = [{"role": m.role, "content": m.content} for m in PROMPT]
    path = _write(
        tmp_path / "c.jsonl",
        # As tools/generate.py writes them: the record's own words do not matter.
        {
            "id": "g",
            "instruction": "i",
            "output": "o",
            "prompt_messages": messages,
            "answers": ["a", "b"],
            "finish": ["stop", "length"],
        },
        {"prompt": "p", "answers": ["a"]},
        {"instruction": "i", "input": "more", "answer": "a", "finish": "length"},
        {"messages": [*messages, {"role": "assistant", "content": "o"}], "answers": ["a", "b"]},
    )
    first, second, third, fourth = read_candidates(path)
    assert first.question.messages == fourth.question.messages == PROMPT
    assert (first.answers, first.ended) == (("a", "b"), (True, False))
    assert (second.answers, second.ended) == (("a",), (True,))
    assert third.question.messages == (Message("user", "i\nmore"),)
    assert (third.answers, third.ended, third.question.id) == (("a",), (False,), "c.jsonl:3")


FAULTS: list[tuple[Any, str]] = [
    ({"prompt": "p"}, "has no field 'answers'"),
    ({"prompt": "p", "answers": []}, "expected a list of texts"),
    ({"prompt": "p", "answers": "a"}, "expected a list of texts"),
    ({"prompt": "p", "answers": ["a", None]}, "expected a list of texts"),
    ({"prompt": "p", "answers": ["a", "b"], "finish": ["stop"]}, "for each of 2 answers"),
    ({"prompt": "p", "answers": ["a"], "finish": ["ended"]}, "expected 'stop' or 'length'"),
    ({"answers": ["a", "b"]}, "is of no known kind"),
    ({"prompt_messages": [{"content": "x"}], "answers": ["a"]}, "message 1"),
    ([1], "expected an object"),
]


@pytest.mark.parametrize(("record", "message"), FAULTS)
def test_faulty_candidates_are_named(tmp_path: Path, record: Any, message: str) -> None:
    path = _write(tmp_path / "c.jsonl", {"prompt": "p", "answers": ["a"]}, record)
    with pytest.raises(DataError) as fault:
        read_candidates(path)
    assert f"{path}:2: " in str(fault.value) and message in str(fault.value)
    assert str(fault.value).endswith("Nothing was ranked.")


def test_texts_without_roles_are_no_candidates(tmp_path: Path) -> None:
    path = _write(tmp_path / "c.jsonl", {"prompt": "p", "answers": ["a"]})
    (tmp_path / "c.jsonl.settings.json").write_text('{"template": "raw"}')
    with pytest.raises(DataError, match="generated with --raw"):
        read_candidates(path)


@pytest.mark.parametrize("margin", [-1.0, float("nan"), float("inf")])
def test_a_least_margin_is_a_number(margin: float) -> None:
    with pytest.raises(ConfigError, match="--min-margin"):
        RankSettings(min_margin=margin)
