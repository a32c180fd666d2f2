"""Stage dpo through train.py: layouts, adapters, every loss, resuming, and what a run tells."""

import json
import math
import re
import shutil
import signal
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dpo_runs import dpo_overrides
from safetensors.torch import load_file
from tiny_chats import TinyChats
from tiny_preferences import TinyPreferences, write_tiny_preferences
from train_runs import Run, Zygote, records

from megatron_cgn.data.reference_store import ENTRY
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
    "full-pp2": (2, PP),
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


@pytest.mark.parametrize("name", ["full", "full-pp2"])
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


@pytest.mark.parametrize("name", ["full", "lora-dropout-dp2", "kto"])
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
    expected, found = records(done["full"]), records(done["full-pp2"])
    assert len(expected) == len(found) == STEPS + 3
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if "accuracies" in name and a["step"] <= 1:
                continue  # the sign of a margin of 0 is that of its rounding
            tolerance = 10 * FP32_PARALLEL_RTOL
            assert b[name] == pytest.approx(value, rel=tolerance, abs=REWARD_ATOL), name
    # Two data-parallel ranks share what is held out; adapters add nothing yet.
    first = records(done["lora-dropout-dp2"])[0]
    for name, value in expected[0].items():
        if "accuracies" not in name:
            assert first[name] == pytest.approx(value, rel=FP32_PARALLEL_RTOL, abs=REWARD_ATOL)


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


def test_a_loss_without_a_reference_scores_none(
    chats: TinyChats, preferences: TinyPreferences, zygote: Zygote, tmp_path: Path
) -> None:
    more = ("loss.type=simpo", "train.train_iters=1", *QUIET)
    ended = zygote.run(
        dpo_overrides(chats, preferences, tmp_path, *more), stderr=tmp_path / "stderr"
    )
    assert ended.codes == [0], ended.stderr
    (step,) = _steps(tmp_path)
    assert math.isfinite(step["loss"]) and step["loss"] > 0
    assert "reference: none" in ended.stderr and "self-check" not in ended.stderr
    assert not list((tmp_path / "cache").glob("reference-*"))


def test_margins_that_explode_are_told_of_once(
    chats: TinyChats, preferences: TinyPreferences, zygote: Zygote, tmp_path: Path
) -> None:
    more = (
        "optim.lr=0.1",
        "loss.beta=1.0",
        "train.global_batch_size=16",
        "train.train_iters=8",
        "train.log_interval_steps=2",
    )
    ended = zygote.run(
        dpo_overrides(chats, preferences, tmp_path, *more, *QUIET), stderr=tmp_path / "stderr"
    )
    assert ended.codes == [0], ended.stderr
    found = re.findall("warning: step ([0-9]+): the mean margin of rewards is", ended.stderr)
    assert len(found) == 1 and int(found[0]) % 2 == 0, ended.stderr


def test_scores_that_are_not_its_own_stop_it_before_the_first_step(
    chats: TinyChats,
    preferences: TinyPreferences,
    zygote: Zygote,
    done: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Whole and well-formed, but of something else: nothing but the self-check can see it."""
    cache = tmp_path / "cache"
    shutil.copytree(done["full"] / "cache", cache)
    for path in cache.glob("reference-*/scores-*.bin"):
        _move_scores(path, nats=0.5)
    more = (f"data.cache_dir={cache}", *QUIET)
    ended = zygote.run(
        dpo_overrides(chats, preferences, tmp_path / "run", *more),
        stderr=tmp_path / "stderr",
        ranks=2,
    )
    assert ended.codes == [2, 2], ended.stderr
    assert "Traceback" not in ended.stderr
    (line,) = (x for x in ended.stderr.splitlines() if x.startswith("error: "))
    for text in ("self-check before the first step", "the cache is likely to be wrong", str(cache)):
        assert text in line, line
    # A pair whose answers are both off by as much has a margin of 0 and a loss of ln 2.
    assert "loss 0.6931, margin 0.0000" in line
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def _move_scores(path: Path, *, nats: float) -> None:
    """Rewrite a file of scores with others, checksums and all."""
    content, moved, begin = path.read_bytes(), b"", 0
    while begin < len(content):
        magic, count, _ = struct.unpack_from("<4sII", content, begin)
        begin += struct.calcsize("<4sII")
        block = np.frombuffer(content, dtype=ENTRY, count=count, offset=begin).copy()
        begin += block.nbytes
        block["logp"] += nats
        data = block.tobytes()
        moved += struct.pack("<4sII", magic, count, zlib.crc32(data)) + data
    path.write_bytes(moved)


CHANGES = {
    "another beta": (("loss.beta=0.2",), "loss.beta: checkpoint 0.1, this run 0.2"),
    "other weights": (("model.hf_path={export}",), "reference.weights: checkpoint"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_going_on_as_another_run_is_refused(
    chats: TinyChats,
    preferences: TinyPreferences,
    zygote: Zygote,
    done: dict[str, Path],
    tmp_path: Path,
    name: str,
) -> None:
    settings, text = CHANGES[name]
    more = [setting.format(export=done["full"] / "export") for setting in settings]
    more += [f"data.cache_dir={tmp_path / 'cache'}", f"checkpoint.dir={done['full']}/checkpoints"]
    before = records(done["full"])
    ended = zygote.run(
        dpo_overrides(chats, preferences, done["full"], "train.train_iters=9", *more, *QUIET),
        stderr=tmp_path / "stderr",
    )
    assert ended.codes == [2], ended.stderr
    assert "Traceback" not in ended.stderr and ended.stderr.count("error: ") == 1, ended.stderr
    assert text in ended.stderr and "step_0000008" in ended.stderr, ended.stderr
    assert records(done["full"]) == before


INTERRUPTED = {
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
