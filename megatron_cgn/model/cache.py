"""Keys and values of sequences that are being generated, and the rows that fill and read them.

A *slot* holds one sequence. Sequences that are being continued lie in the first slots without
gaps, so that attention reads views: whoever ends a sequence moves the last one into its slot.
Which sequence is where is known to `rollout/`; nothing here samples.

Shapes: n query heads and g key/value heads of this tensor-parallel rank, d head
width, T tokens of a row, B sequences that are continued by one token each.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_cgn.model.packing import PackedRow, Row, span_of
from megatron_cgn.parallel import cpu

_KEYS_MULTIPLE = 16
"""Keys read are a multiple of this: kernels want aligned masks, and few different shapes."""


class KeyValueCache:
    """The keys and values of this rank's layers, ``[slots, g, capacity, d]`` each.

    A layer's are allocated when it first writes. They start as zeros, because places behind a
    sequence's end are read and multiplied by zero, which a NaN of fresh memory would survive.

    Args:
        slots: Sequences held at once.
        capacity: Longest of them, in tokens.
    """

    def __init__(self, *, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = -(-capacity // _KEYS_MULTIPLE) * _KEYS_MULTIPLE
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer.

        Args:
            number: The layer's number.
            like: Keys ``[..., g, d]``, for shape, type and device.

        Returns:
            Both ``[slots, g, capacity, d]``.
        """
        if number not in self._layers:
            shape = (self.slots, like.size(-2), self.capacity, like.size(-1))
            self._layers[number] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[number]

    def move(self, source: int, target: int, *, length: int) -> None:
        """Copy the first `length` tokens of a slot over another's."""
        for store in itertools.chain.from_iterable(self._layers.values()):
            store[target, :, :length] = store[source, :, :length]


@dataclass(kw_only=True)
class PrefillRow(PackedRow):
    """A packed row of prompts, whose keys and values are kept.

    Attributes:
        cache: Where they are kept.
        slots: Slot of each sequence of the row. Sequences behind those are padding.
    """

    cache: KeyValueCache
    slots: list[int]

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store a layer's keys and values, both ``[T, 1, g, d]``."""
        keys, values = self.cache.layer(layer, key)
        start = 0
        for slot, length in zip(self.slots, self.spans[0].key_lengths, strict=False):
            here = slice(start, start + length)
            keys[slot, :, :length] = key[here, 0].transpose(0, 1)
            values[slot, :, :length] = value[here, 0].transpose(0, 1)
            start += length


@dataclass(kw_only=True)
class DecodeRow(Row):
    """A row of one token of each sequence in the cache's first B slots, then padding.

    Attributes:
        cache: Holds the tokens before.
        slots: Numbers of the slots, int64 ``[B]``.
        places: Places of the tokens in their sequences, int64 ``[B]``.
        visible: Which keys a token sees, bool ``[B, 1, 1, K]``.
    """

    cache: KeyValueCache
    slots: Tensor
    places: Tensor
    visible: Tensor

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, both ``[T, 1, g, d]``.

        Returns:
            All that the tokens may see, ``[B, g, K, d]`` each.
        """
        keys, values = self.cache.layer(layer, key)
        count, seen = self.visible.size(0), self.visible.size(-1)
        keys[self.slots, :, self.places] = key[:count, 0]
        values[self.slots, :, self.places] = value[:count, 0]
        return keys[:count, :, :seen], values[:count, :, :seen]


def prefill_row(
    cache: KeyValueCache, lengths: list[int], slots: list[int], *, multiple: int = 1
) -> PrefillRow:
    """Lay prompts end to end.

    Args:
        cache: Where their keys and values are kept.
        lengths: Tokens of each prompt.
        slots: Slot of each prompt.
        multiple: The row is padded to a multiple of this.

    Returns:
        What the model is called with, on the model's device.
    """
    padding = -sum(lengths) % multiple
    sequences = [*lengths, padding] if padding else lengths
    positions = torch.cat([torch.arange(length) for length in sequences])
    bounds = [0, *itertools.accumulate(sequences)]
    return PrefillRow(
        qkv_format="sbhd",
        position_ids=positions[None].to(cpu.device()),
        spans=[span_of(bounds, 0, bounds[-1], cpu.device())],
        cache=cache,
        slots=slots,
    )


def decode_row(cache: KeyValueCache, lengths: list[int], *, multiple: int = 1) -> DecodeRow:
    """One more token of each sequence in the first slots.

    Args:
        cache: Holds the tokens before.
        lengths: How many these are, of each sequence.
        multiple: The row is padded to a multiple of this.

    Returns:
        What the model is called with, on the model's device.
    """
    seen = -(-(max(lengths) + 1) // _KEYS_MULTIPLE) * _KEYS_MULTIPLE
    device = cpu.device()
    places = torch.tensor(lengths)
    positions = F.pad(places, (0, -len(lengths) % multiple))
    visible = torch.arange(seen) <= places[:, None]
    return DecodeRow(
        qkv_format="sbhd",
        position_ids=positions[None].to(device),
        cache=cache,
        slots=torch.arange(len(lengths)).to(device),
        places=places.to(device),
        visible=visible[:, None, None].to(device),
    )


def attend_cached(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, *, scale: float | None
) -> Tensor:
    """Attention of one token of each sequence to the keys that were kept of it.

    Args:
        query: ``[T, 1, n, d]``; the first B are the sequences', what follows is padding.
        key: ``[B, g, k, d]``.
        value: As `key`.
        visible: Which keys a token sees, bool ``[B, 1, 1, k]``.
        scale: Factor of the scores; None for ``1 / sqrt(d)``.

    Returns:
        ``[T, 1, n, d]``; zeros where there is padding.
    """
    count, groups = key.shape[:2]
    # The heads that share keys are taken for queries of one head: nothing need be repeated.
    grouped = query[:count, 0].view(count, groups, -1, query.size(-1))
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=visible, scale=scale)
    return F.pad(out.flatten(1, 2)[:, None], (0, 0, 0, 0, 0, 0, 0, len(query) - count))
