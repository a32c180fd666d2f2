"""Give a checkpoint of ours the rows of an extended vocabulary, optimizer state included.

Whatever layout wrote it, and whatever layout will read it: chunks of the embedding and the
output layer that hold old ids only stay where they are, the others are written anew into one
file, and all files of the old checkpoint are linked rather than copied. A checkpoint of a model of
70 billion parameters is resized in seconds, and needs disk space for those chunks alone.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cgn.errors import CheckpointError
from megatron_cgn.hf.checkpoint_layout import (
    CHECKPOINT_FILE,
    DIST_DIRECTORY,
    HF_DIRECTORY,
    CheckpointInfo,
    check_digests,
    digest,
    read_info,
    write_info,
)
from megatron_cgn.hf.config import read_architecture, read_config_json
from megatron_cgn.hf.dist_edit import DistEdit, StoredMatrix, blocks_of, link_or_copy
from megatron_cgn.hf.dist_reader import DistReader
from megatron_cgn.hf.files import check_free_space, directory_to_write, new_directory, write_json
from megatron_cgn.hf.streaming import Progress
from megatron_cgn.hf.vocabulary import (
    ResizeSummary,
    RowMaker,
    Rows,
    check_config,
    check_target,
    copy_others,
    plan_rows,
    resized_config,
    row_maker,
)
from megatron_cgn.model.resize import InitMethod, OldRows, Side
from tokenizer.extension import Extension

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_STATE = "optimizer.state."
"""Begins the keys of optimizer state, which end with the parameter's."""
_MASTER = f"{_STATE}fp32_param."


def resize_checkpoint(
    source: Path,
    target: Path,
    extension: Extension,
    *,
    write_tokenizer: Callable[[Path], object],
    method: InitMethod = "mean",
    seed: int = 1234,
    make_vocab_size_divisible_by: int = 128,
    tensor_parallel: int = 1,
    progress: Progress = lambda _: None,
) -> ResizeSummary:
    """Write a checkpoint with rows for the new tokens; old rows stay bit for bit, in all tensors.

    New rows of the FP32 master weights are made from the masters' old rows, and the model's own
    are those, rounded. New rows of Adam's moments are zero: for a weight that was never updated
    that is what they are. So a run that trains these rows in a group of their own counts Adam's
    steps from 0 for them.

    Args:
        source: Checkpoint directory, converted or from training.
        target: Directory to write: new or empty, and not in the source. On the same file system
            it shares the source's files; either may be deleted.
        extension: The new vocabulary.
        write_tokenizer: Writes the new tokenizer's files into the directory it is given, which
            is the unpublished checkpoint's ``hf/``.
        method: How new rows are made.
        seed: Of methods that draw.
        make_vocab_size_divisible_by: Rows are a multiple of this times `tensor_parallel`.
        tensor_parallel: Tensor-parallel ranks that shall share the rows. Others can load them.
        progress: Told of every few megabytes that were written.

    Returns:
        What was done.

    Raises:
        CheckpointError: If the checkpoint is damaged, or the disk refuses. Nothing is left
            behind then.
        ModelError: If the model is not the extended tokenizer's, or the target is not empty.
        DataError: If the extension is damaged.
    """
    check_target(source, target)
    info = _read(source)
    hf = source / HF_DIRECTORY
    config, architecture = read_config_json(hf), read_architecture(hf)
    check_config(config, path=hf)
    tied = architecture.tie_word_embeddings
    reader = DistReader(source / DIST_DIRECTORY)
    sides: dict[str, Side] = {_EMBEDDING: "both" if tied else "input", _HEAD: "output"}
    matrices = _find(reader, tied=tied, vocab_size=architecture.vocab_size)
    _check_files(source, info, matrices)
    rows = plan_rows(
        extension,
        old_rows=architecture.vocab_size,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        tensor_parallel=tensor_parallel,
        source=hf,
    )
    target = directory_to_write(target, error=CheckpointError)
    check_free_space(target, _needed_bytes(source, target, matrices, rows), error=CheckpointError)
    maker = row_maker(extension, config, method=method, seed=seed)
    keys = tuple(stored.key for matrix in matrices for stored in matrix.stored)
    names = [matrix.key for matrix in matrices]
    with new_directory(target, error=CheckpointError) as work:
        (work / HF_DIRECTORY).mkdir()
        write_tokenizer(work / HF_DIRECTORY)
        copy_others(hf, work / HF_DIRECTORY)
        write_json(work / HF_DIRECTORY / "config.json", resized_config(config, rows))
        edit = DistEdit(reader, work / DIST_DIRECTORY)
        while matrices:
            # Let go of one matrix's mapped rows before the next one's.
            _resize(matrices.pop(0), edit, maker, rows, sides, progress)
        written, linked = edit.finish()
        for file in source.iterdir():
            if file.is_file() and file.name != CHECKPOINT_FILE:
                link_or_copy(file, work / file.name)
        _write_info(work, info, rows, extension, edit.file, names)
    return ResizeSummary(
        method=method,
        seed=seed,
        old_vocab_size=rows.old_vocab,
        new_vocab_size=rows.new_vocab,
        old_rows=rows.old,
        rows=rows.new,
        tied=tied,
        tensors=keys,
        written_bytes=written,
        linked_bytes=linked,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrix:
    """A matrix of the vocabulary, and everything that is stored of it."""

    key: str
    stored: tuple[StoredMatrix, ...]
    """The weights, and the optimizer's state of them."""

    @property
    def exact(self) -> StoredMatrix:
        """The weights as exactly as there are: masters, if there are any."""
        masters = [stored for stored in self.stored if stored.key.startswith(_MASTER)]
        return masters[0] if masters else self.stored[0]


def _read(source: Path) -> CheckpointInfo:
    if not (source / CHECKPOINT_FILE).exists():
        raise CheckpointError(
            f"{source}: holds no {CHECKPOINT_FILE}; give a checkpoint directory, e.g. "
            "runs/…/checkpoints/step_0000100"
        )
    return read_info(source)


def vocabulary_keys(reader: DistReader, *, tied: bool) -> dict[str, list[str]]:
    """What is stored of each matrix of the vocabulary.

    Args:
        reader: A ``torch_dist`` directory.
        tied: Whether the output layer is the embedding.

    Returns:
        By the key of the weights: that key, and those of the optimizer's state of them.
    """
    return {
        key: [key, *(k for k in reader.tensors if k.startswith(_STATE) and k.endswith(f".{key}"))]
        for key in ((_EMBEDDING,) if tied else (_EMBEDDING, _HEAD))
    }


def _find(reader: DistReader, *, tied: bool, vocab_size: int) -> list[_Matrix]:
    """Open the matrices and check that the checkpoint is of its own configuration."""
    result = []
    for key, keys in vocabulary_keys(reader, tied=tied).items():
        if key not in reader.tensors:
            raise CheckpointError(
                f"{reader.directory}: tensor {key!r} is missing; the checkpoint is not of the "
                "model that its config.json describes"
            )
        reader.check_files(keys)
        stored = tuple(StoredMatrix(reader, name) for name in keys)
        for matrix in stored:
            if matrix.num_rows < vocab_size:
                raise CheckpointError(
                    f"{reader.directory}: tensor {matrix.key!r} has {matrix.num_rows:,} rows, but "
                    f"config.json says vocab_size = {vocab_size:,}"
                )
        result.append(_Matrix(key=key, stored=stored))
    return result


def _check_files(source: Path, info: CheckpointInfo, matrices: list[_Matrix]) -> None:
    """Hold files against their hashes whose rows get into a file with a new hash."""
    files = {file for matrix in matrices for stored in matrix.stored for file in stored.files}
    names = sorted(str(file.relative_to(source)) for file in files)
    check_digests(source, info, [name for name in names if name in info.digests])


def _needed_bytes(source: Path, target: Path, matrices: list[_Matrix], rows: Rows) -> int:
    """Bytes of disk at most: the matrices, and everything else if it cannot be linked."""
    needed = sum(
        rows.new * stored.width * stored.dtype.itemsize
        for matrix in matrices
        for stored in matrix.stored
    )
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if parent.stat().st_dev != source.stat().st_dev:
        needed += sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    return needed + needed // 100


def _resize(
    matrix: _Matrix,
    edit: DistEdit,
    maker: RowMaker,
    rows: Rows,
    sides: Mapping[str, Side],
    progress: Progress,
) -> None:
    """Write a matrix and its optimizer state."""
    made = torch.empty(rows.new_vocab - rows.old_vocab, matrix.exact.width)
    position = 0
    for block in maker.blocks(OldRows(matrix.exact.parts(rows.old_vocab)), sides[matrix.key]):
        made[position : position + len(block)] = block
        position += len(block)
    for stored in matrix.stored:
        is_moment = stored.key.startswith(_STATE) and not stored.key.startswith(_MASTER)
        kept = stored.whole_until(rows.old_vocab)
        blocks = _blocks(stored, None if is_moment else made, rows, kept, progress)
        edit.replace_rows(stored.key, blocks, kept=kept, num_rows=rows.new)


def _blocks(
    stored: StoredMatrix, made: Tensor | None, rows: Rows, kept: int, progress: Progress
) -> Iterator[tuple[int, Tensor]]:
    """What a stored matrix has from row `kept` on; `made` are its new rows, None for zeros."""
    for block in blocks_of(kept, rows.new, row_bytes=stored.width * stored.dtype.itemsize):
        result = torch.zeros(block.stop - block.start, stored.width, dtype=stored.dtype)
        for known in (slice(0, rows.old_vocab), rows.kept_padding):
            low, high = max(known.start, block.start), min(known.stop, block.stop)
            if low < high:
                into = result[low - block.start : high - block.start]
                stored.read(slice(low, high), into=into)
        low, high = max(rows.old_vocab, block.start), min(rows.new_vocab, block.stop)
        if low < high and made is not None:
            new = made[low - rows.old_vocab : high - rows.old_vocab]
            result[low - block.start : high - block.start] = new
        progress(result.nbytes)
        yield block.start, result


def _write_info(
    work: Path,
    info: CheckpointInfo,
    rows: Rows,
    extension: Extension,
    new_file: Path,
    matrices: list[str],
) -> None:
    """Write what the checkpoint is now: files of the old one keep their hashes."""
    new_rows = dict(info.new_rows)  # an earlier extension's, if nothing was trained in between
    if info.has_optimizer and extension.new_tokens:
        new_rows = {key: rows.old_vocab for key in matrices} | new_rows
    changed: dict[str, Any] = {
        "model.vocab_size": rows.new,
        "tokenizer": extension.new_fingerprint,
    }
    fit = {name: changed.get(name, value) for name, value in info.fit.items()}
    names = {str(file.relative_to(work)) for file in (work / DIST_DIRECTORY).iterdir()}
    digests = {name: value for name, value in info.digests.items() if name in names}
    digests = {n: v for n, v in digests.items() if n.endswith(new_file.suffix)}
    write_info(
        work,
        replace(info, vocab_size=rows.new, padded_vocab_size=rows.new, fit=fit, new_rows=new_rows),
        tensor_digests=digests | {str(new_file.relative_to(work)): digest(new_file)},
    )
