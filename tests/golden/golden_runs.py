"""Ten training steps of a tiny model of each family, from numbers that never change.

Configurations are written out and weights and tokens come from NumPy's `RandomState`, whose
stream is frozen for good, so that no other program's version can move a golden loss.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_cgn.batch import TokenBatch
from megatron_cgn.config.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_cgn.engine.engine import Engine
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.load import load_weights
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.state import initialize_parallel, shutdown_parallel

DIRECTORY = Path(__file__).parent
STEPS = 10
LENGTH = 64
SEQUENCES = 4
_BASE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3_scaled_rope": {"rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE},
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
        "head_dim": 16,
    },
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
    },
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "head_dim": 20,
        "use_sliding_window": False,
    },
    "smollm2_tied": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
}
"""What each family's ``config.json`` has beside or instead of the base."""


def config_of(family: str) -> dict[str, Any]:
    """The whole ``config.json`` of a golden model."""
    return _BASE | FAMILIES[family]


def write_model(directory: Path, family: str) -> Path:
    """Write a golden model's Hugging Face directory, and return it."""
    config = config_of(family)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    tensors = {}
    for name, shape in _shapes(config).items():
        random = np.random.RandomState(zlib.crc32(name.encode()))
        values = 0.08 * random.standard_normal(shape) + (name.endswith("norm.weight"))
        tensors[name] = torch.from_numpy(values.astype(np.float32))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, head_dim = (config[n] for n in ("hidden_size", "intermediate_size", "head_dim"))
    query = config["num_attention_heads"] * head_dim
    key = config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (query, hidden),
            f"{prefix}self_attn.k_proj.weight": (key, hidden),
            f"{prefix}self_attn.v_proj.weight": (key, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, query),
            f"{prefix}mlp.gate_proj.weight": (ffn, hidden),
            f"{prefix}mlp.up_proj.weight": (ffn, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, ffn),
        }
        if config["model_type"] == "qwen2":
            for name, width in (("q", query), ("k", key), ("v", key)):
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (width,)
        if config["model_type"] == "qwen3":
            for name in ("q", "k"):
                shapes[f"{prefix}self_attn.{name}_norm.weight"] = (head_dim,)
    return shapes


def batch_of(step: int) -> list[TokenBatch]:
    """The micro-batches of a step: two of two sequences, with unequal masks."""
    random = np.random.RandomState(1000 + step)
    ids = (random.random_sample((SEQUENCES, LENGTH + 1)) ** 3 * 300).astype(np.int64)
    density = random.random_sample((SEQUENCES, 1))
    mask = (random.random_sample((SEQUENCES, LENGTH)) < density).astype(np.float32)
    positions = np.broadcast_to(np.arange(LENGTH), (SEQUENCES, LENGTH))
    return [
        TokenBatch(
            tokens=torch.from_numpy(ids[i : i + 2, :-1].copy()),
            labels=torch.from_numpy(ids[i : i + 2, 1:].copy()),
            loss_mask=torch.from_numpy(mask[i : i + 2].copy()),
            position_ids=torch.from_numpy(positions[i : i + 2].copy()),
        )
        for i in range(0, SEQUENCES, 2)
    ]


def run(directory: Path) -> dict[str, list[float]]:
    """Train a golden model on one process.

    Args:
        directory: From `write_model`.

    Returns:
        ``losses`` and ``grad_norms`` of every step.
    """
    config = RunConfig(
        precision="fp32",
        model=ModelConfig(hf_path=str(directory), backend="native"),
        data=DataConfig(seq_length=LENGTH),
        train=TrainConfig(micro_batch_size=2, global_batch_size=SEQUENCES, train_iters=STEPS),
        optim=OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2),
    )
    architecture = read_architecture(directory)
    state = initialize_parallel(ParallelConfig())
    try:
        engine = Engine(config, architecture, state, total_steps=STEPS)
        load_weights(engine.chunks, directory, architecture=architecture, groups=state.groups)
        engine.prepare_training()
        reports = [engine.train_step(batch_of(step), NextToken()) for step in range(STEPS)]
    finally:
        shutdown_parallel()
    return {
        "losses": [r.metrics["loss"] for r in reports],
        "grad_norms": [float(r.grad_norm or 0.0) for r in reports],
    }


def golden_file(family: str) -> Path:
    """Where a family's golden figures are."""
    return DIRECTORY / f"{family}.json"
