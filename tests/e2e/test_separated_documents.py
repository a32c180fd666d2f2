"""``data.reset_attention_mask`` through train.py: training, validation and its refusals."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_files import TinyFiles
from train_runs import Zygote, overrides, records

from megatron_cgn.testing import FP32_PARALLEL_RTOL

SEPARATED = "data.reset_attention_mask=true"
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "joined": (1, ()),
    "one": (1, (SEPARATED, "data.num_workers=1")),
    "cp2": (2, (SEPARATED, "parallel.context_parallel_size=2", "train.recompute=full")),
    "dp2-every-third": (2, (SEPARATED, "train.log_interval_steps=3")),
}
HELD_OUT = 6
"""Documents of each source held out: 0.2 of 30."""


@pytest.fixture(scope="module")
def runs(
    tiny: TinyFiles, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    found = {}
    for name, (ranks, more) in RUNS.items():
        output = tmp_path_factory.mktemp(name)
        ended = zygote.run(overrides(tiny, output, *more), stderr=output / "stderr", ranks=ranks)
        assert ended.codes == [0] * ranks, ended.stderr
        found[name] = records(output)
    return found


def _steps(run: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {r["step"]: r for r in run if "loss" in r}


def _scores(run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in run if "val/domain/loss" in r]


def test_layouts_agree_and_joined_documents_differ(runs: dict[str, list[dict[str, Any]]]) -> None:
    one = runs["one"]
    assert len(runs["cp2"]) == len(one) > 8
    for ours, theirs in zip(runs["cp2"], one, strict=True):
        assert ours == pytest.approx(theirs, rel=FP32_PARALLEL_RTOL)
    joined = _steps(runs["joined"])
    for step, record in _steps(one).items():
        assert record["loss"] != pytest.approx(joined[step]["loss"], rel=1e-3)


def test_source_losses_average_to_the_loss(runs: dict[str, list[dict[str, Any]]]) -> None:
    steps = _steps(runs["one"])
    both = 0
    for record in steps.values():
        losses = [record[n] for n in record if n.startswith("train/")]
        assert losses and set(record) & {"train/domain/loss", "train/general/loss"}
        both += len(losses) == 2
        assert min(losses) <= record["loss"] * 1.000001
        assert max(losses) >= record["loss"] * 0.999999
    assert 0 < both < len(steps), "some steps read both sources and some do not"


def test_figures_of_every_third_step_are_those_of_the_step(
    runs: dict[str, list[dict[str, Any]]],
) -> None:
    every, third = _steps(runs["one"]), _steps(runs["dp2-every-third"])
    assert sorted(third) == [3, 6, 8]
    for step, record in third.items():
        assert record == pytest.approx(every[step], rel=FP32_PARALLEL_RTOL)


def test_held_out_loss_is_that_of_documents_one_by_one(
    tiny: TinyFiles, runs: dict[str, list[dict[str, Any]]]
) -> None:
    """Before the first step, against `transformers`, with windows of 32 labels cut by hand."""
    from transformers import AutoModelForCausalLM

    from megatron_cgn.data.indexed import check_index, map_tokens

    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()
    index = check_index(tiny.domain)
    eod = index.sidecar.eod_id
    assert eod is not None
    start = int(index.lengths[:-HELD_OUT].sum())
    text = [eod, *map_tokens(index)[start:].tolist()]
    total, count = 0.0, len(text) - 1
    for first in range(0, count, 32):
        tokens, labels = text[first : first + 32][: count - first], text[first + 1 : first + 33]
        begins = [i for i in range(len(tokens)) if i == 0 or tokens[i - 1] == eod]
        for a, b in zip(begins, [*begins[1:], len(tokens)], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([tokens[a:b]])).logits[0]
            total += float(
                torch.nn.functional.cross_entropy(
                    logits, torch.tensor(labels[a:b]), reduction="sum"
                )
            )
    first_score = _scores(runs["one"])[0]
    assert first_score["val/domain/loss"] == pytest.approx(total / count, rel=FP32_PARALLEL_RTOL)
    joined = _scores(runs["joined"])[0]
    for name in ("val/domain/loss", "val/domain/bits_per_byte"):
        assert math.isfinite(first_score[name])
        assert first_score[name] != pytest.approx(joined[name], rel=1e-3)


def test_an_index_without_ends_of_documents_is_refused(
    tiny: TinyFiles, zygote: Zygote, tmp_path: Path
) -> None:
    shutil.copytree(tiny.model.parent, tmp_path / "files", dirs_exist_ok=True)
    files = tmp_path / "files"
    broken = TinyFiles(
        model=files / "model", domain=str(files / "domain"), general=str(files / "general")
    )
    sidecar = files / "general.json"
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "eod_id": None}))
    more = ("train.train_iters=1", "optim.warmup_steps=0")
    ended = zygote.run(
        overrides(broken, tmp_path / "run", SEPARATED, *more), stderr=tmp_path / "stderr"
    )
    assert ended.codes == [2]
    assert "general" in ended.stderr and "reset_attention_mask=false" in ended.stderr
    assert "Traceback" not in ended.stderr and str(files / "domain") not in ended.stderr
