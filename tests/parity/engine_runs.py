"""Ten training steps of tiny models on any layout, and the same steps in plain PyTorch.

What the engine's parity tests share. The plain loop imports nothing of the engine: model and
attention are `transformers`', AdamW is PyTorch's, schedule and masked mean are written out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from safetensors.torch import load_file
from torch import Tensor

from megatron_cgn.batch import TokenBatch
from megatron_cgn.config.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    TrainConfig,
)
from megatron_cgn.engine.engine import Engine, StepReport
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.export import export_weights
from megatron_cgn.hf.load import load_weights
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.state import ParallelState, initialize_parallel
from megatron_cgn.testing import tiny_hf_model

STEPS = 10
GLOBAL_BATCH = 4
LENGTH = 32
VOCABULARY = 1000
OPTIM = OptimConfig(lr=1e-3, min_lr=2e-4, warmup_steps=3, weight_decay=0.1, clip_grad=3.5)
"""The gradient norm of ``llama`` crosses the limit: some steps are clipped and some are not."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2-tied-bias": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3-qk-norm": ("qwen3", {}),
}
"""Family and changed fields of each tiny model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way of computing the same ten steps."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: str = "llama"
    micro_batch_size: int = 1
    recompute: Any = "none"
    precision: Precision = "fp32"
    optim: OptimConfig = OPTIM


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a case gave: per-step figures, and the final weights under Hugging Face's names."""

    losses: list[float]
    grad_norms: list[float]
    counts: list[int]
    weights: dict[str, Tensor]
    sources: list[dict[int, float]] = field(default_factory=list)


def write_models(root: Path) -> dict[str, Path]:
    """Write every tiny model below `root`; their directories by name."""
    return {
        name: tiny_hf_model(root / name, family, vocab_size=VOCABULARY, **fields)
        for name, (family, fields) in MODELS.items()
    }


def global_batch(step: int, *, length: int = LENGTH, size: int = GLOBAL_BATCH) -> TokenBatch:
    """The global batch of one step: sequences with very unequal numbers of counted tokens.

    The mask of sequence 0 is full, of sequence 1 empty, and of the others more or less dense, so
    that a mean of means would differ from the mean.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    # Common and rare tokens, so that there is something to learn in ten steps.
    ids = (torch.rand(size, length + 1, generator=generator) ** 3 * VOCABULARY).long()
    density = torch.rand(size, 1, generator=generator)
    mask = (torch.rand(size, length, generator=generator) < density).float()
    mask[0], mask[1] = 1.0, 0.0
    return TokenBatch(
        tokens=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=mask,
        position_ids=torch.arange(length).expand(size, -1).contiguous(),
    )


def rows(batch: TokenBatch, part: slice) -> TokenBatch:
    """Some sequences of a batch."""
    return TokenBatch(
        tokens=batch.tokens[part],
        labels=batch.labels[part],
        loss_mask=batch.loss_mask[part],
        position_ids=batch.position_ids[part],
    )


def micro_batches(batch: TokenBatch, *, size: int, state: ParallelState) -> list[TokenBatch]:
    """Cut this data-parallel rank's share of a global batch into micro-batches."""
    share = len(batch.tokens) // state.dp_size
    first = state.dp_rank * share
    return [rows(batch, slice(i, i + size)) for i in range(first, first + share, size)]


def run_config(case: Case, path: Path) -> RunConfig:
    """The configuration of a case."""
    return RunConfig(
        precision=case.precision,
        model=ModelConfig(hf_path=str(path)),
        parallel=case.parallel,
        data=DataConfig(seq_length=LENGTH),
        train=TrainConfig(
            micro_batch_size=case.micro_batch_size,
            global_batch_size=GLOBAL_BATCH,
            train_iters=STEPS,
            recompute=case.recompute,
        ),
        optim=case.optim,
    )


def build_engine(case: Case, path: Path, *, prepare: bool = True) -> Engine:
    """Lay this process out anew and put an engine with the model's weights on it."""
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    state = initialize_parallel(case.parallel)
    architecture = read_architecture(path)
    engine = Engine(run_config(case, path), architecture, state, total_steps=STEPS)
    load_weights(engine.chunks, path, architecture=architecture, groups=state.groups)
    if prepare:
        engine.prepare_training()
    return engine


def train(engine: Engine, *, steps: Sequence[int] = range(STEPS)) -> list[StepReport]:
    """Take the steps of these numbers."""
    size = engine.run.train.micro_batch_size
    return [
        engine.train_step(
            micro_batches(global_batch(step), size=size, state=engine.state), NextToken()
        )
        for step in steps
    ]


def run_engine(case: Case, path: Path, export_dir: Path) -> tuple[list[float], ...]:
    """Ten steps on the engine, then an export. Collective over all ranks.

    Args:
        case: What to run.
        path: The model's Hugging Face directory.
        export_dir: Where the final weights go.

    Returns:
        Losses, gradient norms and counts.
    """
    engine = build_engine(case, path)
    reports = train(engine)
    export_weights(
        engine.chunks,
        export_dir,
        architecture=engine.architecture,
        source_dir=path,
        groups=engine.state.groups,
        dtype="fp32",
    )
    norms = [math.nan if r.grad_norm is None else r.grad_norm for r in reports]
    return [r.metrics["loss"] for r in reports], norms, [r.count for r in reports]


def read_outcome(figures: tuple[list[float], ...], export_dir: Path) -> Outcome:
    """Put the figures of `run_engine` and the exported weights together."""
    losses, norms, counts = figures
    weights: dict[str, Tensor] = {}
    for file in sorted(export_dir.glob("*.safetensors")):
        weights.update(load_file(file))
    return Outcome(
        losses=losses, grad_norms=norms, counts=[int(c) for c in counts], weights=weights
    )


def joined_logits(model: Any, batch: TokenBatch) -> Tensor:
    """Logits of `transformers` where every token sees the whole row before it."""
    logits: Tensor = model(batch.tokens, use_cache=False).logits
    return logits


def plain_loop(
    path: Path,
    *,
    batches: Callable[[int], TokenBatch] = global_batch,
    logits_of: Callable[[Any, TokenBatch], Tensor] = joined_logits,
) -> Outcome:
    """The same ten steps with `transformers` and PyTorch alone.

    Args:
        path: The model's Hugging Face directory.
        batches: The global batch of a step.
        logits_of: The model's logits ``[B, S, V]``.

    Returns:
        The outcome, with the mean loss of each source if batches know their sources.
    """
    from transformers import AutoModelForCausalLM  # not needed by the gloo processes

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.0,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    losses, norms, counts, sources = [], [], [], []
    for step in range(STEPS):
        batch = batches(step)
        logits = logits_of(model, batch).float()
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), reduction="none"
        )
        mask = batch.loss_mask.flatten()
        loss = (nll * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 3.5)))
        for group in optimizer.param_groups:
            group["lr"] = plain_rate(step)
        optimizer.step()
        losses.append(loss.item())
        counts.append(int(mask.sum()))
        if batch.source_ids is not None:
            sources.append(source_means(nll.detach(), mask, batch.source_ids.flatten()))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return Outcome(losses=losses, grad_norms=norms, counts=counts, weights=weights, sources=sources)


def source_means(nll: Tensor, mask: Tensor, ids: Tensor) -> dict[int, float]:
    """Mean loss of the counted tokens of each source that has any."""
    found = {}
    for source in sorted(set(ids.tolist())):
        mine = (ids == source) & (mask > 0)
        if mine.any():
            found[source] = float(nll[mine].double().mean())
    return found


def plain_rate(step: int) -> float:
    """`OPTIM` written out: three steps up to 1e-3, half a cosine down to 2e-4 at the tenth."""
    if step < 2:
        return (step + 1) / 3 * 1e-3
    return 2e-4 + 4e-4 * (1 + math.cos(math.pi * (step - 2) / 7))


def differences(outcome: Outcome, reference: Outcome) -> dict[str, float]:
    """Largest relative differences over all steps, and of the weights' values.

    Returns:
        ``loss`` and ``grad_norm`` relative to the reference at the same step; ``weights``: norm of
        the difference over norm of the tensor, for the worst tensor.
    """
    assert outcome.weights.keys() == reference.weights.keys()
    return {
        "loss": _worst(outcome.losses, reference.losses),
        "grad_norm": _worst(outcome.grad_norms, reference.grad_norms),
        "weights": max(
            float((outcome.weights[n] - w).norm() / w.norm()) for n, w in reference.weights.items()
        ),
    }


def _worst(values: list[float], reference: list[float]) -> float:
    return max(abs(v - r) / abs(r) for v, r in zip(values, reference, strict=True))
