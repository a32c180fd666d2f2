"""What a model *is*, free of any framework's names.

`hf/config.py` reads an `Architecture` from a Hugging Face ``config.json``; `model/build.py`
turns it into a Megatron-Core model. Nothing here knows of parallelism, precision or training.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3RopeScaling:
    """RoPE frequency scaling of Llama 3.1 (``rope_type: llama3``).

    Wavelengths shorter than ``original_max_position_embeddings / high_freq_factor`` stay,
    longer than ``original_max_position_embeddings / low_freq_factor`` are divided by
    ``factor``, and those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRopeScaling:
    """Position interpolation (``rope_type: linear``): every frequency divided by ``factor``."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A Llama-shaped decoder: RMSNorm before each block, RoPE, grouped queries, SwiGLU.

    Attributes:
        family: Hugging Face ``model_type``, e.g. ``llama``, ``mistral``, ``qwen2``, ``qwen3``.
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Width between gate/up and down projections.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; divides ``num_attention_heads``.
        head_dim: Width of one head; need not be ``hidden_size / num_attention_heads``.
        vocab_size: Rows of the embedding, without padding.
        max_position_embeddings: Longest sequence the model claims, in tokens.
        norm_eps: Epsilon inside the RMSNorm square root.
        rope_theta: RoPE base.
        rope_scaling: How RoPE frequencies are scaled, or None.
        tie_word_embeddings: Whether the output rows are the input rows, where there are any.
        qkv_bias: Whether query, key and value projections have a bias (Qwen 2).
        qk_norm: Whether each query and key head is normalised before RoPE (Qwen 3).
        initializer_range: Standard deviation of randomly initialised weights.
        head: What stands on the last hidden states: ``lm``, probabilities of all ids; or ``score``,
            one number each, as reward models and critics have.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | LinearRopeScaling | None
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    initializer_range: float
    head: Literal["lm", "score"] = "lm"

    @property
    def ties_output(self) -> bool:
        """Whether there is an output layer over the vocabulary whose rows are the input rows."""
        return self.tie_word_embeddings and self.head == "lm"
