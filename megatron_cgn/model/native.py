"""Transformer layers made of Megatron-Core and PyTorch only.

Used where Transformer Engine is not installed: on a CPU, and on a GPU without it. Checkpoint
keys are those of the Transformer Engine layers, so checkpoints move between the two.
"""

import functools

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.attention import NativeAttention
from megatron_cgn.model.native_linear import (
    NativeColumnParallelLinear,
    NativeRowParallelLinear,
)


class NativeRMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` (https://arxiv.org/abs/1910.07467).

    Statistics and quotient are FP32 and rounded to the input's type *before* the weight is
    applied: that is how Llama-shaped models are defined in `transformers`, and in BF16 it is not
    the same as rounding once.

    Args:
        config: The model's configuration.
        hidden_size: Width of the last dimension.
        eps: Epsilon inside the square root.
    """

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        assert config.normalization == "RMSNorm" and not config.layernorm_zero_centered_gamma
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # Under sequence parallelism each rank sees its own tokens, so Megatron must sum this
        # gradient over the tensor-parallel group; it looks for this mark.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension.

        Args:
            x: Hidden states ``[..., hidden_size]``.

        Returns:
            Same shape and type.
        """
        return self.weight * F.rms_norm(x, self.weight.shape, eps=self.eps)


def native_layer_spec(architecture: Architecture) -> ModuleSpec:
    """Spec of one decoder layer: norm, attention, norm, SwiGLU.

    Args:
        architecture: Decides whether queries and keys are normalised.

    Returns:
        A spec that Megatron's ``TransformerBlock`` builds once per layer.
    """
    qk_norm = NativeRMSNorm if architecture.qk_norm else None
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=NativeColumnParallelLinear,
            core_attention=NativeAttention,
            linear_proj=NativeRowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    mlp = functools.partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(
            linear_fc1=NativeColumnParallelLinear, linear_fc2=NativeRowParallelLinear
        ),
        ffn_hidden_size=architecture.ffn_hidden_size,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=NativeRMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=NativeRMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            # Transformer Engine fuses each norm into the projection behind it.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
