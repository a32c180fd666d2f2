"""Stage sft through train.py: layouts, adapters, resuming, and what a run leaves behind.

Eight steps read 39 conversations more than once: the second epoch begins on the way.
"""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_chats import END_OF_TURN, TinyChats
from train_runs import Run, Zygote, records, sft_overrides

from megatron_cgn.testing import FP32_PARALLEL_RTOL, HF_LOGITS_ATOL

STEPS = 8
WEIGHTS_ATOL = 2e-5
"""Weights after eight steps of Adam on another layout: where a gradient is almost nothing, its sign
is decided by the order of a sum, and Adam's step has the same size whatever the gradient's."""
LORA = ("+lora=default", "optim.lr=1e-2", "lora.rank=4", "lora.alpha=8")
TP = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
PP = ("parallel.pipeline_model_parallel_size=2",)
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "full": (1, ()),
    "full-tp2": (2, TP),
    "lora": (1, LORA),
    "lora-pp2": (2, (*LORA, *PP)),
    "lora-dropout-dp2": (2, (*LORA, "lora.dropout=0.1")),
}


@pytest.fixture(scope="module")
def done(
    chats: TinyChats, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Outputs of every run that was not interrupted."""
    outputs = {}
    for name, (ranks, more) in RUNS.items():
        outputs[name] = output = tmp_path_factory.mktemp(name)
        run = zygote.start(
            sft_overrides(chats, output, f"train.train_iters={STEPS}", *more),
            stderr=output / "stderr",
            ranks=ranks,
            record_ids=output / "read",
        )
        ended = run.wait()
        assert ended.codes == [0] * ranks, ended.stderr
        assert "Traceback" not in ended.stderr
    return outputs


def _read(output: Path, *, ranks: int, upto: int | None = None) -> dict[int, list[Any]]:
    """Ids and tokens' hash of every training sequence that was read, by its number."""
    found: dict[int, list[Any]] = {}
    for rank in range(ranks):
        path = output / f"read.{rank}"
        for line in path.read_text("utf-8").splitlines() if path.exists() else []:
            number, ids, tokens = json.loads(line)
            if upto is None or number < upto:
                assert number not in found, "read twice"
                found[number] = [ids, tokens]
    return found


@pytest.mark.parametrize(("one", "two"), [("full", "full-tp2"), ("lora", "lora-pp2")])
def test_two_processes_give_what_one_gives(done: dict[str, Path], one: str, two: str) -> None:
    expected, found = records(done[one]), records(done[two])
    assert len(expected) == len(found) == STEPS + 3
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            tolerance = 10 * FP32_PARALLEL_RTOL if name == "grad_norm" else FP32_PARALLEL_RTOL
            assert b[name] == pytest.approx(value, rel=tolerance, abs=1e-9), name
    assert (done[one] / "samples.jsonl").read_text() == (done[two] / "samples.jsonl").read_text()
    a, b = (load_file(done[name] / "export" / "model.safetensors") for name in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0.0, atol=WEIGHTS_ATOL)


def test_it_learns_and_tells_of_it(done: dict[str, Path], chats: TinyChats) -> None:
    for name in ("full", "lora"):
        scores = [r for r in records(done[name]) if "val/domain/loss" in r]
        assert [r["step"] for r in scores] == [0, 4, STEPS]
        assert scores[-1]["val/domain/loss"] < scores[0]["val/domain/loss"] - 0.2
        assert all(0 <= r[f"val/{s}/token_accuracy"] <= 1 for r in scores for s in ("general",))
        assert [p.name for p in (done[name] / "tensorboard").iterdir()]
    told = (done["lora"] / "stderr").read_text("utf-8")
    # Rank 4 on matrices of 32 × 32, 16 × 32 (twice), 32 × 32, and thrice 64 × 32, in two layers.
    adapters = 2 * 4 * (64 + 48 + 48 + 64 + 3 * 96)
    assert "adapters of rank 4 on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj" in told
    assert f"down_proj: {adapters:,} parameters" in told
    for text in ("chat template: ", "<|im_end|>", "the assistant's turns count", "held out"):
        assert text in told, told
    assert "| domain |" in told and "before  " in told and "/adapter" in told
    account = json.loads((done["lora"] / "sft.json").read_text("utf-8"))
    consumed = json.loads((done["lora"] / "checkpoints/latest/sft.json").read_text("utf-8"))
    assert consumed["tokens"] == account["tokens"] == records(done["lora"])[-2]["tokens"]


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits
    return found


def test_what_is_exported_opens_and_answers_alike(done: dict[str, Path], chats: TinyChats) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = done["lora"]
    tokenizer = AutoTokenizer.from_pretrained(output / "export")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "coolant pressure"}], add_generation_prompt=True
    )["input_ids"]
    merged = AutoModelForCausalLM.from_pretrained(output / "export").eval()
    base = AutoModelForCausalLM.from_pretrained(chats.model).eval()
    before = _logits(base, ids)
    adapted = PeftModel.from_pretrained(base, str(output / "adapter")).eval()
    assert not torch.allclose(before, _logits(adapted, ids), atol=0.1)
    torch.testing.assert_close(
        _logits(merged, ids), _logits(adapted, ids), rtol=0.0, atol=HF_LOGITS_ATOL
    )
    # The well-known fault: a model that does not stop, since no file names the end of a turn.
    stops = merged.generation_config.eos_token_id
    assert stops == [tokenizer.convert_tokens_to_ids(END_OF_TURN), 0]
    for name in ("export", "adapter", "checkpoints/latest/hf"):
        template = (output / name / "chat_template.jinja").read_text("utf-8")
        assert template == (chats.model / "chat_template.jinja").read_text("utf-8")
        assert (
            json.loads((output / name / "generation_config.json").read_text())["eos_token_id"]
            == stops
        )

    last = [r for r in _samples(output) if r["step"] == STEPS]
    assert len(last) == 2 and {r["step"] for r in _samples(output)} == {0, 4, STEPS}
    for sample in last:
        prompt = tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"]
        answer = merged.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0
        )[0, len(prompt) :]
        assert sample["answer"] == tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert sample["num_tokens"] == len(answer)


def _samples(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


INTERRUPTED = {
    "full": (signal.SIGTERM, "checkpoint.interval_steps=null", 75, 5),
    "lora-dropout-dp2": (signal.SIGKILL, "checkpoint.interval_steps=3", -signal.SIGKILL, 3),
}
"""What happens in the fifth step, where checkpoints are, how it ends, and where it goes on."""


@pytest.mark.parametrize("name", INTERRUPTED)
def test_interrupted_it_reads_and_becomes_the_same(
    chats: TinyChats, zygote: Zygote, done: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Nothing is read twice, nothing is skipped, and the weights are equal bit for bit."""
    ranks, more = RUNS[name]
    number, interval, code, step = INTERRUPTED[name]
    arguments = sft_overrides(chats, tmp_path, f"train.train_iters={STEPS}", *more, interval)

    def start(part: str, signal_at: tuple[int, int] | None = None) -> Run:
        (tmp_path / part).mkdir()
        return zygote.start(
            arguments,
            stderr=tmp_path / "stderr",
            ranks=ranks,
            record_ids=tmp_path / part / "read",
            signal_at=signal_at,
        )

    # The last of the fifth step's four sequences, which the last rank reads.
    ended = start("first", (19, number)).wait()
    assert ended.codes[-1] == code, ended.stderr
    latest = json.loads((tmp_path / "checkpoints/latest/checkpoint.json").read_text())
    assert latest["step"] == step
    ended = start("second").wait()
    assert ended.codes == [0] * ranks, ended.stderr
    assert f"after step {step}" in ended.stderr

    consumed = latest["consumed_sequences"]
    before = _read(tmp_path / "first", ranks=ranks, upto=consumed)
    after = _read(tmp_path / "second", ranks=ranks)
    assert sorted(before) == list(range(consumed))
    assert sorted(after) == list(range(consumed, 4 * STEPS))
    assert before | after == _read(done[name], ranks=ranks)
    assert records(tmp_path) == records(done[name])
    assert _samples(tmp_path) == _samples(done[name])
    for file in ("export/model.safetensors", "adapter/adapter_model.safetensors"):
        if (done[name] / file).exists():
            assert (tmp_path / file).read_bytes() == (done[name] / file).read_bytes()
