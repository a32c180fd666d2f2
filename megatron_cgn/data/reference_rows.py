"""Answers that are scored, packed into rows over data-parallel ranks.

Rows hold as many places as a micro-batch of training: what can be trained on can be scored, and
short answers are not scored one by one. Which answers share a row changes no score.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from megatron_cgn.batch import TokenBatch
from megatron_cgn.data.packing import first_fit_decreasing
from megatron_cgn.data.reference import Scored
from megatron_cgn.data.sft_loader import blank, lay_out

type Numbers = npt.NDArray[np.int64]


class ScoringRows:
    """Rows that hold answers once each; every rank has as many, blank ones at the end.

    Attributes:
        numbers: The answers row by row, int64 ``[n]``: round by round, and in each rank by rank.
    """

    def __init__(
        self,
        scored: Scored,
        numbers: Numbers,
        *,
        micro_batch_size: int,
        seq_length: int,
        pad_to_full: bool,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        """Pack answers; nothing is read yet.

        Args:
            scored: All answers.
            numbers: Those to score, int64 ``[n]``; one given twice is in two places.
            micro_batch_size: Sequences of one micro-batch on one rank.
            seq_length: Most places of a sequence, and of an answer.
            pad_to_full: Whether every row has ``micro_batch_size * seq_length`` places; see
                `SftLoader`.
            dp_rank: This rank's place in the data-parallel group.
            dp_size: Size of that group.
        """
        self._scored = scored
        self._capacity = micro_batch_size * seq_length
        self._seq_length = seq_length
        self._pad_to_full = pad_to_full
        self._dp_rank, self._dp_size = dp_rank, dp_size
        packs = first_fit_decreasing(scored.lengths[numbers], capacity=self._capacity)
        self.numbers: Numbers = numbers[packs.items]
        self._bounds = packs.bounds

    def __len__(self) -> int:
        """Rows of this rank: equal on every rank."""
        return -(-(len(self._bounds) - 1) // self._dp_size)

    def __iter__(self) -> Iterator[TokenBatch]:
        """This rank's rows ``[1, T]``, on the CPU."""
        length = self._capacity if self._pad_to_full else None
        for place in range(len(self)):
            mine = self.numbers[self.mine(place)].tolist()
            row = self._scored.row(mine) if mine else blank()
            yield lay_out([row], seq_length=self._seq_length, length=length)

    def mine(self, place: int) -> slice:
        """Where in `numbers` the answers of this rank's row are; empty for a blank row."""
        row = place * self._dp_size + self._dp_rank
        return slice(self._begin(row), self._begin(row + 1))

    def between(self, start: int, stop: int) -> slice:
        """Where in `numbers` the answers of consecutive rows of all ranks are."""
        return slice(self._begin(start * self._dp_size), self._begin(stop * self._dp_size))

    def _begin(self, row: int) -> int:
        return int(self._bounds[min(row, len(self._bounds) - 1)])
