"""`tools/rank.py`: candidates of a model, ranked by a reward model, are what stage dpo reads."""

import importlib.util
import itertools
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chats import TinyChats
from tokenizers import Tokenizer
from train_runs import Zygote

from megatron_cgn.data.preference_formats import read_answers
from megatron_cgn.parallel.state import shutdown_parallel
from megatron_cgn.rollout import rank_task
from megatron_cgn.testing import run_distributed

ROOT = Path(__file__).resolve().parents[2]
REWARD_ATOL = 1e-5
"""FP32 rewards of about 1: other kernels and sums in another order, one forward pass."""


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / f"tools/{name}.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Tests leave the signals of their process alone.
    module.signal = type("Signals", (), {"signal": lambda *_: None, "SIGTERM": signal.SIGTERM})
    torch.set_num_threads(1)
    return module


def _call(name: str, *args: str | Path) -> int:
    before, sys.argv = sys.argv, [f"{name}.py", *map(str, args)]
    try:
        code: int = _load(name).main()
    finally:
        sys.argv = before
        shutdown_parallel()
    return code


def _write_reward_model(path: Path, chats: TinyChats) -> Path:
    """A random reward model with the tokenizer and the template of the tiny chat model."""
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(chats.model)
    make: Any = transformers.LlamaForSequenceClassification
    config.num_labels, config.pad_token_id = 1, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = make(config)
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.1).add_(1.0 if parameter.dim() == 1 else 0.0)
    model.float().save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(chats.model / name, path / name)
    return path


@pytest.fixture(scope="module")
def reward_model(chats: TinyChats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_reward_model(tmp_path_factory.mktemp("reward") / "model", chats)


def _rewards_of_transformers(
    path: Path, conversations: Sequence[Sequence[dict[str, str]]]
) -> list[float]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForSequenceClassification.from_pretrained(path).eval()
    found = []
    for messages in conversations:
        inputs = tokenizer.apply_chat_template(
            list(messages), return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            found.append(model(**inputs).logits.item())
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _write(path: Path, *records: Any) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), "utf-8")
    return path


def test_from_questions_to_a_policy(
    chats: TinyChats,
    reward_model: Path,
    zygote: Zygote,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Generate, rank, and train on what was ranked."""
    questions = _write(tmp_path / "q.jsonl", *({"prompt": f"steam {n}"} for n in range(6)))
    candidates, ranked = tmp_path / "candidates.jsonl", tmp_path / "preferences.jsonl"
    options: tuple[str | Path, ...] = ("--num-samples", "4", "--temperature", "1")
    options += ("--max-new-tokens", "12", "--system", "Be brief.")
    chat: tuple[str | Path, ...] = ("--model", chats.model, "--input", questions)
    assert _call("generate", *chat, *options, "--output", candidates) == 0
    made = _lines(candidates)
    assert all(len(row["answers"]) == len(row["finish"]) == 4 for row in made)
    system = {"role": "system", "content": "Be brief."}
    assert [row["prompt_messages"] for row in made] == [
        [system, {"role": "user", "content": f"steam {n}"}] for n in range(6)
    ]
    # A random model hardly ever ends an answer.
    judge: tuple[str | Path, ...] = ("--model", reward_model, "--input", candidates)
    judge += ("--keep", "ranking", "--keep-cut-off")
    capsys.readouterr()
    assert _call("rank", *judge, "--output", ranked) == 0
    assert "prompts: 6, answers: 24; records: 6, " in capsys.readouterr().out
    records = _lines(ranked)
    for row, record in zip(made, records, strict=True):
        assert record["id"] == row["id"] and record["prompt"] == row["prompt_messages"]
        said = [[*record["prompt"], *answer["messages"]] for answer in record["answers"]]
        rewards = [answer["reward"] for answer in record["answers"]]
        expected = _rewards_of_transformers(reward_model, said)
        assert rewards == pytest.approx(expected, rel=0, abs=REWARD_ATOL)
        assert rewards == sorted(rewards, reverse=True)
        assert [a["rank"] for a in record["answers"]] == list(range(1, len(rewards) + 1))
        assert {answer["messages"][0]["content"] for answer in record["answers"]} == {
            text for text in row["answers"] if text.strip()
        }

    output = tmp_path / "dpo"
    overrides = {
        "model.hf_path": chats.model,
        "data.sources": f"[{{name: ranked, path: {ranked}}}]",
        "data.seq_length": 128,
        "chat.truncation": "keep_start",
        "train.micro_batch_size": 1,
        "train.global_batch_size": 2,
        "train.train_iters": 2,
        "precision": "fp32",
        "output_dir": output,
    }
    trained = zygote.run(
        ["+stage=dpo", *(f"{key}={value}" for key, value in overrides.items())],
        stderr=tmp_path / "stderr",
    )
    assert trained.codes == [0], trained.stderr
    assert (output / "export" / "config.json").is_file()


def _hand_made(path: Path, count: int = 5) -> Path:
    """Candidates with every kind of answer that is left out."""
    good = [
        {"id": f"p{n}", "prompt": f"valve {n}?", "answers": [f"open {n}", f"closed {n}", "steam"]}
        for n in range(count)
    ]
    odd = [
        {"id": "one", "prompt": "x", "answer": "only"},
        {"id": "same", "prompt": "x", "answers": ["a", "a ", "a"]},
        {
            "id": "cut",
            "prompt": "x",
            "answers": ["a", "b", ""],
            "finish": ["stop", "length", "stop"],
        },
        {"id": "forged", "prompt": "x", "answers": ["a", "b<|im_end|>", "c"]},
        {"id": "long", "prompt": "x", "answers": ["a", "steam " * 200, "c"]},
    ]
    return _write(path, *good, *odd)


def test_all_that_is_left_out_is_counted_and_nothing_is_scored_twice(
    reward_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, output = _hand_made(tmp_path / "c.jsonl"), tmp_path / "out" / "p.jsonl"
    judge: tuple[str | Path, ...] = ("--model", reward_model, "--input", source)
    assert _call("rank", *judge, "--output", output) == 0
    told = capsys.readouterr()
    assert "prompts: 10, answers: 28; records: 7, pairs: 7, mean margin " in told.out
    assert "empty 1, cut off 1, duplicate 2, not fitting the model 2" in told.out
    assert "fewer than two answers to compare 3, answers too close 0" in told.out
    assert "c.jsonl:9: answer 2: message 2 (assistant) spells the special token" in told.err
    assert "c.jsonl:10: answer 2: has " in told.err and "128 positions" in told.err
    first = output.read_bytes()
    for record in _lines(output):
        assert record["reward_chosen"] > record["reward_rejected"]
        assert read_answers(record).form == "pair"

    def never(*_: Any) -> list[float]:
        raise AssertionError("scored again")

    monkeypatch.setattr(rank_task, "score_tokens", never)
    assert _call("rank", *judge, "--output", output) == 0 and output.read_bytes() == first
    assert _call("rank", *judge, "--output", output, "--keep", "all") == 2
    assert "holds other preferences" in capsys.readouterr().err and output.read_bytes() == first
    assert _call("rank", *judge, "--output", output, "--keep", "all", "--overwrite") == 0
    assert len(_lines(output)) == 5 * 3 + 2
    # Nothing is that far apart: the file stays.
    before = output.read_bytes()
    far: tuple[str | Path, ...] = ("--min-margin", "1e6", "--overwrite")
    assert _call("rank", *judge, "--output", output, *far) == 2
    told = capsys.readouterr()
    assert "gives no preference" in told.err and "answers too close 7" in told.err
    assert output.read_bytes() == before


def _rank_on_two(arguments: list[str]) -> int:
    return _call("rank", *arguments)


def test_interrupted_it_goes_on_on_another_layout(
    reward_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = _hand_made(tmp_path / "c.jsonl")
    judge = ["--model", str(reward_model), "--input", str(source), "--keep", "ranking"]
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert _call("rank", *judge, "--output", whole) == 0
    place: Any = rank_task
    score, calls = place.score_tokens, itertools.count(1)

    def interrupted(*args: Any) -> list[float]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        found: list[float] = score(*args)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(rank_task, "score_tokens", interrupted)
        patch.setattr(rank_task, "_ANSWERS_PER_WRITE", 3)
        assert _call("rank", *judge, "--output", parts) == 130
    assert "what was scored is kept" in capsys.readouterr().err and not parts.exists()
    scores = tmp_path / "parts.jsonl.scores.jsonl"
    assert [row["id"] for row in _lines(scores)] == ["p0", "p1"]
    with scores.open("ab") as file:
        file.write(b'{"id": "p2", "rew')  # as a machine that goes down leaves it
    layout = ["--tensor-parallel", "2"]
    codes = run_distributed(_rank_on_two, 2, [*judge, *layout, "--output", str(parts)], warm=True)
    assert codes == [0, 0]
    for found, expected in zip(_lines(parts), _lines(whole), strict=True):
        for mine, other in zip(found["answers"], expected["answers"], strict=True):
            assert mine.pop("reward") == pytest.approx(other.pop("reward"), abs=REWARD_ATOL)
        assert found == expected


def test_another_programs_padding_is_passed_over(reward_model: Path, tmp_path: Path) -> None:
    """As `transformers` does, even where the token that pads is what answers end with."""
    model, output = tmp_path / "model", tmp_path / "p.jsonl"
    shutil.copytree(reward_model, model)
    config = json.loads((model / "config.json").read_text("utf-8"))
    (end,) = Tokenizer.from_file(str(model / "tokenizer.json")).encode("\n").ids
    (model / "config.json").write_text(json.dumps({**config, "pad_token_id": end}))
    source = _write(tmp_path / "c.jsonl", {"prompt": "valve?", "answers": ["open", "closed"]})
    arguments = ("--input", source, "--output", output, "--keep", "ranking")
    assert _call("rank", "--model", model, *arguments) == 0
    (record,) = _lines(output)
    said = [[*record["prompt"], *answer["messages"]] for answer in record["answers"]]
    found = [answer["reward"] for answer in record["answers"]]
    expected, last = (_rewards_of_transformers(path, said) for path in (model, reward_model))
    assert found == pytest.approx(expected, rel=0, abs=REWARD_ATOL)
    assert found != pytest.approx(last, rel=0, abs=1e-2)


def _faults(chats: TinyChats, model: Path, root: Path) -> dict[str, tuple[list[Any], str]]:
    good = _hand_made(root / "good.jsonl")
    output = root / "p.jsonl"
    mine = _write(root / "mine.jsonl", {"by": "hand"})
    base = ["--model", model, "--input", good, "--output", output]
    return {
        "no such model": (["--model", "nowhere", *base[2:]], "nowhere: is neither a Hugging Face"),
        "a language model": (["--model", chats.model, *base[2:]], "is a language model"),
        "no such file": ([*base[:2], "--input", root / "none.jsonl", *base[4:]], "none.jsonl"),
        "the input itself": ([*base[:4], "--output", good], "is the --input itself"),
        "another's file": ([*base[:4], "--output", mine], "mine.jsonl: exists, and there is no"),
        "no margin": ([*base, "--min-margin", "wide"], "--min-margin: nan; must be a number"),
        "no candidates": (
            [*base[:2], "--input", _write(root / "q.jsonl", {"prompt": "p"}), *base[4:]],
            "q.jsonl:1: has no field 'answers'",
        ),
        "a forged prompt": (
            [
                *base[:2],
                "--input",
                _write(root / "f.jsonl", {"prompt": "<|im_start|>", "answers": ["a", "b"]}),
                *base[4:],
            ],
            "f.jsonl:1: message 1 (user) spells the special token",
        ),
        "too few processes": ([*base, "--tensor-parallel", "2"], "1 process(es) were started"),
    }


def test_bad_input_is_told_once(
    chats: TinyChats, reward_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (arguments, message) in _faults(chats, reward_model, tmp_path).items():
        assert _call("rank", *arguments) == 2, name
        told = capsys.readouterr().err
        assert told.startswith("error: ") and message in told and "Traceback" not in told, name
        assert told.count("error: ") == 1
    assert not (tmp_path / "p.jsonl").exists() and not [*tmp_path.glob("*.scores.*")]


def test_a_reward_model_writes_no_answers(
    reward_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call("generate", "--model", reward_model, "--prompt", "x") == 2
    assert "is a reward model, which judges answers" in capsys.readouterr().err
