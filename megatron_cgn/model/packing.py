"""Rows that hold several sequences: which tokens see which.

A packed row is ``[1, T]``; each of its sequences attends to itself alone. Nothing here is as large
as T × T: a mask is the places where sequences start. Who lays sequences end to end is not known
here; see `TokenBatch.cu_seqlens`.
"""

import bisect
import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_cgn.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive queries of a row, and the keys of their own sequences up to the last of them.

    The last query of each sequence sees the last of its keys (a lower-right causal mask).

    Attributes:
        first_key: Place in the row of the first key.
        query_lengths: Queries of each sequence.
        key_lengths: Keys of each sequence; only the first sequence may have more than queries.
        query_starts: Sums of `query_lengths` from 0 on, int32 ``[N + 1]`` on the device.
        key_starts: The same of `key_lengths`.
    """

    first_key: int
    query_lengths: list[int]
    key_lengths: list[int]
    query_starts: Tensor
    key_starts: Tensor

    @property
    def keys(self) -> slice:
        """Places in the row of all keys."""
        return slice(self.first_key, self.first_key + sum(self.key_lengths))


@dataclass(kw_only=True)
class Row(PackedSeqParams):
    """What the native layers are told of a row of several sequences.

    Megatron hands it on to each layer. Its format is not ``thd``, for which Megatron would turn
    queries and keys sequence by sequence, waiting for the device at every layer, and would expect
    each sequence to be cut over the context-parallel group by itself.

    Attributes:
        position_ids: RoPE positions of this rank's tokens, int64 ``[1, T / cp]``.
    """

    position_ids: Tensor


@dataclass(kw_only=True)
class PackedRow(Row):
    """A row of whole sequences.

    Attributes:
        spans: One for each part of the row that this rank holds, in order.
    """

    spans: list[Span]


def pack_row(
    cu_seqlens: Tensor,
    *,
    position_ids: Tensor,
    backend: Literal["native", "te"],
    cp_rank: int = 0,
    cp_size: int = 1,
) -> PackedSeqParams:
    """Say which tokens of a row see which, in the terms of the model's layers.

    Args:
        cu_seqlens: Starts of the sequences of the whole row and its end, int32 ``[N + 1]`` on the
            CPU: kernels are launched by these lengths.
        position_ids: RoPE positions of this rank's part of the row, int64 ``[1, T / cp]``, on
            the model's device. Transformer Engine does not read them: it counts from 0 in each
            sequence.
        backend: The model's layers.
        cp_rank: Rank in the context-parallel group.
        cp_size: Size of that group.

    Returns:
        What the model is called with.

    Raises:
        ConfigError: If these layers cannot.
    """
    device = position_ids.device
    bounds: list[int] = cu_seqlens.tolist()
    length = position_ids.numel() * cp_size
    assert len(position_ids) == 1, "a packed row is one row"
    assert bounds[0] == 0 and bounds[-1] == length, "cu_seqlens must cover the row"
    assert all(a < b for a, b in itertools.pairwise(bounds)), "no sequence may be empty"
    if backend == "te":
        check_packing(backend, cp_size=cp_size)
        starts = cu_seqlens.to(device, non_blocking=True)
        longest = max(b - a for a, b in itertools.pairwise(bounds))
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
    part = length // (2 * cp_size)
    places = [(0, length)]
    if cp_size > 1:  # the cut of `parallel.context`
        places = [(c * part, (c + 1) * part) for c in (cp_rank, 2 * cp_size - 1 - cp_rank)]
    spans = [span_of(bounds, start, stop, device) for start, stop in places]
    return PackedRow(qkv_format="sbhd", position_ids=position_ids, spans=spans)


def check_packing(backend: Literal["native", "te"], *, cp_size: int) -> None:
    """Refuse layers that would not keep the sequences of a row apart.

    Args:
        backend: The model's layers.
        cp_size: Size of the context-parallel group.

    Raises:
        ConfigError: If they would not.
    """
    if backend == "te" and cp_size > 1:
        raise ConfigError(
            f"parallel.context_parallel_size: {cp_size}; Transformer Engine cuts every document of "
            f"a row into {2 * cp_size} equal parts, which documents of any length do not have. Set "
            "model.backend=native, or parallel.context_parallel_size=1, or "
            "data.reset_attention_mask=false."
        )


def span_of(bounds: list[int], start: int, stop: int, device: torch.device) -> Span:
    """What the queries from `start` up to `stop` see.

    Args:
        bounds: Starts of the row's sequences and its end.
        start: First query, by its place in the row.
        stop: End of the queries.
        device: The model's.

    Returns:
        The part of the row.
    """
    first = bisect.bisect_right(bounds, start) - 1
    end = bisect.bisect_left(bounds, stop)
    sequences = list(itertools.pairwise(bounds[first : end + 1]))
    queries = [min(b, stop) - max(a, start) for a, b in sequences]
    keys = [min(b, stop) - a for a, b in sequences]
    return Span(
        first_key=bounds[first],
        query_lengths=queries,
        key_lengths=keys,
        query_starts=_starts(queries, device),
        key_starts=_starts(keys, device),
    )


def _starts(lengths: list[int], device: torch.device) -> Tensor:
    sums = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return sums.to(device, non_blocking=True)
