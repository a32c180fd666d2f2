"""Conversations to batches: every micro-batch is one packed row.

Sequences are laid end to end, whatever they hold: a pack of conversations, one conversation, or
nothing. So packing changes how many conversations a row has, and nothing else.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from megatron_cgn.batch import TokenBatch
from megatron_cgn.data.loader import OnceLoader, StepLoader

ROW_MULTIPLE = 8
"""Rows are padded to a multiple of this: matrix multiplications are slow at odd sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationRow:
    """Conversations end to end: T places. A blank sequence has none."""

    tokens: npt.NDArray[np.int64]
    """Ids to read, int64 ``[T]``."""
    labels: npt.NDArray[np.int64]
    """Ids to predict, int64 ``[T]``."""
    loss_mask: npt.NDArray[np.bool_]
    """Whether a label counts, bool ``[T]``."""
    lengths: tuple[int, ...]
    """Places of each conversation."""
    sources: tuple[int, ...]
    """Place among the run's sources of each conversation's."""


class SftLoader(StepLoader[TokenBatch]):
    """Training rows of one data-parallel rank: as `StepLoader`, row by row.

    The last step is filled with blank sequences, which count nothing.
    """

    def __init__(
        self,
        dataset: Dataset[ConversationRow],
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seq_length: int,
        pad_to_full: bool,
        start_sequence: int = 0,
        num_workers: int = 0,
    ) -> None:
        """Set the position; nothing is read yet.

        Args:
            dataset: Sequences in training order: `SftData.train`.
            micro_batch_size: Sequences of one micro-batch on one rank.
            global_batch_size: Sequences of one step over all ranks.
            dp_rank: This rank's place in the data-parallel group.
            dp_size: Size of that group.
            seq_length: Most tokens of a sequence.
            pad_to_full: Whether every row has ``micro_batch_size * seq_length`` places, which
                pipeline, sequence and context parallelism need; else only as many as are used.
            start_sequence: Sequences consumed already.
            num_workers: Processes that read ahead; 0 reads in this one. The order is the same.

        Raises:
            ConfigError: If the global batch does not divide into micro-batches.
        """
        super().__init__(
            dataset,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            start_sequence=start_sequence,
            num_workers=num_workers,
            make_batch=functools.partial(
                lay_out,
                seq_length=seq_length,
                length=micro_batch_size * seq_length if pad_to_full else None,
            ),
        )


class SftValidationLoader(OnceLoader[TokenBatch]):
    """Rows of one data-parallel rank that together hold every held-out conversation once."""

    def __init__(
        self,
        dataset: Dataset[ConversationRow],
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seq_length: int,
        pad_to_full: bool,
        max_sequences: int | None = None,
        num_workers: int = 0,
    ) -> None:
        """Divide the dataset; nothing is read yet.

        Args:
            dataset: Sequences of one source: of `SftData.validation`.
            micro_batch_size: Sequences of one micro-batch on one rank.
            dp_rank: This rank's place in the data-parallel group.
            dp_size: Size of that group.
            seq_length: As for `SftLoader`.
            pad_to_full: As for `SftLoader`.
            max_sequences: Read only this many, from the start. None: all.
            num_workers: Processes that read ahead; 0 reads in this one.
        """
        super().__init__(
            dataset,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            make_blank=blank,
            max_sequences=max_sequences,
            num_workers=num_workers,
            make_batch=functools.partial(
                lay_out,
                seq_length=seq_length,
                length=micro_batch_size * seq_length if pad_to_full else None,
            ),
        )


def blank() -> ConversationRow:
    """A sequence without conversations."""
    nothing = np.empty(0, dtype=np.int64)
    return ConversationRow(
        tokens=nothing, labels=nothing, loss_mask=nothing.astype(np.bool_), lengths=(), sources=()
    )


def lay_out(
    sequences: Sequence[ConversationRow], *, seq_length: int, length: int | None = None
) -> TokenBatch:
    """Lay sequences end to end into one packed row, and pad it.

    Padding is sequences of its own, none longer than ``seq_length``, whose labels do not count.

    Args:
        sequences: Of one micro-batch.
        seq_length: Most tokens of a sequence.
        length: Places of the row; None for as many as are used, rounded up to a multiple of
            `ROW_MULTIPLE`, at least one.

    Returns:
        One row ``[1, T]`` with ``cu_seqlens``, on the CPU.
    """
    lengths = [places for sequence in sequences for places in sequence.lengths]
    used = sum(lengths)
    total = length or max(1, -(-used // ROW_MULTIPLE)) * ROW_MULTIPLE
    assert used <= total, (used, total)
    padding = total - used
    parts = [seq_length] * (padding // seq_length) + [padding % seq_length] * bool(
        padding % seq_length
    )
    all_lengths = np.array(lengths + parts, dtype=np.int64)
    starts = np.concatenate(([0], np.cumsum(all_lengths)))
    sources = [source for sequence in sequences for source in sequence.sources]
    sources += [0] * len(parts)
    return TokenBatch(
        tokens=_row([s.tokens for s in sequences], total, np.int64),
        labels=_row([s.labels for s in sequences], total, np.int64),
        loss_mask=_row([s.loss_mask for s in sequences], total, np.float32),
        position_ids=torch.from_numpy(np.arange(total) - np.repeat(starts[:-1], all_lengths))[None],
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        source_ids=torch.from_numpy(np.repeat(np.array(sources, dtype=np.int64), all_lengths))[
            None
        ],
    )


def _row(parts: list[npt.NDArray[Any]], total: int, dtype: Any) -> torch.Tensor:
    """Put parts into a row of zeros, ``[1, total]``."""
    row = np.zeros((1, total), dtype=dtype)
    begin = 0
    for part in parts:
        row[0, begin : begin + len(part)] = part
        begin += len(part)
    return torch.from_numpy(row)
