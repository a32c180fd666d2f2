"""The sequences of a run on disk: which conversations each holds.

::

    <cache>/packs-<key>/conversations.bin, bounds.bin, facts.json

Conversations are numbered over all files of a run. The key is a hash of all that decides the
order and of the length of the run.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.folders import new_folder, wait_for_folder
from megatron_cgn.data.packing import Packs
from megatron_cgn.data.sft_order import (
    VERSION,
    WINDOW,
    ConversationPool,
    pack_window,
    permutation,
    windows,
)
from megatron_cgn.errors import DataError

_NUMBER = np.dtype("<i4")
"""Two thousand million conversations are enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOrder:
    """All that decides which conversations are read when."""

    pools: tuple[ConversationPool, ...]
    """What is read."""
    seed: int
    """Seed of the order."""
    seq_length: int
    """Most tokens of a sequence."""
    packing: bool
    """Whether conversations share sequences."""
    epoch: float
    """Time of an epoch; see `sft_order.windows`."""

    def key(self) -> str:
        """Hash of it."""
        facts = [
            VERSION,
            self.seed,
            self.seq_length,
            self.packing,
            self.epoch.hex(),
            [[pool.identity, str(pool.share)] for pool in self.pools],
        ]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class PackList:
    """Sequences, mapped."""

    conversations: npt.NDArray[np.integer[Any]]
    """Numbers of the conversations, sequence by sequence."""
    bounds: npt.NDArray[np.int64]
    """Where each sequence begins in them, and the end, int64 ``[sequences + 1]``."""

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.bounds) - 1

    def __getitem__(self, sequence: int) -> list[int]:
        """The conversations of a sequence."""
        begin, end = self.bounds[sequence : sequence + 2].tolist()
        numbers: list[int] = self.conversations[begin:end].tolist()
        return numbers

    def between(self, start: int, stop: int) -> npt.NDArray[np.integer[Any]]:
        """The conversations of consecutive sequences."""
        return self.conversations[int(self.bounds[start]) : int(self.bounds[stop])]


def build_packs(
    order: PackOrder,
    lengths: npt.NDArray[np.int32],
    *,
    sequences: int | None,
    epochs: Fraction | None,
    numbering: str,
    cache: Path,
) -> Path:
    """Write the sequences of a run, unless that has been done.

    Args:
        order: The order.
        lengths: Tokens of every conversation by number, int32 ``[N]``.
        sequences: How many sequences the run reads; or
        epochs: how many epochs. A whole number reads each conversation of a single pool exactly
            as often.
        numbering: Stands for how the conversations are numbered.
        cache: Where the list belongs.

    Returns:
        Its folder.

    Raises:
        DataError: If the cache cannot be written.
    """
    length = f"{sequences} sequences" if epochs is None else f"{epochs} epochs"
    packed = _sequences(order, lengths)
    if epochs is None:
        limited = _first(packed, sequences)
    else:
        limited = _epochs(packed, lengths, order, epochs)
    return _build(f"{order.key()}/{length}/{numbering}", limited, cache)


def build_held_out(
    numbers: npt.NDArray[np.int64],
    identity: str,
    *,
    lengths: npt.NDArray[np.int32],
    seq_length: int,
    packing: bool,
    numbering: str,
    cache: Path,
) -> Path:
    """Write the sequences that hold held-out conversations, each once, unless that has been done.

    Their order is the same for every seed, so that the first of them are an equal sample.

    Args:
        numbers: The conversations.
        identity: Stands for their content.
        lengths: As for `build_packs`.
        seq_length: Most tokens of a sequence.
        packing: Whether conversations share sequences.
        numbering: As for `build_packs`.
        cache: Where the list belongs.

    Returns:
        Its folder.

    Raises:
        DataError: If the cache cannot be written.
    """
    name = f"{VERSION}/{identity}/{seq_length}/{packing}"

    def packed() -> Iterator[Packs]:
        shuffled = numbers[permutation(len(numbers), name)]
        for begin in range(0, len(shuffled), WINDOW):
            part = shuffled[begin : begin + WINDOW]
            packs = pack_window(
                lengths[part], seq_length=seq_length, packing=packing, name=f"{name}/{begin}"
            )
            yield Packs(part[packs.items], packs.bounds)

    return _build(f"{name}/{numbering}", packed(), cache)


def _build(name: str, packed: Iterator[Packs], cache: Path) -> Path:
    digest = hashlib.blake2b(name.encode(), digest_size=12).hexdigest()
    folder = cache / f"packs-{digest}"
    if folder.is_dir():
        return folder
    try:
        with new_folder(folder) as temporary:
            _write(packed, temporary)
    except OSError as error:
        raise DataError(
            f"{cache}: cannot write the order of the conversations ({error.strerror or error}). "
            "Make room there, or set data.cache_dir to a directory that can be written."
        ) from error
    return folder


def open_packs(folder: Path) -> PackList:
    """Map the sequences of a run.

    Raises:
        DataError: If they do not become visible or are damaged.
    """
    wait_for_folder(folder)
    try:
        facts = json.loads((folder / "facts.json").read_text("utf-8"))
        packs = PackList(
            conversations=np.memmap(folder / "conversations.bin", dtype=_NUMBER, mode="r").view(
                np.ndarray
            ),
            bounds=np.memmap(folder / "bounds.bin", dtype="<i8", mode="r").view(np.ndarray),
        )
        if (len(packs), len(packs.conversations)) != (facts["sequences"], facts["conversations"]):
            raise ValueError("its files have other sizes than when it was written")
        return packs
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: cannot read the order of the conversations ({error}). Delete this folder; "
            "it is built again."
        ) from error


def _write(packed: Iterator[Packs], folder: Path) -> None:
    total = count = 0
    with (
        (folder / "conversations.bin").open("wb") as items,
        (folder / "bounds.bin").open("wb") as bounds,
    ):
        bounds.write(np.zeros(1, dtype="<i8").tobytes())
        for packs in packed:
            items.write(packs.items.astype(_NUMBER).tobytes())
            bounds.write((packs.bounds[1:] + total).astype("<i8").tobytes())
            total += len(packs.items)
            count += len(packs)
    facts = {"sequences": count, "conversations": total}
    (folder / "facts.json").write_text(json.dumps(facts), "utf-8")


type _Packed = tuple[int, npt.NDArray[np.float64], Packs]
"""Epochs that are over, when each conversation of a window was drawn, and the window's packs."""


def _sequences(order: PackOrder, lengths: npt.NDArray[np.int32]) -> Iterator[_Packed]:
    """The sequences window by window, without end; items are conversations' numbers."""
    key = order.key()
    stream = windows(order.pools, seed=order.seed, epoch=order.epoch)
    for number, window in enumerate(stream):
        packs = pack_window(
            lengths[window.conversations],
            seq_length=order.seq_length,
            packing=order.packing,
            name=f"{key}/{number}",
        )
        times = window.times[packs.items]
        yield window.epoch, times, Packs(window.conversations[packs.items], packs.bounds)


def _first(packed: Iterator[_Packed], sequences: int | None) -> Iterator[Packs]:
    """The first sequences."""
    assert sequences is not None, "a run has a length"
    left = sequences
    for _, _, packs in packed:
        yield _beginning(packs, min(left, len(packs)))
        left -= len(packs)
        if left <= 0:
            return


def _epochs(
    packed: Iterator[_Packed],
    lengths: npt.NDArray[np.int32],
    order: PackOrder,
    epochs: Fraction,
) -> Iterator[Packs]:
    """The sequences of so many epochs; of the window in which they end, as large a part."""
    end = float(epochs) * order.epoch
    taken = 0
    for epoch, times, packs in packed:
        if epoch >= epochs:
            break
        sizes = lengths[packs.items].astype(np.int64)
        inside = int(sizes[times < end].sum())
        before = np.cumsum(sizes)[packs.bounds[1:] - 1]  # tokens up to the end of each sequence
        number = int(np.searchsorted(before, inside)) + 1 if inside else 0
        if epoch + 1 <= epochs:
            number = len(packs)
        if not number and taken:
            break
        number = max(1, number)
        taken += number
        yield _beginning(packs, number)
        if number < len(packs):
            break
    else:
        raise AssertionError("a stream has no end")


def _beginning(packs: Packs, number: int) -> Packs:
    return Packs(packs.items[: packs.bounds[number]], packs.bounds[: number + 1])
