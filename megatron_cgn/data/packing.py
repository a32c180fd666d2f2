"""First-fit-decreasing bin packing of lengths, exact and vectorised.

Johnson 1973, "Near-optimal bin packing algorithms": the longest first, each into the first bin
with room for it. Never more than 11/9 of the fewest bins, and on lengths such as conversations'
next to none wasted.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Packs:
    """Which items share a bin."""

    items: npt.NDArray[np.int64]
    """Places of the items, bin by bin, int64 ``[N]``."""
    bounds: npt.NDArray[np.int64]
    """Where each bin starts in ``items``, and the end, int64 ``[bins + 1]``."""

    def __len__(self) -> int:
        """Number of bins."""
        return len(self.bounds) - 1


def first_fit_decreasing(lengths: Lengths, *, capacity: int) -> Packs:
    """Pack items into as few bins as first-fit-decreasing does.

    Items of one length are placed at once: in the order of the bins, each takes as many as fit,
    which is what placing them one by one gives. So the time is distinct lengths times bins.

    Args:
        lengths: Of the items, at least 1 and at most ``capacity``, integers ``[N]``.
        capacity: Of a bin.

    Returns:
        The bins. Items of one length are in their order, and within a bin the longest first.
    """
    assert not len(lengths) or 0 < lengths.min() <= lengths.max() <= capacity
    # By length, the longest first, and stable, so that nothing is left to the sorting algorithm.
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    ordered = lengths[order].astype(np.int64)
    # Two items of more than half a bin never share one: these open bins one by one.
    alone = int(np.searchsorted(-2 * ordered, -capacity, side="left"))
    bins = np.empty(len(lengths), dtype=np.int64)
    bins[:alone] = np.arange(alone)
    room = np.empty(max(1, len(lengths)), dtype=np.int64)
    room[:alone] = capacity - ordered[:alone]
    used, begin = alone, alone
    while begin < len(ordered):
        length = int(ordered[begin])
        end = int(np.searchsorted(-ordered, -length, side="right"))
        used = _place(bins[begin:end], room, length=length, used=used, capacity=capacity)
        begin = end
    by_bin = np.argsort(bins, kind="stable")
    counts = np.bincount(bins, minlength=used) if len(bins) else np.zeros(0, dtype=np.int64)
    return Packs(items=order[by_bin], bounds=np.concatenate(([0], np.cumsum(counts))))


def _place(
    bins: npt.NDArray[np.int64],
    room: npt.NDArray[np.int64],
    *,
    length: int,
    used: int,
    capacity: int,
) -> int:
    """Place ``len(bins)`` items of one length: fill in their bins, and return how many are used."""
    fit = room[:used] // length
    before = np.cumsum(fit) - fit
    taken = np.minimum(fit, np.maximum(0, len(bins) - before))
    room[:used] -= taken * length
    placed = int(taken.sum())
    bins[:placed] = np.repeat(np.arange(used), taken)
    left = len(bins) - placed
    each = capacity // length
    opened = -(-left // each)
    bins[placed:] = used + np.arange(left) // each
    room[used : used + opened] = capacity - each * length
    if opened and left % each:
        room[used + opened - 1] = capacity - (left % each) * length
    return used + opened
