"""RoPE frequencies of an `Architecture`, in closed form.

Megatron-Core hard-codes three of Llama 3's four scaling parameters, so the model's rotary
embedding is given these frequencies instead of its own.
"""

import math

import torch
from torch import Tensor

from megatron_cgn.model.architecture import Architecture, LinearRopeScaling, Llama3RopeScaling


def rope_inverse_frequencies(architecture: Architecture) -> Tensor:
    """Angle by which each pair of head dimensions turns from one token to the next.

    Unscaled, pair ``i`` of a head of width ``d`` turns by ``rope_theta ** (-2i / d)`` radians
    (Su et al. 2021, https://arxiv.org/abs/2104.09864). Computed in FP32 on purpose, as
    `transformers` does: the last bit, multiplied by a position of 8,192, is visible in logits.

    Args:
        architecture: Gives ``head_dim``, ``rope_theta`` and ``rope_scaling``.

    Returns:
        Radians per token, float32 ``[head_dim / 2]`` on the CPU.
    """
    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / architecture.rope_theta ** (exponents / architecture.head_dim)
    scaling = architecture.rope_scaling
    if isinstance(scaling, LinearRopeScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3RopeScaling):
        return _llama3(frequencies, scaling)
    return frequencies


def _llama3(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Slow down long wavelengths only; between the two limits, blend linearly in turns."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies
