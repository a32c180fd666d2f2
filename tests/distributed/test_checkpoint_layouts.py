"""Checkpoints saved under one layout and resumed under another, with the optimizer.

What was read back is saved again at once, and every tensor of both checkpoints compared bit for
bit: weights, master weights and moments. Then three more steps are compared with those that the
saving run took without a break.
"""

from pathlib import Path

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
from torch import Tensor

from megatron_cgn.testing import FP32_PARALLEL_RTOL, run_distributed, tiny_hf_model

HALF_PARALLEL_RTOL = 1e-2
"""Losses of BF16 and FP16 runs on two layouts over three steps: their sums are rounded to 8 and 11
bits in another order."""
HALF_PARALLEL_NORM_RTOL = 5e-2
"""Gradient norms likewise, which collect the rounding of all layers."""

LAYOUTS: dict[str, Layout] = {
    "one": layout(1),
    "one-plain": layout(1, distributed_optimizer=False),
    "tp2": layout(2, tp=2),
    "tp2-sp": layout(2, tp=2, sequence_parallel=True),
    "pp2": layout(2, pp=2),
    "pp2-interleaved": layout(2, pp=2, vp=2),
    "dp2": layout(2),
    "dp2-plain": layout(2, distributed_optimizer=False),
    "cp2": layout(2, context_parallel_size=2),
    "tp2-pp2": layout(4, tp=2, pp=2),
    "tp2-dp2": layout(4, tp=2),
    "pp2-dp2-plain": layout(4, pp=2, distributed_optimizer=False),
    "dp4-overlap": layout(4, overlap_grad_reduce=True, overlap_param_gather=True),
}
BF16 = {f"{name}-bf16": LAYOUTS[name].of(precision="bf16") for name in LAYOUTS}
TIED = {f"{name}-tied": LAYOUTS[name].of(model="tied") for name in LAYOUTS}
FP16 = {
    "one-fp16": LAYOUTS["one"].of(precision="fp16", initial_loss_scale=2.0**20),
    "tp2-fp16": LAYOUTS["tp2"].of(precision="fp16"),
    "one-fp16-all-skipped": LAYOUTS["one"].of(precision="fp16", initial_loss_scale=2.0**60),
}
ALL = {**LAYOUTS, **BF16, **TIED, **FP16}
ALL_PAIRS = [(a, b) for a in LAYOUTS for b in LAYOUTS]
SAME = ("one", "tp2-sp", "pp2-interleaved", "dp2", "tp2-pp2", "dp4-overlap")
SOME_PAIRS = [
    *((name, name) for name in SAME),
    # From each layout to one that differs in another way; `make soak` has every pair.
    *zip(list(LAYOUTS), [*list(LAYOUTS)[5:], *list(LAYOUTS)[:5]], strict=True),
]
HALF_PAIRS = [
    ("dp2-bf16", "dp2-bf16"),
    ("one-bf16", "tp2-pp2-bf16"),
    ("tp2-pp2-bf16", "dp2-plain-bf16"),
    ("dp2-plain-bf16", "pp2-interleaved-bf16"),
    ("pp2-interleaved-bf16", "tp2-dp2-bf16"),
    ("dp4-overlap-bf16", "one-plain-bf16"),
    ("one-fp16", "one-fp16"),
    ("one-fp16", "tp2-fp16"),
    ("one-fp16-all-skipped", "one-fp16-all-skipped"),
]
TIED_PAIRS = [("one-tied", "pp2-tied"), ("pp2-tied", "tp2-tied"), ("tp2-pp2-tied", "dp2-tied")]
OTHER_PRECISION = [
    ("dp2", "dp2-bf16"),
    ("one", "tp2-pp2-bf16"),
    ("dp2-bf16", "dp2"),
    ("tp2-pp2-bf16", "dp2-plain"),
]
MASTER = "optimizer.state.fp32_param."


class Runs:
    """The results of all jobs, and where their checkpoints are."""

    def __init__(self, root: Path, pairs: list[tuple[str, str]]) -> None:
        models = {
            "llama": tiny_hf_model(root / "llama", vocab_size=VOCABULARY, hidden_size=32),
            "tied": tiny_hf_model(
                root / "tied",
                "qwen2",
                vocab_size=VOCABULARY,
                hidden_size=32,
                tie_word_embeddings=True,
            ),
        }
        starts = sorted({a for a, _ in pairs})
        jobs = [Job(name=a, layout=ALL[a]) for a in starts]
        jobs += [Job(name=f"{a}→{b}", layout=ALL[b], start=a) for a, b in pairs]
        self._root = root
        self.ranks: list[dict[str, Steps]] = run_distributed(
            run_jobs, 4, root, models, jobs, timeout_s=1200
        )

    def of(self, name: str) -> Steps:
        """A job's figures, as rank 0 has them."""
        return self.ranks[0][name]

    def unequal(self, name: str, reference: str) -> list[str]:
        """Tensors in which two jobs' checkpoints differ."""
        return unequal(read_tensors(self._root / name), read_tensors(self._root / reference))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of a job's checkpoint."""
        return read_tensors(self._root / name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    pairs = [*dict.fromkeys([*SOME_PAIRS, *HALF_PAIRS, *TIED_PAIRS, *OTHER_PRECISION])]
    return Runs(tmp_path_factory.mktemp("checkpoints"), pairs)


def _check_fp32(runs: Runs, saved: str, resumed: str) -> None:
    assert not runs.unequal(f"{saved}→{resumed}", saved)
    after, unbroken = runs.of(f"{saved}→{resumed}"), runs.of(saved)
    if saved == resumed:
        assert after.losses == unbroken.losses
        assert after.grad_norms == unbroken.grad_norms
    else:
        assert after.losses == pytest.approx(unbroken.losses, rel=FP32_PARALLEL_RTOL)
        assert after.grad_norms == pytest.approx(unbroken.grad_norms, rel=FP32_PARALLEL_RTOL)


@pytest.mark.parametrize(("saved", "resumed"), [*SOME_PAIRS, *TIED_PAIRS])
def test_a_run_goes_on_under_another_layout(runs: Runs, saved: str, resumed: str) -> None:
    _check_fp32(runs, saved, resumed)


@pytest.mark.soak
def test_every_layout_resumes_every_layout(tmp_path: Path) -> None:
    runs = Runs(tmp_path, ALL_PAIRS)
    for saved, resumed in ALL_PAIRS:
        _check_fp32(runs, saved, resumed)


@pytest.mark.parametrize("name", SAME)
def test_random_states_of_every_rank_return_under_the_same_layout(runs: Runs, name: str) -> None:
    for rank in range(LAYOUTS[name].world):
        results = runs.ranks[rank]
        assert results[f"{name}→{name}"].draws == results[name].draws


@pytest.mark.parametrize(("saved", "resumed"), HALF_PAIRS)
def test_half_precision_keeps_every_bit_of_the_optimizer(
    runs: Runs, saved: str, resumed: str
) -> None:
    assert not runs.unequal(f"{saved}→{resumed}", saved)
    assert any(name.startswith(MASTER) for name in runs.tensors(saved))
    after, unbroken = runs.of(f"{saved}→{resumed}"), runs.of(saved)
    if saved == resumed:
        assert after.losses == unbroken.losses
        assert after.grad_norms == unbroken.grad_norms
        return
    assert after.losses == pytest.approx(unbroken.losses, rel=HALF_PARALLEL_RTOL)
    known = [(a, b) for a, b in zip(after.grad_norms, unbroken.grad_norms, strict=True) if a and b]
    assert [a for a, _ in known] == pytest.approx(
        [b for _, b in known], rel=HALF_PARALLEL_NORM_RTOL
    )


def test_the_loss_scale_of_fp16_is_restored(runs: Runs) -> None:
    """It starts so high that it has fallen before the checkpoint is saved."""
    saved, resumed = runs.of("one-fp16"), runs.of("one-fp16→tp2-fp16")
    assert saved.loss_scale is not None and saved.loss_scale < 2.0**20
    assert resumed.loss_scale == saved.loss_scale


@pytest.mark.parametrize(("saved", "resumed"), OTHER_PRECISION)
def test_another_precision_takes_the_exact_weights(runs: Runs, saved: str, resumed: str) -> None:
    """FP32 weights become BF16's master weights, and the other way round, without rounding."""
    before, after = runs.tensors(saved), runs.tensors(f"{saved}→{resumed}")
    to_bf16 = not saved.endswith("bf16")
    weights = [n for n in before if not n.startswith("optimizer.")]
    assert weights
    for name in weights:
        exact = before[name] if to_bf16 else before[MASTER + name]
        taken = after[MASTER + name] if to_bf16 else after[name]
        assert taken.equal(exact), name
    moments = [n for n in before if n.startswith("optimizer.") and not n.startswith(MASTER)]
    assert moments and all(after[n].equal(before[n]) for n in moments)
