"""Write a Megatron model as a Hugging Face directory, tensor by tensor, whatever its layout.

Adapters are merged on the way: each parameter is added to, in FP32, when its turn comes.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_cgn.hf.config import read_config_json
from megatron_cgn.hf.families import Parameter
from megatron_cgn.hf.files import write_side_files
from megatron_cgn.hf.gather import (
    Share,
    agree,
    collected_faults,
    once_for_replicas,
    shares_in_turn,
    write_directory,
)
from megatron_cgn.hf.load import model_parameters
from megatron_cgn.hf.safetensors_io import ShardPlan, TensorTypes, plan_shards
from megatron_cgn.hf.score_files import write_score_files
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.lora import delta_of

logger = logging.getLogger(__name__)

ExportDtype = Literal["auto", "bf16", "fp16", "fp32"]

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9
"""Size of one safetensors file, as `transformers` has it."""

_NAMED_DTYPES: Mapping[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@torch.no_grad()
def export_weights(
    model_chunks: Sequence[nn.Module],
    out_dir: str | Path,
    *,
    architecture: Architecture,
    source_dir: str | Path,
    groups: ProcessGroupCollection,
    dtype: ExportDtype = "auto",
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    write_beside: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write a Hugging Face directory, with adapters merged. Collective over all ranks.

    Only ranks 0 of the data- and context-parallel groups take part; the others wait to hear how
    it ended. The directory appears when it is complete; one that exists is replaced only then.
    All files are written to one file system that every pipeline stage sees.

    Args:
        model_chunks: This rank's ``GPTModel`` chunks, possibly wrapped.
        out_dir: The directory to write.
        architecture: The model.
        source_dir: The Hugging Face directory that configuration and tokenizer come from.
        groups: Process groups; ``tp``, ``pp``, ``mp`` and ``dp_cp`` are used.
        dtype: Type of the weights; ``auto`` is the one named in the source's ``config.json``,
            or else the parameters' own. Merged weights are rounded to it once.
        max_shard_bytes: Largest size of one file.
        write_beside: Adds to, or replaces, the files beside the weights, e.g. the chat template.
            Called on the first rank with the directory before it appears.

    Raises:
        ModelError: On every rank alike, if the source cannot be read or the disk refuses.
    """
    once_for_replicas(
        groups,
        lambda: _export(
            model_chunks,
            Path(out_dir),
            architecture=architecture,
            source=Path(source_dir),
            groups=groups,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            write_beside=write_beside,
        ),
    )


def _export(
    model_chunks: Sequence[nn.Module],
    target: Path,
    *,
    architecture: Architecture,
    source: Path,
    groups: ProcessGroupCollection,
    dtype: ExportDtype,
    max_shard_bytes: int,
    write_beside: Callable[[Path], None],
) -> None:
    """Do what `export_weights` says. Collective over tp and pp."""
    config: dict[str, Any] = {}
    with collected_faults(target) as faults:
        config = read_config_json(source)
    agree(groups, faults)

    def write_files(work: Path, stages: Sequence[TensorTypes], plans: Sequence[ShardPlan]) -> None:
        write_side_files(work, source, config, architecture, stages=stages, plans=plans)
        write_beside(work)
        if architecture.head == "score":
            write_score_files(work)

    wanted = resolve_dtype(dtype, config)
    write_directory(
        target,
        [
            parameter_share(
                parameter,
                weight,
                groups.tp,
                dtype=wanted,
                value=functools.partial(_merged, chunk, parameter, weight, wanted),
            )
            for chunk, parameter, weight in exported_parameters(model_chunks, architecture)
        ],
        groups=groups,
        plan=functools.partial(plan_shards, max_shard_bytes=max_shard_bytes),
        write_beside=write_files,
    )


def resolve_dtype(name: ExportDtype, config: Mapping[str, Any]) -> torch.dtype | None:
    """The type to write weights in, or None for the type they have.

    Args:
        name: The user's choice.
        config: The source's ``config.json``.

    Returns:
        The type.
    """
    if name != "auto":
        return _NAMED_DTYPES[name]
    return _NAMED_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))


def exported_parameters(
    model_chunks: Sequence[nn.Module], architecture: Architecture
) -> Iterator[tuple[nn.Module, Parameter, Tensor]]:
    """This rank's parameters, without a tied output layer's copy of the embedding.

    Args:
        model_chunks: ``GPTModel`` chunks, possibly wrapped.
        architecture: The whole model.

    Yields:
        Chunk, table entry and parameter.
    """
    seen = set()
    first_stage = any(
        name.endswith("embedding.word_embeddings.weight")
        for chunk in model_chunks
        for name, _ in chunk.named_parameters()
    )
    for chunk in model_chunks:
        for parameter, weight in model_parameters([chunk], architecture):
            copy = parameter.key == "embedding.word_embeddings.weight" and not first_stage
            if not copy and (parameter.layer, parameter.key) not in seen:
                seen.add((parameter.layer, parameter.key))
                yield chunk, parameter, weight


def _merged(
    chunk: nn.Module, parameter: Parameter, weight: Tensor, dtype: torch.dtype | None
) -> Tensor:
    """A rank's share of a weight with its adapters: added in FP32, then rounded once.

    Collective over tp where the adapters' share is.
    """
    module, _, kind = parameter.key.rpartition(".")
    if parameter.layer is None or kind != "weight":
        return weight
    delta = delta_of(chunk, parameter.layer, module.rpartition(".")[2])
    return weight if delta is None else delta.add_(weight).to(dtype or weight.dtype)


def parameter_share(
    parameter: Parameter,
    weight: Tensor,
    tp: dist.ProcessGroup,
    *,
    dtype: torch.dtype | None,
    value: Callable[[], Tensor] | None = None,
) -> Share:
    """One parameter as Hugging Face tensors to be written.

    Args:
        parameter: The parameter.
        weight: This rank's share of it.
        tp: Tensor-parallel group.
        dtype: Type to write; None for the weight's own.
        value: Makes what is written in place of `weight`, of its shape. Called when the tensors'
            turn comes, on every rank.

    Returns:
        The share.
    """
    return Share(
        types={name: (dtype or weight.dtype, s) for name, s in parameter.hf_shapes().items()},
        device=weight.device,
        collect=lambda: _hf_tensors(parameter, value() if value else weight, tp),
    )


def _hf_tensors(parameter: Parameter, weight: Tensor, tp: dist.ProcessGroup) -> dict[str, Tensor]:
    """Take one parameter apart into Hugging Face tensors in main memory, on rank 0.

    Collective over tp.

    Returns:
        The tensors by name; unset on the other ranks.
    """
    result: dict[str, Tensor] = {}
    if parameter.tp_dim is None:
        if tp.rank() == 0:
            (name,) = parameter.hf_names()
            result[name] = weight.detach().cpu()
        return result
    padded = weight.shape[0] * tp.size()
    for tp_rank, share in enumerate(shares_in_turn(weight, tp)):
        for name, shape in parameter.hf_shapes().items():
            result.setdefault(name, share.new_empty(shape))
        pieces = parameter.pieces(tp_rank=tp_rank, tp_size=tp.size(), padded_vocab_size=padded)
        for piece in pieces:
            rows = result[piece.name][piece.rows]
            rows = rows if piece.columns is None else rows[:, piece.columns]
            rows.copy_(share[piece.local_rows])
    return result
