"""What stands on the last hidden state: the padded vocabulary of the language-model head.

The embedding and the output layer have more rows than the tokenizer has ids, so that they divide
over tensor-parallel ranks. Those rows are kept out of every probability here; reading and
writing them is `hf/`'s part. Models that give a number in place of probabilities are in
`score_model.py`. Importing this loads no Megatron-Core.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def padded_vocab_size(vocab_size: int, *, multiple: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding and output matrices.

    Args:
        vocab_size: Ids of the tokenizer.
        multiple: Rows of one tensor-parallel rank are a multiple of this.
        tensor_parallel_size: Ranks that share the rows.

    Returns:
        The smallest multiple of ``multiple * tensor_parallel_size`` that holds `vocab_size`.
    """
    unit = multiple * tensor_parallel_size
    return -(-vocab_size // unit) * unit


class _MaskColumns(torch.autograd.Function):
    """Overwrite the last logits of each row in place; pass gradients through unchanged.

    Unchanged is right because a masked logit has probability exactly zero, so its gradient under
    every loss that reads probabilities is exactly zero already. It saves copying the largest
    tensor of the step.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, num_valid: int) -> Tensor:
        # Half of the lowest finite value: subtracting the row maximum must not overflow.
        logits[..., num_valid:] = torch.finfo(logits.dtype).min / 2
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0], None


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddingMask:
    """Forward hook of the output layer: columns beyond the vocabulary get probability zero.

    Attributes:
        vocab_size: Ids of the tokenizer.
        padded_size: Rows of the output matrix over all tensor-parallel ranks.
        tensor_parallel_rank: This rank's place among those that share the rows.
        tensor_parallel_size: Ranks that share the rows.
    """

    vocab_size: int
    padded_size: int
    tensor_parallel_rank: int
    tensor_parallel_size: int

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]
    ) -> tuple[Tensor, Any]:
        """Mask logits ``[s, b, V / tp]``, or ``[s, b, V]`` where the layer has gathered them."""
        logits, bias = output
        width = logits.size(-1)
        gathered = width == self.padded_size
        first_column = 0 if gathered else self.tensor_parallel_rank * width
        num_valid = min(max(self.vocab_size - first_column, 0), width)
        if num_valid < width:
            logits = _MaskColumns.apply(logits, num_valid)
        return logits, bias


def mask_padded_vocabulary(
    output_layer: torch.nn.Module,
    *,
    vocab_size: int,
    padded_size: int,
    tensor_parallel_rank: int,
    tensor_parallel_size: int,
) -> None:
    """Make the loss that of the unpadded model, whatever the tensor-parallel size.

    Args:
        output_layer: A Megatron ``ColumnParallelLinear`` that returns ``(logits, bias)``. Its
            ``num_valid`` becomes the number of its rows that are ids, which
            `linear_cross_entropy` reads.
        vocab_size: Ids of the tokenizer.
        padded_size: Rows of the output matrix over all tensor-parallel ranks.
        tensor_parallel_rank: This rank's place among those that share the rows.
        tensor_parallel_size: Ranks that share the rows.
    """
    width = padded_size // tensor_parallel_size
    num_valid = min(max(vocab_size - tensor_parallel_rank * width, 0), width)
    output_layer.num_valid = num_valid  # type: ignore[assignment]
    if padded_size == vocab_size:
        return
    output_layer.register_forward_hook(
        PaddingMask(
            vocab_size=vocab_size,
            padded_size=padded_size,
            tensor_parallel_rank=tensor_parallel_rank,
            tensor_parallel_size=tensor_parallel_size,
        )
    )
