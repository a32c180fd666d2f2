"""What lies where in a checkpoint of ours, and how its ``checkpoint.json`` is read and written.

::

    <checkpoint>/checkpoint.json     what it is: step, vocabulary, type, files and their hashes
    <checkpoint>/hf/                 config.json, tokenizer, generation settings
    <checkpoint>/dist/               Megatron-Core's ``torch_dist`` format
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megatron_cgn.errors import CheckpointError

FORMAT = 1
"""Version of ``checkpoint.json``; readers refuse any other."""
CHECKPOINT_FILE = "checkpoint.json"
HF_DIRECTORY = "hf"
DIST_DIRECTORY = "dist"
TENSOR_SUFFIX = ".distcp"
"""Files of this name hold tensors: they are large."""
REMEDY = "Remove the directory to resume from the checkpoint before it."


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """The contents of ``checkpoint.json``.

    Attributes:
        step: Training steps done.
        optimizer_steps: Those that changed the weights: FP16 overflows change nothing.
        consumed_sequences: Training sequences read.
        has_optimizer: Whether training can go on exactly from here.
        has_master_weights: Whether FP32 master weights are stored beside the model's.
        layout: Parallel sizes it was written under, to know whether RNG states fit.
        fit: What a run must share with the checkpoint to go on from it, by dotted name.
        vocab_size: Ids of the tokenizer.
        padded_vocab_size: Rows of the stored embedding.
        dtype: Type of most stored weights: ``bf16``, ``fp16``, ``fp32`` or ``fp64``.
        new_rows: First row that the optimizer has never updated, by parameter outside the layers:
            where the vocabulary was extended after the last step.
        adapter: Of a checkpoint of adapters: the model they belong to and their settings, by
            name; None where all weights are stored.
        files: Size in bytes of every file, by relative path.
        digests: Hash of every file, by relative path.
        format: Version of this layout.
    """

    step: int
    consumed_sequences: int
    has_optimizer: bool
    optimizer_steps: int = 0
    has_master_weights: bool = False
    layout: Mapping[str, int] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    vocab_size: int
    padded_vocab_size: int
    dtype: str
    new_rows: Mapping[str, int] = field(default_factory=dict)
    adapter: Mapping[str, Any] | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT


def write_info(
    directory: Path, info: CheckpointInfo, *, tensor_digests: Mapping[str, str] | None = None
) -> None:
    """Write what a checkpoint is, when everything else of it is written.

    Args:
        directory: The checkpoint.
        info: What it is; its ``files`` and ``digests`` are filled in here.
        tensor_digests: Hashes of the files that hold tensors, by relative path, if known.
            Those of the others are made here.
    """
    files = {str(p.relative_to(directory)): p for p in sorted(directory.rglob("*")) if p.is_file()}
    digests = {n: digest(p) for n, p in files.items() if not n.endswith(TENSOR_SUFFIX)}
    content = {
        **_as_dict(info),
        "files": {name: file.stat().st_size for name, file in files.items()},
        "digests": digests | dict(tensor_digests or {}),
    }
    with (directory / CHECKPOINT_FILE).open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_info(directory: Path) -> CheckpointInfo:
    """Read and check ``checkpoint.json``, and that every file has its size.

    Args:
        directory: A checkpoint directory.

    Returns:
        What it says.

    Raises:
        CheckpointError: If something is missing, cut short or unreadable.
    """
    path = directory / CHECKPOINT_FILE
    try:
        info = TypeAdapter(CheckpointInfo).validate_python(json.loads(path.read_text("utf-8")))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory}: damaged: checkpoint.json is missing. {REMEDY}"
        ) from error
    except (OSError, ValueError) as error:
        reason = "; ".join(str(error).splitlines()[:3])
        raise CheckpointError(
            f"{directory}: damaged: checkpoint.json cannot be read ({reason}). {REMEDY}"
        ) from error
    if info.format != FORMAT:
        raise CheckpointError(f"{path}: format {info.format}; this version reads {FORMAT}.")
    for name, size in info.files.items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(
                f"{directory}: damaged: {name} {state}, {size} bytes were written. {REMEDY}"
            )
    check_digests(directory, info, [n for n in info.digests if not n.endswith(TENSOR_SUFFIX)])
    return info


def check_digests(directory: Path, info: CheckpointInfo, names: Sequence[str]) -> None:
    """Hold files against their hashes.

    Args:
        directory: A checkpoint directory.
        info: What it says.
        names: Files, by relative path.

    Raises:
        CheckpointError: Naming the first that differs.
    """
    for name in names:
        if digest(directory / name) != info.digests[name]:
            raise CheckpointError(
                f"{directory}: damaged: {name} is not as it was written. {REMEDY}"
            )


def digest(file: Path) -> str:
    """Hash of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _as_dict(info: CheckpointInfo) -> dict[str, Any]:
    names = CheckpointInfo.__dataclass_fields__
    return {n: dict(v) if isinstance(v := getattr(info, n), Mapping) else v for n in names}
