"""Random weights that are the same on every parallel layout.

Megatron-Core draws from per-rank generators, so its random model depends on the tensor and
pipeline layout. Here every matrix is cut into bands across its partitioned dimension, and each
band has a generator seeded by (run seed, matrix name, band): a rank draws the bands it needs.
"""

import hashlib

import torch
from torch import Tensor

_BAND = 128
"""Rows (or columns) drawn by one generator. Changing it changes every random model."""
_HEAD = "output_layer.weight"


def initialize_weights(
    model: torch.nn.Module,
    *,
    seed: int,
    standard_deviation: float,
    tensor_parallel_rank: int,
) -> None:
    """Draw matrices from a normal distribution; set biases to zero and norms to one, in place.

    The result does not depend on tensor, pipeline, context or data parallelism, nor on the
    padding of the vocabulary; CPU and CUDA devices draw different numbers.

    Args:
        model: One pipeline chunk: a ``GPTModel``.
        seed: The run's seed.
        standard_deviation: Of every matrix, as in `transformers`.
        tensor_parallel_rank: This rank's place in the tensor-parallel group.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        name = global_name(model, name)
        dim = int(parameter.partition_dim)  # type: ignore[attr-defined]
        local = parameter.data.t() if dim == 1 else parameter.data
        # Each rank holds a slice of the gate and a slice of the up projection.
        halves = 2 if name.endswith("linear_fc1.weight") else 1
        for half, part in enumerate(local.chunk(halves)):
            key = f"{seed}/{name}/{half}"
            # A negative dimension is Megatron's way of saying that every rank has it all.
            first = tensor_parallel_rank * part.size(0) if dim >= 0 else 0
            _draw_bands(part, key=key, first=first, standard_deviation=standard_deviation)


def initialize_scalar_head(model: torch.nn.Module, *, seed: int, standard_deviation: float) -> None:
    """Draw the scalar head of a model whose other weights come from elsewhere, in place.

    As `initialize_weights` draws it: the same on every layout.

    Args:
        model: One pipeline chunk; one without the end of the model stays as it is.
        seed: The run's seed.
        standard_deviation: As `transformers` draws it: the model's ``initializer_range``.
    """
    if model.post_process:
        weight = model.get_parameter(_HEAD).data
        _draw_bands(weight, key=f"{seed}/{_HEAD}/0", first=0, standard_deviation=standard_deviation)


def global_name(model: torch.nn.Module, name: str) -> str:
    """Name of a parameter in the whole model: the number of its layer counts all stages.

    Args:
        model: One pipeline chunk: a ``GPTModel``.
        name: Name of one of its parameters.

    Returns:
        The name; that of the embedding for an output layer tied to it.
    """
    if name == _HEAD and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    index, rest = name.removeprefix(prefix).split(".", 1)
    layer = model.get_submodule(f"{prefix}{index}")
    return f"{prefix}{int(layer.layer_number) - 1}.{rest}"  # type: ignore[arg-type]


def _draw_bands(target: Tensor, *, key: str, first: int, standard_deviation: float) -> None:
    """Fill `target`, rows ``first, first + 1, …`` of the matrix that `key` names."""
    rows, columns = target.shape
    generator = torch.Generator(target.device)
    for band in range(first // _BAND, -(-(first + rows) // _BAND)):
        digest = hashlib.blake2b(f"{key}/{band}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        drawn = torch.empty(_BAND, columns, device=target.device, dtype=torch.float32)
        drawn.normal_(0.0, standard_deviation, generator=generator)
        start, end = max(band * _BAND, first), min((band + 1) * _BAND, first + rows)
        target[start - first : end - first] = drawn[start - band * _BAND : end - band * _BAND]
