"""Random Hugging Face directories for tests, written without `transformers`."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_sample(
    directory: Path,
    *,
    model_type: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    files: int = 1,
) -> dict[str, Tensor]:
    """Write a random model of 3 layers with odd sizes; return its tensors.

    Names and shapes are spelled out here rather than taken from the table under test.
    """
    hidden, ffn, heads, kv_heads, head_dim, vocab = 24, 40, 4, 2, 10, 77
    tensors = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        tensors["lm_head.weight"] = (vocab, hidden)
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        tensors |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (heads * head_dim, hidden),
            f"{prefix}self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
            f"{prefix}self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, heads * head_dim),
            f"{prefix}mlp.gate_proj.weight": (ffn, hidden),
            f"{prefix}mlp.up_proj.weight": (ffn, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, ffn),
        }
        if model_type == "qwen2":
            tensors |= {
                f"{prefix}self_attn.q_proj.bias": (heads * head_dim,),
                f"{prefix}self_attn.k_proj.bias": (kv_heads * head_dim,),
                f"{prefix}self_attn.v_proj.bias": (kv_heads * head_dim,),
            }
        if model_type == "qwen3":
            tensors |= {
                f"{prefix}self_attn.q_norm.weight": (head_dim,),
                f"{prefix}self_attn.k_norm.weight": (head_dim,),
            }
    generator = torch.Generator().manual_seed(3)
    values = {n: torch.randn(s, generator=generator).to(dtype) for n, s in tensors.items()}
    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "generation_config.json").write_text('{"temperature": 0.6}')
    _save(directory, values, files)
    return values


def _save(directory: Path, values: dict[str, Tensor], files: int) -> None:
    if files == 1:
        save_file(values, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(values.items())[number::files])
        save_file(part, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors files, by the reference reader."""
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_bytes(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Hold names, types, shapes and bytes of two models equal."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        same = torch.equal(
            actual[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
        )
        assert same, name
