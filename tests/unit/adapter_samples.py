"""Random adapter directories for tests, written without `peft`."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

# Those of `hf_samples.write_sample`.
MATRICES = {
    "self_attn.q_proj": (40, 24),
    "self_attn.k_proj": (20, 24),
    "self_attn.v_proj": (20, 24),
    "self_attn.o_proj": (24, 40),
    "mlp.gate_proj": (40, 24),
    "mlp.up_proj": (40, 24),
    "mlp.down_proj": (24, 40),
}
NUM_LAYERS, VOCABULARY, HIDDEN, RANK, ALPHA = 3, 77, 24, 4, 6


def write_adapter(
    directory: Path,
    *,
    targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj"),
    dora: bool = False,
    whole: tuple[str, ...] = (),
    tied: bool = False,
    score: bool = False,
    **fields: Any,
) -> dict[str, Tensor]:
    """Write an adapter for a model of `hf_samples.write_sample`; return its tensors.

    Names and shapes are spelled out here rather than taken from the table under test.

    Args:
        directory: Where to; made if missing.
        targets: Matrices with an adapter.
        dora: Whether it has magnitudes.
        whole: Matrices held whole.
        tied: Whether the one matrix of a tied model is written under both names.
        score: Whether it is of a reward model, as `peft` writes one.
        **fields: Fields of the configuration, or replacements.
    """
    generator = torch.Generator().manual_seed(13)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(NUM_LAYERS):
        for matrix, (rows, columns) in MATRICES.items():
            if matrix.rpartition(".")[2] in targets:
                prefix = f"base_model.model.model.layers.{layer}.{matrix}."
                shapes[f"{prefix}lora_A.weight"] = (RANK, columns)
                shapes[f"{prefix}lora_B.weight"] = (rows, RANK)
                if dora:
                    shapes[f"{prefix}lora_magnitude_vector"] = (rows,)
    tensors = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    vocabulary = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    if "embed_tokens" in whole:
        tensors["base_model.model.model.embed_tokens.weight"] = vocabulary
    if "lm_head" in whole or tied:
        tensors["base_model.model.lm_head.weight"] = (
            vocabulary.clone() if tied else vocabulary + 1.0
        )
    if score:
        tensors["base_model.model.score.weight"] = torch.randn(1, HIDDEN, generator=generator)
    saved = [*whole, *(("classifier", "score") if score else ())]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if score else "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(targets),
        "modules_to_save": saved or None,
        "use_dora": dora,
        "ensure_weight_tying": tied,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config | fields))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return tensors
