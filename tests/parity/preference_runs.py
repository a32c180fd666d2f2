"""Steps on every preference loss, one after another, on any layout.

What the parity test of preference learning runs in processes. Every step of a case minimises
another loss, on records that have two or three answers or, for KTO, one: a step whose loss or
gradient were wrong would show in its own figures and in all that come after it.
"""

import gc
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from lora_runs import Share, shares
from safetensors.torch import load_file
from torch import Tensor

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.config.schema import (
    DataConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_cgn.engine.engine import Engine, StepReport
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.export import export_weights
from megatron_cgn.hf.load import load_weights
from megatron_cgn.objectives.base import Objective
from megatron_cgn.objectives.preference import make_objective
from megatron_cgn.objectives.reward import BradleyTerry
from megatron_cgn.parallel.state import ParallelState, initialize_parallel, shutdown_parallel
from megatron_cgn.testing import release_engine, tiny_hf_model

VOCABULARY = 256
RECORD_LENGTH = 64
"""Most places of a record."""
RECORDS = 4
"""Of a step."""
SOURCES = ("plant", "grid")
OPTIM = OptimConfig(lr=5e-4, min_lr=1e-4, weight_decay=0.1, clip_grad=1.0)
LORA = LoraConfig(rank=4)
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": RECORD_LENGTH,
}
_GUESS = math.log(VOCABULARY) + 0.4
"""Negative log-likelihood of a token under the tiny model, about."""

Head = Literal["lm", "score"]
LOSSES: dict[str, LossConfig] = {
    "sigmoid": LossConfig(type="sigmoid"),
    "sigmoid-conservative": LossConfig(type="sigmoid", label_smoothing=0.2, beta=0.3),
    "sigmoid-with-sft": LossConfig(type="sigmoid", rpo_alpha=0.5),
    "sigmoid-per-token": LossConfig(type="sigmoid", length_normalized=True, beta=2.0),
    "ipo": LossConfig(type="ipo"),
    "hinge": LossConfig(type="hinge"),
    "hinge-per-token": LossConfig(type="hinge", length_normalized=True, beta=2.0),
    "robust": LossConfig(type="robust"),
    "simpo": LossConfig(type="simpo"),
    "orpo": LossConfig(type="orpo"),
    "apo_zero": LossConfig(type="apo_zero"),
    "apo_down": LossConfig(type="apo_down"),
    "kto": LossConfig(type="kto", undesirable_weight=1.3),
}
REWARDS: dict[str, LossConfig] = {
    "margins": LossConfig(),
    "no-margins": LossConfig(use_margins=False),
    "centred": LossConfig(center_rewards=0.1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceCase:
    """One way of computing the same steps.

    Attributes:
        world: Processes.
        packed: Records of a row.
        head: ``lm`` takes the steps of `LOSSES`, ``score`` those of `REWARDS`.
    """

    world: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    packed: int = 1
    padded: bool = False
    head: Head = "lm"
    lora: LoraConfig = field(default_factory=LoraConfig)
    recompute: Any = "none"

    @property
    def losses(self) -> Mapping[str, LossConfig]:
        """The steps, by name."""
        return LOSSES if self.head == "lm" else REWARDS


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceOutcome:
    """What one rank has after a case: a value a step, then its share of what was trained."""

    metrics: list[dict[str, float]]
    grad_norms: list[float]
    counts: list[int]
    adapters: dict[str, Share]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A prompt with its answers."""

    answers: tuple[npt.NDArray[np.int64], ...]
    """Ids of each with the prompt."""
    prompt: int
    """How many of these are the prompt's."""
    pairs: tuple[tuple[int, int], ...] = ()
    margin: float = 0.0
    desirable: tuple[bool, ...] = ()
    source: int = 0


def write_models(root: Path) -> dict[Head, Path]:
    """Write a tiny model with either head, with the same layers."""
    language = tiny_hf_model(root / "lm", **MODEL)
    return {"lm": language, "score": write_score_model(language, root / "score")}


def write_score_model(language: Path, target: Path) -> Path:
    """Write a reward model with the layers of a language model; returns its directory."""
    from transformers import AutoModelForSequenceClassification  # not needed by the processes

    model = AutoModelForSequenceClassification.from_pretrained(
        language, num_labels=1, pad_token_id=0, dtype=torch.float32
    )
    model.score.weight.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(target)
    return target


def objective_of(head: Head, loss: LossConfig) -> Objective[PreferenceBatch]:
    """The objective of a step."""
    return BradleyTerry(loss, SOURCES) if head == "score" else make_objective(loss, SOURCES)


def records(step: int, *, unpaired: bool) -> list[Record]:
    """The records of a step, of very unequal lengths; the last may be blank.

    A pair, a ranking of three without ties, one with a tie, and a pair with a margin; unpaired,
    single answers, more of them good than bad.
    """
    draw = np.random.default_rng(100 + step)

    def answers(count: int) -> tuple[int, tuple[npt.NDArray[np.int64], ...]]:
        prompt = int(draw.integers(2, 6))
        lengths = draw.integers(2, RECORD_LENGTH // count - prompt, size=count)
        # Common and rare tokens, so that there is something to learn.
        start = (draw.random(prompt) ** 3 * VOCABULARY).astype(np.int64)
        return prompt, tuple(
            np.concatenate((start, (draw.random(n) ** 3 * VOCABULARY).astype(np.int64)))
            for n in lengths
        )

    def record(count: int, source: int, **fields: Any) -> Record:
        prompt, ids = answers(count)
        return Record(answers=ids, prompt=prompt, source=source, **fields)

    if unpaired:
        return [record(1, i % 2, desirable=(i != 1,)) for i in range(RECORDS)]
    found = [
        record(2, 0, pairs=((0, 1),)),
        record(3, 1, pairs=((0, 1), (0, 2), (1, 2))),
        record(3, 0, pairs=((2, 0), (2, 1))),
        record(2, 1, pairs=((1, 0),), margin=0.7),
    ]
    if step % 4 == 3:
        found[-1] = Record(answers=(), prompt=0)
    return found


def row(records: Sequence[Record], step: int, *, length: int | None) -> PreferenceBatch:
    """Lay records into one row, as `PreferenceBatch` says; None: as long as they are together."""
    answers = [(record, ids) for record in records for ids in record.answers]
    lengths = [len(ids) for _, ids in answers]
    used = sum(lengths)
    total = length or max(8, -(-used // 8) * 8)
    padding = [total - used] if total > used else []
    starts = np.cumsum([0, *lengths, *padding])
    tokens, labels, mask = (np.zeros(total, dtype=np.int64) for _ in range(3))
    for (record, ids), start in zip(answers, starts, strict=False):
        end = start + len(ids)
        tokens[start:end] = ids
        labels[start : end - 1] = ids[1:]
        mask[start + record.prompt - 1 : end - 1] = 1
    firsts = np.cumsum([0, *(len(record.answers) for record in records)])
    pairs = [
        (first + better, first + worse, 1 / len(record.pairs), record.margin)
        for record, first in zip(records, firsts, strict=False)
        for better, worse in record.pairs
    ]
    better, worse, weights, margins = np.array(pairs, dtype=np.float64).reshape(-1, 4).T
    desirable = [good for record in records for good in record.desirable]
    unpaired = not pairs and bool(desirable)
    return PreferenceBatch(
        tokens=torch.from_numpy(tokens)[None],
        labels=torch.from_numpy(labels)[None],
        loss_mask=torch.from_numpy(mask).float()[None],
        position_ids=torch.from_numpy(
            np.arange(total) - np.repeat(starts[:-1], [*lengths, *padding])
        )[None],
        answer_ids=torch.from_numpy(
            np.repeat(np.arange(len(lengths) + len(padding)), [*lengths, *padding])
        )[None],
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        last_places=torch.from_numpy(starts[1 : len(lengths) + 1] - 1),
        source_ids=torch.tensor([record.source for record, _ in answers], dtype=torch.int64),
        chosen=torch.from_numpy(better.astype(np.int64)),
        rejected=torch.from_numpy(worse.astype(np.int64)),
        weights=torch.from_numpy(weights.astype(np.float32)),
        margins=torch.from_numpy(margins.astype(np.float32)),
        desirable=torch.tensor(desirable) if unpaired else None,
        ref_logps=torch.tensor([_reference(record, ids) for record, ids in answers]),
        baseline=torch.tensor([0.8]) if unpaired else None,
    )


def _reference(record: Record, ids: npt.NDArray[np.int64]) -> float:
    """What a reference may say of an answer: near what the model says, but not alike."""
    return -(len(ids) - record.prompt) * _GUESS + float(ids.sum() % 7) - 3.0


def micro_batches(case: PreferenceCase, step: int, state: ParallelState) -> list[PreferenceBatch]:
    """This data-parallel rank's share of a step's records, in rows."""
    unpaired = [*case.losses.values()][step].type == "kto"
    found = records(step, unpaired=unpaired)
    share = RECORDS // state.dp_size
    mine = found[state.dp_rank * share :][:share]
    length = case.packed * RECORD_LENGTH if case.padded else None
    return [
        row(mine[i : i + case.packed], step, length=length) for i in range(0, share, case.packed)
    ]


@contextmanager
def _joined(world: int, parallel: ParallelConfig, meeting: Path) -> Iterator[ParallelState]:
    """Make the first processes of those at hand a world on a layout."""
    os.environ["WORLD_SIZE"] = str(world)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    yield initialize_parallel(parallel)
    shutdown_parallel()
    gc.collect()


def run_cases(
    cases: Mapping[str, PreferenceCase], models: Mapping[Head, Path], root: Path
) -> dict[str, PreferenceOutcome]:
    """Run cases, those of one layout in turn, each on the first processes of those at hand.

    Args:
        cases: By name.
        models: Hugging Face directories, by the head that the model has.
        root: Where weights go, and where processes meet.

    Returns:
        This rank's outcomes of the cases it took part in.
    """
    torch.set_num_threads(1)
    layouts: dict[tuple[int, ParallelConfig], list[str]] = {}
    for name, case in cases.items():
        layouts.setdefault((case.world, case.parallel), []).append(name)
    outcomes = {}
    for number, ((world, parallel), names) in enumerate(layouts.items()):
        if int(os.environ["RANK"]) < world:
            with _joined(world, parallel, root / f"meet-{number}") as state:
                for name in names:
                    path = models[cases[name].head]
                    outcomes[name] = run_case(cases[name], path, root / name, state=state)
    return outcomes


def run_case(
    case: PreferenceCase, path: Path, export_dir: Path, *, state: ParallelState
) -> PreferenceOutcome:
    """All steps of a case on the processes at hand. Collective over all ranks."""
    engine = build(case, path, state)
    reports: list[StepReport] = [
        engine.train_step(micro_batches(case, step, engine.state), objective_of(case.head, loss))
        for step, loss in enumerate(case.losses.values())
    ]
    if case.lora.rank is None:
        export_weights(
            engine.chunks,
            export_dir,
            architecture=engine.architecture,
            source_dir=path,
            groups=engine.state.groups,
            dtype="fp32",
        )
    outcome = PreferenceOutcome(
        metrics=[report.metrics for report in reports],
        grad_norms=[math.nan if r.grad_norm is None else r.grad_norm for r in reports],
        counts=[report.count for report in reports],
        adapters=shares(engine) if case.lora.rank is not None else {},
    )
    release_engine(engine)
    return outcome


def build(case: PreferenceCase, path: Path, state: ParallelState) -> Engine:
    """An engine with the model's weights, and fresh adapters if asked for."""
    steps = len(case.losses)
    run = RunConfig(
        stage="dpo" if case.head == "lm" else "rm",
        precision="fp32",
        model=ModelConfig(hf_path=str(path)),
        parallel=case.parallel,
        data=DataConfig(seq_length=RECORD_LENGTH),
        train=TrainConfig(
            micro_batch_size=case.packed,
            global_batch_size=RECORDS,
            train_iters=steps,
            recompute=case.recompute,
        ),
        optim=OPTIM,
        lora=case.lora,
    )
    architecture = read_architecture(path)
    assert architecture.head == case.head
    engine = Engine(run, architecture, state, total_steps=steps)
    load_weights(engine.chunks, path, architecture=architecture, groups=state.groups)
    engine.prepare_training()
    return engine


def read_weights(directory: Path) -> dict[str, Tensor]:
    """What `run_case` exported."""
    weights: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        weights.update(load_file(file))
    return weights
