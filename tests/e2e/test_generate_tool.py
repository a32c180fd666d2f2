"""`tools/generate.py` on a real model: prompts, files that are gone on with, a conversation."""

import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cgn.parallel.state import shutdown_parallel
from megatron_cgn.rollout import tasks
from megatron_cgn.rollout.generate import Answer

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / ".cache" / "smollm2-135m-instruct"
TEXTS = ["What is steam?", "压水堆的一回路由哪些设备组成？", "Hi", "核电"]
NEW_TOKENS = 12
NEEDS_MODEL = pytest.mark.skipif(not DEMO.is_dir(), reason="run `make demo-model` first")

Tool = Callable[..., int]


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("generate_tool", ROOT / "tools/generate.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool, which leaves the signals of this process alone."""
    module = _load()
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)
    return module


@pytest.fixture
def tool(module: Any, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """The tool's `main` in this process, with these arguments."""

    def run(*args: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, args)])
        code: int = module.main()
        shutdown_parallel()
        return code

    return run


def _said(*texts: str) -> list[dict[str, str]]:
    """User and assistant in turns."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def _transformers(conversations: list[list[dict[str, str]]]) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO)
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    answers = []
    for messages in conversations:
        inputs = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = out[0, inputs["input_ids"].size(1) :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
    return answers


@NEEDS_MODEL
def test_prompts_are_answered_as_by_transformers(
    tool: Tool, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [part for text in TEXTS for part in ("--prompt", text)]
    assert tool("--model", DEMO, "--max-new-tokens", str(NEW_TOKENS), *prompts) == 0
    expected = _transformers([_said(text) for text in TEXTS])
    blocks = [f"> {t}\n{a}\n\n" for t, a in zip(TEXTS, expected, strict=True)]
    assert capsys.readouterr().out == "".join(blocks)


def _killed(arguments: list[str]) -> None:
    """Run the tool in this process, which is killed when it answers for the second time."""
    place: Any = tasks
    complete, calls = place.complete, itertools.count(1)

    def killed(*args: Any, **kwargs: Any) -> list[Answer]:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        found: list[Answer] = complete(*args, **kwargs)
        return found

    place.complete = killed
    sys.argv = ["generate.py", *arguments]
    _load().main()


@NEEDS_MODEL
def test_a_file_is_gone_on_with_after_a_kill(
    tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "q.jsonl"
    records = [{"prompt": text, "topic": i} for i, text in enumerate([*TEXTS, "a", "b"])]
    source.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    options: tuple[str | Path, ...] = (
        "--model",
        DEMO,
        "--input",
        source,
        "--max-new-tokens",
        "4",
        "--batch-size",
        "1",
    )
    options += ("--batch-size", "1", "--temperature", "1.5", "--seed", "5")
    assert tool(*options, "--output", tmp_path / "whole.jsonl") == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["topic"] for row in rows] == list(range(6))
    assert [row["id"] for row in rows] == [f"q.jsonl:{i}" for i in range(1, 7)]
    assert len({row["answer"] for row in rows}) > 3

    parts = tmp_path / "parts.jsonl"
    process = multiprocessing.get_context("forkserver").Process(
        target=_killed, args=([*map(str, options), "--output", str(parts)],)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert parts.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    with parts.open("ab") as file:
        file.write(b'{"prompt": "a", "id": "q.js')  # as a machine that goes down leaves it
    assert tool(*options, "--output", parts) == 0
    assert parts.read_bytes() == whole
    assert "6 answers (4 of them before)" in capsys.readouterr().out
    assert tool(*options, "--top-k", "3", "--output", parts) == 2
    assert "top_k None → 3" in capsys.readouterr().err and parts.read_bytes() == whole


@pytest.mark.parametrize("ended_by", ["SIGINT", "SIGTERM"])
def test_an_interrupted_tool_says_what_stays(
    module: Any,
    tool: Tool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ended_by: str,
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    # Not an interrupt, which in a conversation would end the answer alone.
    terminated = lambda *_: module._terminate(signal.SIGTERM, None)  # noqa: E731
    monkeypatch.setattr(module, "_run", {"SIGINT": interrupted, "SIGTERM": terminated}[ended_by])
    assert tool("--model", "x", "--input", "q.jsonl", "--output", "a.jsonl") == 130
    told = capsys.readouterr().err
    assert told == "error: interrupted; what a.jsonl has stays, the same command goes on\n"
    assert not issubclass(module._Terminated, KeyboardInterrupt)


def test_bytes_and_characters_of_other_encodings_end_nothing(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"a\xffb\n"), encoding="utf-8")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="gbk")
    monkeypatch.setattr(sys, "stdin", typed)
    monkeypatch.setattr(sys, "stdout", shown)
    module._be_lenient_with_bytes()
    assert tasks._next_line() == "a\udcffb"
    tasks._write("水🙂")
    assert shown.buffer.getvalue() == "水?".encode("gbk")


@NEEDS_MODEL
def test_a_conversation_goes_on_and_begins_anew(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "What is water made of?"
    lines = ["Hi", "<|im_end|>", asked, "", "/reset", asked, "/exit", "never asked"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert tool("--model", DEMO, "--chat", "--max-new-tokens", str(NEW_TOKENS)) == 0
    first, fault, second, new, again = capsys.readouterr().out.splitlines()
    assert fault.startswith("error: message 3 (user) spells the special token")
    assert new == "(new conversation)"
    conversations = [_said("Hi"), _said("Hi", first, asked), _said(asked)]
    assert [first, second, again] == _transformers(conversations)
    assert second != again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere", "--prompt", "x"], "nowhere: is neither a Hugging Face model"),
        (["--model", "nowhere"], "give one of --prompt, --input, --chat"),
        (["--model", "nowhere", "--prompt", "x", "--chat"], "give one of"),
        (["--model", "nowhere", "--input", "x"], "--input and --output: give both"),
        (["--model", "nowhere", "--input", "./x", "--output", "x"], "x is the --input itself"),
        (["--model", "nowhere", "--prompt", "x", "--overwrite"], "--overwrite: has no effect"),
        (["--model", "nowhere", "--prompt", "x", "--num-samples", "2"], "would be the same"),
        (["--model", "nowhere", "--chat", "--raw"], "--raw: a conversation needs a template"),
        (
            ["--model", "nowhere", "--prompt", "x", "--tensor-parallel", "2"],
            "1 process(es) were started",
        ),
    ],
)
def test_faults_of_the_command_line(
    tool: Tool, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert tool(*arguments) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("error: ") and "Traceback" not in told


@NEEDS_MODEL
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "steam " * 9000], "max_position_embeddings"),
        (["--prompt", "ok", "--prompt", "<|im_start|>"], "--prompt 2: message 1"),
        (["--prompt", "x", "--template", "nowhere.jinja"], "nowhere.jinja"),
        (["--prompt", "x", "--temperature", "-1"], "temperature: -1.0"),
        (["--raw", "--prompt", ""], "--prompt 1: the text is empty"),
    ],
)
def test_faulty_prompts_are_refused_before_the_model_is_loaded(
    tool: Tool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert tool("--model", DEMO, *arguments) == 2
    assert message in capsys.readouterr().err
