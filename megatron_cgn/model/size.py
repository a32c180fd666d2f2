"""How many parameters an `Architecture` has, in closed form."""

from dataclasses import dataclass

from megatron_cgn.model.architecture import Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Parameters of a model without vocabulary padding.

    Attributes:
        total: Every parameter, as the Hugging Face checkpoint stores them.
        matmul: Those multiplied with every token: the projections and the head, without
            the embedding (a lookup), norms and biases. Forward and backward take ``6 * matmul``
            FLOPs a token, attention scores apart.
    """

    total: int
    matmul: int


def parameter_count(architecture: Architecture) -> ParameterCount:
    """Count the parameters of `architecture`.

    Args:
        architecture: The model.

    Returns:
        Its counts.
    """
    a = architecture
    query_size = a.num_attention_heads * a.head_dim
    qkv_size = query_size + 2 * a.num_key_value_heads * a.head_dim
    matrices = (
        a.hidden_size * qkv_size
        + query_size * a.hidden_size
        + 3 * a.hidden_size * a.ffn_hidden_size
    )
    vectors = 2 * a.hidden_size
    vectors += qkv_size if a.qkv_bias else 0
    vectors += 2 * a.head_dim if a.qk_norm else 0
    vocabulary = a.vocab_size * a.hidden_size
    output = vocabulary if a.head == "lm" else a.hidden_size
    return ParameterCount(
        total=a.num_layers * (matrices + vectors)
        + a.hidden_size
        + vocabulary
        + (0 if a.ties_output else output),
        matmul=a.num_layers * matrices + output,
    )
