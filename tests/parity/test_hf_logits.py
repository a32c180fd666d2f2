"""FP32 logits of a loaded model equal those of `transformers`, for every family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_cgn.config.schema import ModelConfig, ParallelConfig
from megatron_cgn.hf.to_megatron import convert_to_megatron
from megatron_cgn.testing import HF_LOGITS_ATOL, run_distributed, tiny_hf_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that wavelengths of all three kinds occur below.
    "original_max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-tied-wide-heads": {"family": "llama", "tie_word_embeddings": True, "head_dim": 24},
    "llama-3.1": {"family": "llama", "rope_parameters": LLAMA3_ROPE},
    "llama-linear": {
        "family": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
    "llama-without-groups": {"family": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-3},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3"},
}
CONVERTED = "qwen2"
"""The case that is also converted: a fused bias and a tied embedding."""
NUM_TOKENS = 200


def _tokens() -> torch.Tensor:
    return torch.randint(0, 1000, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(5))


def _logits(root: str, names: list[str], converted: str) -> list[Any]:
    """The engine's logits for every case, in one process, as NumPy arrays.

    The last ones are those of a converted checkpoint, read by Megatron's own loader.

    A tensor would travel by a file descriptor that ends with its process.
    """
    from megatron.core import dist_checkpointing

    from megatron_cgn.hf.config import read_architecture
    from megatron_cgn.hf.load import load_weights
    from megatron_cgn.model.build import build_model, transformer_config
    from megatron_cgn.parallel.state import initialize_parallel

    parallel = ParallelConfig()
    groups = initialize_parallel(parallel).groups
    results = []
    for name in [*names, converted]:
        directory = Path(root) / name / "hf" if name == converted else Path(root) / name
        architecture = read_architecture(directory)
        config = transformer_config(
            architecture, parallel=parallel, model=ModelConfig(backend="native"), precision="fp32"
        )
        chunks = build_model(
            architecture,
            config=config,
            groups=groups,
            seq_length=NUM_TOKENS,
            make_vocab_size_divisible_by=128,
            backend="native",
        )
        (model,) = chunks
        if name == converted:
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))
            state = dist_checkpointing.load(
                model.sharded_state_dict(), str(Path(root) / name / "dist")
            )
            model.load_state_dict(state, strict=False)
        else:
            load_weights(chunks, directory, architecture=architecture, groups=groups)
        model.eval()
        tokens = _tokens()
        positions = torch.arange(NUM_TOKENS).expand_as(tokens)
        with torch.no_grad():
            output = model(tokens, positions, None)[..., : architecture.vocab_size]
        results.append(output.numpy().copy())
    return results


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """The engine's and `transformers`' logits, by case."""
    root = tmp_path_factory.mktemp("logits")
    for name, fields in CASES.items():
        tiny_hf_model(root / name, **fields)
    convert_to_megatron(root / CONVERTED, root / "converted")
    (ours,) = run_distributed(_logits, 1, str(root), list(CASES), "converted")
    theirs = []
    for name in CASES:
        model = AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32)
        with torch.no_grad():
            theirs.append(model.eval()(_tokens()).logits)
    theirs.append(theirs[list(CASES).index(CONVERTED)])
    names = [*CASES, "converted"]
    return {name: (torch.from_numpy(a), b) for name, a, b in zip(names, ours, theirs, strict=True)}


@pytest.mark.parametrize("name", [*CASES, "converted"])
def test_logits_equal_those_of_transformers(
    logits: dict[str, tuple[torch.Tensor, torch.Tensor]], name: str
) -> None:
    ours, theirs = logits[name]
    # A model whose logits are tiny would pass whatever it computed.
    assert theirs.std() > 0.5
    assert (ours - theirs).abs().max().item() <= HF_LOGITS_ATOL


def test_scaled_rope_changes_the_logits(
    logits: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    plain = logits["llama"][0]
    for name in ("llama-3.1", "llama-linear"):
        assert (logits[name][0] - plain).abs().max() > 0.01
