"""Questions in, answers out: text as it settles, files that are gone on with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_cgn.errors import ConfigError, DataError
from megatron_cgn.rollout.files import AnswerFile, read_questions
from megatron_cgn.rollout.text import TextStream
from tokenizer.chat import Message


def _bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["压水堆🙂的é一回路", "plain", "🏴‍☠️", ""])
def test_only_whole_characters_are_shown(text: str) -> None:
    stream = TextStream(_bytes)
    pieces = [stream.add(token) for token in text.encode()]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == text and stream.end() == ""


def test_bytes_that_make_no_character_are_shown_at_the_end() -> None:
    stream = TextStream(_bytes)
    shown = [stream.add(token) for token in "水a".encode()[:2]]
    assert shown == ["", ""] and stream.end() == "\ufffd"


def test_a_space_at_the_beginning_of_a_word_is_kept() -> None:
    words = ["▁one", "▁two", "▁", "x"]

    def decode(ids: Sequence[int]) -> str:  # as SentencePiece: the first space goes
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    stream = TextStream(decode)
    assert "".join(stream.add(i) for i in range(4)) == "one two x"


def _write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts))
    return path


def test_every_kind_of_record_is_a_question(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    path = _write(
        tmp_path / "q.jsonl",
        {"prompt": "u"},
        {"id": "mine", "messages": [user, answer, user, answer]},
        "",
        {"instruction": "u", "input": "more"},
        {"instruction": "u", "output": "a", "system": "own"},
    )
    questions = read_questions(path, system="s", raw=False)
    system, said = Message("system", "s"), Message("user", "u")
    assert [q.id for q in questions] == ["q.jsonl:1", "mine", "q.jsonl:4", "q.jsonl:5"]
    assert [q.messages for q in questions] == [
        (system, said),
        (system, said, Message("assistant", "a"), said),
        (system, Message("user", "u\nmore")),
        (Message("system", "own"), said),
    ]
    assert [q.number for q in questions] == [0, 1, 2, 3]


def test_faulty_records_are_told_together(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "q.jsonl", {"id": 1, "prompt": "a"}, "{", {"id": "1", "prompt": "b"}, {"x": 1}
    )
    with pytest.raises(DataError) as fault:
        read_questions(path, system=None, raw=False)
    assert all(f"{path}:{line}: " in str(fault.value) for line in (2, 3, 4))
    assert "id '1' of line 1" in str(fault.value)
    with pytest.raises(DataError, match="holds no record"):
        read_questions(_write(tmp_path / "none.jsonl"), system=None, raw=False)
    with pytest.raises(DataError, match="field 'prompt'"):
        read_questions(_write(tmp_path / "r.jsonl", {"text": "a"}), system=None, raw=True)


def test_answers_are_gone_on_with(tmp_path: Path) -> None:
    path, settings = tmp_path / "new" / "a.jsonl", {"seed": 1, "stop_ids": [2]}
    first = AnswerFile(path, settings=settings, overwrite=False)
    assert first.done == set()
    first.append([{"id": "a", "answer": "水\u2028"}, {"id": "b", "answer": ""}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "c", "ans')  # the machine went down here
    again = AnswerFile(path, settings=settings, overwrite=False)
    assert again.done == {"a", "b"} and path.read_bytes() == whole
    anew = AnswerFile(path, settings={"seed": 2}, overwrite=True)
    assert anew.done == set() and path.read_bytes() == b""


def test_answers_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    AnswerFile(path, settings={"seed": 1, "top_k": 3}, overwrite=False)
    with pytest.raises(ConfigError, match=r"seed 1 → 2\..*--overwrite"):
        AnswerFile(path, settings={"seed": 2, "top_k": 3}, overwrite=False)
    foreign = _write(tmp_path / "foreign.jsonl", {"id": "a"})
    with pytest.raises(ConfigError, match="there is no foreign.jsonl.settings.json"):
        AnswerFile(foreign, settings={}, overwrite=False)
    assert foreign.read_text() == '{"id": "a"}'


def test_half_a_character_in_a_field_does_not_lose_answers(tmp_path: Path) -> None:
    questions = read_questions(
        _write(tmp_path / "q.jsonl", {"prompt": "水", "topic": "\ud800"}, {"prompt": "水"}),
        system=None,
        raw=False,
    )
    path = tmp_path / "a.jsonl"
    answers = AnswerFile(path, settings={}, overwrite=False)
    answers.append([{**q.record, "id": q.id} for q in questions])
    first, second = path.read_text("utf-8").splitlines()
    assert json.loads(first)["topic"] == "\ud800" and '"水"' in second
    assert AnswerFile(path, settings={}, overwrite=False).done == {"q.jsonl:1", "q.jsonl:2"}
