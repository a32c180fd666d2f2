"""Runs with groups of parameters and rows go on bit for bit, while frozen and after.

All are saved after three steps of six. Under ``frozen`` everything but the new rows is frozen
until step 4, so that the resumed run unfreezes it; under ``thawed`` until step 2, so that Adam has
counted one step of most parameters and three of the new rows.
"""

from pathlib import Path
from typing import Any

import pytest
from checkpoint_runs import (
    VOCABULARY,
    Job,
    Layout,
    Steps,
    layout,
    read_tensors,
    run_jobs,
    unequal,
)

from megatron_cgn.config.schema import ParamGroupConfig
from megatron_cgn.testing import FP32_PARALLEL_RTOL, run_distributed, tiny_hf_model

FIRST_NEW = 1000
UNTIL = {"frozen": 4, "thawed": 2}


def _groups(when: str, *parameters: str) -> tuple[ParamGroupConfig, ...]:
    return (
        ParamGroupConfig(
            name="new", parameters=parameters, rows="new", rows_from=FIRST_NEW, lr_mult=2.0
        ),
        ParamGroupConfig(name="rest", parameters=("others",), frozen_until_step=UNTIL[when]),
    )


SHAPES: dict[str, Layout] = {
    "one-plain": layout(1, distributed_optimizer=False),
    "dp2": layout(2),
    "tp2-sp": layout(2, tp=2, sequence_parallel=True),
    "pp2-overlap-tied": layout(2, pp=2, overlap_grad_reduce=True, overlap_param_gather=True).of(
        model="tied"
    ),
    "dp2-bf16": layout(2).of(precision="bf16"),
    "tp2-plain-bf16": layout(2, tp=2, distributed_optimizer=False).of(precision="bf16"),
}
LAYOUTS: dict[str, Layout] = {
    f"{name}-{when}": shape.of(
        groups=_groups(
            when, *(("embeddings",) if shape.model == "tied" else ("embeddings", "output"))
        )
    )
    for name, shape in SHAPES.items()
    for when in UNTIL
}
PAIRS = [
    ("dp2-frozen", "dp2-frozen"),
    ("dp2-thawed", "dp2-thawed"),
    ("pp2-overlap-tied-thawed", "pp2-overlap-tied-thawed"),
    ("tp2-plain-bf16-frozen", "tp2-plain-bf16-frozen"),
    ("tp2-plain-bf16-thawed", "tp2-plain-bf16-thawed"),
    ("dp2-frozen", "tp2-sp-frozen"),
    ("tp2-sp-thawed", "one-plain-thawed"),
    ("tp2-plain-bf16-thawed", "dp2-bf16-thawed"),
]


class Runs:
    """The results of all jobs, and where their checkpoints are."""

    def __init__(self, root: Path) -> None:
        fields: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32}
        models = {
            "llama": tiny_hf_model(root / "llama", **fields),
            "tied": tiny_hf_model(root / "tied", "qwen2", tie_word_embeddings=True, **fields),
        }
        jobs = [Job(name=a, layout=LAYOUTS[a]) for a in sorted({a for a, _ in PAIRS})]
        jobs += [Job(name=f"{a}→{b}", layout=LAYOUTS[b], start=a) for a, b in PAIRS]
        self._root = root
        self.ranks: list[dict[str, Steps]] = run_distributed(
            run_jobs, 2, root, models, jobs, timeout_s=600
        )

    def of(self, name: str) -> Steps:
        """A job's figures, as rank 0 has them."""
        return self.ranks[0][name]

    def tensors(self, name: str) -> dict[str, Any]:
        """All tensors of a job's checkpoint, which was saved when it had resumed."""
        return read_tensors(self._root / name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize(("saved", "resumed"), PAIRS)
def test_a_run_with_groups_goes_on(runs: Runs, saved: str, resumed: str) -> None:
    assert not unequal(runs.tensors(f"{saved}→{resumed}"), runs.tensors(saved))
    after, unbroken = runs.of(f"{saved}→{resumed}"), runs.of(saved)
    if saved == resumed:
        assert after.losses == unbroken.losses
        assert after.grad_norms == unbroken.grad_norms
        return
    # Half precision rounds sums of two layouts differently: `test_checkpoint_layouts.py`.
    loss, norm = (1e-2, 5e-2) if "bf16" in saved else (FP32_PARALLEL_RTOL,) * 2
    assert after.losses == pytest.approx(unbroken.losses, rel=loss)
    assert after.grad_norms == pytest.approx(unbroken.grad_norms, rel=norm)


@pytest.mark.parametrize("name", ["dp2", "tp2-plain-bf16"])
def test_moments_of_what_is_frozen_are_zero_in_the_checkpoint(runs: Runs, name: str) -> None:
    frozen, thawed = (runs.tensors(f"{name}-{when}") for when in ("frozen", "thawed"))
    moments = [n for n in frozen if n.startswith("optimizer.state.exp_avg")]
    assert len(moments) > 10
    for key in moments:
        tokens = key.endswith(("word_embeddings.weight", "output_layer.weight"))
        old = slice(0, FIRST_NEW) if tokens else slice(None)
        assert not frozen[key][old].any(), key
        assert thawed[key][old].any(), key
        if tokens:
            assert frozen[key][FIRST_NEW:].any(), key
