"""`Engine.score` against `transformers`, on every kind of layout, and between training steps.

Likewise `Engine.score_with_predictions`, where only some tokens count.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import (
    VOCABULARY,
    Case,
    build_engine,
    global_batch,
    micro_batches,
    rows,
    train,
    write_models,
)
from torch import Tensor

from megatron_cgn.batch import TokenBatch
from megatron_cgn.config.schema import ParallelConfig
from megatron_cgn.engine.engine import Engine
from megatron_cgn.eval.bits_per_byte import score_held_out
from megatron_cgn.model.linear_cross_entropy import NOT_PREDICTED
from megatron_cgn.objectives.base import ForwardArgs
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.state import shutdown_parallel
from megatron_cgn.testing import HF_LOGITS_ATOL, run_distributed

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
CASES: dict[str, Case] = {
    "tp2-sp": Case(
        parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        micro_batch_size=2,
    ),
    "pp2-tied-bias": Case(
        parallel=ParallelConfig(pipeline_model_parallel_size=2), model="qwen2-tied-bias"
    ),
    "pp2-interleaved": Case(
        parallel=ParallelConfig(
            pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
        )
    ),
    "cp2-qk-norm": Case(
        parallel=ParallelConfig(context_parallel_size=2),
        micro_batch_size=2,
        model="qwen3-qk-norm",
    ),
    "dp2-overlap": Case(parallel=ParallelConfig(**OVERLAP)),
}
BYTE_LENGTHS = torch.arange(VOCABULARY) % 5
"""Bytes each id might stand for; every fifth for none."""


def _odd_batches(state: Any) -> list[TokenBatch]:
    """This rank's micro-batches: seven of two sequences and a last one of one."""
    batches = [rows(global_batch(20 + i), slice(0, 2)) for i in range(7)]
    return [*batches, rows(global_batch(27), slice(state.dp_rank, state.dp_rank + 1))]


def _all_tokens(batch: TokenBatch) -> ForwardArgs:
    """Arguments that ask for every token's loss, whether it counts or not."""
    return dataclasses.replace(NextToken().forward_args(batch), counted=None)


def _scores(engine: Engine) -> list[Any]:
    scored = engine.score(_odd_batches(engine.state), _all_tokens)
    return [nll.numpy() for _, nll in scored]


def _predictions(engine: Engine) -> list[Any]:
    """Losses and predicted ids, of counted tokens only."""
    scored = engine.score_with_predictions(_odd_batches(engine.state), NextToken().forward_args)
    return [(nll.numpy(), ids.numpy()) for _, nll, ids in scored]


def _run_case(case: Case, path: Path) -> dict[str, Any]:
    engine = build_engine(case, path, prepare=False)
    fresh = _scores(engine)
    predictions = _predictions(engine)
    held_out = score_held_out(engine, _odd_batches(engine.state), BYTE_LENGTHS)
    engine = build_engine(case, path)
    prepared = _scores(engine)
    plain = train(engine, steps=range(4))
    after = _scores(engine)
    # The same four steps, scoring before each.
    engine = build_engine(case, path)
    interrupted = []
    for step in range(4):
        _scores(engine)
        interrupted += train(engine, steps=[step])
    return {
        "dp_rank": engine.state.dp_rank,
        "fresh": fresh,
        "predictions": predictions,
        "held_out": dataclasses.asdict(held_out),
        "prepared": prepared,
        "after": after,
        "plain": [dataclasses.asdict(r) for r in plain],
        "interrupted": [dataclasses.asdict(r) for r in interrupted],
    }


def _run_cases(cases: dict[str, Case], models: dict[str, Path]) -> dict[str, Any]:
    torch.set_num_threads(1)
    results = {name: _run_case(case, models[case.model]) for name, case in cases.items()}
    shutdown_parallel()
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def ranks(models: dict[str, Path]) -> list[dict[str, Any]]:
    return run_distributed(_run_cases, 2, CASES, models)


@pytest.fixture(scope="module")
def alone(models: dict[str, Path]) -> dict[str, Any]:
    cases = {
        name: dataclasses.replace(case, parallel=ParallelConfig()) for name, case in CASES.items()
    }
    return _run_cases(cases, models)


def _transformers_logits(path: Path, batches: list[TokenBatch]) -> list[Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(b.tokens).logits for b in batches]


def _transformers_nll(path: Path, batches: list[TokenBatch]) -> list[Tensor]:
    return [
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), b.labels, reduction="none")
        for logits, b in zip(_transformers_logits(path, batches), batches, strict=True)
    ]


@dataclasses.dataclass
class _Rank:
    dp_rank: int


@pytest.mark.parametrize("case", CASES)
def test_score_is_the_nll_of_transformers_on_every_rank(
    models: dict[str, Path], ranks: list[dict[str, Any]], alone: dict[str, Any], case: str
) -> None:
    for results in (*ranks, alone):
        result = results[case]
        batches = _odd_batches(_Rank(result["dp_rank"]))
        expected = _transformers_nll(models[CASES[case].model], batches)
        for name in ("fresh", "prepared"):
            assert [s.shape for s in result[name]] == [b.tokens.shape for b in batches]
            for scored, nll in zip(result[name], expected, strict=True):
                torch.testing.assert_close(
                    torch.from_numpy(scored), nll, rtol=0, atol=HF_LOGITS_ATOL
                )


@pytest.mark.parametrize("case", CASES)
def test_predictions_are_the_highest_logits_of_counted_tokens(
    models: dict[str, Path], ranks: list[dict[str, Any]], alone: dict[str, Any], case: str
) -> None:
    for results in (*ranks, alone):
        result = results[case]
        batches = _odd_batches(_Rank(result["dp_rank"]))
        logits = _transformers_logits(models[CASES[case].model], batches)
        for (nll, ids), every, batch, expected in zip(
            result["predictions"], result["fresh"], batches, logits, strict=True
        ):
            counts = batch.loss_mask > 0
            highest = torch.where(counts, expected.argmax(-1), NOT_PREDICTED)
            assert torch.equal(torch.from_numpy(ids), highest)
            losses = torch.where(counts, torch.from_numpy(every), 0.0)
            torch.testing.assert_close(torch.from_numpy(nll), losses, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_held_out_score_counts_every_token_once(
    models: dict[str, Path], ranks: list[dict[str, Any]], case: str
) -> None:
    dp_ranks = sorted({rank[case]["dp_rank"] for rank in ranks})
    total = tokens = text = size = 0.0
    for dp_rank in dp_ranks:
        batches = _odd_batches(_Rank(dp_rank))
        nlls = _transformers_nll(models[CASES[case].model], batches)
        for batch, nll in zip(batches, nlls, strict=True):
            lengths = BYTE_LENGTHS[batch.labels] * batch.loss_mask
            counted = nll.double() * batch.loss_mask
            total += float(counted.sum())
            tokens += float(batch.loss_mask.sum())
            text += float(counted[lengths > 0].sum())
            size += float(lengths.sum())
    for rank in ranks:
        score = rank[case]["held_out"]
        assert (score["tokens"], score["text_bytes"]) == (tokens, size)
        assert score["loss"] == pytest.approx(total / tokens, rel=1e-6)
        assert score["bits_per_byte"] == pytest.approx(text / math.log(2) / size, rel=1e-6)
        assert score == ranks[0][case]["held_out"]


@pytest.mark.parametrize("case", CASES)
def test_scoring_sees_every_step_and_changes_none(
    ranks: list[dict[str, Any]], alone: dict[str, Any], case: str
) -> None:
    for results in (*ranks, alone):
        result = results[case]
        assert result["plain"] == result["interrupted"]
    # Trained weights, and on every rank the same ones.
    for rank in ranks:
        result = rank[case]
        assert abs(result["after"][0] - result["fresh"][0]).max() > 0.05
        reference = alone[case]
        for scored, expected in zip(result["after"][:7], reference["after"][:7], strict=True):
            assert abs(scored - expected).max() < HF_LOGITS_ATOL


def test_micro_batches_of_a_rank_cover_its_share() -> None:
    """The helper these tests stand on: shares are disjoint and complete."""

    @dataclasses.dataclass
    class State:
        dp_rank: int
        dp_size: int = 2

    batch = global_batch(0)
    parts = [b.tokens for r in (0, 1) for b in micro_batches(batch, size=1, state=State(r))]
    assert torch.equal(torch.cat(parts), batch.tokens)
