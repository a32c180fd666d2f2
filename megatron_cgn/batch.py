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


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch:
    """Answers that are compared, packed into one row: preference data of every kind.

    T places, A answers, P pairs. An *answer* is a whole conversation, of which only what the
    assistant says after the prompt counts. Answers to one prompt are in one row.

    Attributes:
        tokens: Input ids, int64 ``[1, T]``.
        labels: Ids to predict, already shifted and always valid ids, int64 ``[1, T]``.
        loss_mask: 1.0 where a label counts, float32 ``[1, T]``. It alone says what counts.
        position_ids: RoPE positions, which restart with each answer, int64 ``[1, T]``.
        answer_ids: The answer that each place belongs to, int64 ``[1, T]``; A for padding.
        cu_seqlens: Starts of the answers, then of the padding, and the end, int32 ``[N + 1]`` on
            the CPU. It is about the whole row.
        last_places: Place of each answer's last token, int64 ``[A]``: where a reward is read.
        source_ids: Place among the run's sources of the one each answer is from, int64 ``[A]``.
        chosen: The better answer of each pair, int64 ``[P]``; empty for unpaired data.
        rejected: The worse one, int64 ``[P]``.
        weights: What each pair counts, float32 ``[P]``: one over the pairs of its prompt, so that
            a prompt counts once.
        margins: By how much the better answer is better, as the data say, float32 ``[P]``; 0
            where they say nothing.
        desirable: Of unpaired data, whether an answer is a good one, bool ``[A]``; None for pairs.
        ref_logps: Log-probability of each answer under the reference model, the sum over what
            counts, float32 ``[A]``; None if the objective needs none.
        baseline: Of unpaired data, what a reward is measured against: KTO's estimate of the KL
            divergence of the policy from the reference, one for the whole step, float32 ``[1]``;
            None elsewhere.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    answer_ids: Tensor
    cu_seqlens: Tensor = field(metadata=_ON_HOST)
    last_places: Tensor
    source_ids: Tensor
    chosen: Tensor
    rejected: Tensor
    weights: Tensor
    margins: Tensor
    desirable: Tensor | None = None
    ref_logps: Tensor | None = None
    baseline: Tensor | None = None

    @property
    def num_answers(self) -> int:
        """How many answers the row holds."""
        return self.last_places.size(0)


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
