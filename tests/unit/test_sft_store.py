"""Conversations as tokens on disk: what they hold, when they are made anew, and faults."""

import json
from pathlib import Path

import numpy as np
import pytest
from sft_samples import World, random_records, record, write_records

from megatron_cgn.data.sft_store import SftStore, build_store, open_store, question_hash
from megatron_cgn.data.store_folder import Report
from megatron_cgn.errors import DataError
from tokenizer.chat import Message


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("store"))


def build(world: World, path: str, cache: Path) -> SftStore:
    return open_store(build_store(path, chat=world.chat, tokenizer=world.tokenizer, cache=cache))


def test_conversations_are_those_of_the_template(world: World, tmp_path: Path) -> None:
    records = random_records("q", 40)
    del records[3]["id"]
    path = write_records(tmp_path / "a.jsonl", records)
    store = build(world, path, tmp_path / "cache")
    assert len(store) == 40
    assert store.tokens.dtype == np.uint16
    for number, row in enumerate(store.rows):
        messages = [Message(m["role"], m["content"]) for m in records[number]["messages"]]
        expected = world.chat.encode(messages)
        begin = int(row["token"])
        assert store.tokens[begin : begin + int(row["tokens"])].tolist() == expected.ids
        turn = int(row["turn"])
        turns = store.turns[turn : turn + int(row["turns"])].tolist()
        assert [tuple(t) for t in turns] == list(expected.turns)
        assert int(row["line"]) == number + 1
        assert store.record_id(number) == ("a.jsonl:4" if number == 3 else f"q-{number}")


def test_a_store_is_made_once_for_each_content(world: World, tmp_path: Path) -> None:
    records = random_records("q", 5)
    cache = tmp_path / "cache"
    first = build(world, write_records(tmp_path / "a.jsonl", records), cache).folder
    written = (first / "tokens.bin").stat().st_mtime_ns
    moved = build(world, write_records(tmp_path / "moved.jsonl", records), cache).folder
    assert moved == first and (first / "tokens.bin").stat().st_mtime_ns == written
    records[2]["messages"][1]["content"] += "."
    assert build(world, write_records(tmp_path / "a.jsonl", records), cache).folder != first
    other = tmp_path / "template.jinja"
    other.write_text(world.chat.source.replace("<|im_end|>\n", "<|im_end|>\n\n"))
    chat = type(world.chat).open(world.root / "tokenizer", template=str(other))
    folder = build_store(
        tmp_path / "moved.jsonl", chat=chat, tokenizer=world.tokenizer, cache=cache
    )
    assert folder != first
    assert len(list(cache.iterdir())) == 3, "nothing half-written is left"


def test_progress_is_told_in_bytes(world: World, tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", random_records("q", 50))
    told: list[tuple[str, int, int]] = []
    build_store(
        path,
        chat=world.chat,
        tokenizer=world.tokenizer,
        cache=tmp_path / "cache",
        report=lambda *progress: told.append(progress),
    )
    size = Path(path).stat().st_size
    assert told[-1] == (path, size, size)


def test_faulty_records_are_named_with_their_lines(world: World, tmp_path: Path) -> None:
    records = random_records("q", 30)
    records[4] = {"id": "x", "messages": [{"role": "robot", "content": "hm"}]}
    records[9] = record("y", ("question", "  "))
    path = write_records(tmp_path / "a.jsonl", records)
    with pytest.raises(DataError) as caught:
        build(world, path, tmp_path / "cache")
    message = str(caught.value)
    assert f"{path}:5: " in message and "robot" in message
    assert f"{path}:10: " in message and "empty" in message
    assert "--validate" in message
    assert len(message.splitlines()) == 4
    assert not list((tmp_path / "cache").iterdir()), "a faulty file leaves nothing behind"


def test_of_many_faulty_records_the_first_are_named(world: World, tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", [{"text": "no conversation"}] * 500)
    with pytest.raises(DataError, match="first faulty") as caught:
        build(world, path, tmp_path / "cache")
    assert f"{path}:10: " in str(caught.value) and f"{path}:11: " not in str(caught.value)


def test_an_empty_file_is_refused(world: World, tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", [])
    with pytest.raises(DataError, match="a.jsonl"):
        build(world, path, tmp_path / "cache")


def test_a_file_that_changes_while_it_is_read_is_refused(world: World, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_records(path, random_records("q", 5))
    text = path.read_text()

    def report(name: str, done: int, total: int) -> None:
        path.write_text(text.replace("?", "!")[::-1])  # of the same size

    def build(how: Report | None) -> Path:
        cache = tmp_path / "cache"
        return build_store(
            path, chat=world.chat, tokenizer=world.tokenizer, cache=cache, report=how
        )

    with pytest.raises(DataError, match=r"a\.jsonl: changed while it was read"):
        build(report)
    assert not list((tmp_path / "cache").iterdir()), "nothing lies under the old content's key"
    path.write_text(text)
    assert len(open_store(build(None))) == 5


def test_processes_that_build_at_once_leave_one_store(world: World, tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", random_records("q", 20))
    inner: list[Path] = []

    def report(name: str, done: int, total: int) -> None:
        if not inner:  # another process builds the same while this one is in the middle of it
            inner.append(build(world, path, tmp_path / "cache").folder)

    folder = build_store(
        path, chat=world.chat, tokenizer=world.tokenizer, cache=tmp_path / "cache", report=report
    )
    assert list((tmp_path / "cache").iterdir()) == [folder] == inner
    assert len(open_store(folder)) == 20


def test_a_missing_file_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone.jsonl"):
        build(world, str(tmp_path / "gone.jsonl"), tmp_path / "cache")


@pytest.mark.parametrize("damage", ["short", "facts"])
def test_a_damaged_store_is_refused(world: World, tmp_path: Path, damage: str) -> None:
    path = write_records(tmp_path / "a.jsonl", random_records("q", 5))
    folder = build(world, path, tmp_path / "cache").folder
    if damage == "short":
        tokens = (folder / "tokens.bin").read_bytes()
        (folder / "tokens.bin").write_bytes(tokens[:-2])
    else:
        (folder / "facts.json").write_text(json.dumps([]))
    with pytest.raises(DataError, match="Delete this folder"):
        open_store(folder)


def said(*messages: tuple[str, str]) -> list[Message]:
    return [Message(*m) for m in messages]


def test_equal_questions_have_one_hash() -> None:
    asked = question_hash(said(("user", "What is  steam?"), ("assistant", "Hot.")))
    same = (
        said(("system", "Be kind."), ("user", "What is steam?"), ("assistant", "Gas.")),
        said(("user", "What is\nsteam? "), ("assistant", "H2O"), ("user", "Why?")),
    )
    assert {question_hash(c) for c in same} == {asked}
    other = (
        said(("user", "What is water?"), ("assistant", "Hot.")),
        said(("user", "What is"), ("user", "steam?"), ("assistant", "Hot.")),
        said(("system", "What is steam?"), ("assistant", "Hot.")),
    )
    assert len({asked, *(question_hash(c) for c in other)}) == 4
