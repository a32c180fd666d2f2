"""Names and shapes of an adapter's tensors in `peft`'s files."""

import re
from collections.abc import Mapping, Sequence

from megatron_cgn.config.schema import LoraConfig
from megatron_cgn.hf.families import hf_shapes
from megatron_cgn.model.architecture import Architecture

TARGETS: Mapping[str, str] = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
"""Matrices that may have an adapter, and the block of a layer that each is in."""

WHOLE_MATRICES: Mapping[str, str] = {
    "embed_tokens": "model.embed_tokens.weight",
    "lm_head": "lm_head.weight",
}
"""Matrices that may be trained whole, and the tensors that they are."""

PREFIX = "base_model.model."
"""What `peft` puts before the names of the base model."""

_SUFFIXES: Mapping[str, str] = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    # Saved as a bare parameter, as it once was.
    "lora_magnitude_vector": "lora_magnitude_vector",
}
_NAME = re.compile(
    re.escape(PREFIX)
    + r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\."
    + r"(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?"
)


def module_name(layer: int, target: str) -> str:
    """A matrix's module in the base model, e.g. ``model.layers.0.self_attn.q_proj``."""
    return f"model.layers.{layer}.{TARGETS[target]}.{target}"


def tensor_name(layer: int, target: str, part: str) -> str:
    """An adapter's tensor as `peft` names it."""
    return f"{PREFIX}{module_name(layer, target)}.{_SUFFIXES[part]}"


def parse_name(name: str) -> tuple[int, str, str] | None:
    """Layer, target and part of an adapter's tensor; None if the name is another's."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in TARGETS:
        return None
    key = int(match[1]), match[2], match[3]
    return key if tensor_name(*key) == name else None


def adapter_shapes(architecture: Architecture, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of an adapter directory and its shape, in the order of the model.

    Args:
        architecture: The base model.
        lora: The adapters.

    Returns:
        Shapes by name: ``A`` is ``[rank, in]``, ``B`` is ``[out, rank]``.
    """
    assert lora.rank is not None
    base = hf_shapes(architecture)
    whole = whole_tensors(architecture, lora.modules_to_save)
    vocabulary = (architecture.vocab_size, architecture.hidden_size)
    embedding, head = WHOLE_MATRICES["embed_tokens"], WHOLE_MATRICES["lm_head"]
    shapes: dict[str, tuple[int, ...]] = {}
    if embedding in whole:
        shapes[PREFIX + embedding] = vocabulary
    for layer in range(architecture.num_layers):
        for target in (name for name in TARGETS if name in lora.targets):
            out_features, in_features = base[f"{module_name(layer, target)}.weight"]
            shapes[tensor_name(layer, target, "lora_A")] = (lora.rank, in_features)
            shapes[tensor_name(layer, target, "lora_B")] = (out_features, lora.rank)
            if lora.use_dora:
                shapes[tensor_name(layer, target, "lora_magnitude_vector")] = (out_features,)
    if head in whole:
        shapes[PREFIX + head] = vocabulary
    return shapes


def whole_tensors(architecture: Architecture, modules_to_save: Sequence[str]) -> tuple[str, ...]:
    """The base model's tensors that an adapter holds whole.

    `peft` stores the one matrix of a tied model under both of its names.

    Args:
        architecture: The base model.
        modules_to_save: Names out of `WHOLE_MATRICES`.

    Returns:
        Names in the base model.
    """
    if modules_to_save and architecture.tie_word_embeddings:
        return tuple(WHOLE_MATRICES.values())
    return tuple(tensor for name, tensor in WHOLE_MATRICES.items() if name in modules_to_save)
