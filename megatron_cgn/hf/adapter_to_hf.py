"""Convert a checkpoint of adapters: into an adapter directory of `peft`, or into a merged model."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_cgn.config.schema import LoraConfig
from megatron_cgn.errors import CheckpointError, ModelError
from megatron_cgn.hf.adapter_files import plan_adapter, write_adapter_files
from megatron_cgn.hf.adapter_names import adapter_table
from megatron_cgn.hf.checkpoint_layout import CHECKPOINT_FILE, HF_DIRECTORY
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.files import (
    check_free_space,
    copy_side_files,
    directory_to_write,
    new_directory,
    work_directory,
)
from megatron_cgn.hf.fingerprint import weights_fingerprint
from megatron_cgn.hf.merge import merge_adapter, merged_bytes
from megatron_cgn.hf.streaming import Progress
from megatron_cgn.hf.to_hf import (
    TensorSource,
    convert_to_hf,
    converted_bytes,
    open_tensors,
    read_checkpoint,
    types_bytes,
)


def holds_adapters(checkpoint_dir: str | Path) -> bool:
    """Whether a checkpoint of ours holds adapters only.

    Raises:
        CheckpointError: If it is no checkpoint, or a damaged one.
    """
    return read_checkpoint(Path(checkpoint_dir)).adapter is not None


def convert_adapter(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda _: None,
) -> None:
    """Write an adapter directory of `peft` from a checkpoint of adapters.

    Args:
        checkpoint_dir: Written by training with ``lora.rank``.
        out_dir: Directory to write; replaced, once complete, if it exists.
        base: The model that the adapters belong to. None: the one that the checkpoint names.
        dtype: Type of the tensors; None keeps the stored types.
        progress: Told of every few megabytes that were written.

    Raises:
        CheckpointError: If the checkpoint is damaged, holds no adapters, or `base` is a directory
            of other weights than the adapters were trained on.
        ModelError: If the disk refuses. Nothing is left behind then.
    """
    target, source = directory_to_write(Path(out_dir), error=ModelError), Path(checkpoint_dir)
    record = _record(source)
    if base is not None and Path(base).is_dir():
        _check_base(source, record, Path(base))
    architecture, lora = read_architecture(source / HF_DIRECTORY), _lora(record)
    table = adapter_table(architecture, lora)
    tensors = TensorSource(open_tensors(source, architecture, table), table)
    types = tensors.types(dtype)
    (plan,) = plan_adapter([types], architecture=architecture, lora=lora)
    check_free_space(target, plan.num_bytes, error=ModelError)
    name = base or record.get("base") or "unknown"
    with new_directory(target, error=ModelError) as work:
        copy_side_files(source / HF_DIRECTORY, work)
        write_adapter_files(work, architecture, lora, base=str(name), types=types)
        tensors.write_file(work, plan, dtype=dtype, progress=progress)


def merge_checkpoint(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress = lambda _: None,
) -> None:
    """Write a Hugging Face directory of a checkpoint's adapters and the weights they belong to.

    Args:
        checkpoint_dir: Written by training with ``lora.rank``.
        out_dir: Directory to write; replaced, once complete, if it exists.
        base: The model that the adapters belong to: a Hugging Face directory or a checkpoint of
            ours, which is first converted beside `out_dir`. None: the one that the checkpoint
            names.
        dtype: Type of the weights; None keeps the base's.
        max_shard_bytes: Largest size of one safetensors file.
        progress: Told of every few megabytes that were written.

    Raises:
        CheckpointError: If the checkpoint is damaged, holds no adapters, or the base is not found
            or has other weights than the adapters were trained on.
        ModelError: If base or disk are at fault, or `out_dir` is the base. Nothing is left behind
            then.
    """
    source, target = Path(checkpoint_dir), directory_to_write(Path(out_dir), error=ModelError)
    model = _base(source, base)
    if target in (model.resolve(), *model.resolve().parents):
        raise ModelError(
            f"{target}: would replace the model that the adapters belong to; give another directory"
        )
    with _beside(target) as work:
        convert_adapter(source, work / "adapter", base=str(model))
        if (model / CHECKPOINT_FILE).is_file():
            convert_to_hf(model, work / "base")
            model = work / "base"
        merge_adapter(
            model,
            work / "adapter",
            target,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )


def adapter_bytes(
    checkpoint_dir: str | Path,
    *,
    merge: bool,
    base: str | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Bytes of tensors that `convert_adapter` or `merge_checkpoint` will tell their progress of."""
    source = Path(checkpoint_dir)
    if merge:
        model = _base(source, base)
        is_checkpoint = (model / CHECKPOINT_FILE).is_file()
        return (converted_bytes if is_checkpoint else merged_bytes)(model, dtype=dtype)
    architecture = read_architecture(source / HF_DIRECTORY)
    table = adapter_table(architecture, _lora(_record(source)))
    return types_bytes(TensorSource(open_tensors(source, architecture, table), table).types(dtype))


def _record(checkpoint: Path) -> Mapping[str, Any]:
    """What ``checkpoint.json`` says of the adapters."""
    adapter = read_checkpoint(checkpoint).adapter
    if adapter is None:
        raise CheckpointError(f"{checkpoint}: holds all weights and no adapters to merge")
    return adapter


def _lora(record: Mapping[str, Any]) -> LoraConfig:
    """The adapters' settings; a scale by the rank's root is written as one by the rank."""
    return LoraConfig(
        rank=record["rank"],
        alpha=record["scaling"] * record["rank"],
        targets=tuple(record["targets"]),
        use_dora=record["use_dora"],
        modules_to_save=tuple(record["modules_to_save"]),
    )


def _base(checkpoint: Path, base: str | None) -> Path:
    """The model that a checkpoint's adapters belong to, checked."""
    record = _record(checkpoint)
    path = base or record.get("base")
    if not path:
        raise CheckpointError(
            f"{checkpoint}: its adapters were trained on random weights, which are stored nowhere"
        )
    if not Path(path).is_dir():
        named = "given by --base" if base else f"named in {CHECKPOINT_FILE}"
        raise CheckpointError(
            f"{path}: no such directory, but it is {named} as the model that the adapters of "
            f"{checkpoint} belong to; give it by --base"
        )
    _check_base(checkpoint, record, Path(path))
    return Path(path)


def _check_base(checkpoint: Path, record: Mapping[str, Any], base: Path) -> None:
    if weights_fingerprint(base) != record["base_fingerprint"]:
        raise CheckpointError(
            f"{base}: its weights are not those that the adapters of {checkpoint} were trained "
            f"on, which were at {record.get('base')!r}; give these by --base"
        )


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A directory on the target's disk for what is needed on the way; removed in any case."""
    try:
        work = work_directory(target.with_name(f"{target.name}-parts"))
    except OSError as fault:
        raise ModelError(f"{target}: could not be written: {fault}") from fault
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
