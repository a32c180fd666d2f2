"""Convert a checkpoint directory into a Hugging Face directory, streaming.

No model is built. Every tensor of the table is put together from the checkpoint's chunks in
blocks of rows, whatever layout wrote them, and goes straight to its place in a planned file.
Optimizer state and everything else that the table does not name is left alone.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_cgn.errors import CheckpointError, ModelError
from megatron_cgn.hf.checkpoint_layout import CHECKPOINT_FILE, DIST_DIRECTORY, HF_DIRECTORY
from megatron_cgn.hf.config import read_architecture, read_config_json
from megatron_cgn.hf.dist_reader import Chunk, DistReader
from megatron_cgn.hf.families import Parameter, Piece, parameter_table
from megatron_cgn.hf.files import (
    check_free_space,
    directory_to_write,
    new_directory,
    write_side_files,
)
from megatron_cgn.hf.safetensors_io import (
    MappedFile,
    ShardPlan,
    ShardWriter,
    plan_shards,
    row_blocks,
)
from megatron_cgn.hf.streaming import BLOCK_BYTES, Progress, run_in_threads
from megatron_cgn.model.architecture import Architecture


def convert_to_hf(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress = lambda _: None,
) -> None:
    """Write a Hugging Face directory from a checkpoint directory of ours.

    Args:
        checkpoint_dir: Written by training, or by `convert_to_megatron`.
        out_dir: Directory to write; replaced, once complete, if it exists.
        dtype: Type of the weights; None keeps the stored types.
        max_shard_bytes: Largest size of one safetensors file.
        progress: Told of every few megabytes that were written.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged or does not fit its own
            ``config.json``.
        ModelError: If the disk refuses, or `out_dir` is not a directory. Nothing is left
            behind then.
    """
    target, source = directory_to_write(Path(out_dir), error=ModelError), Path(checkpoint_dir)
    architecture, reader = _open(source)
    tensors = {
        name: (dtype or reader.tensors[parameter.key].properties.dtype, shape)
        for parameter in parameter_table(architecture)
        for name, shape in parameter.hf_shapes().items()
    }
    plans = plan_shards([tensors], max_shard_bytes=max_shard_bytes)
    check_free_space(target, sum(plan.num_bytes for plan in plans), error=ModelError)
    hf = source / HF_DIRECTORY
    tensor_source = _TensorSource(reader, architecture)
    with new_directory(target, error=ModelError) as work:
        write_side_files(
            work, hf, read_config_json(hf), architecture, stages=[tensors], plans=plans
        )
        run_in_threads(
            [
                functools.partial(
                    tensor_source.write_file, work, plan, dtype=dtype, progress=progress
                )
                for plan in plans
            ]
        )


def converted_bytes(checkpoint_dir: str | Path, *, dtype: torch.dtype | None = None) -> int:
    """Bytes of tensors that a conversion of a checkpoint would tell its progress of."""
    architecture, reader = _open(Path(checkpoint_dir))
    total = 0
    for parameter in parameter_table(architecture):
        itemsize = (dtype or reader.tensors[parameter.key].properties.dtype).itemsize
        total += parameter.num_rows * (parameter.columns or 1) * itemsize
    return total


def _open(checkpoint: Path) -> tuple[Architecture, DistReader]:
    """Check that a checkpoint holds what its own configuration says."""
    if not (checkpoint / CHECKPOINT_FILE).exists():
        raise CheckpointError(
            f"{checkpoint}: holds no {CHECKPOINT_FILE}; give a checkpoint directory, e.g. "
            "runs/…/checkpoints/step_0000100"
        )
    architecture = read_architecture(checkpoint / HF_DIRECTORY)
    reader = DistReader(checkpoint / DIST_DIRECTORY)
    parameters = parameter_table(architecture)
    for parameter in parameters:
        if parameter.key not in reader.tensors:
            raise CheckpointError(
                f"{reader.directory}: tensor {parameter.key!r} is missing; the checkpoint is not "
                f"of the model that {checkpoint / HF_DIRECTORY / 'config.json'} describes"
            )
        found = tuple(reader.tensors[parameter.key].size)
        padded = found[0] if parameter.vocabulary else 0
        shape = parameter.local_shape(tp_size=1, padded_vocab_size=padded)
        expected = shape if parameter.layer is None else (architecture.num_layers, *shape)
        if found != expected or (parameter.vocabulary and padded < architecture.vocab_size):
            raise CheckpointError(
                f"{reader.directory}: tensor {parameter.key!r} has shape {found}, but config.json "
                f"says {expected if not parameter.vocabulary else architecture.vocab_size}"
            )
    reader.check_files([parameter.key for parameter in parameters])
    return architecture, reader


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """Rows and columns of one parameter that lie together in a file; columns in bytes."""

    rows: slice
    columns: slice
    file: MappedFile
    start_byte: int

    def view(self, rows: slice) -> Tensor:
        """Some of the box's rows as bytes, uint8 ``[rows, column bytes]``."""
        width = self.columns.stop - self.columns.start
        offset = self.start_byte + (rows.start - self.rows.start) * width
        return self.file.view(torch.uint8, (rows.stop - rows.start, width), offset=offset)

    def drop(self, rows: slice) -> None:
        """Let go of the memory that backs rows which were viewed."""
        width = self.columns.stop - self.columns.start
        offset = self.start_byte + (rows.start - self.rows.start) * width
        self.file.drop(offset=offset, num_bytes=(rows.stop - rows.start) * width)


class _TensorSource:
    """Puts Hugging Face tensors together from a checkpoint's chunks."""

    def __init__(self, reader: DistReader, architecture: Architecture) -> None:
        self._stored = reader.tensors
        self._pieces: dict[str, list[tuple[Parameter, Piece]]] = defaultdict(list)
        self._boxes: dict[tuple[str, int | None], list[_Box]] = defaultdict(list)
        stacked = {}
        for parameter in parameter_table(architecture):
            stacked[parameter.key] = parameter.layer is not None
            padded = reader.tensors[parameter.key].size[0]
            for piece in parameter.pieces(padded_vocab_size=padded):
                self._pieces[piece.name].append((parameter, piece))
        for key, is_stacked in stacked.items():
            for chunk in reader.chunks(key):
                for layer, box in _boxes(chunk, is_stacked=is_stacked):
                    self._boxes[key, layer].append(box)

    def write_file(
        self, directory: Path, plan: ShardPlan, *, dtype: torch.dtype | None, progress: Progress
    ) -> None:
        """Write one planned file.

        Args:
            directory: Where to.
            plan: The file.
            dtype: Type to cast to; None keeps the stored type.
            progress: Told of every block.
        """
        writer = ShardWriter(directory, plan)
        for name in plan.offsets:
            for parameter, piece in self._pieces[name]:
                for row, data in self._blocks(parameter, piece, dtype):
                    writer.write(name, data, start_byte=row * data[0].nbytes)
                    progress(data.nbytes)
        writer.close()

    def _blocks(
        self, parameter: Parameter, piece: Piece, dtype: torch.dtype | None
    ) -> Iterator[tuple[int, Tensor]]:
        """Blocks of one piece, each with its first row in the Hugging Face tensor.

        A block is dropped from memory when the next one is asked for.
        """
        stored = self._stored[parameter.key].properties.dtype
        row_bytes = stored.itemsize * (parameter.columns or 1)
        num_rows = piece.rows.stop - piece.rows.start
        for block in row_blocks(num_rows, row_bytes, block_bytes=BLOCK_BYTES):
            first = piece.local_rows.start
            rows = slice(first + block.start, first + block.stop)
            boxes = [
                box for box in self._boxes[parameter.key, parameter.layer] if _meets(box, rows)
            ]
            data = _read(boxes, rows, row_bytes, parameter)
            if dtype not in (None, stored):
                # A copy, because bytes in a file need not be aligned for their type.
                data = data.clone().view(stored).to(dtype)
            yield piece.rows.start + block.start, data
            for box in boxes:
                box.drop(_common(box.rows, rows))


def _boxes(chunk: Chunk, *, is_stacked: bool) -> Iterator[tuple[int | None, _Box]]:
    """A chunk as boxes of rows and columns, one for each of its layers."""
    offsets, sizes = (chunk.offsets, chunk.sizes)
    first, count = (offsets[0], sizes[0]) if is_stacked else (0, 1)
    if is_stacked:
        offsets, sizes = offsets[1:], sizes[1:]
    itemsize = chunk.dtype.itemsize
    # A vector is a matrix of one column.
    column, width = (offsets[1], sizes[1]) if len(sizes) > 1 else (0, 1)
    for index in range(count):
        box = _Box(
            rows=slice(offsets[0], offsets[0] + sizes[0]),
            columns=slice(column * itemsize, (column + width) * itemsize),
            file=chunk.file,
            start_byte=chunk.start_byte + index * sizes[0] * width * itemsize,
        )
        yield (first + index if is_stacked else None), box


def _common(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def _meets(box: _Box, rows: slice) -> bool:
    common = _common(box.rows, rows)
    return bool(common.start < common.stop)


def _read(boxes: Sequence[_Box], rows: slice, row_bytes: int, parameter: Parameter) -> Tensor:
    """Rows of one parameter as bytes: a view if one box has them all, else put together."""
    num_rows = rows.stop - rows.start
    if len(boxes) == 1 and _common(boxes[0].rows, rows) == rows:
        whole = boxes[0].view(rows)
        if whole.shape[1] == row_bytes:
            return whole
    result = torch.empty(num_rows, row_bytes, dtype=torch.uint8)
    missing = result.numel()
    for box in boxes:
        common = _common(box.rows, rows)
        target = result[common.start - rows.start : common.stop - rows.start, box.columns]
        target.copy_(box.view(common))
        missing -= target.numel()
    if missing:
        raise CheckpointError(
            f"tensor {parameter.key!r}: {missing} bytes of rows {rows.start} to {rows.stop} are "
            "in no file of the checkpoint; use another"
        )
    return result
