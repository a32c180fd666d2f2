"""RoPE: the frequencies of an `Architecture` in closed form, at any positions.

Megatron-Core hard-codes three of Llama 3's four scaling parameters, and turns a row's tokens by
their places in the row, whatever positions they are given.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_cgn.model.architecture import Architecture, LinearRopeScaling, Llama3RopeScaling
from megatron_cgn.model.packing import Row


class Rotary(RotaryEmbedding):
    """Megatron's rotary embedding with the architecture's frequencies, and positions of our own.

    Under a `Row` tokens turn by its ``position_ids``, on any context-parallel rank;
    otherwise by their places, as Megatron has it.

    Args:
        architecture: Gives the frequencies.
        cp_group: The context-parallel group.
    """

    def __init__(self, architecture: Architecture, *, cp_group: dist.ProcessGroup) -> None:
        super().__init__(architecture.head_dim, rotary_percent=1.0, cp_group=cp_group)
        # Not a buffer, so neither a checkpoint nor a cast to BF16 ever touches it.
        self.inv_freq = rope_inverse_frequencies(architecture).to(torch.cuda.current_device())

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **rest: Any,
    ) -> Any:
        """What Megatron's model hands to `forward`: the packed row, or else a length.

        Args:
            inference_context: As Megatron calls it, like all that follow.
            transformer: The layers.
            transformer_input: Hidden states.
            transformer_config: The model's configuration.
            packed_seq_params: The packed row, if one is.
            **rest: Further arguments.

        Returns:
            A `Row`, or tokens.
        """
        if isinstance(packed_seq_params, Row):
            return packed_seq_params
        return super().get_rotary_seq_len(
            inference_context,
            transformer,
            transformer_input,
            transformer_config,
            packed_seq_params,
            **rest,
        )

    def forward(self, length: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Angles of this rank's tokens.

        Args:
            length: What `get_rotary_seq_len` returned.
            *args: As Megatron calls it.
            **kwargs: Likewise.

        Returns:
            Float32 ``[s / cp, 1, 1, head_dim]``.
        """
        if not isinstance(length, Row):
            angles: Tensor = super().forward(length, *args, **kwargs)
            return angles
        half = torch.outer(length.position_ids[0].to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat((half, half), dim=-1)[:, None, None, :]


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
