"""Rows of answers made by hand, for the losses of preference learning."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_cgn.batch import PreferenceBatch

PADDING = 3
"""Places behind the answers of every row."""


def make_batch(
    masks: Sequence[Sequence[int]],
    *,
    pairs: Sequence[tuple[int, int]] = (),
    weights: Sequence[float] | None = None,
    margins: Sequence[float] | None = None,
    sources: Sequence[int] | None = None,
    ref_logps: Tensor | None = None,
    desirable: Tensor | None = None,
    baseline: Tensor | None = None,
) -> PreferenceBatch:
    """A row of answers.

    Args:
        masks: Of each answer, which of its places count.
        pairs: Chosen and rejected answer of each pair.
        weights: What each pair counts; 1 if None.
        margins: Of each pair; 0 if None.
        sources: Of each answer; 0 if None.
        ref_logps: See `PreferenceBatch`.
        desirable: Likewise.
        baseline: Likewise.

    Returns:
        The row, with padding behind.
    """
    lengths = [len(mask) for mask in masks]
    ends = torch.tensor([0, *lengths, PADDING]).cumsum(0)
    total, chosen_and_rejected = (
        int(ends[-1]),
        torch.tensor(list(pairs), dtype=torch.long).view(-1, 2),
    )
    ids = torch.arange(total)
    answers = torch.arange(len(masks) + 1).repeat_interleave(torch.tensor([*lengths, PADDING]))
    return PreferenceBatch(
        tokens=ids[None] % 7,
        labels=(ids[None] + 1) % 7,
        loss_mask=torch.tensor([*(float(m) for mask in masks for m in mask), *[0.0] * PADDING])[
            None
        ],
        position_ids=(ids - ends[answers])[None],
        answer_ids=answers[None],
        cu_seqlens=ends.int(),
        last_places=ends[1:-1] - 1,
        source_ids=torch.tensor(
            [0] * len(masks) if sources is None else list(sources), dtype=torch.long
        ),
        chosen=chosen_and_rejected[:, 0],
        rejected=chosen_and_rejected[:, 1],
        weights=torch.tensor([1.0] * len(pairs) if weights is None else weights),
        margins=torch.tensor([0.0] * len(pairs) if margins is None else margins),
        ref_logps=ref_logps,
        desirable=desirable,
        baseline=baseline,
    )


def make_row(values: Sequence[Tensor], *, padding: float = math.inf) -> Tensor:
    """What a model says of a row: values of each answer's places, and of padding whatever it is."""
    return torch.cat([*values, torch.full((PADDING,), padding)])[None]
