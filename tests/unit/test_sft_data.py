"""What a run reads of conversations: epochs, shares, truncation, what is held out, the account."""

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sft_samples import (
    Record,
    World,
    all_ids,
    random_records,
    record,
    sft_run,
    source,
)

from megatron_cgn.config.schema import ChatConfig, FileConfig, PhaseConfig, RunConfig, SourceConfig
from megatron_cgn.data.sft import SftData
from megatron_cgn.data.sft_account import SftHistory, account_of, describe
from megatron_cgn.data.sft_loader import ConversationRow
from megatron_cgn.errors import ConfigError, DataError
from tokenizer.chat import Message


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World.make(tmp_path_factory.mktemp("data"))
    world.write("a", random_records("a", 120))
    world.write("b", random_records("b", 40, turns=1))
    world.write("c", random_records("c", 25))
    return world


def sources(world: World, **fields: dict[str, Any]) -> list[SourceConfig]:
    return [
        source(name, str(world.root / f"{name}.jsonl"), **more) for name, more in fields.items()
    ]


def consumed(data: SftData, stop: int | None = None) -> Counter[str]:
    return Counter(itertools.chain.from_iterable(all_ids(data)[:stop]))


def names(letter: str, count: int) -> set[str]:
    return {f"{letter}-{number}" for number in range(count)}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("epochs", [1, 3])
def test_each_conversation_is_read_once_an_epoch(world: World, packing: bool, epochs: int) -> None:
    run = sft_run(sources(world, a={}, b={}), epochs=epochs, packing=packing, seq_length=512)
    data = world.open(run)
    assert consumed(data) == dict.fromkeys(names("a", 120) | names("b", 40), epochs)
    # Epochs do not overlap.
    order = [i for ids in all_ids(data) for i in ids]
    for epoch in range(epochs):
        assert len(set(order[epoch * 160 : (epoch + 1) * 160])) == 160
    assert len(data.train) == data.plan.total_steps * 4
    assert data.plan.sequences <= len(data.train) < data.plan.sequences + 4


def expected_row(world: World, wanted: Record) -> ConversationRow:
    """A conversation laid out by hand."""
    encoded = world.chat.encode([Message(m["role"], m["content"]) for m in wanted["messages"]])
    last = encoded.turns[-1][1]
    ids = np.array(encoded.ids[:last])
    counted = np.zeros(last, dtype=bool)
    for begin, end in encoded.turns:
        counted[begin:end] = True
    return ConversationRow(
        tokens=ids[:-1], labels=ids[1:], loss_mask=counted[1:], lengths=(last - 1,), sources=(0,)
    )


def test_rows_are_the_conversations_end_to_end(world: World) -> None:
    records = {r["id"]: r for r in random_records("a", 120)}
    data = world.open(sft_run(sources(world, a={}), epochs=1, seq_length=512))
    for sequence, ids in enumerate(all_ids(data)[: data.plan.sequences]):
        row, parts = data.train[sequence], [expected_row(world, records[i]) for i in ids]
        assert sum(row.lengths) <= 512
        assert row.lengths == tuple(part.lengths[0] for part in parts)
        for name in ("tokens", "labels", "loss_mask"):
            together = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(getattr(row, name), together)
        ends = np.cumsum(row.lengths) - 1
        assert {world.chat.decode([i], skip_special_tokens=False) for i in row.labels[ends]} == {
            "<|im_end|>"
        }
        assert row.loss_mask[ends].all(), "the end of a turn is learned"


def test_packing_fills_sequences_and_says_how_far(world: World) -> None:
    plan = world.plan(sft_run(sources(world, a={}), epochs=1, seq_length=512))
    tokens = plan.planned[0].tokens
    assert plan.utilisation == tokens / (plan.sequences * 512) > 0.9
    assert any(f"{plan.utilisation:.1%} full" in line for line in describe(plan))


@pytest.mark.parametrize("epochs", [0.5, 1.5, 2.25])
def test_parts_of_an_epoch(world: World, epochs: float) -> None:
    data = world.open(sft_run(sources(world, a={}), epochs=epochs, packing=False))
    whole = world.open(sft_run(sources(world, a={}), epochs=3, packing=False))
    epoch = whole.plan.planned[0].tokens / 3
    assert data.plan.planned[0].tokens == pytest.approx(epochs * epoch, abs=130)
    stop = data.plan.sequences
    assert all_ids(data)[:stop] == all_ids(whole)[:stop], "a longer run begins as a shorter one"


def test_a_number_of_steps_goes_on_into_further_epochs(world: World) -> None:
    run = sft_run(sources(world, c={}), train_iters=20, seq_length=512)
    data = world.open(run)
    assert data.plan.total_steps == 20 and data.plan.sequences == 80
    times = consumed(data)
    assert set(times) == names("c", 25) and max(times.values()) > 2
    assert max(times.values()) - min(times.values()) <= 1
    epochs = world.open(sft_run(sources(world, c={}), epochs=2, seq_length=512))
    assert all_ids(data)[: epochs.plan.sequences] == all_ids(epochs)[: epochs.plan.sequences]


def test_shares_are_shares_of_tokens(world: World) -> None:
    weighted = sft_run(
        sources(world, a={"weight": 3.0}, b={"weight": 1.0}), train_iters=150, seq_length=512
    )
    mixed = sft_run(
        sources(world, a={}, b={}), train_iters=150, seq_length=512, mix={"a": 0.75, "b": 0.25}
    )
    for run in (weighted, mixed):
        plan = world.plan(run)
        a, b = (tally.tokens for tally in plan.planned)
        assert a / (a + b) == pytest.approx(0.75, abs=0.01)
        times = consumed(world.open(run))
        for letter, count in (("a", 120), ("b", 40)):
            counts = [times[name] for name in names(letter, count)]
            # One window's packs are shuffled, so that the last window is read in part.
            assert min(counts) > 0 and np.std(counts) < 1.5


def test_epochs_of_a_mix_are_those_of_its_base(world: World) -> None:
    run = sft_run(
        sources(world, a={}, b={}),
        epochs=2,
        seq_length=512,
        mix={"a": 0.6, "b": 0.4},
        epochs_of="a",
    )
    data = world.open(run)
    times = consumed(data)
    assert {times[name] for name in names("a", 120)} == {2}
    a, b = (tally.tokens for tally in data.plan.planned)
    assert a / (a + b) == pytest.approx(0.6, abs=0.01)


def test_files_of_a_source_have_weights(world: World) -> None:
    paths = [str(world.root / f"{name}.jsonl") for name in "ab"]
    files = tuple(FileConfig(path=p, weight=w) for p, w in zip(paths, (1.0, 4.0), strict=True))
    plan = world.plan(
        sft_run([SourceConfig(name="s", files=files)], train_iters=150, seq_length=512)
    )
    a, b = (tally.tokens for tally in plan.planned)
    assert b / (a + b) == pytest.approx(0.8, abs=0.01)
    equal = tuple(FileConfig(path=p) for p in paths)
    data = world.open(sft_run([SourceConfig(name="s", files=equal)], epochs=1, seq_length=512))
    assert set(consumed(data).values()) == {1}


def test_the_order_depends_on_the_seed_and_not_on_places(world: World, tmp_path: Path) -> None:
    run = sft_run(sources(world, a={}, b={}), epochs=2, seq_length=512)
    ids = all_ids(world.open(run))
    assert all_ids(world.open(dataclasses.replace(run, seed=2))) != ids
    assert all_ids(world.open(run, cache="another")) == ids
    for name in "ab":
        text = (world.root / f"{name}.jsonl").read_text()
        (tmp_path / f"moved-{name}.jsonl").write_text(text)
    moved = [source(n, str(tmp_path / f"moved-{n}.jsonl")) for n in ("b", "a")]
    assert all_ids(world.open(sft_run(moved, epochs=2, seq_length=512))) == ids


def lengths(world: World, run: RunConfig) -> dict[str, tuple[int, int]]:
    """Tokens and counted tokens of every conversation that is read."""
    data = world.open(run)
    found = {}
    for sequence, ids in enumerate(all_ids(data)[: data.plan.sequences]):
        row = data.train[sequence]
        bounds = np.cumsum([0, *row.lengths])
        for name, begin, end in zip(ids, bounds, bounds[1:], strict=False):
            found[name] = (int(end - begin), int(row.loss_mask[begin:end].sum()))
    (planned,) = data.plan.planned
    assert (planned.tokens, planned.counted) == tuple(map(sum, zip(*found.values(), strict=True)))
    return found


def test_truncation(world: World) -> None:
    long_answer = record("long-answer", ("short?", "valve " * 100))
    long_question = record("long-question", ("pump " * 100, "yes"))
    two = record("two", ("one?", "steam " * 10), ("two? " + "rod " * 100, "core " * 5))
    short = record("short", ("q", "a"))
    world_path = world.write("truncate", [long_answer, long_question, two, short])
    limit = 60

    def run(how: str, **chat: bool) -> RunConfig:
        settings = ChatConfig(truncation=how, **chat)  # type: ignore[arg-type]
        return sft_run([source("t", world_path)], epochs=1, seq_length=limit, chat=settings)

    whole = lengths(world, sft_run([source("t", world_path)], epochs=1, seq_length=4096))
    assert {name for name, (tokens, _) in whole.items() if tokens > limit} == {
        "long-answer",
        "long-question",
        "two",
    }
    assert lengths(world, run("drop")) == {"short": whole["short"]}

    start = lengths(world, run("keep_start"))
    assert set(start) == {"long-answer", "two", "short"}, "no token of the question counts"
    assert start["long-answer"][0] == limit and 0 < start["long-answer"][1] < limit
    # Of "two" only the first turn is within; what follows its end is not read either.
    one = record("one", ("one?", "steam " * 10))
    assert (
        start["two"]
        == lengths(world, sft_run([source("o", world.write("one", [one]))], epochs=1))["one"]
    )

    end = lengths(world, run("keep_end"))
    assert {name for name, (tokens, _) in end.items() if tokens == limit} == {
        "long-answer",
        "long-question",
        "two",
    }
    assert end["long-question"][1] == whole["long-question"][1]
    assert end["long-answer"][1] == limit, "all that is left is answer"

    with pytest.raises(DataError, match="chat.truncation=error: 3 conversations") as caught:
        world.plan(run("error"))
    places = whole["long-answer"][0]
    assert f"{world_path}:1: {places:,} tokens" in str(caught.value)

    for how, truncated, too_long, uncounted in (
        ("drop", 0, 3, 0),
        ("keep_start", 2, 0, 1),
        ("keep_end", 3, 0, 0),
    ):
        plan = world.plan(run(how))
        (file,) = plan.sources[0].files
        assert (file.truncated, file.too_long, file.nothing_counted) == (
            truncated,
            too_long,
            uncounted,
        )
        told = "\n".join(describe(plan))
        assert (f"warning: {world_path}: of 4" in told) == bool(too_long or uncounted)
        assert (f"{too_long} left out, longer" in told) == bool(too_long)
        assert (f"{truncated} truncated (chat.truncation={how})" in told) == bool(truncated)


def test_the_longest_conversation_fills_a_sequence(world: World) -> None:
    path = world.write("one", [record("one", ("one?", "steam " * 10))])
    places = lengths(world, sft_run([source("o", path)], epochs=1))["one"][0]
    assert lengths(world, sft_run([source("o", path)], epochs=1, seq_length=places))
    with pytest.raises(DataError, match="1 are longer than data.seq_length"):
        world.plan(sft_run([source("o", path)], epochs=1, seq_length=places - 1))


def test_which_tokens_count(world: World) -> None:
    wanted = record("two", ("one?", "steam " * 3), ("two?", "core " * 5))
    path = world.write("counted", [wanted])
    encoded = world.chat.encode([Message(m["role"], m["content"]) for m in wanted["messages"]])
    turns = [end - begin for begin, end in encoded.turns]

    def counted(**chat: bool) -> tuple[int, int]:
        run = sft_run([source("s", path)], epochs=1, chat=ChatConfig(**chat))  # type: ignore[arg-type]
        return lengths(world, run)["two"]

    last = encoded.turns[-1][1]
    assert counted() == (last - 1, sum(turns))
    assert counted(last_turn_only=True) == (last - 1, turns[1])
    # The line feed behind the last turn counts too then; the first token is nobody's label.
    assert counted(train_on_prompt=True) == (len(encoded.ids) - 1, len(encoded.ids) - 1)


def held_out_ids(data: SftData, name: str) -> list[str]:
    validation = data.validation[name]
    return [i for sequence in range(len(validation)) for i in validation.record_ids(sequence)]


def test_held_out_conversations_are_never_trained_on(world: World) -> None:
    run = sft_run(sources(world, a={}, b={}), epochs=2, validation_fraction=0.2, seq_length=512)
    data = world.open(run)
    trained = set(consumed(data))
    for letter, count in (("a", 120), ("b", 40)):
        held = held_out_ids(data, letter)
        assert len(held) == len(set(held)), "each once"
        assert set(held) | (trained & names(letter, count)) == names(letter, count)
        assert not set(held) & trained
        assert 0.05 * count < len(held) < 0.4 * count
    assert data.plan.sources[0].held_out.conversations == len(held_out_ids(data, "a"))


def test_questions_decide_what_is_held_out(world: World) -> None:
    records = random_records("a", 120)
    run = sft_run(sources(world, a={}), epochs=1, validation_fraction=0.2, seq_length=512)
    held = set(held_out_ids(world.open(run), "a"))
    # Other answers, another order, more data, another source: the same questions are held out.
    again = [dict(r, id=f"again-{r['id']}") for r in reversed(records)]
    for r in again:
        r["messages"] = [
            dict(m, content="other") if m["role"] == "assistant" else m for m in r["messages"]
        ]
    path = world.write("again", [*again, *random_records("more", 50)])
    both = world.open(
        sft_run(
            [*sources(world, a={}), source("again", path)],
            epochs=1,
            validation_fraction=0.2,
            seq_length=512,
        )
    )
    assert set(held_out_ids(both, "a")) == held
    assert {
        name.removeprefix("again-")
        for name in held_out_ids(both, "again")
        if name.startswith("again-")
    } == held


def test_a_small_fraction_holds_out_a_question(world: World) -> None:
    run = sft_run(sources(world, c={}), epochs=1, validation_fraction=1e-9, seq_length=512)
    assert len(held_out_ids(world.open(run), "c")) == 1


def test_a_file_is_held_out_whole_and_known_questions_are_told(world: World) -> None:
    known = random_records("a", 120)[7]
    path = world.write("validation", [dict(known, id="known"), *random_records("v", 9)])
    run = sft_run(sources(world, a={"validation_path": path}), epochs=1, seq_length=512)
    data = world.open(run)
    assert set(held_out_ids(data, "a")) == names("v", 9) | {"known"}
    assert set(consumed(data)) == names("a", 120)
    (warning,) = (line for line in describe(data.plan) if "ask what is also trained on" in line)
    assert "1 of 10 held-out" in warning


def test_a_source_may_be_held_out_only(world: World) -> None:
    run = sft_run(
        sources(world, a={"weight": 1.0}, c={"weight": 0.0}),
        epochs=1,
        validation_fraction=0.2,
        seq_length=512,
    )
    data = world.open(run)
    assert not {name for name in consumed(data) if name.startswith("c-")}
    assert held_out_ids(data, "c")


def test_faults_of_settings_and_files(world: World) -> None:
    a = str(world.root / "a.jsonl")
    copy = world.write("copy", random_records("a", 120))
    with pytest.raises(DataError, match="holds exactly what"):
        world.plan(sft_run([source("a", a), source("copy", copy)], epochs=1, seq_length=512))
    phases = (PhaseConfig(mix={"a": 1.0}, until=0.5), PhaseConfig(mix={"a": 1.0}))
    with pytest.raises(ConfigError, match="data.phases"):
        world.plan(sft_run([source("a", a)], epochs=1, phases=phases))
    with pytest.raises(DataError, match=r"data.sources\[a\]: nothing is left"):
        world.plan(sft_run([source("a", a)], epochs=1, seq_length=2))
    long = source("long", world.write("long", [record("long", ("q", "steam " * 400))]))
    with pytest.raises(DataError, match=r"data.sources\[long\]: nothing is left"):
        world.plan(sft_run([source("a", a), long], epochs=1))


def test_the_account_counts_what_was_read(world: World) -> None:
    run = sft_run(sources(world, a={}, b={}), epochs=2, validation_fraction=0.1, seq_length=512)
    data = world.open(run)
    for stop in (0, 5, data.plan.sequences, len(data.train)):
        account = json.loads(json.dumps(account_of(data, consumed=stop)))
        assert account["sequences"] == min(stop, data.plan.sequences)
        rows = [data.train[sequence] for sequence in range(stop)]
        for place, found in enumerate(account["sources"]):
            tokens = counted = conversations = 0
            for row in rows:
                ids = np.repeat(row.sources, row.lengths)
                tokens += int((ids == place).sum())
                counted += int(row.loss_mask[ids == place].sum())
                conversations += row.sources.count(place)
            expected = {
                "tokens": tokens,
                "counted_tokens": counted,
                "conversations": conversations,
                "epochs": tokens / found["training"]["tokens"],
            }
            assert {name: found[name] for name in expected} == expected
    planned = account_of(data)
    assert [s["epochs"] for s in planned["sources"]] == [2.0, 2.0]


def conflict(world: World, before: RunConfig, now: RunConfig, *, consumed: int) -> str | None:
    written = json.loads(json.dumps(SftHistory(world.plan(before))))
    return SftHistory(world.plan(now)).conflict(written, consumed_sequences=consumed)


def test_a_run_goes_on_only_with_what_it_read(world: World) -> None:
    before = sft_run(sources(world, a={}, b={}), epochs=1, seq_length=512, global_batch_size=3)

    def changed(**fields: Any) -> RunConfig:
        return dataclasses.replace(before, **fields)

    def data(**fields: Any) -> RunConfig:
        return changed(data=dataclasses.replace(before.data, **fields))

    longer = changed(train=dataclasses.replace(before.train, epochs=2))
    sequences = world.plan(before).sequences
    assert sequences % 3, "the last step must be filled for this test"
    assert conflict(world, before, before, consumed=3) is None
    assert conflict(world, before, before, consumed=-(-sequences // 3) * 3) is None
    assert conflict(world, before, longer, consumed=3) is None
    assert "blank" in (conflict(world, before, longer, consumed=-(-sequences // 3) * 3) or "")
    assert "has only" in (conflict(world, longer, before, consumed=10**6) or "")
    for now, told in (
        (changed(seed=9), "seed was 1 and is 9"),
        (data(packing=False), "data.packing"),
        (data(seq_length=600), "data.seq_length"),
        (data(sources=tuple(sources(world, a={}))), "'b' is gone"),
        (data(sources=tuple(sources(world, a={}, b={}, c={}))), "'c' is new"),
        (data(mix={"a": 0.5, "b": 0.5}, epochs_of="a"), "data.mix"),
        (data(validation_fraction=0.2), "divided"),
        (changed(chat=ChatConfig(last_turn_only=True)), "chat.last_turn_only"),
    ):
        assert told in (conflict(world, before, now, consumed=3) or ""), told
    assert "start anew" in (SftHistory(world.plan(before)).conflict({}, consumed_sequences=0) or "")
