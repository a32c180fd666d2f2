"""Save under one layout, resume under another: what the checkpoint tests run in processes.

Four processes are started once. Each job uses the first n of them as its world and meets the
others through a file, so that one start serves every number of processes.
"""

import gc
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_cgn.batch import TokenBatch
from megatron_cgn.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ParamGroupConfig,
    Precision,
    RunConfig,
    TrainConfig,
)
from megatron_cgn.engine.engine import Engine, StepReport
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.load import load_weights
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.state import initialize_parallel, shutdown_parallel
from megatron_cgn.testing import release_engine

VOCABULARY = 1100
"""Padded to 1,152 rows with one tensor-parallel rank and to 1,280 with two."""
BEFORE, AFTER = 3, 3
GLOBAL_BATCH, LENGTH = 4, 16
FIT = {"seed": 1234}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where a run is laid out, and how it computes."""

    world: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Precision = "fp32"
    model: str = "llama"
    initial_loss_scale: float = 65536.0
    groups: tuple[ParamGroupConfig, ...] = ()

    def of(self, **changes: Any) -> "Layout":
        """The same with changes."""
        return replace(self, **changes)


def layout(world: int, tp: int = 1, pp: int = 1, vp: int | None = None, **rest: Any) -> Layout:
    """A layout by its sizes."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vp,
        **rest,
    )
    return Layout(world=world, parallel=parallel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Figures of some steps, equal on every rank, and what each rank would draw next."""

    losses: list[float]
    grad_norms: list[float | None]
    draws: list[float]
    loss_scale: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job: a run that starts or resumes, saves at once or after `BEFORE` steps, and goes on."""

    name: str
    layout: Layout
    start: str | None = None
    """Job whose checkpoint is resumed; None starts anew."""


def run_jobs(root: Path, models: dict[str, Path], jobs: Sequence[Job]) -> dict[str, Steps]:
    """Run jobs one after another in this process, which is one of four.

    Args:
        root: Where checkpoints go, in directories with the jobs' names.
        models: Hugging Face directories.
        jobs: In an order in which every start exists before it is needed.

    Returns:
        This rank's results of the jobs it took part in.
    """
    rank = int(os.environ["RANK"])
    results = {}
    for number, job in enumerate(jobs):
        if rank >= job.layout.world:
            continue
        os.environ["WORLD_SIZE"] = str(job.layout.world)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{root}/meet-{number}",
            rank=rank,
            world_size=job.layout.world,
        )
        results[job.name] = _run(root, models[job.layout.model], job)
        shutdown_parallel()
        gc.collect()
    return results


def _run(root: Path, model: Path, job: Job) -> Steps:
    engine = build(model, job.layout, random_weights=job.start is not None)
    if job.start is None:
        _train(engine, range(BEFORE))
    else:
        (directory,) = (root / job.start).glob("step_*")
        engine.resume(directory, fit=FIT)
        assert (engine.step, engine.consumed_sequences) == (BEFORE, BEFORE * GLOBAL_BATCH)
    engine.save(root / job.name, fit=FIT, hf_files=lambda target: target.mkdir())
    scale = engine._optimizer.get_loss_scale() if job.layout.precision == "fp16" else None
    draws = _draw()
    reports = _train(engine, range(BEFORE, BEFORE + AFTER))
    release_engine(engine)
    return Steps(
        losses=[r.metrics["loss"] for r in reports],
        grad_norms=[r.grad_norm for r in reports],
        draws=draws,
        loss_scale=None if scale is None else float(scale),
    )


def build(model: Path, layout: Layout, *, random_weights: bool) -> Engine:
    """An engine that is ready to train."""
    run = RunConfig(
        precision=layout.precision,
        # Other weights and another seed: what a resumed run has, it has from the checkpoint.
        seed=99 if random_weights else 1234,
        model=ModelConfig(hf_path=str(model), init="random" if random_weights else "from_hf"),
        parallel=layout.parallel,
        data=DataConfig(seq_length=LENGTH),
        train=TrainConfig(
            micro_batch_size=1, global_batch_size=GLOBAL_BATCH, train_iters=BEFORE + AFTER
        ),
        optim=OptimConfig(
            lr=3e-3,
            warmup_steps=2,
            initial_loss_scale=layout.initial_loss_scale,
            clip_grad=1.0,
            param_groups=layout.groups,
        ),
        checkpoint=CheckpointConfig(),
    )
    state = initialize_parallel(layout.parallel)
    architecture = read_architecture(model)
    engine = Engine(run, architecture, state, total_steps=BEFORE + AFTER)
    if not random_weights:
        load_weights(engine.chunks, model, architecture=architecture, groups=state.groups)
    engine.prepare_training()
    return engine


def _train(engine: Engine, steps: range) -> list[StepReport]:
    reports = []
    for step in steps:
        share = GLOBAL_BATCH // engine.state.dp_size
        first = engine.state.dp_rank * share
        rows = [_sequence(step, row) for row in range(first, first + share)]
        reports.append(engine.train_step(rows, NextToken()))
        engine.consumed_sequences += GLOBAL_BATCH
    return reports


def _sequence(step: int, row: int) -> TokenBatch:
    """One sequence, the same whatever the layout, with more or less of it counted."""
    generator = torch.Generator().manual_seed(1000 * step + row)
    ids = (torch.rand(1, LENGTH + 1, generator=generator) ** 3 * VOCABULARY).long()
    mask = (torch.rand(1, LENGTH, generator=generator) < 0.2 + 0.2 * row).float()
    mask[0, 0] = 1.0
    return TokenBatch(
        tokens=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=mask,
        position_ids=torch.arange(LENGTH).expand(1, -1).contiguous(),
    )


def _draw() -> list[float]:
    """A number from every generator of this process."""
    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = float(torch.rand(()))
    return [random.random(), float(np.random.rand()), float(torch.rand(())), tracked]


def read_tensors(directory: Path, *, rows: int = VOCABULARY) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, but of the vocabulary the first rows only."""
    (step,) = directory.glob("step_*")
    reader = dcp.FileSystemReader(step / "dist")
    entries = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(step / "dist"), no_dist=True)
    padded = ("word_embeddings.weight", "output_layer.weight")
    return {n: t[:rows] if n.endswith(padded) else t for n, t in tensors.items()}


def unequal(tensors: dict[str, Tensor], reference: dict[str, Tensor]) -> list[str]:
    """Names that only one has or whose bits differ."""
    names = {*tensors, *reference}
    return sorted(
        name
        for name in names
        if name not in tensors
        or name not in reference
        or tensors[name].dtype != reference[name].dtype
        or not torch.equal(tensors[name], reference[name])
    )
