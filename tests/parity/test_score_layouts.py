"""Scalar heads: every layout against the sequence classifiers of `transformers`, both ways.

Four processes and then two run all layouts: a classifier that `transformers` wrote is opened,
valued, trained and exported, and what is exported is opened by `transformers`, and by `peft`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import global_batch
from score_runs import (
    LORA,
    MODELS,
    SAVED_AFTER,
    Case,
    exported,
    plain_loop,
    run_cases,
    write_models,
)
from torch import Tensor

from megatron_cgn.config.schema import ParallelConfig
from megatron_cgn.hf.adapter_to_hf import convert_adapter, merge_checkpoint
from megatron_cgn.hf.to_hf import convert_to_hf
from megatron_cgn.testing import FP32_PARALLEL_RTOL, run_distributed

VALUES_ATOL = 1e-5
"""FP32 scores near 1 of two implementations: other kernels, the same equations."""
WEIGHTS_RTOL = 1e-4
"""Of a tensor's norm; see `test_engine_layouts`."""
EFFECT = 0.05
"""Two steps change scores by more; less would let untrained ones pass."""


def _layout(tp: int = 1, pp: int = 1, cp: int = 1, **rest: Any) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        **rest,
    )


FULL: dict[str, Case] = {
    "tp2-sp-full": Case(parallel=_layout(tp=2, sequence_parallel=True), recompute="full"),
    "pp2": Case(parallel=_layout(pp=2), model="tied-bias"),
    "pp2-vp2": Case(parallel=_layout(pp=2, virtual_pipeline_model_parallel_size=2)),
    "cp2": Case(parallel=_layout(cp=2)),
    "dp2-overlap": Case(
        parallel=ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    ),
    "tp2-pp2": Case(parallel=_layout(tp=2, pp=2), model="tied-bias"),
}
RESUMED: dict[str, Case] = {
    "from-tp2-pp2": Case(
        parallel=_layout(tp=2, sequence_parallel=True, distributed_optimizer=False),
        model="tied-bias",
        resumes="tp2-pp2",
    ),
}
ADAPTED: dict[str, Case] = {
    "lora-dp2": Case(start="language", model="tied-bias", lora=LORA),
    "lora-tp2-pp2-sp": Case(
        start="language",
        model="tied-bias",
        lora=LORA,
        parallel=_layout(tp=2, pp=2, sequence_parallel=True),
    ),
    "lora-resumed": Case(
        start="language",
        model="tied-bias",
        lora=LORA,
        parallel=_layout(pp=2, virtual_pipeline_model_parallel_size=2),
        resumes="lora-tp2-pp2-sp",
        recompute="full",
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores")
    write_models(path)
    return path


@pytest.fixture(scope="module")
def plain(root: Path) -> dict[str, Any]:
    return {name: plain_loop(root / "scores" / name) for name in MODELS}


@pytest.fixture(scope="module")
def ranks(root: Path) -> list[dict[str, Any]]:
    cases = FULL | RESUMED | ADAPTED
    fours = {name: case for name, case in cases.items() if "tp2-pp2" in name}
    fours.pop("from-tp2-pp2")
    twos = {name: case for name, case in cases.items() if name not in fours}
    four = run_distributed(run_cases, 4, fours, root, warm=True)
    two = run_distributed(run_cases, 2, twos, root, warm=True)
    return [a | b for a, b in zip(four, two * 2, strict=True)]


def _classifier(path: Path, adapter: Path | None = None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, **({} if adapter is None else {"num_labels": 1})
    )
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


@torch.no_grad()
def _scores(model: Any) -> Tensor:
    """What `transformers` itself takes for the scores of the rows."""
    scores: Tensor = model(global_batch(100).tokens).logits
    return scores


def _last(values: Any) -> Tensor:
    return torch.tensor(values)[:, -1:]


def _hold(found: dict[str, Any], weights: dict[str, Tensor], expected: dict[str, Any]) -> None:
    number = len(found["losses"])
    for name in ("losses", "norms"):
        assert found[name] == pytest.approx(expected[name][-number:], rel=FP32_PARALLEL_RTOL)
    assert weights.keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert (weights[name] - weight).norm() < WEIGHTS_RTOL * weight.norm(), name


@pytest.mark.parametrize("case", FULL)
def test_values_and_training_are_those_of_transformers(
    ranks: list[dict[str, Any]], plain: dict[str, Any], root: Path, case: str
) -> None:
    expected = plain[FULL[case].model]
    for rank in ranks:
        values = torch.tensor(rank[case]["values"])
        torch.testing.assert_close(values, expected["values"], rtol=0, atol=VALUES_ATOL)
        assert rank[case]["losses"] == ranks[0][case]["losses"]
    _hold(ranks[0][case], exported(root / "export" / case), expected)


@pytest.mark.parametrize("case", ["tp2-pp2", "tp2-sp-full"])
def test_an_export_scores_alike_in_transformers(
    ranks: list[dict[str, Any]], root: Path, case: str
) -> None:
    model = _classifier(root / "export" / case)
    assert model.config.num_labels == 1
    found = _last(ranks[0][case]["after"])
    torch.testing.assert_close(found, _scores(model), rtol=0, atol=VALUES_ATOL)
    assert (found - _last(ranks[0][case]["values"])).abs().max() > EFFECT


def test_a_checkpoint_goes_on_under_another_layout(
    ranks: list[dict[str, Any]], plain: dict[str, Any], root: Path
) -> None:
    found = ranks[0]["from-tp2-pp2"]
    assert len(found["losses"]) == 1
    _hold(found, exported(root / "export" / "from-tp2-pp2"), plain["tied-bias"])


def test_a_checkpoint_becomes_a_classifier(ranks: list[dict[str, Any]], root: Path) -> None:
    (checkpoint,) = (root / "checkpoints" / "tp2-pp2").glob(f"step_*{SAVED_AFTER}")
    convert_to_hf(checkpoint, root / "converted")
    tensors = exported(root / "converted")
    assert tensors["score.weight"].shape == (1, 64) and "lm_head.weight" not in tensors
    assert torch.isfinite(_scores(_classifier(root / "converted"))).all()


def test_adapters_train_the_head_too_on_every_layout(
    ranks: list[dict[str, Any]], root: Path
) -> None:
    one, four, resumed = (ranks[0][name] for name in ADAPTED)
    # The head of both was drawn from the seed.
    torch.testing.assert_close(
        torch.tensor(one["values"]), torch.tensor(four["values"]), rtol=0, atol=VALUES_ATOL
    )
    assert one["losses"] == pytest.approx(four["losses"], rel=FP32_PARALLEL_RTOL)
    assert resumed["losses"] == pytest.approx(four["losses"][-1:], rel=FP32_PARALLEL_RTOL)
    first = exported(root / "adapter" / "lora-dp2")
    assert "base_model.model.score.weight" in first
    for name in list(ADAPTED)[1:]:
        other = exported(root / "adapter" / name)
        assert other.keys() == first.keys()
        for key, tensor in first.items():
            assert (other[key] - tensor).norm() < WEIGHTS_RTOL * tensor.norm(), key


def test_an_adapter_scores_alike_in_peft_merged_and_converted(
    ranks: list[dict[str, Any]], root: Path
) -> None:
    name, base = "lora-tp2-pp2-sp", root / "language" / "tied-bias"
    expected = _last(ranks[0][name]["after"])
    assert (expected - _last(ranks[0][name]["values"])).abs().max() > EFFECT
    (checkpoint,) = (root / "checkpoints" / name).glob("step_*")
    convert_adapter(checkpoint, root / "step-adapter")
    merge_checkpoint(checkpoint, root / "step-merged")
    for model, wanted in (
        (_classifier(base, root / "adapter" / name), expected),
        (_classifier(root / "export" / name), expected),
        (
            _classifier(base, root / "step-adapter"),
            _scores(_classifier(root / "step-merged")),
        ),
    ):
        torch.testing.assert_close(_scores(model), wanted, rtol=0, atol=VALUES_ATOL)
