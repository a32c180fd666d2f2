"""Records of all files, numbered through, and the rows that they make."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.preference_formats import Kind
from megatron_cgn.data.preference_records import pairs_of
from megatron_cgn.data.preference_selection import RecordSelection
from megatron_cgn.data.preference_store import PreferenceStore
from megatron_cgn.data.sft_loader import ConversationRow
from megatron_cgn.data.sft_packs import PackList
from megatron_cgn.data.sft_selection import Reading, Tally
from megatron_cgn.data.sft_sequences import (
    Beginning,
    Conversations,
    PackedSequences,
    ReadFile,
    count_by_file,
    place_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceRow(ConversationRow):
    """Answers end to end: T places, A answers, P pairs. A blank sequence has none.

    Where `ConversationRow` says conversation, it is an answer with its prompt in front.
    """

    chosen: npt.NDArray[np.int64]
    """The better answer of each pair, by its place in the row, int64 ``[P]``."""
    rejected: npt.NDArray[np.int64]
    """The worse one, int64 ``[P]``."""
    weights: npt.NDArray[np.float32]
    """One over the pairs of the record, float32 ``[P]``."""
    margins: npt.NDArray[np.float32]
    """By how much the better one is better, as the data say, float32 ``[P]``; 0 if they do not."""
    desirable: npt.NDArray[np.bool_] | None
    """Of unpaired data, which answers are good, bool ``[A]``; None for pairs."""
    answers: npt.NDArray[np.int64]
    """Numbers of the answers over all files of the run, int64 ``[A]``."""

    @property
    def last_places(self) -> npt.NDArray[np.int64]:
        """Place of the last token that is read of each answer, int64 ``[A]``."""
        return np.cumsum(self.lengths, dtype=np.int64) - 1


def blank_preferences(kind: Kind) -> PreferenceRow:
    """A sequence without answers."""
    numbers = np.empty(0, dtype=np.int64)
    return PreferenceRow(
        tokens=numbers,
        labels=numbers,
        loss_mask=numbers.astype(np.bool_),
        lengths=(),
        sources=(),
        chosen=numbers,
        rejected=numbers,
        weights=numbers.astype(np.float32),
        margins=numbers.astype(np.float32),
        desirable=numbers.astype(np.bool_) if kind == "unpaired" else None,
        answers=numbers,
    )


@dataclass(frozen=True, slots=True)
class ReadPreferences:
    """A file as it is read."""

    store: PreferenceStore
    """Its records."""
    selection: RecordSelection
    """What is read of them."""
    source: int
    """Place of its source."""


class Preferences:
    """The records of all files, numbered through; and their answers, numbered through too."""

    def __init__(self, files: Sequence[ReadPreferences], reading: Reading, *, kind: Kind) -> None:
        """Put files together.

        Args:
            files: At least one, all of one kind.
            reading: How answers are read.
            kind: What can be learned from them.
        """
        self.files = files
        """The files, in the order of the numbers."""
        self.kind = kind
        self.bases = np.cumsum([0, *(len(file.store) for file in files)])
        """Number of each file's first record, and the end."""
        self.answers = Conversations(
            [ReadFile(f.store.answers, f.selection.answers, f.source) for f in files], reading
        )
        """Every answer, as a conversation with its prompt in front."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """What each record takes of a row, int32 ``[N]``."""
        return np.concatenate([file.selection.places for file in self.files])

    @property
    def numbering(self) -> str:
        """Stands for how records are numbered."""
        return "/".join(file.store.key for file in self.files)

    @property
    def read_answers(self) -> npt.NDArray[np.int64]:
        """Numbers of the answers of all records that are read, ascending, int64."""
        return np.concatenate(
            [
                file.selection.answers_of(np.flatnonzero(file.selection.read)) + base
                for file, base in zip(self.files, self.answers.bases.tolist(), strict=False)
            ]
        )

    def answers_of(self, number: int) -> npt.NDArray[np.int64]:
        """Numbers of a record's answers, int64."""
        place, record = place_of(number, self.bases)
        within = self.files[place].store.answers_of(record)
        return np.arange(within.start, within.stop) + int(self.answers.bases[place])

    def row(self, numbers: Sequence[int]) -> PreferenceRow:
        """Read records, end to end."""
        answers = np.concatenate([self.answers_of(number) for number in numbers])
        compared = [self._compared(number) for number in numbers]
        sizes = [len(values) for values, _ in compared]
        starts = np.cumsum([0, *sizes])[:-1].tolist()
        pairs = [pairs_of(values) for values, _ in compared]
        counts = [len(better) for better, _ in pairs]
        good = np.concatenate([values for values, _ in compared]) > 0
        row = self.answers.row(answers.tolist())
        return PreferenceRow(
            tokens=row.tokens,
            labels=row.labels,
            loss_mask=row.loss_mask,
            lengths=row.lengths,
            sources=row.sources,
            chosen=_joined([better + n for (better, _), n in zip(pairs, starts, strict=True)]),
            rejected=_joined([worse + n for (_, worse), n in zip(pairs, starts, strict=True)]),
            weights=np.repeat([1 / max(1, n) for n in counts], counts).astype(np.float32),
            margins=np.repeat([margin for _, margin in compared], counts).astype(np.float32),
            desirable=good if self.kind == "unpaired" else None,
            answers=answers,
        )

    def record_id(self, number: int) -> str:
        """The id of a record."""
        return self.answers.record_id(int(self.answers_of(number)[0]))

    def beginning(self, number: int) -> Beginning:
        """What a record asks, and its best answer."""
        values, _ = self._compared(number)
        return self.answers.beginning(int(self.answers_of(number)[np.argmax(values)]))

    def tally(self, numbers: npt.NDArray[np.integer[Any]]) -> tuple[Tally, ...]:
        """Count records file by file, as often as each is given."""
        return count_by_file(numbers, self.bases, [f.selection.tally for f in self.files])

    def _compared(self, number: int) -> tuple[npt.NDArray[np.float64], float]:
        """What orders the answers of a record, and its margin."""
        place, record = place_of(number, self.bases)
        store = self.files[place].store
        within = store.answers_of(record)
        return store.values[within.start : within.stop], float(store.rows[record]["margin"])


class PreferenceSequences(PackedSequences[PreferenceRow]):
    """Sequences of records."""

    def __init__(self, records: Preferences, packs: PackList, *, multiple_of: int) -> None:
        """Put records and their order together: see `PackedSequences`."""
        blank = functools.partial(blank_preferences, records.kind)
        super().__init__(records, packs, multiple_of=multiple_of, blank=blank)


def _joined(parts: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    return np.concatenate(parts).astype(np.int64)
