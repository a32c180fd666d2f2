"""Fill a built Megatron model from safetensors, in place, whatever its layout.

Every rank reads only what its own parameters are made of, one block of rows at a time, straight
from the mapped files into the parameters: beyond the model itself a rank needs no memory.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_cgn.errors import ModelError
from megatron_cgn.hf.families import (
    HEAD_KEY,
    LAYER_PREFIX,
    Parameter,
    module_spelling,
    parameter_table,
)
from megatron_cgn.hf.safetensors_io import MappedTensors, row_blocks
from megatron_cgn.hf.weights import (
    has_tied_copy,
    open_weights,
    stored_architecture,
    tied_copy_fault,
)
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.lora import ADAPTERS
from megatron_cgn.parallel.reduce import first_problem

_BLOCK_BYTES = 64 * 2**20
"""Bytes of a file that are in memory at once while they are copied."""


def load_weights(
    model_chunks: Sequence[nn.Module],
    path: str | Path,
    *,
    architecture: Architecture,
    groups: ProcessGroupCollection,
) -> None:
    """Fill a model's parameters from a Hugging Face directory, in place.

    Every rank checks every header, so that a faulty directory is refused on all ranks alike.
    Collective over all ranks if a tied model holds its embedding twice: the first rank alone
    then reads both, to compare them. Values are cast to the parameters' types; padding rows
    become zero. A scalar head stays as it is where the directory is a language model's.

    Args:
        model_chunks: This rank's ``GPTModel`` chunks (one, or one per virtual pipeline stage),
            possibly wrapped.
        path: Hugging Face directory with safetensors.
        architecture: What `read_architecture` says of it, or the same with a scalar head.
        groups: Process groups; ``tp`` is used.

    Raises:
        ModelError: If a file or tensor is missing, truncated, of a wrong shape or unexpected,
            or a tied output layer differs from the embedding, naming file and tensor.
    """
    stored = stored_architecture(path, architecture)
    source = open_weights(path, stored)
    if has_tied_copy(source, stored):
        fault = tied_copy_fault(source) if dist.get_rank() == 0 else None
        if first := first_problem(fault):
            raise ModelError(first)
    tp_rank, tp_size = groups.tp.rank(), groups.tp.size()
    for parameter, weight in model_parameters(model_chunks, architecture):
        if parameter.key == HEAD_KEY and stored.head != architecture.head:
            continue
        fill_parameter(weight, parameter, source, tp_rank=tp_rank, tp_size=tp_size)


def model_parameters(
    model_chunks: Sequence[nn.Module], architecture: Architecture
) -> Iterator[tuple[Parameter, Tensor]]:
    """Pair the parameters of this rank's model chunks with their entries in the table.

    Adapters are none of the model's parameters, and left out.

    Args:
        model_chunks: ``GPTModel`` chunks, possibly wrapped.
        architecture: The whole model.

    Yields:
        Table entry and parameter, in the chunks' order. The output layer of a tied model's
        last pipeline stage is paired with the embedding's entry.

    Raises:
        AssertionError: If a chunk has a parameter that the architecture does not have.
    """
    table = {(entry.layer, entry.key): entry for entry in parameter_table(architecture)}
    if architecture.ties_output:
        table[None, HEAD_KEY] = table[None, "embedding.word_embeddings.weight"]
    for chunk in model_chunks:
        while not hasattr(chunk, "decoder"):
            assert isinstance(chunk.module, nn.Module), f"{type(chunk).__name__} is no GPTModel"
            chunk = chunk.module
        for name, weight in chunk.named_parameters():
            if name.startswith(f"{ADAPTERS}."):
                continue
            key = _global_key(chunk, name)
            assert key in table, f"{name} is not a parameter of {architecture}"
            yield table[key], weight


def _global_key(chunk: nn.Module, name: str) -> tuple[int | None, str]:
    """Global layer index and checkpoint key of a chunk's parameter."""
    if not name.startswith(LAYER_PREFIX):
        return None, name
    local, inner = name.removeprefix(LAYER_PREFIX).split(".", 1)
    layer_number = chunk.get_submodule(f"{LAYER_PREFIX}{local}").layer_number
    assert isinstance(layer_number, int)
    return layer_number - 1, LAYER_PREFIX + module_spelling(inner)


@torch.no_grad()
def fill_parameter(
    weight: Tensor,
    parameter: Parameter,
    source: MappedTensors,
    *,
    tp_rank: int,
    tp_size: int,
) -> None:
    """Copy one parameter's pieces, and zero the rows that no piece covers.

    Args:
        weight: This rank's share of the parameter.
        parameter: Its entry in a table.
        source: Holds the tensors that the entry names, of the shapes that it says.
        tp_rank: Rank in the tensor-parallel group.
        tp_size: Size of that group.
    """
    padded = weight.shape[0] * tp_size
    shape = parameter.local_shape(tp_size=tp_size, padded_vocab_size=padded)
    assert tuple(weight.shape) == shape, f"{parameter.key}: {tuple(weight.shape)} is not {shape}"
    filled = 0
    for piece in parameter.pieces(tp_rank=tp_rank, tp_size=tp_size, padded_vocab_size=padded):
        place = source.places[piece.name]
        first, last = piece.rows.start, piece.rows.stop
        row_bytes = place.num_bytes // max(1, place.shape[0])
        for block in row_blocks(last - first, row_bytes, block_bytes=_BLOCK_BYTES):
            rows = slice(first + block.start, first + block.stop)
            view = source.view(piece.name, rows)
            begin = piece.local_rows.start + block.start
            target = weight[begin : begin + rows.stop - rows.start]
            target.copy_(view if piece.columns is None else view[:, piece.columns])
            source.drop(piece.name, rows)
        filled += last - first
    # Only vocabulary parameters have padding, and it is at their end.
    weight[filled:].zero_()
