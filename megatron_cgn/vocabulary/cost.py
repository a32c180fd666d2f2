r"""What more rows cost a model, and what fewer tokens save it: closed forms, nothing is run.

Training FLOPs of a token, forward and backward, as Megatron-LM counts them:

.. math:: F = 6 P_\mathrm{matmul} + 6 L s\, n_\mathrm{heads} d_\mathrm{head}

:math:`P_\mathrm{matmul}` holds the projections and the output matrix with its padding, which is
multiplied as well, and not the embedding, a lookup. The second term is attention over a sequence
of :math:`s` tokens, of which a causal mask leaves half. Recomputation is not counted. Sequences
have as many tokens after an extension as before, and so more text.
"""

from dataclasses import dataclass, replace

from megatron_cgn.errors import ConfigError
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.heads import padded_vocab_size
from megatron_cgn.model.size import parameter_count

TRAINING_BYTES_PER_PARAMETER = 18
"""BF16 weight (2), FP32 gradient (4), FP32 weight (4) and Adam's two FP32 moments (8). The
distributed optimizer divides the last 12 over the data-parallel ranks; BF16 gradients save 2."""
LOGITS_BYTES = 6
"""Of a logit: BF16 as the output layer gives it (2), FP32 in the cross entropy (4)."""
KV_BYTES = 2
"""Of a cached key or value: BF16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingShape:
    """What of a training run decides its cost."""

    seq_length: int = 4096
    """Tokens of a sequence."""
    micro_batch_size: int = 1
    tensor_model_parallel_size: int = 1
    make_vocab_size_divisible_by: int = 128
    """Rows of a tensor-parallel rank are a multiple of this."""

    def __post_init__(self) -> None:
        """Check that all are positive.

        Raises:
            ConfigError: If one is not; names all.
        """
        names = (
            "seq_length",
            "micro_batch_size",
            "tensor_model_parallel_size",
            "make_vocab_size_divisible_by",
        )
        faults = [
            f"{name}: {value}, but at least 1 is needed."
            for name in names
            if (value := getattr(self, name)) < 1
        ]
        if faults:
            raise ConfigError("\n".join(faults))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """A model with one size of vocabulary."""

    rows: int
    """Rows of the embedding and of the output matrix, padding included."""
    parameters: int
    """All of them, padding included; shared matrices once."""
    extra_parameters: int
    """More than before the extension."""
    training_flops_per_token: float
    logits_bytes: int
    """Logits of a micro-batch on one tensor-parallel rank."""
    training_state_bytes: int
    """Weights, gradients and optimizer state over all ranks that share the model."""
    kv_cache_bytes_per_token: int
    """Keys and values that a server keeps of a token, over all layers."""


def model_cost(
    architecture: Architecture, *, num_tokens: int, old_vocab_size: int, shape: TrainingShape
) -> ModelCost:
    """Work out a model with new tokens.

    Args:
        architecture: The model before; its ``vocab_size`` may exceed `old_vocab_size` by rows that
            no token uses, which new tokens take first.
        num_tokens: New tokens.
        old_vocab_size: Ids of the old tokenizer.
        shape: The training run.

    Returns:
        The costs.
    """
    before = _rows(architecture, 0, old_vocab_size, shape)
    rows = _rows(architecture, num_tokens, old_vocab_size, shape)
    a = replace(architecture, vocab_size=rows)
    count = parameter_count(a)
    attention = 6 * a.num_layers * shape.seq_length * a.num_attention_heads * a.head_dim
    logits = shape.micro_batch_size * shape.seq_length * rows // shape.tensor_model_parallel_size
    return ModelCost(
        rows=rows,
        parameters=count.total,
        extra_parameters=count.total
        - parameter_count(replace(architecture, vocab_size=before)).total,
        training_flops_per_token=float(6 * count.matmul + attention),
        logits_bytes=logits * LOGITS_BYTES,
        training_state_bytes=count.total * TRAINING_BYTES_PER_PARAMETER,
        kv_cache_bytes_per_token=2 * a.num_layers * a.num_key_value_heads * a.head_dim * KV_BYTES,
    )


def _rows(
    architecture: Architecture, num_tokens: int, old_vocab_size: int, shape: TrainingShape
) -> int:
    # Rows that the model has beyond the tokenizer's are kept: nothing gets smaller.
    return padded_vocab_size(
        max(architecture.vocab_size, old_vocab_size + num_tokens),
        multiple=shape.make_vocab_size_divisible_by,
        tensor_parallel_size=shape.tensor_model_parallel_size,
    )
