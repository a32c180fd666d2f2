"""Stage dpo through train.py: layouts, adapters, every loss, resuming, and what a run tells."""

import json
import math
import signal
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from dpo_runs import dpo_overrides
from safetensors.torch import load_file
from tiny_chats import TinyChats
from tiny_preferences import TinyPreferences, write_tiny_preferences
from train_runs import Run, Zygote, records

from megatron_cgn.config.schema import PreferenceLoss
from megatron_cgn.testing import FP32_PARALLEL_RTOL

STEPS = 8
LN2_ATOL = 1e-6
"""FP32: the loss of the first step is ln 2 but for the rounding of sums over some tokens."""
REWARD_ATOL = 1e-5
"""Rewards are a tenth of differences of log-probabilities of about 100, rounded to FP32."""
LORA = ("+lora=dpo", "optim.lr=1e-2", "lora.rank=4", "lora.alpha=8")
PP = ("parallel.pipeline_model_parallel_size=2",)
KTO = ("loss.type=kto", "optim.lr=1e-3")
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "full": (1, ()),
    "lora": (1, LORA),
    "lora-pp2": (2, (*LORA, *PP)),
    "lora-dropout-dp2": (2, (*LORA, "lora.dropout=0.1")),
    "kto": (1, KTO),
}
QUIET = ("samples.count=0", "samples.max_new_tokens=128", "export.enabled=false")


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> TinyPreferences:
    return write_tiny_preferences(tmp_path_factory.mktemp("preferences"))


def _arguments(
    name: str, chats: TinyChats, preferences: TinyPreferences, output: Path
) -> list[str]:
    sources = [preferences.unpaired()] if name == "kto" else []
    return dpo_overrides(chats, preferences, output, *RUNS[name][1], *sources)


@pytest.fixture(scope="module")
def done(
    chats: TinyChats,
    preferences: TinyPreferences,
    zygote: Zygote,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Outputs of every run that was not interrupted."""
    outputs = {}
    for name, (ranks, _) in RUNS.items():
        outputs[name] = output = tmp_path_factory.mktemp(name)
        run = zygote.start(
            _arguments(name, chats, preferences, output),
            stderr=output / "stderr",
            ranks=ranks,
            record_ids=output / "read",
        )
        ended = run.wait()
        assert ended.codes == [0] * ranks, ended.stderr
        assert "Traceback" not in ended.stderr
    return outputs


def _steps(output: Path) -> list[dict[str, Any]]:
    return [r for r in records(output) if "loss" in r]


@pytest.mark.parametrize("name", ["full", "lora", "lora-pp2"])
def test_the_first_step_is_ln_2_and_its_margin_0(done: dict[str, Path], name: str) -> None:
    first = _steps(done[name])[0]
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(math.log(2), abs=LN2_ATOL)
    for metric in ("chosen", "rejected", "margins"):
        assert first[f"rewards/{metric}"] == pytest.approx(0.0, abs=REWARD_ATOL)
    told = (done[name] / "stderr").read_text("utf-8")
    assert "self-check before the first step: loss 0.6931, margin" in told
    assert "loss: sigmoid (beta=0.1, " in told and "reference: the policy as it starts" in told


def test_metrics_have_the_names_of_trl_and_are_told_by_source(done: dict[str, Path]) -> None:
    names = {
        f"{group}/{which}" for group in ("rewards", "logps") for which in ("chosen", "rejected")
    } | {"rewards/margins", "rewards/accuracies"}
    step = _steps(done["full"])[-1]
    assert names <= step.keys()
    seen = {name for r in _steps(done["full"]) for name in r}
    assert {f"train/{s}/{n}" for s in ("pairs", "rankings") for n in (*names, "loss")} <= seen
    scores = [r for r in records(done["full"]) if "val/pairs/loss" in r]
    assert [r["step"] for r in scores] == [0, 4, STEPS]
    held_out = {f"val/{s}/{n}" for s in ("pairs", "rankings") for n in (*names, "loss")}
    assert held_out <= scores[-1].keys()
    assert scores[0]["val/pairs/loss"] == pytest.approx(math.log(2), abs=LN2_ATOL)


@pytest.mark.parametrize("name", ["full", "lora", "kto"])
def test_it_learns_what_is_better_and_tells_of_it(done: dict[str, Path], name: str) -> None:
    source = "labels" if name == "kto" else "pairs"
    scores = [r for r in records(done[name]) if f"val/{source}/loss" in r]
    before, after = scores[0], scores[-1]
    assert after[f"val/{source}/loss"] < before[f"val/{source}/loss"] - 0.01
    margin = f"val/{source}/rewards/margins"
    assert after[margin] > before[margin] + 0.1
    told = (done[name] / "stderr").read_text("utf-8")
    assert f"| {source} |" in told and "margin before" in told
    if name != "kto":
        assert after[f"val/{source}/rewards/accuracies"] > 0.9
        assert "accuracy before" in told
        assert "  accuracy " in told and "  margin " in told  # on the line of a step
    account = json.loads((done[name] / "preference.json").read_text("utf-8"))
    consumed = json.loads((done[name] / "checkpoints/latest/preference.json").read_text("utf-8"))
    steps = _steps(done[name])
    assert consumed["tokens"] == account["tokens"] == steps[-1]["tokens"] > 0
    assert (done[name] / "loss.png").stat().st_size > 10_000
    samples = [json.loads(x) for x in (done[name] / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0, 4, STEPS] and samples[0]["reference"]


def test_kto_starts_from_a_baseline_of_0(done: dict[str, Path]) -> None:
    """Then every answer's loss is 1 - sigmoid(0)."""
    first, *rest = _steps(done["kto"])
    assert first["loss"] == pytest.approx(0.5, abs=LN2_ATOL)
    assert first["kl"] == pytest.approx(0.0, abs=REWARD_ATOL)
    assert any(step["kl"] > 0 for step in rest)
    step = rest[-1]
    margin = step["rewards/chosen"] - step["rewards/rejected"]
    assert step["rewards/margins"] == pytest.approx(margin, abs=REWARD_ATOL)


def test_two_processes_give_what_one_gives(done: dict[str, Path]) -> None:
    expected, found = records(done["lora"]), records(done["lora-pp2"])
    assert len(expected) == len(found) == STEPS + 3
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if "accuracies" in name and (
                a["step"] == 0 or a.get("lr") == _steps(done["lora"])[0].get("lr")
            ):
                continue  # the sign of a margin of 0 is that of its rounding
            tolerance = 10 * FP32_PARALLEL_RTOL
            assert b[name] == pytest.approx(value, rel=tolerance, abs=REWARD_ATOL), name


def test_the_second_run_finds_the_reference(
    chats: TinyChats,
    preferences: TinyPreferences,
    zygote: Zygote,
    done: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Another loss and another rate on the same data from the same weights score nothing."""
    more = ("loss.type=ipo", "train.train_iters=1", f"data.cache_dir={done['full'] / 'cache'}")
    ended = zygote.run(
        dpo_overrides(chats, preferences, tmp_path, *more, *QUIET), stderr=tmp_path / "stderr"
    )
    assert ended.codes == [0], ended.stderr
    assert "all found in" in ended.stderr and "reference: scored" not in ended.stderr
    assert "reference: scored" in (done["full"] / "stderr").read_text("utf-8")


STARTS = {"ipo": 25.0, "hinge": 1.0, "robust": math.log(2), "apo_zero": 1.0, "apo_down": 1.0}
"""The loss of a policy that is its reference, from each loss's equation at margins of 0."""


@pytest.mark.parametrize(
    "loss", [n for n in get_args(PreferenceLoss) if n not in ("sigmoid", "kto")]
)
def test_every_loss_starts(
    chats: TinyChats,
    preferences: TinyPreferences,
    zygote: Zygote,
    done: dict[str, Path],
    tmp_path: Path,
    loss: str,
) -> None:
    more = (f"loss.type={loss}", "train.train_iters=1", f"data.cache_dir={done['full'] / 'cache'}")
    ended = zygote.run(
        dpo_overrides(chats, preferences, tmp_path, *more, *QUIET), stderr=tmp_path / "stderr"
    )
    assert ended.codes == [0], ended.stderr
    (step,) = _steps(tmp_path)
    if loss in STARTS:
        assert step["loss"] == pytest.approx(STARTS[loss], rel=1e-5)
        assert "self-check" in ended.stderr
    else:
        assert math.isfinite(step["loss"]) and step["loss"] > 0
        assert "reference: none" in ended.stderr and "self-check" not in ended.stderr


INTERRUPTED = {
    "full": (signal.SIGTERM, "checkpoint.interval_steps=null", 75, 5),
    "lora-dropout-dp2": (signal.SIGKILL, "checkpoint.interval_steps=3", -signal.SIGKILL, 3),
    "kto": (signal.SIGTERM, "checkpoint.interval_steps=null", 75, 5),
}
"""What happens in the fifth step, where checkpoints are, how it ends, and where it goes on."""


@pytest.mark.parametrize("name", INTERRUPTED)
def test_interrupted_it_reads_and_becomes_the_same(
    chats: TinyChats,
    preferences: TinyPreferences,
    zygote: Zygote,
    done: dict[str, Path],
    tmp_path: Path,
    name: str,
) -> None:
    """Nothing is read twice, nothing is skipped, and the weights are equal bit for bit."""
    ranks = RUNS[name][0]
    number, interval, code, step = INTERRUPTED[name]
    arguments = [*_arguments(name, chats, preferences, tmp_path), interval]

    def start(part: str, signal_at: tuple[int, int] | None = None) -> Run:
        (tmp_path / part).mkdir()
        return zygote.start(
            arguments,
            stderr=tmp_path / part / "stderr",
            ranks=ranks,
            record_ids=tmp_path / part / "read",
            signal_at=signal_at,
        )

    # The last of the fifth step's two sequences, which the last rank reads.
    ended = start("first", (9, number)).wait()
    assert ended.codes[-1] == code, ended.stderr
    latest = json.loads((tmp_path / "checkpoints/latest/checkpoint.json").read_text())
    assert latest["step"] == step
    ended = start("second").wait()
    assert ended.codes == [0] * ranks, ended.stderr
    assert f"after step {step}" in ended.stderr
    # What the reference says is not asked again, nor is the first step looked at.
    assert "all found in" in ended.stderr and "self-check" not in ended.stderr

    consumed = latest["consumed_sequences"]
    before = _read(tmp_path / "first", ranks=ranks, upto=consumed)
    after = _read(tmp_path / "second", ranks=ranks)
    assert sorted(before) == list(range(consumed))
    assert sorted(after) == list(range(consumed, 2 * STEPS))
    assert before | after == _read(done[name], ranks=ranks)
    assert records(tmp_path) == records(done[name])
    for file in ("export/model.safetensors", "adapter/adapter_model.safetensors"):
        if (done[name] / file).exists():
            ours, theirs = load_file(tmp_path / file), load_file(done[name] / file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[n], theirs[n]) for n in ours)


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
