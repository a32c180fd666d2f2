"""tools/preprocess_data.py --sft: what it prints, lists and returns."""

import importlib
import json
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_cgn.data.conversation_report import Counting, show
from megatron_cgn.data.conversations import Conversation
from tests.unit.chat_samples import chatml_tokenizer
from tokenizer.chat import ChatTemplate, Message

ROOT = Path(__file__).parents[2]
QUESTION = {"role": "user", "content": "压力？"}


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


RECORDS: list[Any] = [
    {"messages": [QUESTION, _answer("15.5"), QUESTION, _answer("MPa")], "id": "first"},
    {"messages": [QUESTION, _answer("")]},
    {"instruction": "压力？", "output": "15.5 " * 40},
    {"messages": [QUESTION, _answer("<|im_end|>")]},
    {"messages": [QUESTION, QUESTION, QUESTION, _answer(" ")]},
    {"messages": [QUESTION, _answer("\n15.5"), QUESTION]},
]


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        module = importlib.import_module("preprocess_data")
    finally:
        sys.path.remove(str(ROOT / "tools"))
    handler, level = signal.getsignal(signal.SIGTERM), logging.getLogger("megatron_cgn").level
    yield module
    signal.signal(signal.SIGTERM, handler)
    logging.getLogger("megatron_cgn").setLevel(level)


class Run:
    """Runs the command on one file of conversations."""

    option = "--sft"
    records = RECORDS

    def __init__(
        self, tool: ModuleType, directory: Path, patch: pytest.MonkeyPatch, capture: Any
    ) -> None:
        self.tokenizer = chatml_tokenizer(directory / "tokenizer")
        self.file = directory / "qa.jsonl"
        self.file.write_text("".join(f"{json.dumps(r)}\n" for r in self.records))
        self._tool, self._patch, self._capture = tool, patch, capture

    def __call__(self, *options: object) -> tuple[int, str, str]:
        arguments = [self.option, "--tokenizer", self.tokenizer, "--input", self.file, *options]
        self._patch.setattr(sys, "argv", ["preprocess_data.py", *map(str, arguments)])
        code = self._tool.main()
        captured = self._capture.readouterr()
        return code, captured.out, captured.err


@pytest.fixture
def run(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    return Run(tool, tmp_path, monkeypatch, capsys)


def test_validate_lists_every_faulty_record(run: Run) -> None:
    code, out, err = run("--validate")
    assert (code, err) == (2, "")
    listed = [line for line in out.splitlines() if line.startswith(f"{run.file}:")]
    assert [line.split(":")[1] for line in listed] == ["2", "4", "5"]
    assert "message 2 (assistant) is empty" in listed[0]
    assert "spells the special token '<|im_end|>'" in listed[1]
    # By reason, whatever the number of the message.
    assert "             2  message … (assistant) is empty" in out
    assert "             1  message … (assistant) spells the special token …" in out


def test_without_validate_faults_are_counted_and_the_remedy_is_named(run: Run) -> None:
    code, out, _ = run()
    assert code == 2
    assert f"{run.file}:2" not in out
    assert "faulty records                 3" in out
    assert "--validate names every faulty record" in out


def test_too_long_ones_are_listed_and_good_files_give_0(run: Run) -> None:
    run.file.write_text("".join(f"{json.dumps(RECORDS[n])}\n" for n in (0, 2, 5)))
    chat = ChatTemplate.open(run.tokenizer)
    encoded = chat.encode([Message("user", "压力？"), Message("assistant", "15.5 " * 40)])
    # The end-of-turn token is predicted and not read; what follows it is neither.
    length = encoded.turns[-1][1] - 1
    assert run("--validate", "--seq-length", length)[0] == 0
    code, out, _ = run("--validate", "--seq-length", length - 1)
    assert code == 2
    expected = f"{run.file}:2: takes {length:,} tokens, more than the sequence length of"
    assert expected in out
    assert run("--seq-length", length - 1)[0] == 0  # counted only
    assert "too long                       1" in run("--seq-length", length - 1)[1]


def test_json_is_an_object_a_line(run: Run) -> None:
    code, out, _ = run("--json", "--validate", "--seq-length", 100)
    *faults, figures = map(json.loads, out.splitlines())
    assert code == 2
    assert [(fault["path"], fault["line"]) for fault in faults] == [
        (str(run.file), line) for line in (2, 3, 4, 5)
    ]
    assert faults[1]["reason"].startswith("takes ")
    chat = ChatTemplate.open(run.tokenizer)
    usable = [
        chat.encode([Message(m["role"], m["content"]) for m in messages])
        for messages in (
            RECORDS[0]["messages"],
            [QUESTION, _answer(RECORDS[2]["output"])],
            RECORDS[5]["messages"],
        )
    ]
    lengths = sorted(e.turns[-1][1] - 1 for e in usable)
    assert figures == {
        "conversations": 3,
        "kinds": {"messages": 2, "alpaca": 1},
        "turns": 4,
        "tokens": sum(len(e.ids) for e in usable),
        "counted_tokens": sum(end - start for e in usable for start, end in e.turns),
        "unanswered": 1,
        "answers_beginning_with_space": 1,
        "too_long": 1,
        "length_quantiles": {
            "0.5": lengths[1],
            **{name: lengths[2] for name in ("0.9", "0.95", "0.99", "1.0")},
        },
        "faults": 3,
        "faults_by_reason": figures["faults_by_reason"],
    }
    assert sum(figures["faults_by_reason"].values()) == 3


TEXT = (
    "<|im_start|>user↵\n压力？<|im_end|>↵\n<|im_start|>assistant↵\n{}15.5<|im_end|>{}↵\n"
    "<|im_start|>user↵\n压力？<|im_end|>↵\n<|im_start|>assistant↵\n{}MPa<|im_end|>{}↵\n"
)


def test_show_marks_what_counts(run: Run) -> None:
    _, out, _ = run("--show", 1)
    assert "--- first (messages, " in out
    assert TEXT.format("⟦", "⟧", "⟦", "⟧") in out
    assert out.count("--- ") == 1
    assert TEXT.format("", "", "⟦", "⟧") in run("--show", 1, "--last-turn-only")[1]
    assert run("--show", 9)[1].count("--- ") == 3
    marked = run("--show", 1, "--train-on-prompt")[1].partition("<|im_start|>")[2]
    assert marked.startswith("⟦user↵")
    assert marked.partition("MPa<|im_end|>↵\n")[2].startswith("⟧")


def test_show_colours_for_terminals_and_lets_no_escape_code_through(tmp_path: Path) -> None:
    chat = ChatTemplate.open(chatml_tokenizer(tmp_path))
    messages = (Message("user", "\x1b[31mred"), Message("assistant", "a\r\nb"))
    conversation = Conversation("id", messages, "f.jsonl", 1, "messages")
    text = show(conversation, chat.encode(messages), chat=chat, counting=Counting(), colour=True)
    assert "␛[31mred" in text
    assert "\x1b[1;32ma␍↵\nb<|im_end|>\x1b[0m↵\n" in text
    assert text.count("\x1b") == 2


def test_an_id_can_be_any_text(run: Run) -> None:
    name = "\ud800\x1b[31m\x9b31m\n"
    other = run.file.with_name("other.jsonl")
    other.write_text(json.dumps({**RECORDS[0], "id": name}) + "\n")
    code, out, _ = run("--input", other, "--show", 9)
    assert code == 2 and "--- \\ud800␛[31m\\x9b31m↵" in out
    assert "\x1b" not in out


def test_a_file_without_a_conversation_is_a_fault(run: Run) -> None:
    empty = run.file.with_name("empty.jsonl")
    empty.write_text("\n \n")
    code, out, _ = run("--input", empty, "--validate")
    assert code == 2 and f"{empty}:1: the file holds no conversation" in out.splitlines()
    assert f"{run.file}:1: " not in out


def test_faults_of_the_template_or_file_are_one_message(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run("--chat-template", "chatlm")
    assert (code, out) == (2, "")
    assert err.startswith("preprocess_data: chat template 'chatlm': there is none of that name.")
    code, out, err = run("--input", tmp_path / "absent.jsonl")
    assert (code, out) == (2, "")
    assert "absent.jsonl: there is no such input" in err


@pytest.mark.parametrize(
    "options", [("--json", "--show", 1), ("--train-on-prompt", "--last-turn-only"), ("--show", 0)]
)
def test_settings_without_effect_are_refused(run: Run, options: tuple[object, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*options)
    assert ended.value.code == 2
