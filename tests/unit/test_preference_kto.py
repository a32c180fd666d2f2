"""Mismatched answers of KTO: whose answer each prompt gets, and what is read and counted of it."""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cgn.data.preference_kto import Mismatched, partners_of
from megatron_cgn.data.preference_rows import ReadPreferences
from megatron_cgn.data.preference_selection import select_records
from megatron_cgn.data.preference_store import build_preferences, open_preferences
from megatron_cgn.data.sft_selection import TOO_LONG, Reading
from megatron_cgn.errors import DataError
from megatron_cgn.eval.kto import with_baselines
from tests.unit.sft_samples import WORDS, World
from tokenizer.chat import Message

READING = Reading(seq_length=512, truncation="drop", train_on_prompt=False, last_turn_only=False)
CUTS_LAST = ("keep_start", True)
type Record = dict[str, Any]


def records(count: int, *, seed: int, turns: int = 1) -> list[Record]:
    """Unpaired records, of which some ask the same; answers of up to so many turns."""
    draw = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    found = []
    for number in range(count):
        prompt = [{"role": "user", "content": f"{number} {words(6)}"}]
        if number % 3 == 1:  # an answer of the assistant that is part of the prompt
            prompt += [
                {"role": "assistant", "content": words(4)},
                {"role": "user", "content": words(5)},
            ]
        completion = [{"role": "assistant", "content": f"{number} {words(12)}"}]
        for _ in range(draw.randint(0, turns - 1)):
            completion += [
                {"role": "user", "content": words(4)},
                {"role": "assistant", "content": words(8)},
            ]
        found.append({"prompt": prompt, "completion": completion, "label": number % 2 == 0})
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("kto"))


def read(world: World, path: str, reading: Reading = READING) -> ReadPreferences:
    folder = build_preferences(
        path, chat=world.chat, tokenizer=world.tokenizer, cache=world.root / "cache"
    )
    store = open_preferences(folder)
    return ReadPreferences(store, select_records(store, reading), 0)


def messages(record: Record, *, answer_of: Record) -> list[Message]:
    return [Message(m["role"], m["content"]) for m in record["prompt"] + answer_of["completion"]]


def expected(
    world: World, record: Record, other: Record, reading: Reading
) -> tuple[list[int], list[bool]]:
    """Ids and what counts of them, from the template's own encoding of the mismatched text."""
    encoded = world.chat.encode(messages(record, answer_of=other))
    own = sum(m["role"] == "assistant" for m in record["prompt"])
    turns = encoded.turns[own:]
    if reading.last_turn_only:
        turns = turns[-1:]
    ids = encoded.ids[: turns[-1][1]]
    counts = [any(begin <= i < end for begin, end in turns) for i in range(len(ids))]
    longest = reading.seq_length + 1
    if reading.truncation == "keep_end":
        ids, counts = ids[-longest:], counts[-longest:]
    return ids[:longest], counts[:longest]


def check(world: World, path: str, given: list[Record], reading: Reading) -> int:
    """Hold every mismatched answer against the template; how many there are."""
    file = read(world, path, reading)
    mismatched = Mismatched([file], [path], reading)
    used = np.flatnonzero(file.selection.read).tolist()
    (scored,) = mismatched.files
    for place, number in enumerate(used):
        ids, counts = expected(world, given[number], given[used[place - 1]], reading)
        row = mismatched.row([number])
        assert row.tokens.tolist() == ids[:-1] and row.labels.tolist() == ids[1:]
        assert row.loss_mask.tolist() == counts[1:]
        assert row.lengths == (len(ids) - 1,)
        assert mismatched.lengths[number] == len(ids) - 1 <= reading.seq_length
        assert scored.counted[number] == sum(counts[1:])
    left = sorted(set(range(len(given))) - set(used))
    assert not mismatched.lengths[left].any() and not scored.counted[left].any()
    return len(used)


@pytest.mark.parametrize("last_turn_only", [False, True])
@pytest.mark.parametrize("truncation", ["drop", "keep_start", "keep_end"])
def test_rows_are_what_the_template_makes_of_mismatched_text(
    world: World, truncation: Any, last_turn_only: bool
) -> None:
    given = records(24, seed=3, turns=3)
    path = world.write("turns", given)
    for seq_length in (512, 60):
        reading = Reading(
            seq_length=seq_length,
            truncation=truncation,
            train_on_prompt=False,
            last_turn_only=last_turn_only,
        )
        number = check(world, path, given, reading)
        # Too long, or cut off in front of the last turn.
        some = seq_length == 60 and (
            truncation == "drop" or (truncation, last_turn_only) == CUTS_LAST
        )
        assert (2 < number < 24) if some else number == 24


def test_a_long_prompt_leaves_room_for_the_beginning_of_an_answer(world: World) -> None:
    given = [
        {"prompt": " ".join(["pump"] * 30), "completion": "valve", "label": True},
        {"prompt": "rod", "completion": " ".join(["steam"] * 30), "label": False},
    ]
    path = world.write("long", given)
    whole = read(world, path).selection.answers.places
    reading = dataclasses.replace(READING, seq_length=int(whole.max()))
    mismatched = Mismatched([read(world, path, reading)], [path], reading)
    assert mismatched.lengths[0] == reading.seq_length < mismatched.lengths.sum()
    assert 0 < mismatched.files[0].counted[0] < 31
    assert mismatched.row([0]).loss_mask.sum() == mismatched.files[0].counted[0]


def test_rows_of_several_files_keep_to_their_file(world: World) -> None:
    sets = [records(7, seed=1), records(9, seed=2)]
    paths = [world.write(f"file{i}", given) for i, given in enumerate(sets)]
    files = [read(world, path) for path in paths]
    both = Mismatched(files, paths, READING)
    apart = [Mismatched([file], [path], READING) for file, path in zip(files, paths, strict=True)]
    rows = [(apart[0], 6, 6), (apart[1], 0, 7), (apart[1], 8, 15)]
    together = both.row([number for _, _, number in rows])
    tokens = np.concatenate([one.row([local]).tokens for one, local, _ in rows])
    assert np.array_equal(together.tokens, tokens)
    assert len(both.lengths) == 16 and len(together.lengths) == 3


def test_lengths_are_counted_once(world: World) -> None:
    """They are asked for before every step, and there may be a million answers."""
    path = world.write("once", records(4, seed=4))
    mismatched = Mismatched([read(world, path)], [path], READING)
    assert mismatched.lengths is mismatched.lengths


def test_a_record_that_is_left_out_changes_the_partner_of_the_next_alone(world: World) -> None:
    given = records(6, seed=5)
    path = world.write("before", given)
    before = Mismatched([read(world, path)], [path], READING).files[0]
    fewer = read(world, path)
    fewer.selection.state[2] = TOO_LONG
    after = Mismatched([fewer], [path], READING).files[0]
    assert np.flatnonzero(before.readings != after.readings).tolist() == [2, 3]


def test_answers_to_one_question_alone_are_refused(world: World) -> None:
    given = [{"prompt": "why", "completion": w, "label": True} for w in ("pump", "rod")]
    path = world.write("same", given)
    with pytest.raises(DataError, match=f"{path}.*one question.*Add records"):
        Mismatched([read(world, path)], [path], READING)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_partners_are_the_nearest_before_that_ask_something_else(questions: list[int]) -> None:
    found = partners_of(np.array(questions, dtype=np.uint64))
    if len(set(questions)) == 1:
        assert found is None
        return
    assert found is not None
    for place, question in enumerate(questions):
        back = next(n for n in range(1, len(questions)) if questions[place - n] != question)
        assert found[place] == (place - back) % len(questions)


@dataclasses.dataclass(frozen=True)
class _Batch:
    name: str
    baseline: float | None = None


def test_a_baseline_is_made_right_before_its_step_and_the_loader_is_closed() -> None:
    done: list[str] = []

    def steps() -> Iterator[list[_Batch]]:
        try:
            for name in "abc":
                yield [_Batch(name), _Batch(name * 2)]
        finally:
            done.append("closed")

    def baseline(answers: Any) -> float:
        done.append(f"scored {answers}")
        return float(answers)

    given: Any = with_baselines(steps(), (n for n in (1, 2, 3)), baseline)  # type: ignore[arg-type]
    assert done == []
    assert next(given) == [_Batch("a", 1.0), _Batch("aa", 1.0)]
    done.append("step")
    assert next(given)[1] == _Batch("bb", 2.0)
    given.close()
    assert done == ["scored 1", "step", "scored 2", "closed"]
