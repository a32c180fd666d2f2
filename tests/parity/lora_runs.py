"""Steps with adapters on any layout: what the adapters' parity tests run in processes.

Four processes are started once. Each job uses the first n of them as its world, as the jobs of the
checkpoint tests do.
"""

import dataclasses
import gc
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from engine_runs import GLOBAL_BATCH, LENGTH, OPTIM, STEPS, VOCABULARY, global_batch, micro_batches
from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_cgn.batch import TokenBatch
from megatron_cgn.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    ParamGroupConfig,
    Precision,
    RunConfig,
    TrainConfig,
)
from megatron_cgn.engine.engine import Engine, StepReport
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.load import load_weights
from megatron_cgn.model.lora import adapter_parameters, adapters_off, trained_whole
from megatron_cgn.model.lora_linear import REPLICATED_RNG, SHARDED_RNG
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.state import initialize_parallel, shutdown_parallel
from megatron_cgn.testing import release_engine

LORA = LoraConfig(rank=4)
TIMES = 10.0
"""Learning rates are these times those of `OPTIM`: adapters begin at nothing."""
CLIP = 1.0
"""The gradient norm crosses it: some steps are clipped and some are not."""
LORA_OPTIM = dataclasses.replace(
    OPTIM, lr=OPTIM.lr * TIMES, min_lr=OPTIM.min_lr * TIMES, clip_grad=CLIP
)
FIT = {"seed": 1234}
FEW = 4
"""Steps of a case that need not be of all ten: of the same schedule, past the warm-up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraCase:
    """One run with adapters.

    Attributes:
        world: Processes.
        packed: Whether the sequences of a micro-batch are one packed row.
        steps: How many of the schedule's steps are taken.
        start: Case whose checkpoint is resumed after half of them.
        saves: Whether to write a checkpoint after half of them.
    """

    world: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: str = "llama"
    lora: LoraConfig = LORA
    micro_batch_size: int = 2
    recompute: Any = "none"
    precision: Precision = "fp32"
    packed: bool = False
    groups: tuple[ParamGroupConfig, ...] = ()
    steps: int = FEW
    start: str | None = None
    saves: bool = False

    @property
    def half(self) -> int:
        """Steps before a checkpoint."""
        return self.steps // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One rank's share of a trained tensor, in an array since a queue would share a tensor."""

    value: Any
    tp_dim: int | None
    tp_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOutcome:
    """What one rank has after a case."""

    losses: list[float]
    grad_norms: list[float]
    first: dict[str, Share]
    last: dict[str, Share]
    frozen_before: str
    frozen_after: str
    off_is_base: bool
    draws: tuple[float, ...] = ()
    stored: tuple[str, ...] = ()


def layout(tp: int = 1, pp: int = 1, cp: int = 1, vp: int | None = None, **rest: Any) -> Any:
    """A parallel layout by its sizes."""
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vp,
        **rest,
    )


def run_cases(
    cases: Mapping[str, LoraCase], models: Mapping[str, Path], root: Path
) -> dict[str, LoraOutcome]:
    """Run cases in turn, each on the first processes of those at hand.

    Args:
        cases: By name; one that resumes comes after the one that saves.
        models: Hugging Face directories.
        root: Where checkpoints go, and where processes meet.

    Returns:
        This rank's outcomes of the cases it took part in.
    """
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    outcomes = {}
    for number, (name, case) in enumerate(cases.items()):
        if rank >= case.world:
            continue
        os.environ["WORLD_SIZE"] = str(case.world)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{root}/meet-{number}",
            rank=rank,
            world_size=case.world,
        )
        outcomes[name] = run_case(name, case, models[case.model], root)
        shutdown_parallel()
        gc.collect()
    return outcomes


def build(case: LoraCase, path: Path, *, prepare: bool = True) -> Engine:
    """An engine with the model's weights and fresh adapters."""
    run = RunConfig(
        precision=case.precision,
        model=ModelConfig(hf_path=str(path)),
        parallel=case.parallel,
        data=DataConfig(seq_length=LENGTH),
        train=TrainConfig(
            micro_batch_size=1 if case.packed else case.micro_batch_size,
            global_batch_size=GLOBAL_BATCH,
            train_iters=STEPS,
            recompute=case.recompute,
        ),
        optim=dataclasses.replace(LORA_OPTIM, param_groups=case.groups),
        lora=case.lora,
    )
    state = initialize_parallel(case.parallel)
    architecture = read_architecture(path)
    engine = Engine(run, architecture, state, total_steps=STEPS)
    load_weights(engine.chunks, path, architecture=architecture, groups=state.groups)
    if prepare:
        engine.prepare_training()
    return engine


def run_case(name: str, case: LoraCase, path: Path, root: Path) -> LoraOutcome:
    """All steps of a case on the processes at hand. Collective over all ranks."""
    engine = build(case, path)
    frozen_before, first = frozen_digest(engine), shares(engine)
    stored: tuple[str, ...] = ()
    reports: list[StepReport] = []
    if case.start is not None:
        (directory,) = (root / case.start).glob("step_*")
        engine.resume(directory, fit=FIT)
    else:
        reports += train(engine, case, range(case.half))
    if case.saves:
        directory = engine.save(root / name, fit=FIT, hf_files=lambda target: target.mkdir())
        entries = FileSystemReader(directory / "dist").read_metadata().state_dict_metadata
        stored = tuple(n for n, e in entries.items() if isinstance(e, TensorStorageMetadata))
    reports += train(engine, case, range(case.half, case.steps))
    outcome = LoraOutcome(
        losses=[r.metrics["loss"] for r in reports],
        grad_norms=[math.nan if r.grad_norm is None else r.grad_norm for r in reports],
        first=first,
        last=shares(engine),
        frozen_before=frozen_before,
        frozen_after=frozen_digest(engine),
        off_is_base=_off_is_base(engine, case) if case.start is None else True,
        draws=_draws() if case.lora.dropout else (),
        stored=stored,
    )
    release_engine(engine)
    return outcome


def train(engine: Engine, case: LoraCase, steps: Sequence[int]) -> list[StepReport]:
    """Take the steps of these numbers."""
    reports = []
    for step in steps:
        batches = micro_batches(global_batch(step), size=case.micro_batch_size, state=engine.state)
        if case.packed:
            batches = [_packed(batch) for batch in batches]
        reports.append(engine.train_step(batches, NextToken()))
    return reports


def shares(engine: Engine) -> dict[str, Share]:
    """This rank's share of everything that is trained, by name in `peft` without its prefix."""
    tp_rank = engine.state.tp_rank
    found = {
        entry.key: Share(
            value=p.detach().float().numpy().copy(), tp_dim=entry.tp_dim, tp_rank=tp_rank
        )
        for entry, p in adapter_parameters(engine.chunks)
    }
    for name, p in trained_whole(engine.chunks):
        found[name] = Share(value=p.detach().float().numpy().copy(), tp_dim=0, tp_rank=tp_rank)
    return found


def join(ranks: Sequence[Mapping[str, Share]]) -> dict[str, Tensor]:
    """The whole tensors of all ranks' shares, whose copies must be equal bit for bit."""
    parts: dict[str, dict[int, Share]] = {}
    for rank in ranks:
        for key, share in rank.items():
            place = 0 if share.tp_dim is None else share.tp_rank
            known = parts.setdefault(key, {}).setdefault(place, share)
            assert np.array_equal(known.value, share.value), f"{key}: copies differ"
    whole = {}
    for key, places in parts.items():
        values = [torch.from_numpy(places[place].value) for place in sorted(places)]
        joined = values[0] if len(values) == 1 else torch.cat(values, places[0].tp_dim or 0)
        # The vocabulary's padding depends on the layout.
        whole[key] = joined if key.startswith("adapters.") else joined[:VOCABULARY]
    return whole


def frozen_digest(engine: Engine) -> str:
    """Hash of all weights of this rank that are not trained."""
    digest = hashlib.sha256()
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None and not hasattr(parameter, "main_grad")
                digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _draws() -> tuple[float, ...]:
    """The next number of each random state of dropout."""
    drawn = []
    for name in (REPLICATED_RNG, SHARDED_RNG):
        with tensor_parallel.get_cuda_rng_tracker().fork(name):
            drawn.append(float(torch.rand(())))
    return tuple(drawn)


def _off_is_base(engine: Engine, case: LoraCase) -> bool:
    """Whether scores without adapters are those of a model that never had any."""
    if case.lora.modules_to_save:
        return True
    batch = micro_batches(global_batch(0), size=case.micro_batch_size, state=engine.state)
    with adapters_off(engine._wrapped):
        off = [nll for _, nll in engine.score(batch, NextToken().forward_args)]
    on = [nll for _, nll in engine.score(batch, NextToken().forward_args)]
    for chunk in engine.chunks:
        for module in chunk.modules():
            for key in [k for k, h in module._forward_hooks.items() if type(h).__name__ == "_Add"]:
                del module._forward_hooks[key]
    base = [nll for _, nll in engine.score(batch, NextToken().forward_args)]
    same = all(torch.equal(a, b) for a, b in zip(off, base, strict=True))
    return same and not all(torch.equal(a, b) for a, b in zip(on, base, strict=True))


def _packed(batch: TokenBatch) -> TokenBatch:
    """The sequences of a batch in one row, each seeing itself alone."""
    count, length = batch.tokens.shape
    return TokenBatch(
        tokens=batch.tokens.reshape(1, -1),
        labels=batch.labels.reshape(1, -1),
        loss_mask=batch.loss_mask.reshape(1, -1),
        position_ids=batch.position_ids.reshape(1, -1),
        cu_seqlens=torch.arange(count + 1, dtype=torch.int32) * length,
    )
