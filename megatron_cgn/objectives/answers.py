"""What every loss of whole answers needs: their log-probabilities, lengths, and weighted means."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.objectives.base import ForwardArgs, Ratio


def likelihood_args(batch: PreferenceBatch) -> ForwardArgs:
    """Ask the model for the per-token negative log-likelihood of what counts.

    Args:
        batch: Answers in one row.

    Returns:
        Arguments with labels.
    """
    return ForwardArgs(
        tokens=batch.tokens,
        position_ids=batch.position_ids,
        labels=batch.labels,
        cu_seqlens=batch.cu_seqlens,
        counted=batch.loss_mask > 0,
    )


def answer_logps(output: Tensor, batch: PreferenceBatch) -> Tensor:
    r"""Log-probability of each answer, :math:`\sum_{i \in y} \log \pi(y_i|x, y_{<i})`.

    Args:
        output: Per-token negative log-likelihood of the whole row, ``[1, T]``.
        batch: The row.

    Returns:
        Sums over what counts, float32 ``[A]``; 0 for an answer of which nothing counts.
    """
    # Not output * mask: an infinite loss of a token that does not count would become NaN.
    # In FP64 the order of thousands of summands, which packing and the device decide, is lost in
    # the rounding to FP32: the same tokens give the same sum, and equal models a margin of 0.
    logps = torch.where(batch.loss_mask > 0, -output.double(), 0.0)
    return _sum_by_answer(logps, batch).float()


def counted_lengths(batch: PreferenceBatch) -> Tensor:
    """How many tokens of each answer count, int64 ``[A]``."""
    return _sum_by_answer((batch.loss_mask > 0).long(), batch)


@torch.no_grad()
def weighted_means(
    values: Mapping[str, tuple[Tensor, Tensor]], *, sources: Tensor, source_names: Sequence[str]
) -> dict[str, Ratio]:
    """Means to report, of everything and of each source.

    Args:
        values: By name, values and what each counts, ``[N]`` each. A value that counts 0 may be
            anything. ``loss`` is of sources alone: that of everything the engine reports itself.
        sources: Place in `source_names` of the source that each value is from, int64 ``[N]``.
        source_names: Sources to report one by one.

    Returns:
        Weighted sums and sums of weights by name, and by ``train/<source>/<name>``.
    """
    weights = torch.stack([weight for _, weight in values.values()]).float()
    table = torch.stack([value for value, _ in values.values()]).float() * weights
    table = torch.where(weights > 0, table, 0.0)  # MN: names, values
    found = _ratios(values, table.sum(1), weights.sum(1))
    found.pop("loss", None)
    for place, source in enumerate(source_names):
        mine = sources == place
        sums, counts = (torch.where(mine, t, 0.0).sum(1) for t in (table, weights))
        found |= _ratios((f"train/{source}/{name}" for name in values), sums, counts)
    return found


def _ratios(names: Iterable[str], sums: Tensor, counts: Tensor) -> dict[str, Ratio]:
    return {n: Ratio(total, count) for n, total, count in zip(names, sums, counts, strict=True)}


def _sum_by_answer(values: Tensor, batch: PreferenceBatch) -> Tensor:
    """Sums ``[A]`` of what is given place by place, ``[1, T]``; padding belongs to no answer."""
    sums = torch.zeros(batch.num_answers + 1, dtype=values.dtype, device=values.device)
    return sums.index_add(0, batch.answer_ids.flatten(), values.flatten())[:-1]
