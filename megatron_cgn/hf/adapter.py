"""Adapters of a built model to and from `peft`'s directories, on any layout.

::

    <directory>/adapter_config.json          what it is
    <directory>/adapter_model.safetensors    adapters, and matrices held whole
    <directory>/README.md                    the same for people
    <directory>/tokenizer…, chat_template…   what serves it

Adding adapters to the weights themselves is `export.py`'s on a built model, and `merge.py`'s on
files.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_cgn.config.schema import LoraConfig
from megatron_cgn.errors import ModelError
from megatron_cgn.hf.adapter_file import AdapterFile
from megatron_cgn.hf.adapter_file import read_adapter_config as read_adapter_config
from megatron_cgn.hf.adapter_files import plan_adapter, write_adapter_files
from megatron_cgn.hf.adapter_names import adapter_table
from megatron_cgn.hf.export import (
    ExportDtype,
    exported_parameters,
    parameter_share,
    resolve_dtype,
)
from megatron_cgn.hf.families import HEAD_KEY, Parameter
from megatron_cgn.hf.files import copy_side_files
from megatron_cgn.hf.gather import Share, once_for_replicas, write_directory
from megatron_cgn.hf.load import fill_parameter, model_parameters
from megatron_cgn.hf.safetensors_io import ShardPlan, TensorTypes
from megatron_cgn.hf.score_files import write_score_files
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.lora import adapter_parameters
from megatron_cgn.parallel.reduce import first_problem


@torch.no_grad()
def export_adapter(
    chunks: Sequence[nn.Module],
    out_dir: str | Path,
    *,
    architecture: Architecture,
    lora: LoraConfig,
    groups: ProcessGroupCollection,
    base: str,
    dtype: ExportDtype = "auto",
    source_dir: str | Path | None = None,
    write_beside: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write an adapter directory of `peft`. Collective over all ranks.

    The same bytes on every layout. The directory appears when it is complete; one that exists is
    replaced only then.

    Args:
        chunks: This rank's ``GPTModel`` chunks with adapters, possibly wrapped.
        out_dir: The directory to write.
        architecture: The base model.
        lora: The adapters' settings.
        groups: Process groups; ``tp``, ``pp``, ``mp`` and ``dp_cp`` are used.
        base: What users shall load the adapter onto: a directory or a name on a hub.
        dtype: Type of the tensors; ``auto`` is the one they are trained in.
        source_dir: Hugging Face directory whose tokenizer, chat template and generation settings
            are copied beside the adapter. None: nothing is.
        write_beside: Adds to, or replaces, the files beside the tensors, e.g. the chat template.
            Called on the first rank with the directory before it appears.

    Raises:
        ModelError: On every rank alike, if the source cannot be read or the disk refuses.
    """

    def write_files(work: Path, stages: Sequence[TensorTypes], plans: Sequence[ShardPlan]) -> None:
        if source_dir is not None:
            copy_side_files(Path(source_dir), work)
        types = {name: entry for stage in stages for name, entry in stage.items()}
        write_adapter_files(work, architecture, lora, base=base, types=types)
        write_beside(work)
        if architecture.head == "score":
            write_score_files(work)

    once_for_replicas(
        groups,
        lambda: write_directory(
            out_dir,
            list(_shares(chunks, architecture, lora, groups.tp, resolve_dtype(dtype, {}))),
            groups=groups,
            plan=functools.partial(plan_adapter, architecture=architecture, lora=lora),
            write_beside=write_files,
        ),
    )


@torch.no_grad()
def load_adapter(
    chunks: Sequence[nn.Module],
    path: str | Path,
    *,
    architecture: Architecture,
    lora: LoraConfig,
    groups: ProcessGroupCollection,
) -> None:
    """Fill a model's adapters from an adapter directory of `peft`, in place.

    Every rank checks the whole header, so that a faulty directory is refused on all ranks alike.
    Collective over all ranks if a tied model's matrix is in it twice: the first rank alone then
    reads both, to compare them.

    Args:
        chunks: This rank's ``GPTModel`` chunks with adapters, possibly wrapped.
        path: The directory.
        architecture: The base model.
        lora: The adapters' settings, which the directory's must equal.
        groups: Process groups; ``tp`` is used.

    Raises:
        ModelError: If it is not an adapter of this model, or is damaged, or of a kind that is not
            supported, naming file, field or tensor.
        ConfigError: If the settings differ, naming every one with both values.
    """
    adapter = AdapterFile(path)
    adapter.check(architecture)
    adapter.check_settings(lora, architecture)
    if adapter.has_tied_copy(architecture):
        fault = adapter.tied_copy_fault() if dist.get_rank() == 0 else None
        if first := first_problem(fault):
            raise ModelError(first)
    stored = adapter.stored_architecture(architecture)
    table = {parameter.key: parameter for parameter in adapter_table(stored, adapter.lora)[::-1]}
    if stored.head != architecture.head:
        table.pop(HEAD_KEY, None)
    tp_rank, tp_size = groups.tp.rank(), groups.tp.size()
    weights: list[tuple[str, Tensor]] = [(e.key, w) for e, w in adapter_parameters(chunks)]
    weights += [(p.key, w) for p, w in model_parameters(chunks, architecture) if p.key in table]
    for key, weight in weights:
        fill_parameter(weight, table[key], adapter.tensors, tp_rank=tp_rank, tp_size=tp_size)


def _shares(
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    lora: LoraConfig,
    tp: dist.ProcessGroup,
    dtype: torch.dtype | None,
) -> Iterator[Share]:
    """What this rank has of an adapter directory."""
    table: dict[str, list[Parameter]] = {}
    for parameter in adapter_table(architecture, lora):
        table.setdefault(parameter.key, []).append(parameter)
    for entry, share in adapter_parameters(chunks):
        (parameter,) = table[entry.key]
        yield parameter_share(parameter, share, tp, dtype=dtype)
    for _, whole, weight in exported_parameters(chunks, architecture):
        # Both names of a tied model's matrix.
        for parameter in table.get(whole.key, ()):
            yield parameter_share(parameter, weight, tp, dtype=dtype)
