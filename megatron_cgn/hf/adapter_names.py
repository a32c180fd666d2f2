"""Names, shapes and layouts of an adapter's tensors in `peft`'s files."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from megatron_cgn.config.schema import LoraConfig
from megatron_cgn.hf.families import SCORE_NAME, Parameter, Rows, parameter_table
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.lora_layout import AdapterEntry, adapter_entries

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


def adapter_table(architecture: Architecture, lora: LoraConfig) -> tuple[Parameter, ...]:
    """Every tensor of an adapter directory, in the order of the model.

    As `families.parameter_table` is for a model: files in, files out and conversions follow it.

    Args:
        architecture: The base model.
        lora: The adapters.

    Returns:
        Tensors by the names of `peft`, with their keys in checkpoints. A tied model's matrix that
        is held whole is there under both of its names, with one key.
    """
    whole = whole_tensors(architecture, lora.modules_to_save)
    base = {name: entry for entry in parameter_table(architecture) for name in entry.hf_names()}
    embedding, head = WHOLE_MATRICES["embed_tokens"], WHOLE_MATRICES["lm_head"]
    table = [_renamed(base[embedding], embedding)] if embedding in whole else []
    table += [_adapter_parameter(entry) for entry in adapter_entries(architecture, lora)]
    if head in whole:
        # A tied model's table has the matrix once.
        table.append(_renamed(base.get(head, base[embedding]), head))
    if SCORE_NAME in whole:
        table.append(_renamed(base[SCORE_NAME], SCORE_NAME))
    return tuple(table)


def adapter_shapes(architecture: Architecture, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of `adapter_table` and their shapes: ``A [rank, in]``, ``B [out, rank]``."""
    table = adapter_table(architecture, lora)
    return {name: shape for entry in table for name, shape in entry.hf_shapes().items()}


def _adapter_parameter(entry: AdapterEntry) -> Parameter:
    name = tensor_name(entry.layer, entry.target, entry.part)
    return Parameter(
        key=entry.key,
        parts=((Rows(name=name, start=0, stop=entry.shape[0]),),),
        columns=entry.shape[1] if len(entry.shape) > 1 else None,
        tp_dim=entry.tp_dim,
    )


def _renamed(parameter: Parameter, name: str) -> Parameter:
    """A matrix of the base model as `peft` names it."""
    rows = Rows(name=PREFIX + name, start=0, stop=parameter.num_rows)
    return dataclasses.replace(parameter, parts=((rows,),))


def whole_tensors(architecture: Architecture, modules_to_save: Sequence[str]) -> tuple[str, ...]:
    """The base model's tensors that an adapter holds whole.

    `peft` stores the one matrix of a tied model under both of its names. A scalar head is always
    one of them.

    Args:
        architecture: The base model.
        modules_to_save: Names out of `WHOLE_MATRICES`.

    Returns:
        Names in the base model.
    """
    if modules_to_save and architecture.ties_output:
        return tuple(WHOLE_MATRICES.values())
    whole = [tensor for name, tensor in WHOLE_MATRICES.items() if name in modules_to_save]
    if architecture.head == "score":
        return (*(tensor for tensor in whole if tensor != WHOLE_MATRICES["lm_head"]), SCORE_NAME)
    return tuple(whole)
