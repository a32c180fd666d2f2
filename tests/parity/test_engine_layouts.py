"""Ten FP32 steps on every kind of layout against one process, and one process against PyTorch.

One start of two processes and one of four run all layouts in turn. Every batch has very unequal
loss masks, so a mean of means anywhere would show.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import (
    GLOBAL_BATCH,
    LENGTH,
    MODELS,
    Case,
    Outcome,
    build_engine,
    differences,
    global_batch,
    plain_loop,
    read_outcome,
    run_engine,
    train,
    write_models,
)

from megatron_cgn.config.schema import ParallelConfig
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.state import shutdown_parallel
from megatron_cgn.testing import FP32_PARALLEL_RTOL, run_distributed

WEIGHTS_RTOL = 1e-4
"""Of a tensor's norm after ten steps. AdamW's first steps move every weight by the learning rate
whatever its gradient's size, so rounding of the smallest gradients shows (1e-5 was seen); weights
travel 5e-2 of their norm, and forgetting the weight decay would change it by 6e-4."""


def _layout(
    tp: int = 1, pp: int = 1, cp: int = 1, vp: int | None = None, **rest: Any
) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vp,
        **rest,
    )


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
ONE: dict[str, Case] = {
    "micro-batch-1": Case(),
    "micro-batch-2": Case(micro_batch_size=2),
    "micro-batch-4": Case(micro_batch_size=4),
    "plain-optimizer": Case(
        micro_batch_size=2, parallel=ParallelConfig(distributed_optimizer=False)
    ),
    "selective": Case(micro_batch_size=2, recompute="selective"),
    "full": Case(micro_batch_size=2, recompute="full"),
    "overlap": Case(micro_batch_size=2, parallel=ParallelConfig(**OVERLAP)),
    "tied-bias": Case(micro_batch_size=2, model="qwen2-tied-bias"),
    "qk-norm": Case(micro_batch_size=2, model="qwen3-qk-norm"),
}
TWO: dict[str, Case] = {
    "tp2": Case(parallel=_layout(tp=2), micro_batch_size=2),
    "tp2-accumulate": Case(parallel=_layout(tp=2), micro_batch_size=1),
    "tp2-sp": Case(parallel=_layout(tp=2, sequence_parallel=True), micro_batch_size=2),
    "tp2-sp-selective": Case(
        parallel=_layout(tp=2, sequence_parallel=True), micro_batch_size=2, recompute="selective"
    ),
    "tp2-tied-bias": Case(parallel=_layout(tp=2), micro_batch_size=2, model="qwen2-tied-bias"),
    "tp2-sp-tied-bias": Case(
        parallel=_layout(tp=2, sequence_parallel=True), micro_batch_size=2, model="qwen2-tied-bias"
    ),
    "tp2-qk-norm": Case(parallel=_layout(tp=2), micro_batch_size=2, model="qwen3-qk-norm"),
    "tp2-sp-qk-norm": Case(
        parallel=_layout(tp=2, sequence_parallel=True), micro_batch_size=2, model="qwen3-qk-norm"
    ),
    "pp2": Case(parallel=_layout(pp=2), micro_batch_size=1),
    "pp2-one-micro-batch": Case(parallel=_layout(pp=2), micro_batch_size=4),
    "pp2-full": Case(parallel=_layout(pp=2), micro_batch_size=2, recompute="full"),
    "pp2-tied-bias": Case(parallel=_layout(pp=2), micro_batch_size=1, model="qwen2-tied-bias"),
    "pp2-interleaved": Case(parallel=_layout(pp=2, vp=2), micro_batch_size=1),
    "pp2-interleaved-full": Case(
        parallel=_layout(pp=2, vp=2), micro_batch_size=1, recompute="full"
    ),
    "pp2-interleaved-tied-bias": Case(
        parallel=_layout(pp=2, vp=2), micro_batch_size=1, model="qwen2-tied-bias"
    ),
    "cp2": Case(parallel=_layout(cp=2), micro_batch_size=1),
    "cp2-full": Case(parallel=_layout(cp=2), micro_batch_size=2, recompute="full"),
    "cp2-selective": Case(parallel=_layout(cp=2), micro_batch_size=2, recompute="selective"),
    "cp2-qk-norm": Case(parallel=_layout(cp=2), micro_batch_size=2, model="qwen3-qk-norm"),
    "dp2": Case(micro_batch_size=1),
    "dp2-plain-optimizer": Case(parallel=_layout(distributed_optimizer=False), micro_batch_size=1),
    "dp2-overlap": Case(parallel=_layout(**OVERLAP), micro_batch_size=1),
    "dp2-overlap-tied-bias": Case(
        parallel=_layout(**OVERLAP), micro_batch_size=1, model="qwen2-tied-bias"
    ),
}
FOUR: dict[str, Case] = {
    "tp2-pp2": Case(parallel=_layout(tp=2, pp=2), micro_batch_size=1),
    "tp2-pp2-sp": Case(parallel=_layout(tp=2, pp=2, sequence_parallel=True), micro_batch_size=1),
    "tp2-pp2-sp-tied-bias-full": Case(
        parallel=_layout(tp=2, pp=2, sequence_parallel=True),
        micro_batch_size=1,
        recompute="full",
        model="qwen2-tied-bias",
    ),
    "tp2-pp2-interleaved-qk-norm": Case(
        parallel=_layout(tp=2, pp=2, vp=2, sequence_parallel=True),
        micro_batch_size=1,
        model="qwen3-qk-norm",
    ),
    "tp2-cp2": Case(parallel=_layout(tp=2, cp=2), micro_batch_size=2),
    "tp2-cp2-sp": Case(parallel=_layout(tp=2, cp=2, sequence_parallel=True), micro_batch_size=2),
    "pp2-cp2": Case(parallel=_layout(pp=2, cp=2), micro_batch_size=2),
    "dp2-tp2": Case(parallel=_layout(tp=2), micro_batch_size=1),
    "dp2-tp2-sp-overlap-qk-norm": Case(
        parallel=_layout(tp=2, sequence_parallel=True, **OVERLAP),
        micro_batch_size=1,
        model="qwen3-qk-norm",
    ),
    "dp2-pp2-tied-bias": Case(parallel=_layout(pp=2), micro_batch_size=1, model="qwen2-tied-bias"),
    "dp2-pp2-interleaved-overlap": Case(
        parallel=_layout(pp=2, vp=2, **OVERLAP), micro_batch_size=1
    ),
    "dp2-cp2": Case(parallel=_layout(cp=2), micro_batch_size=1),
    "dp4": Case(micro_batch_size=1),
}


def _run(cases: dict[str, Case], models: dict[str, Path], root: Path) -> dict[str, Any]:
    """Run cases in turn on the processes at hand; their figures by name."""
    torch.set_num_threads(1)
    figures = {
        name: run_engine(case, models[case.model], root / name) for name, case in cases.items()
    }
    shutdown_parallel()
    return figures


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(models: dict[str, Path]) -> dict[str, Outcome]:
    return {name: plain_loop(models[name]) for name in MODELS}


@pytest.fixture(scope="module")
def one(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    root = tmp_path_factory.mktemp("one")
    figures = _run(ONE, models, root)
    return {name: read_outcome(figures[name], root / name) for name in ONE}


@pytest.fixture(scope="module")
def two(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    root = tmp_path_factory.mktemp("two")
    return [root, run_distributed(_run, 2, TWO, models, root)]


@pytest.fixture(scope="module")
def four(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    root = tmp_path_factory.mktemp("four")
    return [root, run_distributed(_run, 4, FOUR, models, root)]


def _hold(outcome: Outcome, reference: Outcome) -> None:
    found = differences(outcome, reference)
    assert found["loss"] < FP32_PARALLEL_RTOL
    assert found["grad_norm"] < FP32_PARALLEL_RTOL
    assert found["weights"] < WEIGHTS_RTOL
    assert outcome.counts == reference.counts


def _same_on_every_rank(ranks: list[dict[str, Any]], case: str) -> None:
    assert all(rank[case] == ranks[0][case] for rank in ranks)


def test_plain_loop_learns_and_clips_some_steps_only(plain: dict[str, Outcome]) -> None:
    norms = plain["llama"].grad_norms
    assert min(norms) < 3.5 < max(norms)
    for outcome in plain.values():
        assert sum(outcome.losses[-3:]) < sum(outcome.losses[:3]) - 0.3


@pytest.mark.parametrize("case", ONE)
def test_one_process_is_the_plain_loop(
    one: dict[str, Outcome], plain: dict[str, Outcome], case: str
) -> None:
    _hold(one[case], plain[ONE[case].model])


def test_a_batch_that_counts_nothing_has_no_loss_and_no_gradient(models: dict[str, Path]) -> None:
    engine = build_engine(Case(), models["llama"])
    empty = [dataclasses.replace(global_batch(0), loss_mask=torch.zeros(GLOBAL_BATCH, LENGTH))]
    report = engine.train_step(empty, NextToken())
    assert (report.metrics["loss"], report.count, report.grad_norm) == (0.0, 0, 0.0)
    (after,) = train(engine, steps=[0])
    assert after.metrics["loss"] == pytest.approx(7.08, abs=0.01)
    shutdown_parallel()


@pytest.mark.parametrize("case", TWO)
def test_two_processes_are_one(plain: dict[str, Outcome], two: list[Any], case: str) -> None:
    root, ranks = two
    _same_on_every_rank(ranks, case)
    _hold(read_outcome(ranks[0][case], root / case), plain[TWO[case].model])


@pytest.mark.parametrize("case", FOUR)
def test_four_processes_are_one(plain: dict[str, Outcome], four: list[Any], case: str) -> None:
    root, ranks = four
    _same_on_every_rank(ranks, case)
    _hold(read_outcome(ranks[0][case], root / case), plain[FOUR[case].model])
