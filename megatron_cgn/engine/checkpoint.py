"""Checkpoints: directories that exist only when they are whole.

::

    checkpoints/
      latest -> step_0000200          moved only after the directory below is complete
      step_0000200/
        checkpoint.json               what it is: step, position, model, files and their sizes
        dist/                         Megatron's torch_dist format: weights, optimizer, RNG
        hf/                           config.json and tokenizer, so that it can be exported
        blend.json                    what it has consumed, where the stage keeps account

A checkpoint is written to ``step_….partial`` and renamed, and an old one is renamed to
``step_….partial`` before it is deleted, so a kill leaves every ``step_…`` whole. Reading and
writing tensors only; when to save is `trainer.py`'s business.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cgn.engine.dist_writer import InProcessSaveStrategy
from megatron_cgn.errors import CheckpointError, UserError
from megatron_cgn.hf.checkpoint_layout import (
    REMEDY,
    TENSOR_SUFFIX,
    check_digests,
    digest,
    write_info,
)
from megatron_cgn.hf.checkpoint_layout import CheckpointInfo as CheckpointInfo
from megatron_cgn.hf.checkpoint_layout import read_info as read_info
from megatron_cgn.parallel.reduce import first_problem

logger = logging.getLogger(__name__)

LATEST = "latest"
_BEFORE = {"model.head": "lm"}
"""What was meant where older checkpoints say nothing."""
_STEP = re.compile(r"step_(\d{7,})")


def checkpoint_name(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step_{step:07d}"


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is a checkpoint of ours, rather than a Hugging Face directory."""
    return (directory / "checkpoint.json").is_file()


def find_latest(root: Path) -> Path | None:
    """The newest checkpoint below `root`, or None.

    A save never leaves an incomplete directory under a checkpoint's name, so the newest is not
    passed over for an older one if something of it is missing: `read_info` refuses it.

    Args:
        root: ``checkpoint.dir``.

    Returns:
        Its directory. Directories with another name are not seen.
    """
    steps = _by_step(root)
    return steps[-1] if steps else None


def _by_step(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    found = (p for p in root.iterdir() if _STEP.fullmatch(p.name) and p.is_dir())
    return sorted(found, key=lambda p: int(p.name[5:]))


def check_tensors(directory: Path, info: CheckpointInfo) -> None:
    """Hold the files that `read_info` leaves out against their hashes. Collective over all ranks.

    They are large, so every rank reads its share of them. PyTorch's reader checks no checksum.

    Args:
        directory: A checkpoint directory.
        info: From `read_info`.

    Raises:
        CheckpointError: On every rank, if a file is damaged.
    """
    names = sorted(n for n in info.digests if n.endswith(TENSOR_SUFFIX))
    problem: str | None = None
    try:
        check_digests(directory, info, names[dist.get_rank() :: dist.get_world_size()])
    except (CheckpointError, OSError) as error:
        problem = str(error)
    if first := first_problem(problem):
        raise CheckpointError(first)


@runtime_checkable
class Extendable(Protocol):
    """A part of the fit of which only what has been consumed must stay. JSON for the rest."""

    def conflict(self, written: object, *, consumed_sequences: int) -> str | None:
        """Say what of a checkpoint's value does not fit, or None if all does."""
        ...


def check_fit(info: CheckpointInfo, fit: Mapping[str, Any], directory: Path) -> None:
    """Refuse a checkpoint that another configuration wrote.

    Args:
        info: The checkpoint's.
        fit: What this run needs, by dotted name. Equal values fit; an `Extendable` decides itself.
        directory: For the message.

    Raises:
        CheckpointError: Naming every differing field and both values.
    """
    written = dict(info.fit)
    wanted = json.loads(json.dumps(fit))
    faults = []
    for name in sorted({*written, *wanted}):
        value = fit.get(name)
        if isinstance(value, Extendable):
            conflict = value.conflict(written.get(name), consumed_sequences=info.consumed_sequences)
            faults += [f"{name}: {conflict}"] if conflict else []
        elif (before := written.get(name, _BEFORE.get(name))) != wanted.get(name):
            faults.append(f"{name}: checkpoint {before!r}, this run {wanted.get(name)!r}")
    if faults:
        lines = "".join(f"\n  {fault}" for fault in faults)
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
        write_info(
            partial, info, tensor_digests={k: v for part in written for k, v in part.items()}
        )
        partial.rename(final)
        _sync_directory(root)
        _point_latest(root, final.name)

    own: dict[str, str] = {}
    written: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    _together(prepare, "prepare", partial, only_rank_0=True)
    _together(lambda: _write_dist(sharded_state, partial / "dist"), "write", partial)
    _together(lambda: own.update(_own_digests(partial)), "check", partial)
    dist.all_gather_object(written, own)
    _together(publish, "publish", partial, only_rank_0=True)
    if keep_last is not None and dist.get_rank() == 0:
        _keep_newest(root, keep_last)
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
    loaded: dict[str, Any] = {}
    problem: str | None = None
    try:
        loaded = dist_checkpointing.load(
            sharded_state,
            str(directory / "dist"),
            validate_access_integrity=False,
            strict=StrictHandling.ASSUME_OK_UNEXPECTED,
        )
    except (torch.OutOfMemoryError, MemoryError, dist.DistError, AssertionError):
        raise  # no fault of the checkpoint's
    except (Exception, CheckpointException) as error:
        # Damaged bytes in a pickle raise whatever they spell; PyTorch's own error is not even an
        # `Exception`.
        logger.debug("could not load %s", directory, exc_info=True)
        problem = _one_line(error)
    if first := first_problem(problem):
        raise CheckpointError(f"{directory}: cannot be read ({first}). {REMEDY}")
    return loaded


def _keep_newest(root: Path, number: int) -> None:
    """Delete older checkpoints; one that cannot be deleted is no reason to end a run."""
    for old in _by_step(root)[:-number]:
        try:
            _remove(old)
        except OSError as error:
            logger.warning("%s: an old checkpoint cannot be deleted (%s)", old, error)


def _remove(directory: Path) -> None:
    """Delete a checkpoint so that a kill leaves it whole or without its name."""
    doomed = directory.with_name(directory.name + ".partial")
    directory.rename(doomed)
    shutil.rmtree(doomed)


def per_rank_object(key: str, value: Any) -> ShardedObject:
    """An object that every rank stores for itself, such as its RNG state."""
    shape, offset = (dist.get_world_size(),), (dist.get_rank(),)
    return ShardedObject(key, value, shape, offset, replica_id=0)


def _write_dist(sharded_state: ShardedStateDict, directory: Path) -> None:
    dist_checkpointing.save(
        sharded_state,
        str(directory),
        sharded_strategy=InProcessSaveStrategy(),
        validate_access_integrity=False,
    )


def _point_latest(root: Path, name: str) -> None:
    link = root / f".{LATEST}.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.replace(root / LATEST)


def _own_digests(directory: Path) -> dict[str, str]:
    """Hashes of the files that this rank wrote, still in the page cache."""
    files = (directory / "dist").glob(f"__{dist.get_rank()}_*{TENSOR_SUFFIX}")
    return {str(file.relative_to(directory)): digest(file) for file in files}


def _sync_directory(path: Path) -> None:
    """Make renames in a directory durable before anything older is deleted."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        except (Exception, CheckpointException) as error:
            # Any writer's error, of whatever type, must reach all ranks: those that wrote well
            # would otherwise wait for ever.
            logger.debug("could not %s a checkpoint", verb, exc_info=True)
            problem = _one_line(error)
    if first := first_problem(problem):
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{partial.parent}: could not {verb} a checkpoint ({first}). Earlier checkpoints are "
            "untouched. Free space or choose another checkpoint.dir."
        )


def _one_line(error: BaseException) -> str:
    """What went wrong, without the traceback that PyTorch puts into some messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"[:500]
