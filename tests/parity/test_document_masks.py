"""Separated documents and losses per source, on every kind of layout, against `transformers`.

The reference runs the model document by document, positions from 0, and knows nothing of packed
rows. Documents are of one token and up, cross every cut of a row, and some fill it.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import (
    GLOBAL_BATCH,
    LENGTH,
    STEPS,
    VOCABULARY,
    Case,
    Outcome,
    build_engine,
    plain_loop,
    write_models,
)
from torch import Tensor

from megatron_cgn.batch import TokenBatch
from megatron_cgn.config.schema import ParallelConfig
from megatron_cgn.data.loader import collate
from megatron_cgn.data.windows import Sample
from megatron_cgn.engine.engine import Engine
from megatron_cgn.objectives.base import ForwardArgs
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.state import shutdown_parallel
from megatron_cgn.testing import FP32_PARALLEL_RTOL, HF_LOGITS_ATOL, run_distributed

EOD = 3
SOURCES = ("领域", "general", "never read")
EDITED = slice(0, 20)
"""Places of row 2 that the independence test changes; documents that start behind stay."""


def _layout(tp: int = 1, pp: int = 1, cp: int = 1, **rest: Any) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        **rest,
    )


SP = {"sequence_parallel": True}
VP = {"virtual_pipeline_model_parallel_size": 2}
ONE: dict[str, Case] = {
    "micro-batch-1": Case(),
    "micro-batch-4": Case(micro_batch_size=4),
    "selective": Case(micro_batch_size=2, recompute="selective"),
    "full": Case(micro_batch_size=2, recompute="full"),
    "qk-norm": Case(micro_batch_size=2, model="qwen3-qk-norm"),
}
TWO: dict[str, Case] = {
    "tp2": Case(parallel=_layout(tp=2), micro_batch_size=2),
    "tp2-sp": Case(parallel=_layout(tp=2, **SP), micro_batch_size=2),
    "pp2": Case(parallel=_layout(pp=2), micro_batch_size=2),
    "pp2-interleaved-full": Case(parallel=_layout(pp=2, **VP), recompute="full"),
    "cp2": Case(parallel=_layout(cp=2), micro_batch_size=1),
    "cp2-micro-batch-4": Case(parallel=_layout(cp=2), micro_batch_size=4),
    "cp2-selective-qk-norm": Case(
        parallel=_layout(cp=2), micro_batch_size=2, recompute="selective", model="qwen3-qk-norm"
    ),
    "cp2-full": Case(parallel=_layout(cp=2), micro_batch_size=2, recompute="full"),
    "dp2": Case(micro_batch_size=2),
}
FOUR: dict[str, Case] = {
    "tp2-cp2-sp": Case(parallel=_layout(tp=2, cp=2, **SP), micro_batch_size=2),
    "pp2-cp2": Case(parallel=_layout(pp=2, cp=2), micro_batch_size=2),
    "cp4": Case(parallel=_layout(cp=4), micro_batch_size=2),
    "dp2-cp2": Case(parallel=_layout(cp=2), micro_batch_size=1),
    "tp2-pp2-interleaved-sp": Case(parallel=_layout(tp=2, pp=2, **SP, **VP), micro_batch_size=2),
}


def _rows(step: int) -> list[Sample]:
    """The samples of a step. Row 0 is one document, row 1 mostly of one token, others mixed."""
    generator = torch.Generator().manual_seed(500 + step)
    ids = (torch.rand(GLOBAL_BATCH, LENGTH + 1, generator=generator) ** 3 * VOCABULARY).long()
    ids[ids == EOD] = EOD + 1
    ends = torch.rand(GLOBAL_BATCH, LENGTH + 1, generator=generator) < torch.tensor(
        [[0.0], [0.7], [0.2], [0.1]]
    )
    ids[ends] = EOD
    mask = (torch.rand(GLOBAL_BATCH, LENGTH, generator=generator) < 0.8).float()
    return [
        {
            "tokens": row[:-1],
            "labels": row[1:],
            "loss_mask": counted,
            "position_ids": torch.arange(LENGTH),
            # Every third step reads one source only.
            "source": torch.tensor(0 if step % 3 == 2 else place % 2),
        }
        for place, (row, counted) in enumerate(zip(ids, mask, strict=True))
    ]


def _whole(step: int) -> TokenBatch:
    """The samples of a step as they are, for the reference."""
    return collate(_rows(step))


def _documents(tokens: list[int]) -> list[slice]:
    """Where a row's documents lie, found by walking over it."""
    starts = [0] + [place + 1 for place, token in enumerate(tokens[:-1]) if token == EOD]
    return [slice(a, b) for a, b in itertools.pairwise([*starts, len(tokens)])]


def _logits_by_document(model: Any, batch: TokenBatch) -> Tensor:
    rows = []
    for row in batch.tokens:
        parts = [model(row[None, d], use_cache=False).logits for d in _documents(row.tolist())]
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


def _micro_batches(rows: list[Sample], engine: Engine) -> list[TokenBatch]:
    size, share = engine.run.train.micro_batch_size, len(rows) // engine.state.dp_size
    first = engine.state.dp_rank * share
    return [collate(rows[i : i + size], eod_id=EOD) for i in range(first, first + share, size)]


def _every_token(batch: TokenBatch) -> ForwardArgs:
    """Arguments that ask for the loss of labels that do not count too."""
    return dataclasses.replace(NextToken().forward_args(batch), counted=None)


def _scores(engine: Engine, rows: list[Sample]) -> Any:
    """Losses of the labels of this rank's rows, ``[rows, S]``."""
    scored = engine.score(_micro_batches(rows, engine), _every_token)
    return torch.cat([nll.view(-1, LENGTH) for _, nll in scored]).numpy()


def _edited() -> list[Sample]:
    """The rows of step 0 with other tokens, but the same documents, in a part of row 2."""
    rows = [dict(row) for row in _rows(0)]
    tokens, labels = rows[2]["tokens"].clone(), rows[2]["labels"].clone()
    tokens[EDITED] = torch.where(tokens[EDITED] == EOD, EOD, (tokens[EDITED] + 500) % VOCABULARY)
    labels[: EDITED.stop - 1] = tokens[1 : EDITED.stop]
    rows[2] |= {"tokens": tokens, "labels": labels}
    return rows


def _run_case(case: Case, path: Path) -> dict[str, Any]:
    engine = build_engine(case, path)
    scores = [_scores(engine, rows) for rows in (_rows(0), _edited())]
    objective = NextToken(SOURCES)
    reports = [
        engine.train_step(_micro_batches(_rows(step), engine), objective) for step in range(STEPS)
    ]
    plain = engine.train_step(_micro_batches(_rows(STEPS), engine), NextToken())
    return {
        "other_objective": sorted(plain.metrics),
        "rows": engine.state.dp_rank * len(scores[0]),
        "scores": scores,
        "metrics": [r.metrics for r in reports],
        "grad_norms": [r.grad_norm for r in reports],
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
def plain(models: dict[str, Path]) -> dict[str, Outcome]:
    return {
        name: plain_loop(models[name], batches=_whole, logits_of=_logits_by_document)
        for name in ("llama", "qwen3-qk-norm")
    }


@pytest.fixture(scope="module")
def expected_scores(models: dict[str, Path]) -> dict[str, Tensor]:
    """Losses of the labels of step 0 before training, ``[B, S]``, by model."""
    from transformers import AutoModelForCausalLM

    batch, scores = _whole(0), {}
    for name in ("llama", "qwen3-qk-norm"):
        model = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32).eval()
        with torch.no_grad():
            logits = _logits_by_document(model, batch).transpose(1, 2)
        scores[name] = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    return scores


@pytest.fixture(scope="module")
def ranks(models: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Every case's results, rank by rank."""
    groups = [
        [_run_cases(ONE, models)],
        run_distributed(_run_cases, 2, TWO, models),
        run_distributed(_run_cases, 4, FOUR, models),
    ]
    return {name: [rank[name] for rank in group] for group in groups for name in group[0]}


def test_documents_of_the_test_are_of_every_kind() -> None:
    lengths = [d.stop - d.start for row in _rows(0) for d in _documents(row["tokens"].tolist())]
    assert min(lengths) == 1 and max(lengths) == LENGTH and len(set(lengths)) > 5
    late = [d.start for d in _documents(_rows(0)[2]["tokens"].tolist()) if d.start >= EDITED.stop]
    assert late, "the independence test needs documents behind the edited ones"


@pytest.mark.parametrize("case", [*ONE, *TWO, *FOUR])
def test_training_is_that_of_documents_one_by_one(
    plain: dict[str, Outcome], ranks: dict[str, list[dict[str, Any]]], case: str
) -> None:
    expected = plain[{**ONE, **TWO, **FOUR}[case].model]
    for rank in ranks[case]:
        losses = [metrics["loss"] for metrics in rank["metrics"]]
        assert losses == pytest.approx(expected.losses, rel=FP32_PARALLEL_RTOL)
        assert rank["grad_norms"] == pytest.approx(expected.grad_norms, rel=FP32_PARALLEL_RTOL)


@pytest.mark.parametrize("case", [*ONE, *TWO, *FOUR])
def test_losses_of_sources_are_those_of_their_tokens_on_every_rank(
    plain: dict[str, Outcome], ranks: dict[str, list[dict[str, Any]]], case: str
) -> None:
    expected = plain[{**ONE, **TWO, **FOUR}[case].model].sources
    assert [sorted(means) for means in expected[:3]] == [[0, 1], [0, 1], [0]]
    for rank in ranks[case]:
        for metrics, means in zip(rank["metrics"], expected, strict=True):
            found = {name: value for name, value in metrics.items() if name.startswith("train/")}
            wanted = {f"train/{SOURCES[source]}/loss": value for source, value in means.items()}
            assert found == pytest.approx(wanted, rel=FP32_PARALLEL_RTOL)


@pytest.mark.parametrize("case", [*ONE, *TWO, *FOUR])
def test_another_objective_on_the_same_engine_has_its_own_metrics(
    ranks: dict[str, list[dict[str, Any]]], case: str
) -> None:
    assert [rank["other_objective"] for rank in ranks[case]] == [["loss"]] * len(ranks[case])


@pytest.mark.parametrize("case", [*ONE, *TWO, *FOUR])
def test_no_document_sees_another(ranks: dict[str, list[dict[str, Any]]], case: str) -> None:
    documents = _documents(_rows(0)[2]["tokens"].tolist())
    # The label behind an end-of-document token belongs to the document that ends.
    behind = min(d.start for d in documents if d.start >= EDITED.stop)
    checked = 0
    for rank in ranks[case]:
        before, after = (torch.from_numpy(scores) for scores in rank["scores"])
        for row in range(len(before)):
            if rank["rows"] + row == 2:
                assert torch.equal(before[row, behind:], after[row, behind:])
                assert not torch.equal(before[row, :behind], after[row, :behind])
                checked += 1
            else:
                assert torch.equal(before[row], after[row])
    assert checked


@pytest.mark.parametrize("case", [*ONE, *TWO, *FOUR])
def test_scores_are_those_of_documents_one_by_one(
    expected_scores: dict[str, Tensor], ranks: dict[str, list[dict[str, Any]]], case: str
) -> None:
    expected = expected_scores[{**ONE, **TWO, **FOUR}[case].model]
    for rank in ranks[case]:
        scored = torch.from_numpy(rank["scores"][0])
        mine = slice(rank["rows"], rank["rows"] + len(scored))
        torch.testing.assert_close(scored, expected[mine], rtol=0, atol=HF_LOGITS_ATOL)
