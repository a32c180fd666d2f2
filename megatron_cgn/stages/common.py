"""Wiring that every stage shares: the model to start from, the files of a run, its end."""

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_cgn.config.load import dump_config
from megatron_cgn.config.schema import RunConfig
from megatron_cgn.config.validate import validate_architecture
from megatron_cgn.engine.callbacks import Callback
from megatron_cgn.engine.checkpoint import is_checkpoint, read_info
from megatron_cgn.engine.engine import Engine
from megatron_cgn.engine.group_selection import configured_groups
from megatron_cgn.engine.metrics import Monitor, before_after_table, read_records
from megatron_cgn.errors import CheckpointError, ConfigError, ModelError
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.export import export_weights
from megatron_cgn.hf.load import load_weights
from megatron_cgn.hf.weights import open_weights
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.build import resolve_backend
from megatron_cgn.parallel.reduce import first_problem
from tokenizer.wrapper import Tokenizer

logger = logging.getLogger(__name__)

_HF_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


def start_path(run: RunConfig) -> Path:
    """``model.hf_path``, which validation has demanded."""
    assert run.model.hf_path is not None
    return Path(run.model.hf_path)


def model_path(run: RunConfig) -> Path:
    """Where the model's ``config.json`` and tokenizer are, also if it starts from a checkpoint."""
    start = start_path(run)
    return start / "hf" if is_checkpoint(start) else start


def checkpoint_dir(run: RunConfig) -> Path:
    """``checkpoint.dir`` or its default."""
    return Path(run.checkpoint.dir or Path(run.output_dir) / "checkpoints")


def open_architecture(run: RunConfig) -> Architecture:
    """Read the model's architecture and check that the layout and the groups fit it.

    Args:
        run: The configuration.

    Returns:
        The architecture.

    Raises:
        ModelError: If the directory is wrong or not supported.
        ConfigError: If the layout or ``optim.param_groups`` does not fit the model.
    """
    architecture = read_architecture(model_path(run))
    validate_architecture(run, architecture)
    configured_groups(run, architecture)
    return architecture


def check_start(run: RunConfig, architecture: Architecture, tokenizer: Tokenizer) -> None:
    """Check what can be checked of the model, the tokenizer and the outputs without building.

    Args:
        run: The configuration.
        architecture: The model.
        tokenizer: Its tokenizer.

    Raises:
        UserError: If weights are missing or cut short, the vocabulary does not fit, or an output
            directory cannot be one.
    """
    for name, path in (
        ("output_dir", Path(run.output_dir)),
        ("checkpoint.dir", checkpoint_dir(run)),
    ):
        for place in (path, *path.parents):
            if place.exists() and not place.is_dir():
                raise ConfigError(f"{name}: {path}: {place} is a file; choose a directory.")
    if tokenizer.vocab_size > architecture.vocab_size:
        raise ModelError(
            f"{model_path(run)}: the tokenizer has {tokenizer.vocab_size:,} ids, but the model's "
            f"vocab_size is {architecture.vocab_size:,}: the last ids have no embedding. Extend "
            "the model's vocabulary, or restore the model's own tokenizer."
        )
    start = start_path(run)
    if run.model.init == "from_hf":
        has_optimizer = is_checkpoint(start) and read_info(start).has_optimizer
        if run.checkpoint.load_optimizer and not has_optimizer:
            raise CheckpointError(
                f"{start}: holds no optimizer state, which checkpoint.load_optimizer=true asks "
                "for; give a checkpoint of a run with checkpoint.save_optimizer=true as "
                "model.hf_path, or set checkpoint.load_optimizer=false"
            )
        if not is_checkpoint(start):
            open_weights(start, architecture)


def load_start(engine: Engine) -> None:
    """Give the model its first weights: from ``model.hf_path``, unless they are random."""
    if engine.run.model.init == "random":
        return
    start = start_path(engine.run)
    if is_checkpoint(start):
        engine.load_model(start)
    else:
        load_weights(
            engine.chunks,
            start,
            architecture=engine.architecture,
            groups=engine.state.groups,
        )


def start_optimizer(engine: Engine) -> None:
    """Give the optimizer the state of ``model.hf_path`` if the configuration asks for it."""
    if engine.run.checkpoint.load_optimizer:
        engine.start_optimizer(start_path(engine.run))


def copy_hf_files(source: Path, target: Path) -> None:
    """Copy configuration and tokenizer, but no weights.

    Args:
        source: Hugging Face directory.
        target: Directory to fill; made if missing.
    """
    if not (source / "config.json").is_file():
        raise ModelError(f"{source}: config.json is gone; a checkpoint needs it to be exported.")
    target.mkdir(parents=True, exist_ok=True)
    for pattern in _HF_FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)


def base_fit(architecture: Architecture, **more: Any) -> dict[str, Any]:
    """What a run must share with a checkpoint to go on from it.

    Args:
        architecture: The model, which always belongs to it.
        **more: A stage's own fields, e.g. everything that decides the data's order.

    Returns:
        Flat dictionary by dotted name.
    """
    fields = {f"model.{name}": value for name, value in asdict(architecture).items()}
    return {**fields, **more}


def _write_config(run: RunConfig) -> None:
    path = Path(run.output_dir) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(dump_config(run), "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def make_callbacks(
    engine: Engine, *, tokens_after: Callable[[int], int], resumed_from: Path | None
) -> list[Callback]:
    """Write the run's ``config.yaml`` and open its monitor. Collective over all ranks.

    Comes after resuming: a run that is refused leaves the records of the run before it alone.

    Args:
        engine: After resuming, so that its step is where the run goes on.
        tokens_after: Tokens that all ranks have read after so many steps, padding left out.
        resumed_from: The checkpoint that the run goes on from, to be told.

    Returns:
        Callbacks for the trainer; none on other ranks.

    Raises:
        ConfigError: On every rank, if ``output_dir`` cannot be written.
    """
    callbacks: list[Callback] = []
    problem: str | None = None
    if dist.get_rank() == 0:
        try:
            _write_config(engine.run)
            monitor = Monitor(
                Path(engine.run.output_dir),
                total_steps=engine.total_steps,
                first_step=engine.step,
                tokens_after=tokens_after,
            )
            callbacks = [monitor]
            if resumed_from is not None:
                monitor.on_message(f"resumed from {resumed_from} after step {engine.step}")
        except OSError as error:
            problem = str(error)
    if first := first_problem(problem):
        raise ConfigError(
            f"output_dir: {engine.run.output_dir} cannot be written ({first}). Free space, or "
            "choose another directory."
        )
    return callbacks


def describe_engine(engine: Engine) -> str:
    """Say what the model runs on and how it is laid out."""
    p, state = engine.run.parallel, engine.state
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return (
        f"{engine.run.precision} on {where}, {resolve_backend(engine.run.model.backend)} layers; "
        f"{state.world_size} process(es): tensor {p.tensor_model_parallel_size} × pipeline "
        f"{p.pipeline_model_parallel_size} × context {p.context_parallel_size} × data "
        f"{state.dp_size}; {engine.total_steps} steps"
    )


def describe_groups(engine: Engine) -> Iterator[str]:
    """Say what ``optim.param_groups`` makes of the model."""
    optim = engine.run.optim
    if engine.grouping is not None:
        yield from engine.grouping.describe(lr=optim.lr, weight_decay=optim.weight_decay)


def show_outcome(run: RunConfig, exported: Path | None) -> None:
    """Say on rank 0 what the run achieved and where it is."""
    if dist.get_rank() != 0:
        return
    table = before_after_table(read_records(Path(run.output_dir) / "metrics.jsonl"))
    where = [f"checkpoint  {checkpoint_dir(run) / 'latest'}"]
    where += [f"export      {exported}"] if exported else []
    sys.stderr.write("\n" + "\n".join([table, *where]) + "\n")


def export(engine: Engine) -> Path | None:
    """Write ``output_dir/export``, if asked for. Collective over all ranks.

    Args:
        engine: The trained model.

    Returns:
        The Hugging Face directory, or None.
    """
    run = engine.run
    if not run.export.enabled:
        return None
    target = Path(run.output_dir) / "export"
    export_weights(
        engine.chunks,
        target,
        architecture=engine.architecture,
        source_dir=model_path(run),
        groups=engine.state.groups,
        dtype=run.export.dtype,
    )
    return target
