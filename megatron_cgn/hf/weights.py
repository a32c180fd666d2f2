"""Open a Hugging Face directory's weights and hold them against its architecture."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from megatron_cgn.errors import ModelError
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.families import hf_shapes
from megatron_cgn.hf.safetensors_io import MappedTensors, SafetensorsDirectory, row_blocks
from megatron_cgn.hf.streaming import BLOCK_BYTES
from megatron_cgn.model.architecture import Architecture

logger = logging.getLogger(__name__)

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def stored_architecture(path: str | Path, architecture: Architecture) -> Architecture:
    """What a directory holds that a model starts from.

    A model with a scalar head may start from a language model, whose output layer it has no use
    for.

    Args:
        path: Hugging Face directory.
        architecture: The model.

    Returns:
        `architecture`, with the head that the directory has.

    Raises:
        ModelError: If the directory is a reward model's and the model is a language model, or its
            configuration is not supported.
    """
    found = read_architecture(path).head
    if found == "score" and architecture.head == "lm":
        raise ModelError(
            f"{path}: is a reward model: it gives a score and no probabilities of ids; give a "
            "language model"
        )
    return replace(architecture, head=found)


def open_weights(path: str | Path, architecture: Architecture) -> SafetensorsDirectory:
    """Open a directory's safetensors and check that they are exactly an architecture's.

    Args:
        path: Hugging Face directory.
        architecture: What its weights shall be.

    Returns:
        The opened directory.

    Raises:
        ModelError: If a tensor is missing, unexpected, or of a wrong shape, or a file is
            missing or truncated.
    """
    source = SafetensorsDirectory(path)
    expected = hf_shapes(architecture)
    for name, shape in expected.items():
        if name not in source.places:
            raise ModelError(f"{source.path}: tensor {name!r} of shape {shape} is missing")
        place = source.places[name]
        if place.shape != shape:
            raise ModelError(
                f"{place.file}: tensor {name!r} has shape {place.shape}, but config.json says "
                f"{shape}"
            )
    for name in sorted(source.places.keys() - expected.keys()):
        if _is_redundant(name, architecture):
            logger.debug("%s: tensor %s is not needed", source.path, name)
            continue
        raise ModelError(
            f"{source.places[name].file}: tensor {name!r} does not belong to a "
            f"{architecture.family} model as its config.json describes it"
        )
    return source


def _is_redundant(name: str, architecture: Architecture) -> bool:
    """Whether a tensor may be in a directory though nothing reads it."""
    # Old Llama files hold RoPE's frequencies; some tied models hold their embedding twice.
    return name.endswith(".rotary_emb.inv_freq") or (name == _HEAD and architecture.ties_output)


def has_tied_copy(source: SafetensorsDirectory, architecture: Architecture) -> bool:
    """Whether a tied model holds its embedding twice, so that `tied_copy_fault` must read it."""
    return architecture.ties_output and _HEAD in source.places


def tied_copy_fault(
    source: MappedTensors, *, embedding: str = _EMBEDDING, head: str = _HEAD
) -> str | None:
    """Compare a tied model's output layer with its embedding, block by block.

    Such a model has two different matrices, whatever its ``config.json`` says: `transformers`
    does not tie them either.

    Args:
        source: A directory of which `has_tied_copy` holds.
        embedding: Name of the embedding.
        head: Name of the output layer.

    Returns:
        What is wrong, or None if the two are equal.
    """
    place = source.places[embedding]
    same = place.shape == source.places[head].shape
    row_bytes = place.num_bytes // max(1, place.shape[0])
    for rows in row_blocks(place.shape[0], row_bytes, block_bytes=BLOCK_BYTES):
        if not same:
            break
        ours, copy = source.view(embedding, rows), source.view(head, rows)
        common = torch.promote_types(ours.dtype, copy.dtype)
        same = torch.equal(ours.to(common), copy.to(common))
        source.drop(embedding, rows)
        source.drop(head, rows)
    if same:
        return None
    return (
        f"{source.places[head].file}: tensor {head!r} differs from the embedding, though "
        "config.json says that they are one; set tie_word_embeddings to false"
    )
