"""Checkpoints: directories that exist only when they are whole.

::

    checkpoints/
      latest -> step_0000200          moved only after the directory below is complete
      step_0000200/
        checkpoint.json               what it is: step, position, model, files and their sizes
        dist/                         Megatron's torch_dist format: weights, optimizer, RNG
        hf/                           config.json and tokenizer, so that it can be exported

A checkpoint is written to ``step_….partial`` and renamed, so a killed save leaves the previous
one latest and usable. Reading and writing tensors only; when to save is `engine.py`'s business.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_cgn.errors import CheckpointError, UserError

logger = logging.getLogger(__name__)

FORMAT = 1
LATEST = "latest"
_STEP = re.compile(r"step_(\d{7,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """The contents of ``checkpoint.json``.

    Attributes:
        step: Optimizer steps done.
        consumed_sequences: Training sequences read.
        has_optimizer: Whether training can go on exactly from here.
        has_master_weights: Whether FP32 master weights are stored beside the model's.
        layout: Parallel sizes it was written under, to know whether RNG states fit.
        fit: What a run must share with the checkpoint to go on from it, by dotted name.
        vocab_size: Ids of the tokenizer.
        padded_vocab_size: Rows of the stored embedding.
        dtype: Type of the stored weights.
        files: Size in bytes of every file, by relative path.
        format: Version of this layout.
    """

    step: int
    consumed_sequences: int
    has_optimizer: bool
    has_master_weights: bool = False
    layout: Mapping[str, int] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    vocab_size: int
    padded_vocab_size: int
    dtype: str
    files: Mapping[str, int] = field(default_factory=dict)
    format: int = FORMAT


def checkpoint_name(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step_{step:07d}"


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is a checkpoint of ours, rather than a Hugging Face directory."""
    return (directory / "checkpoint.json").is_file()


def find_latest(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`, or None.

    Args:
        root: ``checkpoint.dir``.

    Returns:
        Its directory. Directories without ``checkpoint.json`` or with another name are not seen.
    """
    steps = _complete(root)
    return steps[-1] if steps else None


def _complete(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if _STEP.fullmatch(p.name) and not p.is_symlink()]
    return sorted((p for p in found if is_checkpoint(p)), key=lambda p: int(p.name[5:]))


def read_info(directory: Path) -> CheckpointInfo:
    """Read and check ``checkpoint.json``, and that every file has its size.

    Args:
        directory: A checkpoint directory.

    Returns:
        What it says.

    Raises:
        CheckpointError: If something is missing, cut short or unreadable.
    """
    path = directory / "checkpoint.json"
    try:
        fields = json.loads(path.read_text("utf-8"))
        info = CheckpointInfo(**fields)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory}: no checkpoint.json, so this is not a complete checkpoint."
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error
    if info.format != FORMAT:
        raise CheckpointError(f"{path}: format {info.format}; this version reads {FORMAT}.")
    for name, size in info.files.items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(
                f"{directory}: damaged: {name} {state}, {size} bytes were written. Remove the "
                "directory to resume from the checkpoint before it."
            )
    return info


def check_fit(info: CheckpointInfo, fit: Mapping[str, Any], directory: Path) -> None:
    """Refuse a checkpoint that another configuration wrote.

    Args:
        info: The checkpoint's.
        fit: What this run needs, by dotted name.
        directory: For the message.

    Raises:
        CheckpointError: Naming every differing field and both values.
    """
    written = dict(info.fit)
    wanted = json.loads(json.dumps(fit))
    names = [n for n in sorted({*written, *wanted}) if written.get(n) != wanted.get(n)]
    if names:
        lines = "".join(
            f"\n  {n}: checkpoint {written.get(n)!r}, this run {wanted.get(n)!r}" for n in names
        )
        raise CheckpointError(
            f"{directory}: does not fit this configuration:{lines}\n"
            "Restore these settings, or start anew with checkpoint.resume=never and another "
            "checkpoint.dir."
        )


def save_checkpoint(
    root: Path,
    sharded_state: ShardedStateDict,
    info: CheckpointInfo,
    *,
    hf_files: Callable[[Path], None],
    keep_last: int | None,
) -> Path:
    """Write one checkpoint. Collective over all ranks.

    Args:
        root: ``checkpoint.dir``.
        sharded_state: Everything to store, as sharded tensors and objects.
        info: What goes into ``checkpoint.json``; its ``files`` are filled in here.
        hf_files: Writes configuration and tokenizer into a directory. Called on rank 0.
        keep_last: How many checkpoints remain; None keeps all.

    Returns:
        The new checkpoint's directory.

    Raises:
        CheckpointError: On every rank, if any rank could not write; nothing then remains of it.
    """
    final = root / checkpoint_name(info.step)
    partial = final.with_name(final.name + ".partial")

    def prepare() -> None:
        for leftover in root.glob("step_*.partial"):
            shutil.rmtree(leftover)
        (partial / "dist").mkdir(parents=True)
        hf_files(partial / "hf")

    def publish() -> None:
        sizes = {
            str(p.relative_to(partial)): p.stat().st_size
            for p in sorted(partial.rglob("*"))
            if p.is_file()
        }
        _write_json(partial / "checkpoint.json", {**_as_dict(info), "files": sizes})
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _point_latest(root, final.name)
        if keep_last is not None:
            for old in _complete(root)[:-keep_last]:
                shutil.rmtree(old)

    _together(prepare, "prepare", partial, only_rank_0=True)
    _together(lambda: _write_dist(sharded_state, partial / "dist"), "write", partial)
    _together(publish, "publish", partial, only_rank_0=True)
    return final


def load_checkpoint(directory: Path, sharded_state: ShardedStateDict) -> dict[str, Any]:
    """Read tensors and objects of a checkpoint. Collective over all ranks.

    Args:
        directory: A checkpoint directory.
        sharded_state: What this rank needs; its tensors are filled in place where possible.

    Returns:
        The loaded state dict.

    Raises:
        CheckpointError: If something is missing or cannot be read.
    """
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(
            sharded_state,
            str(directory / "dist"),
            validate_access_integrity=False,
            strict=StrictHandling.ASSUME_OK_UNEXPECTED,
        )
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(f"{directory}: cannot be read: {error}") from error
    except Exception as error:
        # Megatron's and torch's checkpoint errors share no base below Exception.
        if type(error).__name__ not in ("CheckpointingException", "CheckpointException"):
            raise
        raise CheckpointError(f"{directory}: cannot be read: {error}") from error
    return loaded


def per_rank_object(key: str, value: Any) -> ShardedObject:
    """An object that every rank stores for itself, such as its RNG state."""
    shape, offset = (dist.get_world_size(),), (dist.get_rank(),)
    return ShardedObject(key, value, shape, offset, replica_id=0)


def _write_dist(sharded_state: ShardedStateDict, directory: Path) -> None:
    dist_checkpointing.save(sharded_state, str(directory), validate_access_integrity=False)


def _point_latest(root: Path, name: str) -> None:
    link = root / f".{LATEST}.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.replace(root / LATEST)


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _as_dict(info: CheckpointInfo) -> dict[str, Any]:
    names = CheckpointInfo.__dataclass_fields__
    return {n: dict(v) if isinstance(v := getattr(info, n), Mapping) else v for n in names}


def _together(
    action: Callable[[], None], verb: str, partial: Path, *, only_rank_0: bool = False
) -> None:
    """Do one phase of a save; if it fails anywhere, clean up and fail everywhere."""
    problem: str | None = None
    if not only_rank_0 or dist.get_rank() == 0:
        try:
            action()
        except UserError as error:
            problem = str(error)
        except Exception as error:
            # Any writer thread's or process's error, of whatever type, must reach all ranks:
            # those that wrote well would otherwise wait for ever.
            logger.debug("could not %s a checkpoint", verb, exc_info=True)
            problem = f"{type(error).__name__}: {error}"
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    failed = {rank: p for rank, p in enumerate(problems) if p is not None}
    if failed:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        rank, first = next(iter(failed.items()))
        raise CheckpointError(
            f"{partial.parent}: could not {verb} a checkpoint (rank {rank}: {first}). Earlier "
            "checkpoints are untouched. Free space or choose another checkpoint.dir."
        )
