"""Directories that appear whole or not at all, and the small files beside the weights."""

import contextlib
import fnmatch
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cgn.errors import UserError
from megatron_cgn.hf.safetensors_io import INDEX_FILE, ShardPlan, TensorTypes, index_json
from megatron_cgn.model.architecture import Architecture

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer*",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab_extension.json",
    "merges.txt",
    "sentencepiece*.model",
    "spiece.model",
    "chat_template*",
)
"""What a tokenizer is made of, as patterns in lower case; names match in any."""
_SIDE_FILES = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "license*",
    "licence*",
    "notice*",
    "use_policy*",
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
    target = directory_to_write(target, error=error)
    try:
        work = work_directory(target)
    except OSError as fault:
        raise error(disk_fault(target, fault)) from fault
    try:
        yield work
        replace_directory(work, target)
    except OSError as fault:
        raise error(disk_fault(target, fault)) from fault
    finally:
        shutil.rmtree(work, ignore_errors=True)


def directory_to_write(target: Path, *, error: type[UserError]) -> Path:
    """Where a target shall be: behind it, if it is a link.

    Args:
        target: Directory to be written, which need not exist.
        error: Raised if it exists and is not a directory.

    Returns:
        The target without links, so that a rename replaces what they point to.
    """
    try:
        resolved = target.resolve()
        is_other = resolved.exists() and not resolved.is_dir()
    except (OSError, RuntimeError) as fault:
        raise error(f"{target}: cannot be a directory: {fault}; give another") from fault
    if is_other:
        raise error(f"{target}: exists and is not a directory; give another directory")
    return resolved


def disk_fault(target: Path, fault: OSError) -> str:
    """One message about a disk that refused to read or write while `target` was made."""
    # A fault of copying names both files.
    place = fault.filename2 or fault.filename
    reason = f"{fault.strerror or fault}{f' ({place})' if place else ''}"
    ours = (str(target), str(target.with_name(f".{target.name}.")))
    if place and not str(place).startswith(ours) and Path(str(place)) not in target.parents:
        return f"{target}: not written, because the source could not be read: {reason}"
    return (
        f"{target}: could not be written: {reason}. Nothing was left behind; free some space, or "
        "give another directory"
    )


def work_directory(target: Path) -> Path:
    """Create an empty sibling of `target` to be filled and renamed.

    One that a kill has left is told of, since its name hides it and it may be as large as a model.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.tmp-"
    for left in sorted(p for p in target.parent.iterdir() if p.name.startswith(prefix)):
        logger.warning(
            "%s: unfinished, left by a program that was killed unless one is writing it now; "
            "remove it by hand",
            left,
        )
    work = target.with_name(prefix + uuid.uuid4().hex[:8])
    work.mkdir()
    return work


def replace_directory(work: Path, target: Path) -> None:
    """Rename a filled sibling to `target`, replacing what is there only at the end.

    Args:
        work: From `work_directory`; made durable before it is renamed.
        target: Without links; see `directory_to_write`.

    Raises:
        OSError: If the disk refuses; what was there is there again then.
    """
    _sync_tree(work)
    if not target.exists():
        os.rename(work, target)
        _sync(target.parent)
        return
    old = target.with_name(f".{target.name}.old-{uuid.uuid4().hex[:8]}")
    os.rename(target, old)
    try:
        os.rename(work, target)
    except BaseException:
        os.rename(old, target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    if old.exists():
        logger.warning("%s: could not be removed after it was replaced; remove it by hand", old)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation settings, chat templates and licences of a model directory."""
    for file in sorted(source.iterdir()):
        if matches(file.name, _SIDE_FILES):
            if file.is_dir():
                shutil.copytree(file, target / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, target / file.name)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file's name is one of some lower-case patterns, in whatever case."""
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)


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
    # Written under every name the source has, so that its readers find it.
    fields = [field for field in ("dtype", "torch_dtype") if field in config] or ["dtype"]
    written = dict(config) | {"vocab_size": architecture.vocab_size}
    written |= dict.fromkeys(fields, str(common).removeprefix("torch."))
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
    parent = target.resolve().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise error(
            f"{target}: needs {_size(num_bytes)}, but only {_size(free)} are free on that disk; "
            "free some space, or give another directory"
        )


def _size(num_bytes: int) -> str:
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.2f} MiB"
    return f"{num_bytes / 2**30:.2f} GiB"


def _sync_tree(directory: Path) -> None:
    """Make everything in a directory durable. What was already costs nothing."""
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
