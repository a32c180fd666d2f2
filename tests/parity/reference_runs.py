"""A reference that scores answers on any layout: what its tests run in processes.

Answers are random ids, held in memory. Four processes are started once; each case uses the first n
of them as its world.
"""

import errno
import gc
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron_cgn.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_cgn.data.reference import ScoredFile
from megatron_cgn.data.reference_store import reading_of
from megatron_cgn.data.sft_loader import ConversationRow
from megatron_cgn.engine.engine import Engine
from megatron_cgn.errors import MegatronCGNError
from megatron_cgn.eval import reference
from megatron_cgn.eval.kto import KtoBaseline
from megatron_cgn.eval.reference import reference_scores
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.model.lora import adapter_parameters
from megatron_cgn.parallel.state import initialize_parallel, shutdown_parallel
from megatron_cgn.stages.common import load_start
from megatron_cgn.testing import release_engine

VOCABULARY = 200
LENGTH = 64
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}
LORA = LoraConfig(rank=4, targets=("q_proj", "down_proj"))
SIZES = (14, 9)
"""Answers of each file."""
FIRST = np.arange(0, sum(SIZES), 2)
"""What is wanted at first."""
EVERY = np.arange(sum(SIZES))
MISMATCHED = np.array([3, 17, 8, 3, 20, 11])
"""Prompts of a step; one is in it twice."""
TIMES = 1.02
"""All weights of the policy are these times those of the reference."""
SHIFTS = (6.0, -6.0)
"""What is taken from the reference's log-probabilities, to have a baseline above and below 0."""


class Samples:
    """Random answers behind random prompts; see `Scored`."""

    name = "answers"

    def __init__(self) -> None:
        draw = np.random.default_rng(11)
        lengths = draw.integers(3, LENGTH + 1, size=len(EVERY))
        lengths[[0, 1]] = LENGTH, 3
        self.ids = [draw.integers(0, VOCABULARY, size=n + 1) for n in lengths.tolist()]
        self.prompts = [int(draw.integers(1, len(ids))) for ids in self.ids]
        counted = np.array([len(i) - p for i, p in zip(self.ids, self.prompts, strict=True)])
        bounds = np.cumsum([0, *SIZES]).tolist()
        self.files = [
            ScoredFile(
                path=f"file-{number}.jsonl",
                facts={"answers": "answers", "content": f"content-{number}"},
                readings=reading_of(lengths[begin:end]),
                counted=counted[begin:end].astype(np.int32),
                lines=np.arange(1, end - begin + 1),
            )
            for number, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False))
        ]

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        return np.array([len(ids) - 1 for ids in self.ids], dtype=np.int32)

    def row(self, numbers: Sequence[int]) -> ConversationRow:
        parts = [self.ids[number] for number in numbers]
        masks = [np.arange(1, len(self.ids[n])) >= self.prompts[n] for n in numbers]
        return ConversationRow(
            tokens=np.concatenate([ids[:-1] for ids in parts]),
            labels=np.concatenate([ids[1:] for ids in parts]),
            loss_mask=np.concatenate(masks),
            lengths=tuple(len(ids) - 1 for ids in parts),
            sources=(0,) * len(parts),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceCase:
    """One way of scoring the same answers.

    Attributes:
        world: Processes.
        adapted: Whether adapters that change something are loaded.
        cache: Name of the cache, which cases may share.
    """

    world: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batch_size: int = 1
    lora: LoraConfig = field(default_factory=LoraConfig)
    adapted: bool = False
    cache: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceOutcome:
    """What one rank has after a case."""

    first: npt.NDArray[np.float32]
    every: npt.NDArray[np.float32]
    again: npt.NDArray[np.float32]
    lines: list[str]
    baselines: list[float]


def run_cases(
    cases: Mapping[str, ReferenceCase], model: Path, root: Path
) -> dict[str, ReferenceOutcome | list[str]]:
    """Run cases in turn, and faults of single ranks; this rank's outcomes."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    outcomes: dict[str, ReferenceOutcome | list[str]] = {}
    for number, (name, case) in enumerate(cases.items()):
        if rank < case.world:
            _join(case.world, root / f"meet-{number}")
            outcomes[name] = _run_case(case, model, root, root / (case.cache or name))
            shutdown_parallel()
            gc.collect()
    if rank < 2:
        _join(2, root / "meet-faults")
        outcomes["faults"] = _faults(model, root / "faults")
        shutdown_parallel()
    return outcomes


def _join(world: int, place: Path) -> None:
    os.environ["WORLD_SIZE"] = str(world)
    dist.init_process_group(
        "gloo", init_method=f"file://{place}", rank=int(os.environ["RANK"]), world_size=world
    )


def build(case: ReferenceCase, model: Path) -> Engine:
    """An engine with the model's weights, and adapters if the case has any."""
    run = RunConfig(
        stage="dpo",
        precision="fp32",
        model=ModelConfig(hf_path=str(model)),
        parallel=case.parallel,
        data=DataConfig(seq_length=LENGTH),
        train=TrainConfig(micro_batch_size=case.micro_batch_size, train_iters=1),
        lora=case.lora,
    )
    state = initialize_parallel(case.parallel)
    engine = Engine(run, read_architecture(model), state, total_steps=1)
    load_start(engine)
    return engine


def _run_case(case: ReferenceCase, model: Path, root: Path, cache: Path) -> ReferenceOutcome:
    engine, samples, lines = build(case, model), Samples(), list[str]()
    if case.lora.rank is not None and not case.adapted:
        with torch.no_grad():  # as if they had been trained: the reference is without them
            for _, parameter in adapter_parameters(engine.chunks):
                parameter.fill_(0.1)

    def score(wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return reference_scores(engine, samples, wanted, cache=cache, say=lines.append)

    first, every, again = score(FIRST), score(EVERY), score(EVERY)
    baselines = [] if case.lora.rank is not None else _baselines(engine, samples, every)
    release_engine(engine)
    return ReferenceOutcome(first=first, every=every, again=again, lines=lines, baselines=baselines)


def _baselines(engine: Engine, samples: Samples, every: npt.NDArray[np.float32]) -> list[float]:
    with torch.no_grad():
        for chunk in engine.chunks:
            for parameter in chunk.parameters():
                parameter.mul_(TIMES)
    found = []
    for shift in SHIFTS:
        baseline = KtoBaseline(engine, samples, every - np.float32(shift))(MISMATCHED)
        assert baseline.shape == (1,) and baseline.dtype == torch.float32
        found.append(float(baseline))
    return found


class _SignalledSamples(Samples):
    """Answers whose reading brings a signal to the second rank."""

    def row(self, numbers: Sequence[int]) -> ConversationRow:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().row(numbers)


def _full_disk(descriptor: int, data: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _faults(model: Path, cache: Path) -> list[str]:
    """What both of two ranks say if something happens to one of them."""
    engine, said = build(ReferenceCase(world=2), model), list[str]()

    def attempt(samples: Samples) -> None:
        try:
            reference_scores(engine, samples, EVERY, cache=cache, say=lambda line: None)
            said.append("done")
        except MegatronCGNError as error:
            said.append(f"{type(error).__name__}: {error}")

    before = signal.getsignal(signal.SIGTERM)
    with mock.patch.object(reference, "_KEEP_S", 0.0):  # collects after every row
        attempt(_SignalledSamples())
        assert signal.getsignal(signal.SIGTERM) is before
        writes = _full_disk if dist.get_rank() == 0 else os.write
        with mock.patch.object(os, "write", writes):
            attempt(Samples())
        embedding = next(engine.chunks[0].parameters())
        with torch.no_grad():
            embedding.fill_(torch.nan)
        attempt(Samples())
    release_engine(engine)
    return said
