import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_cgn.model.architecture import Architecture, LinearRopeScaling, Llama3RopeScaling
from megatron_cgn.model.rope import rope_inverse_frequencies

LLAMA3 = dict(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def _architecture(**fields: Any) -> Architecture:
    base = Architecture(
        family="llama",
        num_layers=1,
        hidden_size=256,
        ffn_hidden_size=512,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        vocab_size=1000,
        max_position_embeddings=131072,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=None,
        tie_word_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
        initializer_range=0.02,
    )
    return dataclasses.replace(base, **fields)


def _transformers(architecture: Architecture, parameters: dict[str, Any]) -> torch.Tensor:
    config = LlamaConfig(
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        head_dim=architecture.head_dim,
        max_position_embeddings=architecture.max_position_embeddings,
        rope_parameters={"rope_theta": architecture.rope_theta, **parameters},
    )
    return LlamaRotaryEmbedding(config).inv_freq


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        (None, {"rope_type": "default"}),
        (LinearRopeScaling(factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (Llama3RopeScaling(**LLAMA3), {"rope_type": "llama3", **LLAMA3}),
        (
            Llama3RopeScaling(**{**LLAMA3, "factor": 8.0, "high_freq_factor": 7.0}),
            {"rope_type": "llama3", **LLAMA3, "factor": 8.0, "high_freq_factor": 7.0},
        ),
    ],
)
def test_frequencies_are_those_of_transformers(
    head_dim: int, theta: float, scaling: Any, parameters: dict[str, Any]
) -> None:
    architecture = _architecture(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    ours = rope_inverse_frequencies(architecture)
    assert ours.dtype is torch.float32 and ours.shape == (head_dim // 2,)
    assert torch.equal(ours, _transformers(architecture, parameters))


def test_llama3_keeps_short_wavelengths_and_divides_long_ones() -> None:
    scaled = rope_inverse_frequencies(_architecture(rope_scaling=Llama3RopeScaling(**LLAMA3)))
    plain = rope_inverse_frequencies(_architecture())
    wavelengths = 2 * torch.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    assert short.any() and long.any() and not (short | long).all()
    assert torch.equal(scaled[short], plain[short])
    assert torch.equal(scaled[long], plain[long] / 32)
    between = (scaled / plain)[~(short | long)]
    assert ((between > 1 / 32) & (between < 1)).all()
