"""Open a Hugging Face directory's weights and hold them against its architecture."""

import logging
from pathlib import Path

from megatron_cgn.errors import ModelError
from megatron_cgn.hf.families import hf_shapes
from megatron_cgn.hf.safetensors_io import SafetensorsDirectory
from megatron_cgn.model.architecture import Architecture

logger = logging.getLogger(__name__)


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
    return name.endswith(".rotary_emb.inv_freq") or (
        name == "lm_head.weight" and architecture.tie_word_embeddings
    )
