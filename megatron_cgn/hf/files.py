"""Directories that appear whole or not at all, and the small files beside the weights."""

import contextlib
import fnmatch
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cgn.errors import UserError
from megatron_cgn.hf.safetensors_io import INDEX_FILE, ShardPlan, TensorTypes, index_json
from megatron_cgn.model.architecture import Architecture

_SIDE_FILES = (
    "tokenizer*",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "sentencepiece*.model",
    "spiece.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""What makes a Hugging Face directory usable besides ``config.json`` and the weights."""


@contextlib.contextmanager
def new_directory(target: Path, *, error: type[UserError]) -> Iterator[Path]:
    """Fill a directory beside `target`, then put it in its place in one step.

    A target that exists stays as it is until the new one is complete, then is replaced.
    If the body raises, nothing of the new directory is left.

    Args:
        target: Where the directory shall be.
        error: Raised for faults of the disk, e.g. when it is full.

    Yields:
        The directory to fill.

    Raises:
        UserError: As `error`, if the disk refuses.
    """
    with explain_disk_faults(target, error=error):
        work = work_directory(target)
        try:
            yield work
            replace_directory(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def explain_disk_faults(target: Path, *, error: type[UserError]) -> Iterator[None]:
    """Turn an `OSError` into one message that names the target and the remedy."""
    try:
        yield
    except OSError as fault:
        raise error(disk_fault(target, fault)) from fault


def disk_fault(target: Path, fault: OSError) -> str:
    """One message about a disk that refused to write."""
    return (
        f"{target}: could not be written: {fault.strerror or fault}"
        f"{f' ({fault.filename})' if fault.filename else ''}. Nothing was left behind; free some "
        "space, or give another directory"
    )


def work_directory(target: Path) -> Path:
    """Create an empty sibling of `target` to be filled and renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    work.mkdir()
    return work


def replace_directory(work: Path, target: Path) -> None:
    """Rename a filled sibling to `target`, replacing what is there only at the end."""
    _sync_directory(work)
    if target.exists():
        old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
        os.rename(target, old)
        os.rename(work, target)
        shutil.rmtree(old)
    else:
        os.rename(work, target)
    _sync_directory(target.parent)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation settings, chat templates and licences of a model directory."""
    for file in sorted(source.iterdir()):
        if any(fnmatch.fnmatch(file.name, pattern) for pattern in _SIDE_FILES):
            if file.is_dir():
                shutil.copytree(file, target / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, target / file.name)


def write_side_files(
    directory: Path,
    source: Path,
    config: Mapping[str, Any],
    architecture: Architecture,
    *,
    stages: Sequence[TensorTypes],
    plans: Sequence[ShardPlan],
) -> None:
    """Write everything of a Hugging Face directory except the weights.

    Args:
        directory: Where to.
        source: Directory to copy tokenizer, generation settings and licences from.
        config: The source's ``config.json``; type and vocabulary size are brought up to date.
        architecture: The model.
        stages: Types and shapes of the tensors, by writer.
        plans: The weight files.
    """
    copy_side_files(source, directory)
    dtypes = [dtype for stage in stages for dtype, _ in stage.values()]
    common = max(set(dtypes), key=dtypes.count)
    # Written under the name the source has, so that its readers find it.
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    written = dict(config) | {
        "vocab_size": architecture.vocab_size,
        field: str(common).removeprefix("torch."),
    }
    write_json(directory / "config.json", written)
    if len(plans) > 1:
        (directory / INDEX_FILE).write_text(index_json(plans), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_free_space(target: Path, num_bytes: int, *, error: type[UserError]) -> None:
    """Refuse to start what the disk cannot hold.

    Args:
        target: Directory to be written, which need not exist.
        num_bytes: What will be written.
        error: Raised if less is free.
    """
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise error(
            f"{target}: needs {num_bytes / 2**30:.2f} GiB, but only {free / 2**30:.2f} GiB are "
            "free on that disk; free some space, or give another directory"
        )


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
