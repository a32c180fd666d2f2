"""Records to batches: every micro-batch is one packed row of answers."""

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.data.loader import OnceLoader, StepLoader
from megatron_cgn.data.preference_formats import Kind
from megatron_cgn.data.preference_rows import PreferenceRow, blank_preferences
from megatron_cgn.data.sft_loader import lay_out

type RefLogps = npt.NDArray[np.float32] | None
"""Log-probability of every answer of the run under the reference, float32 ``[answers]``."""


class PreferenceLoader(StepLoader[PreferenceBatch]):
    """Training rows of one data-parallel rank: as `StepLoader`, row by row.

    The last step is filled with blank sequences, which count nothing.
    """

    def __init__(
        self,
        dataset: Dataset[PreferenceRow],
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seq_length: int,
        pad_to_full: bool,
        ref_logps: RefLogps = None,
        start_sequence: int = 0,
        num_workers: int = 0,
    ) -> None:
        """Set the position; nothing is read yet.

        Args:
            dataset: Sequences in training order: `PreferenceData.train`.
            micro_batch_size: Sequences of one micro-batch on one rank.
            global_batch_size: Sequences of one step over all ranks.
            dp_rank: This rank's place in the data-parallel group.
            dp_size: Size of that group.
            seq_length: Most places of a sequence.
            pad_to_full: Whether every row has ``micro_batch_size * seq_length`` places, which
                pipeline, sequence and context parallelism need; else only as many as are used.
            ref_logps: By the number of the answer; None for batches without.
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
                lay_out_preferences,
                seq_length=seq_length,
                length=micro_batch_size * seq_length if pad_to_full else None,
                ref_logps=ref_logps,
            ),
        )


class PreferenceValidationLoader(OnceLoader[PreferenceBatch]):
    """Rows of one data-parallel rank that together hold every held-out record once."""

    def __init__(
        self,
        dataset: Dataset[PreferenceRow],
        *,
        kind: Kind,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seq_length: int,
        pad_to_full: bool,
        ref_logps: RefLogps = None,
        max_sequences: int | None = None,
        num_workers: int = 0,
    ) -> None:
        """Divide the dataset; nothing is read yet.

        Args:
            dataset: Sequences of one source: of `PreferenceData.validation`.
            kind: Of the data.
            micro_batch_size: Sequences of one micro-batch on one rank.
            dp_rank: This rank's place in the data-parallel group.
            dp_size: Size of that group.
            seq_length: As for `PreferenceLoader`.
            pad_to_full: As for `PreferenceLoader`.
            ref_logps: As for `PreferenceLoader`.
            max_sequences: Read only this many, from the start. None: all.
            num_workers: Processes that read ahead; 0 reads in this one.
        """
        super().__init__(
            dataset,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            make_blank=functools.partial(blank_preferences, kind),
            max_sequences=max_sequences,
            num_workers=num_workers,
            make_batch=functools.partial(
                lay_out_preferences,
                seq_length=seq_length,
                length=micro_batch_size * seq_length if pad_to_full else None,
                ref_logps=ref_logps,
            ),
        )


def lay_out_preferences(
    sequences: Sequence[PreferenceRow],
    *,
    seq_length: int,
    length: int | None = None,
    ref_logps: RefLogps = None,
) -> PreferenceBatch:
    """Lay sequences end to end into one packed row, and pad it.

    Args:
        sequences: Of one micro-batch, all of one kind.
        seq_length: Most places of a sequence.
        length: Places of the row; None for as many as are used, as in `sft_loader.lay_out`.
        ref_logps: By the number of the answer; None for a batch without.

    Returns:
        One row ``[1, T]`` on the CPU. Padding belongs to answer A, which is none.
    """
    row = lay_out(sequences, seq_length=seq_length, length=length)
    assert row.cu_seqlens is not None
    lengths = np.array([n for s in sequences for n in s.lengths], dtype=np.int64)
    padding = row.tokens.size(1) - int(lengths.sum())
    answers = np.concatenate([s.answers for s in sequences])
    firsts = np.cumsum([0, *(len(s.answers) for s in sequences)])
    owners = np.repeat(np.arange(len(lengths) + 1), np.append(lengths, padding))
    return PreferenceBatch(
        tokens=row.tokens,
        labels=row.labels,
        loss_mask=row.loss_mask,
        position_ids=row.position_ids,
        answer_ids=torch.from_numpy(owners)[None],
        cu_seqlens=row.cu_seqlens,
        last_places=torch.from_numpy(np.cumsum(lengths) - 1),
        source_ids=torch.tensor([n for s in sequences for n in s.sources], dtype=torch.int64),
        chosen=_shifted([s.chosen for s in sequences], firsts),
        rejected=_shifted([s.rejected for s in sequences], firsts),
        weights=torch.from_numpy(np.concatenate([s.weights for s in sequences])),
        margins=torch.from_numpy(np.concatenate([s.margins for s in sequences])),
        desirable=_labels(sequences),
        ref_logps=None if ref_logps is None else torch.from_numpy(ref_logps[answers]),
    )


def _shifted(parts: Sequence[npt.NDArray[np.int64]], by: npt.NDArray[np.int64]) -> torch.Tensor:
    """Put places together, each part counted on from what stands in front of it."""
    shifted = [part + first for part, first in zip(parts, by.tolist(), strict=False)]
    return torch.from_numpy(np.concatenate(shifted))


def _labels(sequences: Sequence[PreferenceRow]) -> torch.Tensor | None:
    labels = [s.desirable for s in sequences if s.desirable is not None]
    assert len(labels) in (0, len(sequences)), "a run reads one kind of data"
    return torch.from_numpy(np.concatenate(labels)) if labels else None
