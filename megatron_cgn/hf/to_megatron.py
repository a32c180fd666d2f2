"""Convert a Hugging Face directory into a Megatron checkpoint, streaming.

No model is built. The tensors of the table are cut into blocks of rows; PyTorch's distributed
checkpoint writer asks for each block when it writes it, and most blocks are views of the mapped
safetensors files. So conversion runs at the speed of the disk, in memory that does not depend on
the model's size. The keys are those of ``GPTModel.sharded_state_dict()`` with stacked layers.
"""

import dataclasses
import functools
import io
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from megatron_cgn.errors import CheckpointError, ModelError
from megatron_cgn.hf.checkpoint_layout import (
    DIST_DIRECTORY,
    HF_DIRECTORY,
    CheckpointInfo,
    write_info,
)
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.families import LAYER_PREFIX, Parameter, parameter_table
from megatron_cgn.hf.files import (
    check_free_space,
    copy_side_files,
    directory_to_write,
    new_directory,
    write_json,
)
from megatron_cgn.hf.safetensors_io import SafetensorsDirectory, forget_file, row_blocks
from megatron_cgn.hf.streaming import BLOCK_BYTES, Progress, run_in_threads
from megatron_cgn.hf.weights import has_tied_copy, open_weights, tied_copy_fault
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.heads import padded_vocab_size

_FILE_BYTES = 2**30
"""Bytes of one ``.distcp`` file, unless there would be too many."""
_MAX_FILES = 256
"""About as many ``.distcp`` files are written at most."""

_PRECISIONS = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
"""Types as ``checkpoint.json`` names them, which is as training's configuration does."""

_EXTRA_STATES = (
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer whose (empty) extra state Megatron's loader looks for."""


def convert_to_megatron(
    source_dir: str | Path,
    out_dir: str | Path,
    *,
    make_vocab_size_divisible_by: int = 128,
    progress: Progress = lambda _: None,
) -> None:
    """Write a Megatron checkpoint directory from a Hugging Face directory.

    Args:
        source_dir: Hugging Face directory with safetensors.
        out_dir: Checkpoint directory to write; replaced, once complete, if it exists.
        make_vocab_size_divisible_by: The stored embedding is padded with zeros to a multiple
            of this. Models with another padding load it all the same.
        progress: Told of every few megabytes that were written.

    Raises:
        ModelError: If the source is not complete or not supported.
        CheckpointError: If the disk refuses, or `out_dir` is not a directory. Nothing is left
            behind then.
    """
    source, target = Path(source_dir), directory_to_write(Path(out_dir), error=CheckpointError)
    architecture = read_architecture(source)
    weights = open_weights(source, architecture)
    if has_tied_copy(weights, architecture) and (fault := tied_copy_fault(weights)):
        raise ModelError(fault)
    padded = padded_vocab_size(
        architecture.vocab_size, multiple=make_vocab_size_divisible_by, tensor_parallel_size=1
    )
    planner = _StreamingPlanner(weights, architecture, padded, progress)
    # Headers, metadata and file system take well below a hundredth.
    check_free_space(target, planner.num_bytes + planner.num_bytes // 100, error=CheckpointError)
    with new_directory(target, error=CheckpointError) as work:
        (work / HF_DIRECTORY).mkdir()
        copy_side_files(source, work / HF_DIRECTORY)
        (work / HF_DIRECTORY / "config.json").write_bytes((source / "config.json").read_bytes())
        _write_dist(work / DIST_DIRECTORY, planner)
        info = CheckpointInfo(
            step=0,
            consumed_sequences=0,
            has_optimizer=False,
            vocab_size=architecture.vocab_size,
            padded_vocab_size=padded,
            dtype=_PRECISIONS[planner.common_dtype],
        )
        write_info(work, info)


def converted_bytes(source_dir: str | Path, *, make_vocab_size_divisible_by: int = 128) -> int:
    """Bytes of tensors, with padding, that a conversion will tell its progress of.

    Args:
        source_dir: Hugging Face directory with safetensors.
        make_vocab_size_divisible_by: As for `convert_to_megatron`.

    Returns:
        The sum.

    Raises:
        ModelError: If the source is not complete or not supported.
    """
    architecture = read_architecture(source_dir)
    weights = open_weights(source_dir, architecture)
    padded = padded_vocab_size(
        architecture.vocab_size, multiple=make_vocab_size_divisible_by, tensor_parallel_size=1
    )
    return sum(
        math.prod(entry.local_shape(tp_size=1, padded_vocab_size=padded))
        * weights.places[entry.hf_names()[0]].dtype.itemsize
        for entry in parameter_table(architecture)
    )


def _write_dist(directory: Path, planner: "_StreamingPlanner") -> None:
    """Write the ``torch_dist`` directory; each plan becomes a file, as if a rank's."""
    writer = FileSystemWriter(directory, per_thread_copy_ahead=0)
    writer.reset(directory)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan(planner.create_local_plans())
    plans = writer.prepare_global_plan(plans)
    writer.prepare_local_plan(plans[0])
    results = run_in_threads(
        [functools.partial(_write_file, writer, plan, planner) for plan in plans]
    )
    writer.finish(metadata, results)
    torch.save({"iteration": 0, "checkpoint_version": 3.0}, directory / "common.pt")
    write_json(
        directory / "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    )


def _write_file(
    writer: FileSystemWriter, plan: SavePlan, planner: "_StreamingPlanner"
) -> list[WriteResult]:
    """Write one plan's file, with the disk's faults as they were raised.

    Raises:
        OSError: If the disk refuses.
    """
    # A checksum reads every byte once more than copying does, and no reader looks at it. The
    # option is this thread's own, and the thread ends with the conversion.
    torch.serialization.set_crc32_options(False)
    try:
        results = writer.write_data(plan, planner).wait()
    except RuntimeError as error:
        # PyTorch's archive writer complains of the cut archive while it handles the disk's fault.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from error
    forget_file(Path(writer.path) / results[0].storage_data.relative_path)
    return results


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Rows of a stacked or plain checkpoint tensor, and where they come from.

    Attributes:
        sources: Hugging Face tensors and rows, to be put one under the other; none for zeros.
        shape: Of the block, without the layer axis.
        stacked: Whether the checkpoint's tensor has a layer axis in front.
        dtype: Of the block.
    """

    sources: tuple[tuple[str, slice], ...]
    shape: tuple[int, ...]
    stacked: bool
    dtype: torch.dtype


class _StreamingPlanner(SavePlanner):
    """Plans every block beforehand and makes each one when it is written."""

    def __init__(
        self,
        weights: SafetensorsDirectory,
        architecture: Architecture,
        padded: int,
        progress: Progress,
    ) -> None:
        self._weights = weights
        self._architecture = architecture
        self._padded = padded
        self._progress = progress
        self._blocks: dict[MetadataIndex, _Block] = {}
        self._last = threading.local()
        self._items = [*self._tensor_items(), *_extra_state_items(architecture)]
        tensors = [item.tensor_data for item in self._items if item.tensor_data is not None]
        self.num_bytes = sum(_num_bytes(data) for data in tensors)
        """Size of all tensors."""
        dtypes = [data.properties.dtype for data in tensors]
        self.common_dtype = max(set(dtypes), key=dtypes.count)
        """Type of most blocks."""

    def create_local_plans(self) -> list[SavePlan]:
        """Share the items out over files."""
        plans: list[SavePlan] = []
        file_bytes = max(_FILE_BYTES, self.num_bytes // _MAX_FILES)
        filled = file_bytes
        for item in self._items:
            size = 0 if item.tensor_data is None else _num_bytes(item.tensor_data)
            if filled + size > file_bytes:
                plans.append(SavePlan(items=[]))
                filled = 0
            plans[-1].items.append(item)
            filled += size
        return plans

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Make one block: a view of a mapped file where one suffices."""
        if write_item.type == WriteItemType.BYTE_IO:
            return _empty_extra_state()
        self._drop_last()
        index = dataclasses.replace(write_item.index, index=None)
        block = self._blocks[index]
        views = [self._weights.view(name, rows) for name, rows in block.sources]
        if not views:
            result = torch.zeros(block.shape, dtype=block.dtype)
        else:
            result = views[0] if len(views) == 1 else torch.cat(views)
        self._last.block = block
        self._progress(result.numel() * result.itemsize)
        return result.unsqueeze(0) if block.stacked else result

    def _drop_last(self) -> None:
        """Let go of the pages of this thread's previous block, which is written by now."""
        last: _Block | None = getattr(self._last, "block", None)
        for name, rows in last.sources if last is not None else ():
            self._weights.drop(name, rows, for_all=True)

    def _tensor_items(self) -> Iterator[WriteItem]:
        first_names: dict[str, str] = {}
        for parameter in parameter_table(self._architecture):
            # Layers are stacked, so that a parameter has one type over all of them.
            first = first_names.setdefault(parameter.key, parameter.hf_names()[0])
            dtype = self._dtype(parameter, first)
            shape = parameter.local_shape(tp_size=1, padded_vocab_size=self._padded)
            layers = self._architecture.num_layers
            stack = () if parameter.layer is None else (layers,)
            for first_row, block in self._cut(parameter, dtype, shape):
                offset = (first_row, *(0 for _ in shape[1:]))
                size = block.shape
                if parameter.layer is not None:
                    offset, size = (parameter.layer, *offset), (1, *size)
                index = MetadataIndex(parameter.key, torch.Size(offset))
                self._blocks[index] = block
                yield WriteItem(
                    index=index,
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(torch.Size(offset), torch.Size(size)),
                        properties=TensorProperties(dtype=dtype),
                        size=torch.Size((*stack, *shape)),
                    ),
                )

    def _cut(
        self, parameter: Parameter, dtype: torch.dtype, shape: Sequence[int]
    ) -> Iterator[tuple[int, _Block]]:
        """Cut one parameter into blocks, each with its first row."""
        row_bytes = dtype.itemsize * (shape[1] if len(shape) > 1 else 1)
        position = 0
        for part in parameter.parts:
            ranges = [(rows.name, rows.start, rows.stop) for rows in part]
            num_rows = sum(stop - start for _, start, stop in ranges)
            for block in row_blocks(num_rows, row_bytes, block_bytes=BLOCK_BYTES):
                yield (
                    position + block.start,
                    _Block(
                        sources=tuple(_overlap(ranges, block)),
                        shape=(block.stop - block.start, *shape[1:]),
                        stacked=parameter.layer is not None,
                        dtype=dtype,
                    ),
                )
            position += num_rows
        for block in row_blocks(shape[0] - position, row_bytes, block_bytes=BLOCK_BYTES):
            zeros = (block.stop - block.start, *shape[1:])
            yield (
                position + block.start,
                _Block(sources=(), shape=zeros, stacked=False, dtype=dtype),
            )

    def _dtype(self, parameter: Parameter, first: str) -> torch.dtype:
        expected = self._weights.places[first].dtype
        for name in parameter.hf_names():
            place = self._weights.places[name]
            if place.dtype != expected:
                raise ModelError(
                    f"{place.file}: tensor {name!r} is {place.dtype}, but it is stored together "
                    f"with {first!r}, which is {expected}; save the model in one type"
                )
        return expected

    # The rest of the planner's interface: one process plans everything at once.

    def set_up_planner(self, *args: object, **kwargs: object) -> None:
        """Nothing to set up."""

    def create_local_plan(self) -> SavePlan:
        """All items in one plan."""
        return SavePlan(items=list(self._items))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Gather the metadata of all plans."""
        return create_default_global_save_plan(all_plans, rewrite_index_hints=False)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Nothing to finish."""
        return new_plan


def _overlap(ranges: Sequence[tuple[str, int, int]], block: slice) -> Iterator[tuple[str, slice]]:
    """The row ranges that a block of the ranges' concatenation is made of."""
    position = 0
    for name, start, stop in ranges:
        low, high = max(block.start, position), min(block.stop, position + stop - start)
        if low < high:
            yield name, slice(start + low - position, start + high - position)
        position += stop - start


def _extra_state_items(architecture: Architecture) -> Iterator[WriteItem]:
    """Empty extra states, in the superset of what the kinds of layers have."""
    modules = list(_EXTRA_STATES)
    if architecture.qk_norm:
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    layers = architecture.num_layers
    names = [
        f"{LAYER_PREFIX}{module}._extra_state/shard_{layer}_{layers}"
        for module in modules
        for layer in range(layers)
    ]
    for name in [*names, "decoder.final_layernorm._extra_state/shard_0_1"]:
        yield WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO)


def _empty_extra_state() -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer


def _num_bytes(data: TensorWriteData) -> int:
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize
