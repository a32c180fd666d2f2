"""What flows from a data source to an objective: fields, shapes, dtypes.

Shapes: B sequences, S tokens. Every field is a tensor on the device of the model.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Sequences for next-token prediction (pre-training and SFT).

    Attributes:
        tokens: Input ids, int64 ``[B, S]``.
        labels: Ids to predict, already shifted and always valid ids, int64 ``[B, S]``.
        loss_mask: 1.0 where a label counts, float32 ``[B, S]``. It alone says what counts.
        position_ids: RoPE positions, int64 ``[B, S]``.
        cu_seqlens: Starts of the packed sequences and the end, int32 ``[N + 1]``, when B is 1
            and several sequences share a row with block-diagonal attention; None otherwise.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None = None
