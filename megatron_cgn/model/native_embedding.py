"""Megatron's parallel embedding with gradients of the rows that were read, not of all rows.

On a GPU it is Megatron's own in every respect. On a CPU a dense gradient would be zeroed, and added
to Megatron's buffer, whole: in each micro-batch two passes over the largest matrix of a small
model. Communication is Megatron's.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import functional as F


class NativeVocabParallelEmbedding(VocabParallelEmbedding):
    """``weight[ids]``, whose rows are shared out over tp."""

    def forward(self, input_: Tensor) -> Tensor:
        """Look ids up. Collective over tp.

        Args:
            input_: Ids int64 ``[b, s]``.

        Returns:
            Rows ``[b, s, h]``; ``[s / tp, b, h]`` under sequence parallelism.
        """
        # As in native_linear.py: Megatron's hooks may be waiting for a gradient.
        into_buffer = self.config.no_sync_func is None and hasattr(self.weight, "main_grad")
        if self.weight.device.type != "cpu" or not (into_buffer and self.weight.requires_grad):
            out: Tensor = super().forward(input_)
            return out
        sharded = self.tp_group.size() > 1
        rows: Tensor = _LookUp.apply(input_ - self.vocab_start_index, self.weight, sharded)
        if self.reduce_scatter_embeddings:
            rows = rows.transpose(0, 1).contiguous()
            rows = reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        elif sharded:
            rows = reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)
        return rows


class _LookUp(torch.autograd.Function):
    """Rows of a matrix, zeros for ids of other ranks; gradients go straight into its buffer."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, sharded: bool) -> Tensor:
        ctx.save_for_backward(ids, weight)
        if not sharded:  # an id that is nobody's is a fault, and raises
            return F.embedding(ids, weight)
        owned = (ids >= 0) & (ids < len(weight))
        rows = F.embedding(ids.where(owned, 0), weight)
        return rows.masked_fill_(~owned[..., None], 0.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        ids, weight = ctx.saved_tensors
        owned = (ids >= 0) & (ids < len(weight))
        by_rows = grad_outputs[0][owned].to(weight.main_grad.dtype)
        # First the sum of each row, so that it is rounded as that of a dense gradient is.
        rows, places = ids[owned].unique(return_inverse=True)
        sums = by_rows.new_zeros(len(rows), weight.size(1)).index_add_(0, places, by_rows)
        weight.main_grad.index_add_(0, rows, sums)
        return None, None, None
