"""Models with a scalar head on any layout: values, a few training steps, checkpoints, exports.

The plain loop beside them imports nothing of the engine: the model is the sequence classifier of
`transformers`, AdamW is PyTorch's.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from engine_runs import GLOBAL_BATCH, LENGTH, VOCABULARY, global_batch, micro_batches
from megatron.core import parallel_state as mpu
from safetensors.torch import load_file
from torch import Tensor

from megatron_cgn.batch import TokenBatch
from megatron_cgn.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_cgn.engine.engine import Engine
from megatron_cgn.hf.adapter import export_adapter
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.export import export_weights
from megatron_cgn.hf.files import copy_side_files
from megatron_cgn.hf.load import load_weights
from megatron_cgn.hf.score_files import write_score_files
from megatron_cgn.objectives.base import ForwardArgs, LossOutput
from megatron_cgn.parallel.state import initialize_parallel, shutdown_parallel
from megatron_cgn.testing import release_engine, tiny_hf_model

STEPS, SAVED_AFTER = 2, 1
OPTIM = OptimConfig(lr=1e-3, min_lr=1e-3, schedule="constant", weight_decay=0.1, clip_grad=1.0)
LORA = LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))
FIT = {"seed": 1234}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {}),
    "tied-bias": ("qwen2", {"tie_word_embeddings": True}),
}
"""Family and changed fields of each tiny model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A run of a few steps on one layout."""

    model: str = "untied"
    start: Literal["scores", "language"] = "scores"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: Literal["none", "selective", "full"] = "none"
    lora: LoraConfig = field(default_factory=LoraConfig)
    resumes: str | None = None
    """The case whose checkpoint it goes on from."""


class Nearness:
    """Values shall be near a target each: every token's value and gradient matters."""

    unit: Literal["token"] = "token"

    def forward_args(self, batch: TokenBatch) -> ForwardArgs:
        """Ask for the head's own output."""
        return ForwardArgs(tokens=batch.tokens, position_ids=batch.position_ids)

    def loss(self, output: Tensor, batch: TokenBatch) -> LossOutput:
        """Squared distances."""
        assert output.dtype == torch.float32 and output.shape == batch.labels.shape
        distances = (output - batch.labels / VOCABULARY).square() * batch.loss_mask
        return LossOutput(loss_sum=distances.sum(), count=batch.loss_mask.sum().int(), metrics={})


def write_models(root: Path) -> None:
    """Write every language model, and a sequence classifier with the same weights beside it."""
    from transformers import AutoModelForSequenceClassification

    for name, (family, fields) in MODELS.items():
        path = tiny_hf_model(
            root / "language" / name,
            family,
            vocab_size=VOCABULARY,
            pad_token_id=VOCABULARY - 1,
            **fields,
        )
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=torch.float32
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model.score.weight.data.normal_(0.0, 0.3)
        model.save_pretrained(root / "scores" / name)


def run_cases(cases: dict[str, Case], root: Path) -> dict[str, Any]:
    """Run cases in turn on the processes at hand; values, losses and norms by name."""
    torch.set_num_threads(1)
    results = {}
    for name, case in cases.items():
        results[name] = _run(name, case, root)
        gc.collect()
    shutdown_parallel()
    return results


def _run(name: str, case: Case, root: Path) -> dict[str, Any]:
    path = root / case.start / case.model
    engine = _engine(case, path)
    values = _values(engine)
    engine.prepare_training()
    first = 0
    if case.resumes is not None:
        (directory,) = (root / "checkpoints" / case.resumes).glob("step_*")
        engine.resume(directory, fit=FIT)
        first = SAVED_AFTER
    reports = []
    for step in range(first, STEPS):
        if step == SAVED_AFTER and case.resumes is None:
            engine.save(root / "checkpoints" / name, fit=FIT, hf_files=_hf_files(path))
        batches = micro_batches(global_batch(step), size=1, state=engine.state)
        reports.append(engine.train_step(batches, Nearness()))
    after = _values(engine)
    common: dict[str, Any] = {
        "architecture": engine.architecture,
        "groups": engine.state.groups,
        "source_dir": path,
        "dtype": "fp32",
    }
    export_weights(engine.chunks, root / "export" / name, **common)
    if engine.has_adapters:
        export_adapter(
            engine.chunks, root / "adapter" / name, lora=case.lora, base=str(path), **common
        )
    release_engine(engine)
    return {
        "values": values,
        "after": after,
        "losses": [report.metrics["loss"] for report in reports],
        "norms": [report.grad_norm for report in reports],
    }


def _hf_files(path: Path) -> Callable[[Path], None]:
    def write(target: Path) -> None:
        target.mkdir()
        copy_side_files(path, target)
        (target / "config.json").write_bytes((path / "config.json").read_bytes())
        write_score_files(target)

    return write


def _engine(case: Case, path: Path) -> Engine:
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    state = initialize_parallel(case.parallel)
    run = RunConfig(
        precision="fp32",
        model=ModelConfig(hf_path=str(path)),
        parallel=case.parallel,
        data=DataConfig(seq_length=LENGTH),
        train=TrainConfig(
            micro_batch_size=1,
            global_batch_size=GLOBAL_BATCH,
            train_iters=STEPS,
            recompute=case.recompute,
        ),
        optim=OPTIM,
        lora=case.lora,
    )
    architecture = replace(read_architecture(path), head="score")
    engine = Engine(run, architecture, state, total_steps=STEPS)
    load_weights(engine.chunks, path, architecture=architecture, groups=state.groups)
    return engine


def _values(engine: Engine) -> list[list[float]]:
    """Values of one batch, that every rank brings whole; as lists, since a queue shares tensors."""
    ((_, output),) = engine.score([global_batch(100)], Nearness().forward_args)
    return [[float(value) for value in row] for row in output]


def plain_loop(path: Path) -> dict[str, Any]:
    """The same steps with `transformers` and PyTorch alone."""
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)

    def values(batch: TokenBatch) -> Tensor:
        hidden = model.model(batch.tokens, use_cache=False).last_hidden_state
        scored: Tensor = model.score(hidden).squeeze(-1)
        return scored

    with torch.no_grad():
        before = values(global_batch(100))
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(0.9, 0.95),
    )
    losses, norms = [], []
    for step in range(STEPS):
        batch = global_batch(step)
        distances = (values(batch) - batch.labels / VOCABULARY).square() * batch.loss_mask
        loss = distances.sum() / batch.loss_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
    return {
        "values": before,
        "losses": losses,
        "norms": norms,
        "weights": {name: p.detach() for name, p in model.named_parameters()},
    }


def exported(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
