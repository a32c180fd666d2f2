"""What an adapter directory of `peft` is made of, apart from the tensors themselves."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_cgn.config.schema import LoraConfig
from megatron_cgn.hf.adapter_card import adapter_card
from megatron_cgn.hf.adapter_config import CONFIG_FILE, WEIGHTS_FILE, config_json
from megatron_cgn.hf.adapter_names import adapter_shapes
from megatron_cgn.hf.files import write_json
from megatron_cgn.hf.safetensors_io import ShardPlan, TensorTypes, plan_shards
from megatron_cgn.model.architecture import Architecture


def plan_adapter(
    stages: Sequence[TensorTypes], *, architecture: Architecture, lora: LoraConfig
) -> list[ShardPlan]:
    """Lay an adapter's tensors out in its one file, in the order of the model.

    Args:
        stages: Types and shapes, in one mapping per writer.
        architecture: The base model.
        lora: The adapters.

    Returns:
        The file.
    """
    merged = {name: entry for stage in stages for name, entry in stage.items()}
    ordered = {name: merged[name] for name in adapter_shapes(architecture, lora)}
    assert len(ordered) == len(merged)
    (plan,) = plan_shards([ordered], max_shard_bytes=sys.maxsize)
    return [dataclasses.replace(plan, file_name=WEIGHTS_FILE)]


def write_adapter_files(
    directory: Path,
    architecture: Architecture,
    lora: LoraConfig,
    *,
    base: str,
    types: TensorTypes,
) -> None:
    """Write what is beside the tensors: ``adapter_config.json`` and ``README.md``.

    Args:
        directory: Where to.
        architecture: The base model.
        lora: The adapters.
        base: What users shall load the adapter onto.
        types: Types and shapes of the tensors.
    """
    ties_weights = bool(lora.modules_to_save) and architecture.ties_output
    if ties_weights:
        lora = dataclasses.replace(lora, modules_to_save=("embed_tokens",))
    config = config_json(lora, base=base, head=architecture.head, ties_weights=ties_weights)
    write_json(directory / CONFIG_FILE, config)
    card = adapter_card(lora, base=base, head=architecture.head, types=types)
    (directory / "README.md").write_text(card, encoding="utf-8")
