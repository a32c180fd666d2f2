"""What flows from a data source to an objective: fields, shapes, dtypes.

Shapes: B sequences, S tokens. Every field is a tensor on the device of the model, unless it says
otherwise.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

_ON_HOST = {"on_host": True}
"""Mark of a field that stays on the CPU: kernels are launched by its values, and reading them from
a device would wait for all that it has to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Sequences for next-token prediction (pre-training and SFT).

    Attributes:
        tokens: Input ids, int64 ``[B, S]``.
        labels: Ids to predict, already shifted and always valid ids, int64 ``[B, S]``.
        loss_mask: 1.0 where a label counts, float32 ``[B, S]``. It alone says what counts.
        position_ids: RoPE positions, int64 ``[B, S]``.
        cu_seqlens: Starts of the packed sequences and the end, int32 ``[N + 1]`` on the CPU, when
            B is 1 and several sequences share a row with block-diagonal attention; None
            otherwise. It is about the whole row, also where a context-parallel rank holds parts.
        source_ids: Place among the run's sources of the one each label is from, int64 ``[B, S]``;
            None if nobody asks.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None = field(default=None, metadata=_ON_HOST)
    source_ids: Tensor | None = None


def to_device[B](batch: B, device: torch.device) -> B:
    """Move every tensor of a batch, except those that stay on the CPU.

    Args:
        batch: Any dataclass of tensors.
        device: Where to.

    Returns:
        A new batch of the same type.
    """
    return _map(
        batch,
        lambda tensor: tensor.to(device, non_blocking=True),
        skip=lambda f: "on_host" in f.metadata,
    )


def map_sequences[B](batch: B, function: Callable[[Tensor], Tensor]) -> B:
    """Apply a function to every tensor that has a sequence dimension (two or more dimensions).

    Args:
        batch: Any dataclass of tensors.
        function: From ``[B, S, …]`` to ``[B, S', …]``.

    Returns:
        A new batch of the same type.
    """
    return _map(batch, lambda tensor: function(tensor) if tensor.dim() >= 2 else tensor)


def _map[B](
    batch: B,
    function: Callable[[Tensor], Tensor],
    *,
    skip: Callable[[Field[Any]], bool] = lambda f: False,
) -> B:
    changed = {
        f.name: function(value)
        for f in fields(batch)  # type: ignore[arg-type]
        if isinstance(value := getattr(batch, f.name), Tensor) and not skip(f)
    }
    return replace(batch, **changed)  # type: ignore[type-var]
