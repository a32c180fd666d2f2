"""What a run reads of preference data: answers, pairs, lengths, truncation, order, the account."""

import collections
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_samples import (
    data_of,
    encoded_answers,
    plan_of,
    preference_run,
    random_labels,
    random_pairs,
    random_rankings,
)
from sft_samples import Record, World, source

from megatron_cgn.config.schema import ChatConfig, RunConfig, SourceConfig
from megatron_cgn.data.preference import PreferenceData
from megatron_cgn.data.preference_formats import read_answers
from megatron_cgn.data.preference_records import pairs_of
from megatron_cgn.data.preference_rows import PreferenceRow
from megatron_cgn.data.preference_selection import select_records
from megatron_cgn.data.preference_store import PreferenceStore, build_preferences, open_preferences
from megatron_cgn.data.sft_account import SftHistory, account_of, describe
from megatron_cgn.data.sft_selection import (
    KEPT,
    NOTHING_COUNTED,
    TOO_LONG,
    TRUNCATED,
    Reading,
    Truncation,
)
from megatron_cgn.errors import DataError
from tokenizer.chat import EncodedChat

RECORDS = {
    "pairs": random_pairs("pairs", 60, margins=True),
    "rankings": random_rankings("rankings", 40),
    "labels": random_labels("labels", 45),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World.make(tmp_path_factory.mktemp("preference"))
    for name, records in RECORDS.items():
        world.write(name, records)
    return world


def sources(world: World, *names: str) -> list[SourceConfig]:
    return [source(name, str(world.root / f"{name}.jsonl")) for name in names]


def record_ids(data: PreferenceData) -> list[list[str]]:
    return [data.train.record_ids(sequence) for sequence in range(len(data.train))]


@dataclasses.dataclass
class Expected:
    """A record laid out by hand."""

    parts: list[tuple[list[int], list[int], list[bool]]]
    pairs: list[tuple[int, int]]
    margin: float
    values: list[float]


def expected(world: World, record: Record, *, whole: bool = False) -> Expected:
    read = read_answers(record)
    in_prompt = sum(m.role == "assistant" for m in read.prompt)
    parts = []
    for encoded in encoded_answers(world.chat, read):
        turns = encoded.turns[in_prompt:]
        stop = len(encoded.ids) + 1 if whole else turns[-1][1]
        ids = [*encoded.ids, 0][:stop]
        counts = {place for begin, end in turns for place in range(begin, end)}
        parts.append((ids[:-1], ids[1:], [i in counts for i in range(1, stop)]))
    values = [answer.value for answer in read.answers]
    pairs = [(i, j) for i, a in enumerate(values) for j, b in enumerate(values) if a > b]
    return Expected(parts, pairs if len(values) > 1 else [], read.margin, values)


def check_row(row: PreferenceRow, records: Sequence[Expected]) -> None:
    parts = [part for record in records for part in record.parts]
    assert row.lengths == tuple(len(ids) for ids, _, _ in parts)
    assert row.tokens.tolist() == [i for ids, _, _ in parts for i in ids]
    assert row.labels.tolist() == [i for _, ids, _ in parts for i in ids]
    assert row.loss_mask.tolist() == [c for _, _, counts in parts for c in counts]
    firsts = itertools.accumulate((len(record.parts) for record in records), initial=0)
    pairs = [
        (first + better, first + worse, 1 / len(record.pairs), record.margin)
        for first, record in zip(firsts, records, strict=False)
        for better, worse in record.pairs
    ]
    found = zip(row.chosen, row.rejected, row.weights, row.margins, strict=True)
    assert [tuple(f) for f in found] == [pytest.approx(p) for p in pairs]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["pairs", "rankings"])
def test_rows_are_the_answers_end_to_end(
    world: World, kind: str, packing: bool, whole: bool
) -> None:
    records = {r["id"]: r for r in RECORDS[kind]}
    run = preference_run(sources(world, kind), epochs=1, packing=packing, seq_length=512)
    data = data_of(world, run, whole=whole)
    ids = record_ids(data)
    assert sorted(i for sequence in ids for i in sequence) == sorted(records)
    assert packing == any(len(sequence) > 1 for sequence in ids)
    for sequence, names in enumerate(ids[: data.plan.sequences]):
        row = data.train[sequence]
        check_row(row, [expected(world, records[name], whole=whole) for name in names])
        assert row.desirable is None and sum(row.lengths) <= 512
        assert float(row.weights.sum()) == pytest.approx(len(names)), "a prompt counts once"
        labels = row.labels[row.last_places]
        assert bool((labels == 0).all()) == whole, "read whole, the last token predicts nothing"
    blank = data.train[len(data.train) - 1]
    assert data.plan.sequences % 4 == 0 or (blank.lengths, len(blank.chosen)) == ((), 0)


def test_single_answers_have_labels_and_no_pairs(world: World) -> None:
    records = {r["id"]: r for r in RECORDS["labels"]}
    run = preference_run(sources(world, "labels"), epochs=1, loss="kto", global_batch_size=5)
    data = data_of(world, run)
    assert data.plan.sequences % 5, "the last step must hold blank sequences"
    for sequence, names in enumerate(record_ids(data)):
        row = data.train[sequence]
        check_row(row, [expected(world, records[name]) for name in names])
        assert row.desirable is not None
        assert row.desirable.tolist() == [records[name]["label"] for name in names]


def test_answers_are_numbered_through_over_all_files(world: World) -> None:
    run = preference_run(sources(world, "pairs", "rankings"), epochs=1, seq_length=512)
    data = data_of(world, run)
    assert [file.first_answer for file in data.plan.files] == [0, 120]
    everything = [r for name in ("pairs", "rankings") for r in RECORDS[name]]
    owners = [r["id"] for r in everything for _ in read_answers(r).answers]
    assert data.plan.num_answers == len(owners) == len(data.records.answers.lengths)
    assert data.records.read_answers.tolist() == list(range(len(owners)))
    for sequence, names in enumerate(record_ids(data)):
        row = data.train[sequence]
        assert [owners[n] for n in row.answers] == [
            name for name in names for n in owners if n == name
        ]
        assert row.sources == tuple(int(n >= 120) for n in row.answers)


def test_a_ranking_and_its_pairs_have_one_value_each() -> None:
    values = [3.0, 1.0, 3.0, 2.0]
    better, worse = pairs_of(values)
    pairs = {(i, j) for i in range(4) for j in range(4) if values[i] > values[j]}
    assert set(zip(better.tolist(), worse.tolist(), strict=True)) == pairs
    assert len(better) == len(pairs) == 5, "all but the tie of six"


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_pairs_are_all_of_unequal_rank(ranks: list[int]) -> None:
    better, worse = pairs_of([float(rank) for rank in ranks])
    ties = sum(a == b for a, b in itertools.combinations(ranks, 2))
    assert len(better) == len(ranks) * (len(ranks) - 1) // 2 - ties
    assert all(ranks[b] > ranks[w] for b, w in zip(better, worse, strict=True))


def test_beginnings_are_prompts_with_the_best_answer(world: World) -> None:
    run = preference_run(sources(world, "rankings"), epochs=1, seq_length=512)
    data = data_of(world, run)
    best = {
        r["prompt"]: min(r["answers"], key=lambda a: a["rank"])["text"] for r in RECORDS["rankings"]
    }
    found = {}
    for one in data.train.beginnings():
        asked = world.chat.decode(one.prompt, skip_special_tokens=False)
        assert asked.endswith("<|im_start|>assistant\n")
        question = asked.removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]
        found[question] = world.chat.decode(one.answer)
    assert found == best


# What is read of records, against the same told answer by answer.

type Chat = tuple[int, list[tuple[int, int]]]


@st.composite
def chats(draw: st.DrawFn) -> Chat:
    """A prompt of at least a token, one to three turns behind it, and perhaps a line feed."""
    turns, place = [], draw(st.integers(1, 6))
    for _ in range(draw(st.integers(1, 3))):
        turns.append((place, place + draw(st.integers(2, 6))))
        place = turns[-1][1] + draw(st.integers(0, 4))
    return place + draw(st.integers(0, 2)), turns


class _Encoded:
    """Writes stores of made-up tokens through the writer of real ones."""

    def __init__(self, records: list[list[Chat]], folder: Path) -> None:
        from megatron_cgn.data import preference_store
        from megatron_cgn.data.preference_formats import Answer, AnswerRecord
        from megatron_cgn.data.preference_records import Preference
        from tokenizer.chat import Message

        with preference_store._Writer(folder, vocab_size=1000) as writer:
            for number, answers in enumerate(records):
                record = AnswerRecord(
                    "ranking",
                    (Message("user", "q"),),
                    tuple(Answer(str(i), (), float(i)) for i in range(len(answers))),
                )
                encoded = [
                    EncodedChat([100 * i + j for j in range(n)], tuple(t))
                    for i, (n, t) in enumerate(answers)
                ]
                writer.add(Preference("x", record, "f", number), encoded)
            writer.finish()
        self.store: PreferenceStore = open_preferences(folder)


def told(chat: Chat, limit: int, reading: Reading) -> tuple[int, list[bool]]:
    """First token read of an answer, and of each place whether what it predicts counts."""
    size, turns = chat
    turns = turns[-1:] if reading.last_turn_only else turns
    inside = {token for begin, end in turns for token in range(begin, end)}
    labels = [token in inside for token in range(1, size + 1)]  # the last predicts nothing
    if not reading.whole:
        labels = labels[: max(i for i, counts in enumerate(labels) if counts) + 1]
    begin = 0
    if len(labels) > limit:
        if reading.truncation == "keep_end":
            begin = len(labels) - limit
        labels = labels[begin : begin + limit]
    if reading.whole and labels:
        labels[-1] = False  # nothing behind the last is read
    while labels and not labels[-1] and not reading.whole:
        labels.pop()
    return begin, labels


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(chats(), min_size=1, max_size=4), min_size=1, max_size=8),
    st.integers(1, 60),
    st.sampled_from(["error", "drop", "keep_start", "keep_end"]),
    st.booleans(),
    st.booleans(),
)
def test_records_are_read_as_told_answer_by_answer(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[list[Chat]],
    seq_length: int,
    truncation: Truncation,
    last_turn_only: bool,
    whole: bool,
) -> None:
    reading = Reading(
        seq_length=seq_length,
        truncation=truncation,
        train_on_prompt=False,
        last_turn_only=last_turn_only,
        whole=whole,
    )
    store = _Encoded(records, tmp_path_factory.mktemp("store")).store
    found = select_records(store, reading)
    for number, answers in enumerate(records):
        full = [told(chat, 10**6, reading) for chat in answers]
        long = sum(len(labels) for _, labels in full) > seq_length
        cut = truncation in ("keep_start", "keep_end")
        if long and cut:
            full = [told(chat, seq_length // len(answers), reading) for chat in answers]
        state = (TRUNCATED if cut else TOO_LONG) if long else KEPT
        if state != TOO_LONG and any(not any(labels) for _, labels in full):
            state = NOTHING_COUNTED
        assert found.state[number] == state
        if state in (KEPT, TRUNCATED):
            assert found.places[number] == sum(len(labels) for _, labels in full) <= seq_length
            assert found.counted[number] == sum(sum(labels) for _, labels in full)
            for answer, (begin, labels) in zip(store.answers_of(number), full, strict=True):
                assert found.answers.begin[answer] == begin
                assert found.answers.places[answer] == len(labels)
    tally = found.tally(np.flatnonzero(found.read))
    assert tally.tokens == int(found.places[found.read].sum())


def test_a_pair_longer_than_the_sequence(world: World) -> None:
    long = {"id": "long", "prompt": "q", "chosen": "pump " * 60, "rejected": "rod " * 60}
    uneven = {"id": "uneven", "prompt": "q", "chosen": "pump " * 60, "rejected": "no"}
    asks = {"id": "asks", "prompt": "steam " * 60, "chosen": "yes", "rejected": "no"}
    short = {"id": "short", "prompt": "q", "chosen": "yes", "rejected": "no"}
    path = world.write("long", [long, uneven, asks, short])

    def run(how: Truncation, seq_length: int = 120) -> RunConfig:
        chat = ChatConfig(truncation=how)
        return preference_run([source("t", path)], epochs=1, seq_length=seq_length, chat=chat)

    def ids(how: Truncation) -> set[str]:
        return {i for names in record_ids(data_of(world, run(how))) for i in names}

    whole = data_of(world, run("drop", 1000))
    (file,) = whole.plan.sources[0].files
    assert (file.records, file.too_long, file.truncated) == (4, 0, 0)

    assert ids("drop") == {"uneven", "short"}
    (dropped,) = plan_of(world, run("drop")).sources[0].files
    assert (dropped.too_long, dropped.truncated, dropped.nothing_counted) == (2, 0, 0)
    text = "\n".join(describe(plan_of(world, run("drop"))))
    assert "of 4 records 2 left out, longer than data.seq_length" in text

    # Of `asks` no token of an answer is within its half.
    assert ids("keep_start") == {"long", "uneven", "short"}
    assert ids("keep_end") == {"long", "uneven", "asks", "short"}
    for how in ("keep_start", "keep_end"):
        data = data_of(world, run(how))
        for sequence, names in enumerate(record_ids(data)[: data.plan.sequences]):
            row = data.train[sequence]
            if "long" in names:
                place = 2 * names.index("long")
                assert row.lengths[place : place + 2] == (60, 60)
            assert all(row.loss_mask[a : b + 1].any() for a, b in _bounds(row))

    with pytest.raises(DataError) as caught:
        plan_of(world, run("error"))
    message = str(caught.value)
    assert "2 records take more than data.seq_length=120 tokens" in message
    assert "long.jsonl:1: " in message and "long.jsonl:3: " in message and ":2: " not in message


def test_answers_that_are_read_alike_once_cut_are_left_out(world: World) -> None:
    alike = {"id": "alike", "prompt": "q", "chosen": "pump " * 60 + "a", "rejected": "pump " * 60}
    unlike = {"id": "unlike", "prompt": "q", "chosen": "a " + "pump " * 60, "rejected": "rod " * 60}
    path = world.write("alike", [alike, unlike])

    def run(how: Truncation) -> RunConfig:
        chat = ChatConfig(truncation=how)
        return preference_run([source("t", path)], epochs=1, seq_length=100, chat=chat)

    for whole in (False, True):
        data = data_of(world, run("keep_start"), whole=whole)
        assert {i for names in record_ids(data) for i in names} == {"unlike"}
        assert "1 left out, with an answer of which" in "\n".join(describe(data.plan))
        data = data_of(world, run("keep_end"), whole=whole)
        assert {i for names in record_ids(data) for i in names} == {"alike", "unlike"}


def _bounds(row: PreferenceRow) -> list[tuple[int, int]]:
    ends = row.last_places.tolist()
    return list(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True))


def test_kinds_of_data_and_loss_must_fit(world: World) -> None:
    with pytest.raises(DataError, match=r"labels\.jsonl: holds single answers.*loss\.type=ipo"):
        plan_of(world, preference_run(sources(world, "labels"), epochs=1, loss="ipo"))
    with pytest.raises(DataError, match=r"labels\.jsonl: holds single.*loss\.type=kto"):
        plan_of(world, preference_run(sources(world, "pairs", "labels"), epochs=1))
    with pytest.raises(DataError, match=r"pairs\.jsonl: holds answers to compare.*kto"):
        plan_of(world, preference_run(sources(world, "pairs"), epochs=1, loss="kto"))


def test_faulty_records_are_named_with_their_lines(world: World) -> None:
    path = world.write("faulty", [*RECORDS["pairs"][:3], {"prompt": "q"}, {"chosen": "a"}])
    with pytest.raises(DataError) as caught:
        plan_of(world, preference_run([source("f", path)], epochs=1))
    message = str(caught.value)
    assert f"{path}:4: is of no known form" in message and f"{path}:5: chosen lacks" in message
    assert "--preference --validate" in message
    empty = world.write("empty", [])
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no record"):
        plan_of(world, preference_run([source("f", empty)], epochs=1))


def test_a_damaged_store_is_refused(world: World, tmp_path: Path) -> None:
    path = world.write("damaged", RECORDS["pairs"][:4])
    folder = build_preferences(
        path, chat=world.chat, tokenizer=world.tokenizer, cache=tmp_path / "cache"
    )
    values = (folder / "values.bin").read_bytes()
    (folder / "values.bin").write_bytes(values[:-8])
    with pytest.raises(DataError, match="Delete this folder"):
        open_preferences(folder)
    (folder / "values.bin").unlink()
    with pytest.raises(DataError, match="Delete this folder"):
        open_preferences(folder)


def test_prompts_are_held_out_and_not_answers(world: World) -> None:
    pairs = random_pairs("held", 80)
    # Another pair of answers to each prompt, as a file of its own.
    again = [dict(r, id=f"again-{r['id']}", chosen=f"other {r['chosen']}") for r in pairs]
    paths = [source(n, world.write(n, r)) for n, r in (("held", pairs), ("again", again))]
    run = preference_run(paths, epochs=1, validation_fraction=0.2, seq_length=512)
    data = data_of(world, run)
    trained = {i.removeprefix("again-") for names in record_ids(data) for i in names}
    held = {
        name: {
            i.removeprefix("again-")
            for sequence in range(len(sequences))
            for i in sequences.record_ids(sequence)
        }
        for name, sequences in data.validation.items()
    }
    assert held["held"] == held["again"] and len(held["held"]) > 5
    assert not trained & held["held"] and len(trained | held["held"]) == 80


def test_the_account_counts_records_and_pairs(world: World) -> None:
    rankings = [*RECORDS["rankings"], {"prompt": "q", "answers": ["a", "b", "c"], "id": "last"}]
    rankings[0] = dict(rankings[0], answers=[*rankings[0]["answers"], rankings[0]["answers"][0]])
    paths = [
        source("pairs", str(world.root / "pairs.jsonl")),
        source("more", world.write("more", rankings)),
    ]
    data = data_of(world, preference_run(paths, epochs=2, seq_length=512))
    account = json.loads(json.dumps(account_of(data)))
    read = [read_answers(r) for r in (*RECORDS["pairs"], *rankings)]
    sizes = [len(r.answers) for r in read]
    pairs = [len(pairs_of([a.value for a in r.answers])[0]) for r in read]
    assert account["kind"] == "pairs"
    assert account["repeated_answers_left_out"] == 1
    assert account["training"] == {
        "records": len(read),
        "answers": sum(sizes),
        "pairs": sum(pairs),
        "ties": sum(n * (n - 1) // 2 for n in sizes) - sum(pairs),
        "margins": 30,
        "desirable": 0,
    }
    assert account["records"] == 2 * len(read) and "conversations" not in account
    assert [s["epochs"] for s in account["sources"]] == [2.0, 2.0]
    tokens = sum(sum(data.train[i].lengths) for i in range(len(data.train)))
    assert account["tokens"] == tokens
    lines = "\n".join(describe(data.plan))
    assert f"{sum(sizes):,} answers in {len(read):,} records: {sum(pairs):,} pairs" in lines
    assert "30 records have a margin" in lines and "1 answers that rankings give twice" in lines
    assert data.plan.has_margins


def test_labels_are_counted_and_one_kind_alone_is_told(world: World) -> None:
    lines = "\n".join(
        describe(plan_of(world, preference_run(sources(world, "labels"), epochs=1, loss="kto")))
    )
    assert "30 good answers, 15 bad ones" in lines
    path = world.write("good", [dict(r, label=True) for r in RECORDS["labels"][:9]])
    plan = plan_of(world, preference_run([source("good", path)], epochs=1, loss="kto"))
    assert "warning: all answers are good" in "\n".join(describe(plan))
    assert not plan.has_margins


def test_a_run_goes_on_only_with_what_it_read(world: World) -> None:
    def history(whole: bool = False, **how: Any) -> SftHistory:
        how = {"seq_length": 512, **how}
        run = preference_run(sources(world, "pairs"), epochs=1, **how)
        return SftHistory(plan_of(world, run, whole=whole))

    def conflict(now: SftHistory) -> str | None:
        return now.conflict(json.loads(json.dumps(history())), consumed_sequences=4)

    assert conflict(history()) is None
    assert "data.seq_length was 512 and is 600" in (conflict(history(seq_length=600)) or "")
    assert "read to the last token" in (conflict(history(whole=True)) or "")
    other = preference_run(
        [source("pairs", world.write("other", RECORDS["pairs"][:-1]))], epochs=1, seq_length=512
    )
    now = SftHistory(plan_of(world, other))
    assert "the records of the source 'pairs' have changed" in (conflict(now) or "")


def test_epochs_read_every_record_as_often(world: World) -> None:
    run = preference_run(sources(world, "pairs", "rankings"), epochs=3, seq_length=400)
    times = collections.Counter(i for ids in record_ids(data_of(world, run)) for i in ids)
    assert set(times.values()) == {3} and len(times) == 100
