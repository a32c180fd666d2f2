"""Wiring that every stage shares: the model to start from, the files of a run, its end."""

import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_cgn.config.load import dump_config
from megatron_cgn.config.schema import RunConfig
from megatron_cgn.config.validate import validate_architecture
from megatron_cgn.engine.adapter_checkpoint import check_is_whole
from megatron_cgn.engine.callbacks import Callback
from megatron_cgn.engine.checkpoint import is_checkpoint, read_info
from megatron_cgn.engine.engine import Engine
from megatron_cgn.engine.group_selection import configured_groups
from megatron_cgn.engine.metrics import (
    SAMPLES_FILE,
    Monitor,
    before_after_samples,
    before_after_table,
    read_records,
)
from megatron_cgn.errors import CheckpointError, ConfigError, ModelError
from megatron_cgn.hf.adapter import export_adapter, load_adapter
from megatron_cgn.hf.adapter_file import AdapterFile
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.export import export_weights
from megatron_cgn.hf.load import load_weights
from megatron_cgn.hf.weights import open_weights, stored_architecture
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.lora import adapter_entries
from megatron_cgn.model.size import parameter_count
from megatron_cgn.parallel.reduce import first_problem
from tokenizer.wrapper import Tokenizer

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 5.0
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
        The architecture; of stage ``rm`` with a scalar head, which is new if the model starts from
        a language model.

    Raises:
        ModelError: If the directory is wrong or not supported, or a reward model where the stage
            needs a language model.
        ConfigError: If the layout or ``optim.param_groups`` does not fit the model.
    """
    architecture = read_architecture(model_path(run))
    if run.stage == "rm":
        architecture = replace(architecture, head="score")
    elif architecture.head == "score":
        raise ModelError(
            f"{model_path(run)}: is a reward model: it gives a score and no probabilities of ids. "
            f"Stage {run.stage} needs a language model."
        )
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
        UserError: If weights are missing or cut short, the vocabulary or the adapter to start
            from does not fit, or an output directory cannot be one.
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
    if is_checkpoint(start):
        check_is_whole(start, read_info(start))
    if run.lora.adapter_path is not None:
        adapter = AdapterFile(run.lora.adapter_path)
        adapter.check(architecture)
        adapter.check_settings(run.lora, architecture)
    if run.model.init == "from_hf":
        has_optimizer = is_checkpoint(start) and read_info(start).has_optimizer
        if run.checkpoint.load_optimizer and not has_optimizer:
            raise CheckpointError(
                f"{start}: holds no optimizer state, which checkpoint.load_optimizer=true asks "
                "for; give a checkpoint of a run with checkpoint.save_optimizer=true as "
                "model.hf_path, or set checkpoint.load_optimizer=false"
            )
        if not is_checkpoint(start):
            open_weights(start, stored_architecture(start, architecture))


def load_start(engine: Engine) -> None:
    """Give the model its first weights: from ``model.hf_path``, unless they are random.

    Adapters start from ``lora.adapter_path``, or change nothing yet.
    """
    run, architecture, groups = engine.run, engine.architecture, engine.state.groups
    start = start_path(run)
    if run.model.init == "from_hf" and is_checkpoint(start):
        engine.load_model(start)
    elif run.model.init == "from_hf":
        load_weights(engine.chunks, start, architecture=architecture, groups=groups)
    if run.lora.adapter_path is not None:
        load_adapter(
            engine.chunks,
            run.lora.adapter_path,
            architecture=architecture,
            lora=run.lora,
            groups=groups,
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
        f"{engine.run.precision} on {where}, {engine.backend} layers; "
        f"{state.world_size} process(es): tensor {p.tensor_model_parallel_size} × pipeline "
        f"{p.pipeline_model_parallel_size} × context {p.context_parallel_size} × data "
        f"{state.dp_size}; {engine.total_steps} steps"
    )


def describe_trained(engine: Engine) -> Iterator[str]:
    """Say how much of the model is trained beside frozen weights, and where it starts."""
    lora = engine.run.lora
    if lora.rank is None:
        return
    total = parameter_count(engine.architecture).total
    entries = adapter_entries(engine.architecture, lora)
    adapters = sum(math.prod(entry.shape) for entry in entries)
    hidden = engine.architecture.hidden_size
    whole = engine.architecture.vocab_size * hidden * len(lora.modules_to_save)
    names = list(lora.modules_to_save)
    if engine.architecture.head == "score":
        whole, names = whole + hidden, [*names, "score"]
    yield (
        f"adapters of rank {lora.rank} on {', '.join(lora.targets)}: {adapters:,} parameters, "
        f"{adapters / total:.2%} of the model's {total:,}"
        + (f"; {', '.join(names)} trained whole: {whole:,}" if whole else "")
        + (f"; they start from {lora.adapter_path}" if lora.adapter_path else "")
    )


def describe_groups(engine: Engine) -> Iterator[str]:
    """Say what ``optim.param_groups`` makes of the model."""
    optim = engine.run.optim
    if engine.grouping is not None:
        yield from engine.grouping.describe(lr=optim.lr, weight_decay=optim.weight_decay)


class Progress:
    """Tells on standard error how far a long reading of files is, from time to time."""

    def __init__(self, what: str) -> None:
        """Say what is done, e.g. ``encoding``."""
        self._what = what
        self._told = time.monotonic()

    def __call__(self, path: str, done: int, total: int) -> None:
        """Take note of the bytes of a file that are done."""
        now = time.monotonic()
        if now - self._told >= _PROGRESS_SECONDS:
            self._told = now
            sys.stderr.write(f"{self._what} {path}: {done / max(1, total):.0%}\n")


def show_outcome(run: RunConfig, exported: Mapping[str, Path]) -> None:
    """Say on rank 0 what the run achieved and where it is.

    Args:
        run: The configuration.
        exported: From `export`.
    """
    if dist.get_rank() != 0:
        return
    output_dir = Path(run.output_dir)
    parts = [before_after_table(read_records(output_dir / "metrics.jsonl"))]
    samples = output_dir / SAMPLES_FILE
    if samples.is_file():
        parts += before_after_samples(read_records(samples))
    places = {"checkpoint": checkpoint_dir(run) / "latest", **exported}
    parts.append("\n".join(f"{name:<12}{path}" for name, path in places.items()))
    sys.stderr.write("\n" + "\n\n".join(part for part in parts if part) + "\n")


def export(
    engine: Engine, *, write_beside: Callable[[Path], None] = lambda _: None
) -> dict[str, Path]:
    """Write ``output_dir/export`` and ``output_dir/adapter``, as asked for. Collective.

    Args:
        engine: The trained model.
        write_beside: Adds to, or replaces, the files beside the weights.

    Returns:
        What was written, by the name of its directory.
    """
    run = engine.run
    if not run.export.enabled:
        return {}
    output_dir, groups = Path(run.output_dir), engine.state.groups
    written: dict[str, Path] = {}
    if not engine.has_adapters or run.lora.export != "adapter":
        written["export"] = output_dir / "export"
        export_weights(
            engine.chunks,
            written["export"],
            architecture=engine.architecture,
            source_dir=model_path(run),
            groups=groups,
            dtype=run.export.dtype,
            write_beside=write_beside,
        )
    if engine.has_adapters and run.lora.export != "merged":
        written["adapter"] = output_dir / "adapter"
        export_adapter(
            engine.chunks,
            written["adapter"],
            architecture=engine.architecture,
            lora=run.lora,
            groups=groups,
            base=str(start_path(run)),
            dtype=run.export.dtype,
            source_dir=model_path(run),
            write_beside=write_beside,
        )
    return written
