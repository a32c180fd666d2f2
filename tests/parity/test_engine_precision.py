"""BF16 and FP16 stay near FP32; an FP16 step that overflows is skipped and said to be."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import OPTIM, Case, build_engine, train, write_models

from megatron_cgn.config.schema import OptimConfig, ParallelConfig
from megatron_cgn.engine.engine import Engine, StepReport
from megatron_cgn.parallel.state import shutdown_parallel
from megatron_cgn.testing import release_engine, run_distributed

EPSILON = {"bf16": 2.0**-8, "fp16": 2.0**-11}
"""Spacing of the type at 1: 8 and 11 bits of significand."""
LOSS_RTOL = 0.5
"""In epsilons. Activations are rounded to half an epsilon each; the mean over a batch's tokens
averages that out (a tenth of an epsilon was seen) and a wrong cast would not."""
GRAD_NORM_RTOL = 4.0
"""In epsilons: a gradient passes twice as many roundings, and after ten steps the weights, whose
least significant bit is an epsilon, differ too (one and a half were seen)."""


def _loss_scale(scale: float) -> OptimConfig:
    return dataclasses.replace(OPTIM, initial_loss_scale=scale)


OVERFLOWING = _loss_scale(2.0**40)
TWO: dict[str, Case] = {
    "bf16-tp2-sp": Case(
        precision="bf16",
        micro_batch_size=2,
        parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    ),
    "bf16-pp2-interleaved": Case(
        precision="bf16",
        parallel=ParallelConfig(
            pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
        ),
        model="qwen2-tied-bias",
    ),
    "bf16-cp2-qk-norm": Case(
        precision="bf16",
        micro_batch_size=2,
        parallel=ParallelConfig(context_parallel_size=2),
        model="qwen3-qk-norm",
    ),
    "fp16-pp2": Case(
        precision="fp16",
        optim=_loss_scale(2.0**12),
        parallel=ParallelConfig(pipeline_model_parallel_size=2),
    ),
    "fp16-dp2-overlap": Case(
        precision="fp16",
        optim=_loss_scale(2.0**12),
        parallel=ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True),
    ),
}


def _weights(engine: Engine) -> dict[str, Any]:
    return {
        f"{i}.{name}": weight.detach().float().numpy().copy()
        for i, chunk in enumerate(engine.chunks)
        for name, weight in chunk.named_parameters()
    }


def _unequal(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [name for name in a if not (a[name] == b[name]).all()]


def _overflow(engine: Engine) -> dict[str, Any]:
    """One step that must overflow and some more, and what they did to the weights.

    The engine's loss scale is `OVERFLOWING`.
    """
    before = _weights(engine)
    (skipped,) = train(engine, steps=[0])
    after = _weights(engine)
    # Backing off takes one step a halving; 24 are needed at most.
    steps = train(engine, steps=range(1, 30))
    return {
        "report": dataclasses.asdict(skipped),
        "changed": _unequal(before, after),
        "recovered": [not r.skipped for r in steps],
        "changed_later": len(_unequal(before, _weights(engine))),
        "steps": [r.step for r in steps],
    }


def _alone[R](case: Case, path: Path, use: Callable[[Engine], R]) -> R:
    """Use an engine in this process, and leave nothing of it behind."""
    engine = build_engine(case, path)
    try:
        return use(engine)
    finally:
        release_engine(engine)
        shutdown_parallel()


def _run_two(models: dict[str, Path]) -> dict[str, Any]:
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        name: [dataclasses.asdict(r) for r in train(build_engine(case, models[case.model]))]
        for name, case in TWO.items()
    }
    for name in ("fp16-pp2", "fp16-dp2-overlap"):
        case = dataclasses.replace(TWO[name], optim=OVERFLOWING)
        results[f"{name}-overflow"] = _overflow(build_engine(case, models[case.model]))
    shutdown_parallel()
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def full(models: dict[str, Path]) -> dict[str, list[StepReport]]:
    """FP32 on one process, which `test_engine_layouts.py` holds to plain PyTorch."""
    return {name: _alone(Case(model=name), path, train) for name, path in models.items()}


@pytest.fixture(scope="module")
def ranks(models: dict[str, Path]) -> list[dict[str, Any]]:
    return run_distributed(_run_two, 2, models)


def _near(reports: list[Any], full: list[StepReport], precision: str) -> None:
    epsilon = EPSILON[precision]
    for report, reference in zip(reports, full, strict=True):
        assert not report["skipped"]
        loss = reference.metrics["loss"]
        assert abs(report["metrics"]["loss"] - loss) < LOSS_RTOL * epsilon * loss
        norm = reference.grad_norm
        assert norm is not None
        assert abs(report["grad_norm"] - norm) < GRAD_NORM_RTOL * epsilon * norm
        assert report["count"] == reference.count
    # Near, and yet not the same: the arithmetic was the one that was asked for.
    assert report["metrics"]["loss"] != loss


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("distributed_optimizer", [True, False])
@pytest.mark.parametrize("model", ["llama", "qwen3-qk-norm"])
def test_half_precision_stays_near_fp32(
    models: dict[str, Path],
    full: dict[str, list[StepReport]],
    precision: Any,
    distributed_optimizer: bool,
    model: str,
) -> None:
    parallel = ParallelConfig(distributed_optimizer=distributed_optimizer)
    case = Case(precision=precision, micro_batch_size=2, model=model, parallel=parallel)
    reports = _alone(case, models[model], train)
    _near([dataclasses.asdict(r) for r in reports], full[model], precision)


@pytest.mark.parametrize("case", TWO)
def test_half_precision_on_two_processes_stays_near_fp32(
    ranks: list[dict[str, Any]], full: dict[str, list[StepReport]], case: str
) -> None:
    assert ranks[0][case] == ranks[1][case]
    _near(ranks[0][case], full[TWO[case].model], TWO[case].precision)


def _hold_overflow(result: dict[str, Any]) -> None:
    report = result["report"]
    assert report["skipped"] and report["grad_norm"] is None
    assert report["step"] == 1 and report["metrics"]["loss"] > 0
    assert result["changed"] == []
    assert result["recovered"][-1] and result["changed_later"]
    assert result["steps"] == list(range(2, 31))


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_overflow_skips_the_step_then_recovers(
    models: dict[str, Path], distributed_optimizer: bool
) -> None:
    parallel = ParallelConfig(distributed_optimizer=distributed_optimizer)
    case = Case(precision="fp16", parallel=parallel, optim=OVERFLOWING)
    _hold_overflow(_alone(case, models["llama"], _overflow))


@pytest.mark.parametrize("case", ["fp16-pp2", "fp16-dp2-overlap"])
def test_overflow_skips_the_step_on_every_rank(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        _hold_overflow(rank[f"{case}-overflow"])
