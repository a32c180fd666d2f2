"""Losses of whole answers under context parallelism, against `transformers` on one process.

The cut of a row goes through answers and pairs. Two ranks compute each loss; it must count once,
and the gradients of their halves must add up to those of one loss.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.config.schema import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_cgn.engine.engine import Engine
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.load import load_weights
from megatron_cgn.objectives.preference import make_objective
from megatron_cgn.parallel.context import gather_whole, shard_sequence
from megatron_cgn.parallel.state import ParallelState, initialize_parallel
from megatron_cgn.testing import FP32_PARALLEL_RTOL, run_distributed, tiny_hf_model

VOCABULARY = 200
LENGTHS = ((9, 5), (11, 2, 6), (7, 8))
"""Answers of each micro-batch, in places: no cut into 4 falls between answers."""
PAIRS = (((0, 1),), ((0, 1), (2, 0), (2, 1)), ((1, 0),))
WEIGHTS = ((1.0,), (1 / 3, 1 / 3, 1 / 3), (1.0,))
ROW = 24
LOSSES: dict[str, LossConfig] = {
    "sigmoid": LossConfig(rpo_alpha=0.3),
    "ipo": LossConfig(type="ipo"),
    "orpo": LossConfig(type="orpo"),
    "kto": LossConfig(type="kto"),
}


def _batches() -> list[PreferenceBatch]:
    """Three rows; in the last, an answer of which nothing counts."""
    generator = torch.Generator().manual_seed(6)
    made = []
    for lengths, pairs, weights in zip(LENGTHS, PAIRS, WEIGHTS, strict=True):
        ids = torch.randint(VOCABULARY, (ROW + 1,), generator=generator)
        ends = torch.tensor([0, *lengths, ROW - sum(lengths)]).cumsum(0)
        answers = torch.arange(len(lengths) + 1).repeat_interleave(ends.diff())
        mask = (torch.rand(ROW, generator=generator) < 0.7) & (answers < len(lengths))
        if len(made) == 2:
            mask &= answers != 0
        chosen, rejected = torch.tensor(pairs).T
        count = len(lengths)
        made.append(
            PreferenceBatch(
                tokens=ids[None, :-1],
                labels=ids[None, 1:],
                loss_mask=mask[None].float(),
                position_ids=(torch.arange(ROW) - ends[answers])[None],
                answer_ids=answers[None],
                cu_seqlens=ends.int(),
                last_places=ends[1:-1] - 1,
                source_ids=torch.zeros(count, dtype=torch.long),
                chosen=chosen,
                rejected=rejected,
                weights=torch.tensor(weights),
                margins=torch.zeros(len(pairs)),
                desirable=torch.arange(count) % 2 == 0,
                ref_logps=-torch.rand(count, generator=generator) * 40,
                baseline=torch.tensor([0.7]),
            )
        )
    return made


def _gradient_of_gather(state: ParallelState) -> bool:
    """Whether a rank's part of the gradient is its part of the whole's, and the values are too."""
    whole = torch.arange(24.0).view(2, 12)
    factors = whole**2 - 7
    cut: dict[str, int] = {"cp_rank": state.cp_rank, "cp_size": state.cp_size}
    part = shard_sequence(whole, **cut).clone().requires_grad_()
    gathered = gather_whole(part, state.groups.cp)
    (gradient,) = torch.autograd.grad((gathered * factors).sum(), part)
    return torch.equal(gathered, whole) and torch.equal(gradient, shard_sequence(factors, **cut))


def _train(path: Path) -> tuple[bool, dict[str, Any]]:
    """A step on each loss, too small to change the weights. Collective over all ranks."""
    run = RunConfig(
        precision="fp32",
        model=ModelConfig(hf_path=str(path)),
        parallel=ParallelConfig(context_parallel_size=2),
        data=DataConfig(seq_length=ROW),
        train=TrainConfig(global_batch_size=len(LENGTHS), train_iters=len(LOSSES)),
        optim=OptimConfig(lr=1e-30, min_lr=1e-30, clip_grad=0.0),
    )
    state = initialize_parallel(run.parallel)
    architecture = read_architecture(path)
    engine = Engine(run, architecture, state, total_steps=len(LOSSES))
    load_weights(engine.chunks, path, architecture=architecture, groups=state.groups)
    engine.prepare_training()
    figures = {}
    for name, loss in LOSSES.items():
        report = engine.train_step(_batches(), make_objective(loss, ["only"]))
        figures[name] = (report.count, report.grad_norm, report.metrics)
    return _gradient_of_gather(state), figures


def _row_nll(model: Any, batch: PreferenceBatch) -> Tensor:
    """Negative log-likelihood of a row, answer by answer and from position 0."""
    losses = []
    bounds = batch.cu_seqlens.tolist()
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        logits = model(batch.tokens[:, start:stop], use_cache=False).logits[0]
        labels = batch.labels[0, start:stop]
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    return torch.cat(losses)[None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The model, and what two ranks made of it."""
    path = tiny_hf_model(
        tmp_path_factory.mktemp("cp") / "model", vocab_size=VOCABULARY, num_hidden_layers=2
    )
    return path, run_distributed(_train, 2, path, warm=True)


def test_gather_gives_each_rank_the_gradient_of_its_part(trained: tuple[Path, list[Any]]) -> None:
    assert [good for good, _ in trained[1]] == [True, True]


@pytest.mark.parametrize("name", LOSSES)
def test_step_of_two_ranks_is_that_of_one_process(
    trained: tuple[Path, list[Any]], name: str
) -> None:
    from transformers import AutoModelForCausalLM

    path, ranks = trained
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    objective = make_objective(LOSSES[name], ["only"])
    results = [objective.loss(_row_nll(model, batch), batch) for batch in _batches()]
    count = sum(int(r.count) for r in results)
    loss = torch.stack([r.loss_sum for r in results]).sum() / count
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    for found_count, found_norm, metrics in (figures[name] for _, figures in ranks):
        assert found_count == count == (7 if name == "kto" else 3)
        assert metrics["loss"] == pytest.approx(loss.item(), rel=FP32_PARALLEL_RTOL)
        assert found_norm == pytest.approx(norm, rel=FP32_PARALLEL_RTOL)
        for metric in results[0].metrics:
            ratios = [r.metrics[metric] for r in results]
            mean = float(sum(r.sum for r in ratios)) / float(sum(r.count for r in ratios))
            assert metrics[metric] == pytest.approx(mean, rel=FP32_PARALLEL_RTOL, abs=1e-6)
        assert metrics.keys() == {"loss", *results[0].metrics}
