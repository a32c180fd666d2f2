"""Convert a checkpoint directory into a Hugging Face directory, streaming.

No model is built. Every tensor of the table is put together from the checkpoint's chunks in
blocks of rows, whatever layout wrote them, and goes straight to its place in a planned file.
Optimizer state and everything else that the table does not name is left alone.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_cgn.errors import CheckpointError, ModelError
from megatron_cgn.hf.checkpoint_layout import (
    CHECKPOINT_FILE,
    DIST_DIRECTORY,
    HF_DIRECTORY,
    CheckpointInfo,
    read_info,
)
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
    ShardPlan,
    ShardWriter,
    TensorTypes,
    forget_file,
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
    tensor_source = TensorSource(reader, parameter_table(architecture))
    tensors = tensor_source.types(dtype)
    plans = plan_shards([tensors], max_shard_bytes=max_shard_bytes)
    check_free_space(target, sum(plan.num_bytes for plan in plans), error=ModelError)
    hf = source / HF_DIRECTORY
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
    source = TensorSource(reader, parameter_table(architecture))
    return types_bytes(source.types(dtype))


def types_bytes(types: TensorTypes) -> int:
    """Bytes of some tensors."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in types.values())


def _open(checkpoint: Path) -> tuple[Architecture, DistReader]:
    """Check that a checkpoint holds what its own configuration says."""
    info = read_checkpoint(checkpoint)
    if info.adapter is not None:
        raise CheckpointError(
            f"{checkpoint}: holds adapters only, of the model {info.adapter.get('base')!r}; it "
            "becomes an adapter directory, or a model with --merge"
        )
    architecture = read_architecture(checkpoint / HF_DIRECTORY)
    return architecture, open_tensors(checkpoint, architecture, parameter_table(architecture))


def read_checkpoint(checkpoint: Path) -> CheckpointInfo:
    """Read ``checkpoint.json``.

    Raises:
        CheckpointError: If the directory is no checkpoint, or a damaged one.
    """
    if not (checkpoint / CHECKPOINT_FILE).exists():
        raise CheckpointError(
            f"{checkpoint}: holds no {CHECKPOINT_FILE}; give a checkpoint directory, e.g. "
            "runs/…/checkpoints/step_0000100"
        )
    return read_info(checkpoint)


def open_tensors(
    checkpoint: Path, architecture: Architecture, parameters: Sequence[Parameter]
) -> DistReader:
    """Open a checkpoint's tensors and hold them against a table.

    Args:
        checkpoint: The directory.
        architecture: The model.
        parameters: What shall be in the checkpoint.

    Returns:
        The opened tensors.

    Raises:
        CheckpointError: Naming a tensor that is missing or has another shape, or a file that is
            cut short.
    """
    reader = DistReader(checkpoint / DIST_DIRECTORY)
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
    return reader


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """Rows and columns of one parameter that lie together in a file; columns in bytes."""

    rows: slice
    columns: slice
    file: Path
    start_byte: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one of the box's rows."""
        return int(self.columns.stop - self.columns.start)

    def offset(self, row: int) -> int:
        """Where a row begins in the file."""
        return int(self.start_byte + (row - self.rows.start) * self.row_bytes)

    def read(self, rows: slice) -> Tensor:
        """Some of the box's rows as bytes, uint8 ``[rows, row bytes]``."""
        result = torch.empty(rows.stop - rows.start, self.row_bytes, dtype=torch.uint8)
        with self.file.open("rb") as opened:
            opened.seek(self.offset(rows.start))
            count = opened.readinto(memoryview(result.reshape(-1).numpy()))
        if count != result.numel():
            raise CheckpointError(f"{self.file}: ends too early; use another checkpoint")
        return result


class TensorSource:
    """Puts tensors of a safetensors file together from a checkpoint's chunks."""

    def __init__(self, reader: DistReader, parameters: Sequence[Parameter]) -> None:
        """Find the chunks of all tensors that a table's entries are made of."""
        self._stored = reader.tensors
        self._parameters = parameters
        self._pieces: dict[str, list[tuple[Parameter, Piece]]] = defaultdict(list)
        self._boxes: dict[tuple[str, int | None], list[_Box]] = defaultdict(list)
        stacked = {}
        for parameter in parameters:
            stacked[parameter.key] = parameter.layer is not None
            padded = reader.tensors[parameter.key].size[0]
            for piece in parameter.pieces(padded_vocab_size=padded):
                self._pieces[piece.name].append((parameter, piece))
        for key, is_stacked in stacked.items():
            for chunk in reader.chunks(key):
                for layer, box in _boxes(chunk, is_stacked=is_stacked):
                    self._boxes[key, layer].append(box)

    def types(self, dtype: torch.dtype | None) -> TensorTypes:
        """Types and shapes of the tensors, in order; all of one type unless it is None."""
        return {
            name: (dtype or self._stored[parameter.key].properties.dtype, shape)
            for parameter in self._parameters
            for name, shape in parameter.hf_shapes().items()
        }

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
                stored = self._stored[parameter.key].properties.dtype
                row_bytes = stored.itemsize * (parameter.columns or 1)
                num_rows = piece.rows.stop - piece.rows.start
                for block in row_blocks(num_rows, row_bytes, block_bytes=BLOCK_BYTES):
                    progress(self._write_block(writer, parameter, piece, block, dtype or stored))
        writer.close()
        forget_file(directory / plan.file_name)

    def _write_block(
        self,
        writer: ShardWriter,
        parameter: Parameter,
        piece: Piece,
        block: slice,
        dtype: torch.dtype,
    ) -> int:
        """Write a block of a piece's rows; how many bytes it were."""
        stored = self._stored[parameter.key].properties.dtype
        row_bytes = stored.itemsize * (parameter.columns or 1)
        rows = slice(piece.local_rows.start + block.start, piece.local_rows.start + block.stop)
        first = piece.rows.start + block.start
        boxes = self._meeting(parameter, rows)
        if dtype == stored and _is_whole(boxes, rows, row_bytes):
            size = (rows.stop - rows.start) * row_bytes
            place = {"offset": boxes[0].offset(rows.start), "start_byte": first * row_bytes}
            writer.copy(piece.name, boxes[0].file, num_bytes=size, **place)
            return int(size)
        data = _assemble(boxes, rows, row_bytes, parameter).view(stored).to(dtype)
        writer.write(piece.name, data, start_byte=first * data[0].nbytes)
        return data.nbytes

    def _meeting(self, parameter: Parameter, rows: slice) -> list[_Box]:
        """The boxes that have some of a parameter's rows."""
        boxes = self._boxes[parameter.key, parameter.layer]
        return [b for b in boxes if b.rows.start < rows.stop and rows.start < b.rows.stop]


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


def _is_whole(boxes: Sequence[_Box], rows: slice, row_bytes: int) -> bool:
    """Whether the first box alone has all of these rows in one run of bytes."""
    return (
        len(boxes) == 1
        and boxes[0].row_bytes == row_bytes
        and boxes[0].rows.start <= rows.start
        and rows.stop <= boxes[0].rows.stop
    )


def _assemble(boxes: Sequence[_Box], rows: slice, row_bytes: int, parameter: Parameter) -> Tensor:
    """Rows of one parameter put together from boxes, as bytes ``[rows, row bytes]``."""
    result = torch.empty(rows.stop - rows.start, row_bytes, dtype=torch.uint8)
    missing = result.numel()
    for box in boxes:
        low, high = max(box.rows.start, rows.start), min(box.rows.stop, rows.stop)
        target = result[low - rows.start : high - rows.start, box.columns]
        target.copy_(box.read(slice(low, high)))
        missing -= target.numel()
    if missing:
        raise CheckpointError(
            f"tensor {parameter.key!r}: {missing} bytes of rows {rows.start} to {rows.stop} are "
            "in no file of the checkpoint; use another"
        )
    return result
