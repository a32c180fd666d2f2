"""In which order conversations are read, and which share a sequence.

A *pool* is a set of conversations that are read equally often: an epoch of it is every
conversation once, in a permutation of its own, and its epochs follow one another without end.
Several pools with shares are merged: a conversation's *time* is the tokens its pool has given up
to its middle over the pool's share, and conversations are drawn by time. So at any time each pool
has given its share of the tokens, but for less than one conversation, and none is skipped or
repeated.

The merged stream is cut into *windows*, of at most 65,536 conversations, and where an epoch ends.
A window is packed by itself, and its packs are shuffled: so epochs do not mix. Nothing here
depends on how long the run is or on how many ranks read: a longer run begins as the shorter one.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.packing import Packs, first_fit_decreasing

VERSION = 1
"""Changes with every change of the order, so that caches of another are not read."""
WINDOW = 1 << 16
"""Most conversations of a window."""

type Numbers = npt.NDArray[np.int64]
type Drawn = tuple[npt.NDArray[np.float64], Numbers]
"""Times and conversations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationPool:
    """Conversations that are read equally often."""

    identity: str
    """Stands for their content."""
    conversations: Numbers
    """Their numbers, int64 ``[N]``, N at least 1: they decide nothing, their order does."""
    lengths: npt.NDArray[np.int32]
    """Tokens of each, at least 1, int32 ``[N]``."""
    share: Fraction
    """Share of the tokens that are read."""

    def stream(self, seed: int) -> Iterator[Drawn]:
        """Draw without end, some epochs at a time."""
        rate = float(1 / self.share) / 2
        epochs = -(-WINDOW // len(self.conversations))
        total = int(self.lengths.sum(dtype=np.int64))
        for block in itertools.count():
            first = block * epochs
            order = _permutations(
                epochs, len(self.lengths), f"{seed}/{self.identity}/{block}"
            ).ravel()
            lengths = self.lengths[order].astype(np.int64)
            middles = 2 * (first * total + np.cumsum(lengths)) - lengths
            yield middles.astype(np.float64) * rate, self.conversations[order]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Some consecutive conversations of the stream."""

    epoch: int
    """Epochs that were over before it."""
    times: npt.NDArray[np.float64]
    """When each was drawn, float64 ``[N]``."""
    conversations: Numbers
    """Their numbers, int64 ``[N]``."""


def windows(
    pools: Sequence[ConversationPool], *, seed: int, epoch: float, size: int = WINDOW
) -> Iterator[Window]:
    """Cut the merged stream into windows, without end.

    Args:
        pools: At least one; their shares add up to 1.
        seed: Seed of the order.
        epoch: Time of an epoch of what the run counts epochs of.
        size: Most conversations of a window.

    Yields:
        Windows, none empty.
    """
    times, conversations = np.empty(0), np.empty(0, dtype=np.int64)
    number = 0
    for more_times, more in _merged(pools, seed):
        times, conversations = np.append(times, more_times), np.append(conversations, more)
        while True:
            # What is drawn behind the epoch's end is not of its windows.
            end = int(np.searchsorted(times, (number + 1) * epoch))
            if end < size and end == len(times):
                break
            take = min(end, size)
            if take:
                yield Window(epoch=number, times=times[:take], conversations=conversations[:take])
            times, conversations = times[take:], conversations[take:]
            number += end < size
    raise AssertionError("a stream has no end")


def _merged(pools: Sequence[ConversationPool], seed: int) -> Iterator[Drawn]:
    """Put the pools' streams together by time."""
    streams = [pool.stream(seed) for pool in pools]
    waiting = [next(stream) for stream in streams]
    while True:
        # Up to here every pool is known.
        horizon = min(times[-1] for times, _ in waiting)
        cuts = [int(np.searchsorted(times, horizon, side="right")) for times, _ in waiting]
        times = np.concatenate([t[:cut] for (t, _), cut in zip(waiting, cuts, strict=True)])
        drawn = np.concatenate([c[:cut] for (_, c), cut in zip(waiting, cuts, strict=True)])
        order = np.argsort(times, kind="stable")
        yield times[order], drawn[order]
        for place, cut in enumerate(cuts):
            rest_times, rest = waiting[place][0][cut:], waiting[place][1][cut:]
            if not len(rest):
                rest_times, rest = next(streams[place])
            waiting[place] = rest_times, rest


def pack_window(
    lengths: npt.NDArray[np.int32], *, seq_length: int, packing: bool, name: str
) -> Packs:
    """Say which conversations of a window share a sequence, and in which order these come.

    Args:
        lengths: Of the window's conversations, in its order.
        seq_length: Most tokens of a sequence.
        packing: Whether conversations share sequences.
        name: Stands for the window: decides the order of its packs.

    Returns:
        Packs of places in the window.
    """
    if not packing:
        return Packs(items=np.arange(len(lengths)), bounds=np.arange(len(lengths) + 1))
    packs = first_fit_decreasing(lengths, capacity=seq_length)
    order = permutation(len(packs), f"{name}/packs")
    sizes = np.diff(packs.bounds)[order]
    bounds = np.concatenate(([0], np.cumsum(sizes)))
    # Where each item lies among those of the unshuffled packs.
    places = np.arange(len(packs.items)) - np.repeat(bounds[:-1] - packs.bounds[order], sizes)
    return Packs(items=packs.items[places], bounds=bounds)


def permutation(size: int, name: str) -> Numbers:
    """The numbers below ``size`` in an order that only ``name`` decides."""
    order: Numbers = _permutations(1, size, name)[0]
    return order


def _permutations(count: int, size: int, name: str) -> Numbers:
    """Several permutations, int64 ``[count, size]``.

    NumPy keeps raw bits the same over its versions, unlike permutations, and so does a stable
    sort.
    """
    key = hashlib.blake2b(f"{VERSION}/{name}".encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count * size)
    order: Numbers = np.argsort(bits.reshape(count, size), axis=1, kind="stable")
    return order
