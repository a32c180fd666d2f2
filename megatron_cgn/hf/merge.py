"""Add an adapter to the weights it belongs to, on files alone, streaming.

Every tensor goes straight from the mapped base to its place in a planned file, block of rows by
block of rows: added to in FP32 and rounded once, replaced where the adapter holds it whole, or
copied. So the largest model takes no more memory than a few blocks and one adapter's ``A``.
"""

import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_cgn.errors import ModelError
from megatron_cgn.hf.adapter_file import AdapterFile
from megatron_cgn.hf.adapter_names import PREFIX, module_name, tensor_name, whole_tensors
from megatron_cgn.hf.config import read_architecture, read_config_json
from megatron_cgn.hf.families import hf_shapes
from megatron_cgn.hf.files import (
    TOKENIZER_FILES,
    check_free_space,
    directory_to_write,
    matches,
    new_directory,
    write_side_files,
)
from megatron_cgn.hf.safetensors_io import (
    MappedTensors,
    SafetensorsDirectory,
    ShardPlan,
    ShardWriter,
    TensorTypes,
    forget_file,
    plan_shards,
    row_blocks,
)
from megatron_cgn.hf.score_files import write_score_files
from megatron_cgn.hf.streaming import Progress, run_in_threads
from megatron_cgn.hf.weights import has_tied_copy, open_weights, tied_copy_fault
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.lora_layout import scaling

BLOCK_BYTES = 32 * 2**20
"""Bytes of the base that a writing thread holds at once; in FP32 they are several times that."""

_ADAPTERS_FILES = (*TOKENIZER_FILES, "generation_config.json")
_TEMPLATES = ("chat_template*",)
"""Patterns of files in an adapter directory that take the place of the base's."""


def merge_adapter(
    model_dir: str | Path,
    adapter_dir: str | Path,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress = lambda _: None,
) -> None:
    """Write a Hugging Face directory of a model with an adapter in its weights.

    Configuration, tokenizer and licences come from the base; tokenizer, chat template and
    generation settings that the adapter directory has take their place.

    Args:
        model_dir: Hugging Face directory of the base.
        adapter_dir: Adapter directory of `peft`.
        out_dir: Directory to write; replaced, once complete, if it exists.
        dtype: Type of the weights; None keeps the base's.
        max_shard_bytes: Largest size of one safetensors file.
        progress: Told of every few megabytes that were written.

    Raises:
        ModelError: If base or adapter is missing, damaged or not supported, the adapter is
            another model's, or gives weights that are no numbers, or the disk refuses. Nothing is
            left behind then.
    """
    target, source = directory_to_write(Path(out_dir), error=ModelError), Path(model_dir)
    architecture, base, adapter = _open(source, Path(adapter_dir))
    tensors = _types(architecture, base, dtype)
    plans = plan_shards([tensors], max_shard_bytes=max_shard_bytes)
    check_free_space(target, sum(plan.num_bytes for plan in plans), error=ModelError)
    writer = _Writer(base, adapter, architecture, tensors, progress)
    with new_directory(target, error=ModelError) as work:
        config = read_config_json(source)
        write_side_files(work, source, config, architecture, stages=[tensors], plans=plans)
        _replace_side_files(Path(adapter_dir), work)
        if adapter.config.head == "score":
            # Whoever trained it scored with this tokenizer's padding.
            write_score_files(work, keep_pad=True)
        run_in_threads([functools.partial(writer.write_file, work, plan) for plan in plans])


def merged_bytes(model_dir: str | Path, *, dtype: torch.dtype | None = None) -> int:
    """Bytes of tensors that merging into a model would tell its progress of, but for a new head."""
    architecture = read_architecture(model_dir)
    base = open_weights(model_dir, architecture)
    return sum(
        base.places[name].num_bytes * kind.itemsize // base.places[name].dtype.itemsize
        for name, (kind, _) in _types(architecture, base, dtype).items()
    )


def _open(model: Path, adapter_dir: Path) -> tuple[Architecture, SafetensorsDirectory, AdapterFile]:
    """Open base and adapter, check that they belong together, and say what comes of them."""
    stored = read_architecture(model)
    base = open_weights(model, stored)
    adapter = AdapterFile(adapter_dir)
    # A reward model's adapter brings the head that makes one of a language model.
    brings_head = adapter.config.head == "score"
    architecture = replace(stored, head="score") if brings_head else stored
    adapter.check(architecture)
    if has_tied_copy(base, stored) and (fault := tied_copy_fault(base)):
        raise ModelError(fault)
    if adapter.has_tied_copy(architecture) and (fault := adapter.tied_copy_fault()):
        raise ModelError(fault)
    return architecture, base, adapter


def _types(
    architecture: Architecture, base: SafetensorsDirectory, dtype: torch.dtype | None
) -> TensorTypes:
    # A head that the base lacks is as wide as what it reads.
    others = base.places["model.norm.weight"]
    return {
        name: (dtype or base.places.get(name, others).dtype, shape)
        for name, shape in hf_shapes(architecture).items()
    }


def _replace_side_files(adapter: Path, target: Path) -> None:
    """Put what the adapter was trained with in place of the base's."""
    mine = [f for f in sorted(adapter.iterdir()) if matches(f.name, _ADAPTERS_FILES)]
    if any(matches(file.name, _TEMPLATES) for file in mine):
        # The base's template may be in a file of another name, which would come first.
        for file in [f for f in target.iterdir() if matches(f.name, _TEMPLATES)]:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    for file in mine:
        if file.is_dir():
            shutil.copytree(file, target / file.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(file, target / file.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixAdapter:
    """The adapter of one matrix.

    Attributes:
        a: FP32 ``[rank, in]``.
        b: ``[out, rank]``.
        magnitude: ``[out]``, the rows' lengths (DoRA); None without.
        scale: What ``B A`` is multiplied by.
    """

    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    scale: float

    def merged(self, weight: Tensor, rows: slice) -> Tensor:
        """Add the adapter to some rows of the matrix.

        ``W + s B A``; with DoRA every row of that at its own length,
        https://arxiv.org/abs/2402.09353, equation 5.

        Args:
            weight: These rows of the base.
            rows: Which they are.

        Returns:
            FP32, of the shape of `weight`.
        """
        result = (self.b[rows].float() @ self.a).mul_(self.scale).add_(weight)
        if self.magnitude is not None:
            lengths = torch.linalg.norm(result, dim=1)
            result.mul_((self.magnitude[rows].float() / lengths).unsqueeze(1))
        return result


class _Writer:
    """Writes the merged model's files."""

    def __init__(
        self,
        base: SafetensorsDirectory,
        adapter: AdapterFile,
        architecture: Architecture,
        types: TensorTypes,
        progress: Progress,
    ) -> None:
        self._base = base
        self._adapter = adapter
        self._types = types
        self._progress = progress
        stored = adapter.stored_architecture(architecture)
        self._whole = whole_tensors(stored, adapter.lora.modules_to_save)
        self._adapted: Mapping[str, tuple[int, str]] = {
            f"{module_name(layer, target)}.weight": (layer, target)
            for layer in range(architecture.num_layers)
            for target in adapter.lora.targets
        }

    def write_file(self, directory: Path, plan: ShardPlan) -> None:
        """Write one planned file."""
        writer = ShardWriter(directory, plan)
        for name in plan.offsets:
            self._write_tensor(writer, name)
        writer.close()
        forget_file(directory / plan.file_name)

    def _write_tensor(self, writer: ShardWriter, name: str) -> None:
        is_whole = name in self._whole
        source: MappedTensors = self._adapter.tensors if is_whole else self._base
        stored = PREFIX + name if is_whole else name
        place, dtype = source.places[stored], self._types[name][0]
        adapter = None if is_whole else self._matrix(name)
        row_bytes = place.num_bytes // max(1, place.shape[0])
        for rows in row_blocks(place.shape[0], row_bytes, block_bytes=BLOCK_BYTES):
            start_byte = rows.start * row_bytes // place.dtype.itemsize * dtype.itemsize
            if adapter is None and place.dtype == dtype:
                size = (rows.stop - rows.start) * row_bytes
                offset = place.offset + rows.start * row_bytes
                writer.copy(name, place.file, offset=offset, num_bytes=size, start_byte=start_byte)
            else:
                view = source.view(stored, rows)
                data = (view if adapter is None else adapter.merged(view, rows)).to(dtype)
                if adapter is not None and not data.isfinite().all():
                    raise ModelError(
                        f"{self._adapter.file}: the adapter of {name} gives weights that are "
                        f"infinite or not a number in {str(dtype).removeprefix('torch.')}; it "
                        "belongs to another base, or its training failed. If only the type is too "
                        "small, give --dtype fp32 or bf16"
                    )
                writer.write(name, data, start_byte=start_byte)
                source.drop(stored, rows, for_all=True)
                size = data.nbytes
            self._progress(size)

    def _matrix(self, name: str) -> MatrixAdapter | None:
        """The adapter of a matrix, if it has one."""
        if name not in self._adapted:
            return None
        layer, target = self._adapted[name]
        lora, tensors = self._adapter.lora, self._adapter.tensors
        magnitude = tensor_name(layer, target, "lora_magnitude_vector")
        return MatrixAdapter(
            a=tensors.view(tensor_name(layer, target, "lora_A")).float(),
            b=tensors.view(tensor_name(layer, target, "lora_B")),
            magnitude=tensors.view(magnitude) if lora.use_dora else None,
            scale=scaling(lora),
        )
