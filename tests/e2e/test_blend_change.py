"""A run goes on with another mix or another length, and nobody can tell that it was interrupted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_files import TinyFiles
from train_runs import Zygote, checkpoints, overrides, records

from megatron_cgn.data.consumed import documents_consumed, read_account

OLD = "{domain: 0.8, general: 0.2}"
NEW = "{domain: 0.25, general: 0.75}"
STEADY = ("optim.schedule=constant", "train.validation_interval_steps=null")


def _arguments(tiny: TinyFiles, output: Path, *more: str) -> list[str]:
    sources = (
        f"data.sources=[{{name: domain, path: {tiny.domain}}},"
        f"{{name: general, path: {tiny.general}}}]"
    )
    return overrides(tiny, output, *STEADY, sources, *more)


def _losses(output: Path) -> list[dict[str, Any]]:
    return [record for record in records(output) if "loss" in record]


def _read(path: Path) -> dict[str, Any]:
    account: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return account


def _sequences(account: dict[str, Any]) -> dict[str, int]:
    return {entry["name"]: entry["sequences"] for entry in account["sources"]}


@pytest.fixture(scope="module")
def planned(tiny: TinyFiles, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps whose second half has another mix, planned from the start."""
    output = tmp_path_factory.mktemp("planned")
    phases = f"data.phases=[{{until: 0.5, mix: {OLD}}}, {{until: 1.0, mix: {NEW}}}]"
    ended = zygote.run(_arguments(tiny, output, phases), stderr=output / "stderr")
    assert ended.codes == [0], ended.stderr
    return output


def test_the_plan_and_what_was_consumed(planned: Path) -> None:
    """32 sequences in two halves of 16: round(16 * 0.8) + round(16 * 0.25) of domain text."""
    plan = _read(planned / "blend.json")
    assert _sequences(plan) == {"domain": 13 + 4, "general": 3 + 12}
    assert [(p["first_step"], p["last_step"]) for p in plan["phases"]] == [(1, 4), (5, 8)]
    consumed = {
        step: _sequences(_read(planned / f"checkpoints/step_{step:07d}/blend.json"))
        for step in (2, 4, 6, 8)
    }
    assert consumed[2] == {"domain": 6, "general": 2}  # round(6.4)
    assert consumed[4] == {"domain": 13, "general": 3}
    assert consumed[6] == {"domain": 13 + 2, "general": 3 + 6}
    assert consumed[8] == _sequences(plan)
    assert _read(planned / "checkpoints/step_0000008/blend.json") == plan
    blend, total = read_account(planned / "checkpoints" / "step_0000006")
    tokens: Counter[str] = Counter()
    for found in documents_consumed(blend, consumed=total):
        tokens[found.source] += int(found.tokens.sum())
    assert tokens == {name: number * 32 for name, number in consumed[6].items()}
    text = (planned / "stderr").read_text("utf-8")
    assert "phase 2: steps 5-8" in text


def test_a_changed_run_is_the_planned_one_bit_for_bit(
    tiny: TinyFiles, zygote: Zygote, planned: Path, tmp_path: Path
) -> None:
    """Four steps of one mix; then longer, and with another: refused unless what was read stays."""
    output = tmp_path / "run"
    ended = zygote.run(
        _arguments(tiny, output, f"data.mix={OLD}", "train.train_iters=4"),
        stderr=tmp_path / "stderr",
    )
    assert ended.codes == [0], ended.stderr
    before = (output / "metrics.jsonl").read_bytes()

    ended = zygote.run(_arguments(tiny, output, f"data.mix={NEW}"), stderr=tmp_path / "stderr")
    assert ended.codes == [2], ended.stderr
    assert f"data.plan: the checkpoint read {OLD} in steps 1 to 4; this run" in ended.stderr
    assert f"data.phases=[{{until: 4, mix: {OLD}}}, {{mix: …}}]" in ended.stderr
    ended = zygote.run(
        _arguments(tiny, output, f"data.mix={OLD}", "train.train_iters=3"),
        stderr=tmp_path / "stderr",
    )
    assert ended.codes == [2], ended.stderr
    assert "has done 4 steps and this run has only 3" in ended.stderr
    separated = (f"data.mix={OLD}", "data.reset_attention_mask=true")
    ended = zygote.run(_arguments(tiny, output, *separated), stderr=tmp_path / "stderr")
    assert ended.codes == [2], ended.stderr
    assert "data.reset_attention_mask: checkpoint False, this run True" in ended.stderr
    assert (output / "metrics.jsonl").read_bytes() == before
    assert checkpoints(output) == ["latest", "step_0000002", "step_0000004"]

    # The remedy that the message gave.
    phases = f"data.phases=[{{until: 4, mix: {OLD}}}, {{mix: {NEW}}}]"
    ended = zygote.run(_arguments(tiny, output, phases), stderr=tmp_path / "stderr")
    assert ended.codes == [0], ended.stderr
    assert "the run now has 8 steps instead of 4: the learning rate" in ended.stderr
    assert "and is 0.001 at step 5 as before" in ended.stderr  # the schedule is constant
    assert _losses(output) == _losses(planned)
    for name in ("blend.json", "checkpoints/step_0000006/blend.json"):
        assert _read(output / name) == _read(planned / name)


def test_epochs_of_the_domain_decide_the_length(
    tiny: TinyFiles, zygote: Zygote, tmp_path: Path
) -> None:
    """Half a pass over the domain text and a quarter as many sequences of general text."""
    output = tmp_path / "run"
    more = (f"data.mix={OLD}", "train.train_iters=null", "train.epochs=0.5")
    ended = zygote.run(_arguments(tiny, output, *more), stderr=tmp_path / "stderr")
    assert ended.codes == [0], ended.stderr
    domain, general = _read(output / "blend.json")["sources"]
    limit = (domain["files"][0]["tokens_per_epoch"] // 2 - 1) // 32
    assert limit - 4 < domain["sequences"] <= limit
    assert abs(general["sequences"] - domain["sequences"] / 4) <= 1
    steps = (domain["sequences"] + general["sequences"]) // 4
    assert len(_losses(output)) == steps
    assert f"train.epochs=0.5 of 'domain': {steps} whole steps of 4 sequences" in ended.stderr
