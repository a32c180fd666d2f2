"""Train, extend the vocabulary of the checkpoint, go on under another layout: what processes run.

Processes are started once, as for `checkpoint_runs.py`.
"""

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoint_runs import BEFORE, FIT, GLOBAL_BATCH, LENGTH, VOCABULARY, Layout, build
from resize_samples import extension, tokenizer_of

from megatron_cgn.batch import TokenBatch
from megatron_cgn.engine.engine import Engine
from megatron_cgn.hf.resize_checkpoint import resize_checkpoint
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.state import shutdown_parallel
from megatron_cgn.testing import release_engine

PIECES = [(3, 7), (11,), (1099, 640, 9), *((i, 2 * i, 3 * i) for i in range(20, 37))]
"""20 new tokens: 1,120 ids, for which one tensor-parallel rank needs 1,152 rows and two 1,280."""
EXTENSION = extension(PIECES, old=VOCABULARY)
AFTER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run that starts and whose checkpoint gets new tokens, or one that goes on from it."""

    name: str
    layout: Layout
    start: str | None = None
    """Job whose resized checkpoint is gone on from; None starts anew."""
    resumes: bool = True
    """Whether step and position go on too, or the weights and the optimizer alone."""


def run_jobs(root: Path, models: dict[str, Path], jobs: Sequence[Job]) -> dict[str, list[float]]:
    """Run jobs one after another in this process, which is one of several.

    Args:
        root: Where checkpoints go: ``<name>/step_…`` and ``<name>-resized/step_…``.
        models: Hugging Face directories; ``<model>-resized`` has the new vocabulary.
        jobs: In an order in which every start exists before it is needed.

    Returns:
        Losses of the steps that each job of this process took at its end.
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
        results[job.name] = _run(root, models, job)
        shutdown_parallel()
        gc.collect()
    return results


def _run(root: Path, models: dict[str, Path], job: Job) -> list[float]:
    kind = job.layout.model if job.start is None else f"{job.layout.model}-resized"
    engine = build(models[kind], job.layout, random_weights=job.start is not None)
    if job.start is None:
        losses = _train(engine, range(BEFORE), num_ids=VOCABULARY)
        saved = engine.save(root / job.name, fit=FIT, hf_files=_hf_files(models[kind]))
        if dist.get_rank() == 0:
            resize_checkpoint(
                saved,
                root / f"{job.name}-resized" / saved.name,
                EXTENSION,
                write_tokenizer=tokenizer_of(EXTENSION),
            )
        dist.barrier()
    else:
        (directory,) = (root / f"{job.start}-resized").glob("step_*")
        if job.resumes:
            engine.resume(directory, fit=FIT)
        else:
            engine.start_optimizer(directory)
        assert engine.step == (BEFORE if job.resumes else 0)
        engine.save(root / job.name, fit=FIT, hf_files=_hf_files(models[kind]))
        losses = _train(engine, range(BEFORE, BEFORE + AFTER), num_ids=EXTENSION.new_vocab_size)
    release_engine(engine)
    return losses


def _hf_files(model: Path) -> Callable[[Path], None]:
    def write(target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_bytes((model / "config.json").read_bytes())

    return write


def _train(engine: Engine, steps: range, *, num_ids: int) -> list[float]:
    losses = []
    for step in steps:
        share = GLOBAL_BATCH // engine.state.dp_size
        first = engine.state.dp_rank * share
        rows = [_sequence(step, row, num_ids) for row in range(first, first + share)]
        losses.append(engine.train_step(rows, NextToken()).metrics["loss"])
        engine.consumed_sequences += GLOBAL_BATCH
    return losses


def _sequence(step: int, row: int, num_ids: int) -> TokenBatch:
    """One sequence of any ids, the last ones among them."""
    generator = torch.Generator().manual_seed(1000 * step + row)
    ids = torch.randint(0, num_ids, (1, LENGTH + 1), generator=generator)
    ids[0, ::5] = num_ids - 1 - ids[0, ::5] % 10
    return TokenBatch(
        tokens=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=torch.ones(1, LENGTH),
        position_ids=torch.arange(LENGTH).expand(1, -1).contiguous(),
    )
