"""The answers of preference data as a reference scores them: exactly as training reads them."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.preference import PreferenceData
from megatron_cgn.data.preference_rows import PreferenceRow, Preferences, ReadPreferences
from megatron_cgn.data.reference import ScoredFile
from megatron_cgn.data.reference_store import reading_of
from megatron_cgn.data.sft_loader import ConversationRow
from megatron_cgn.data.sft_selection import Reading
from megatron_cgn.data.sft_sequences import Conversations, PackedSequences, ReadFile

type Numbers = npt.NDArray[np.int64]


class Answers:
    """The answers of all files of a run, numbered through; see `Scored`."""

    name = "answers"

    def __init__(
        self, files: Sequence[ReadPreferences], paths: Sequence[str], reading: Reading
    ) -> None:
        """Put files together.

        Args:
            files: In the order of the answers' numbers.
            paths: Where each was.
            reading: How answers are read.
        """
        named = zip(files, paths, strict=True)
        self.files = [_scored(file, path, reading) for file, path in named]
        self._answers = Conversations(
            [ReadFile(file.store.answers, file.selection.answers, 0) for file in files], reading
        )

    @classmethod
    def of(cls, data: PreferenceData) -> Self:
        """Take the answers of a run."""
        return cls(data.records.files, paths_of(data), data.plan.reading)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Places that each answer takes of a row, int32 ``[A]``."""
        return self._answers.lengths

    def row(self, numbers: Sequence[int]) -> ConversationRow:
        """Read answers, end to end."""
        return self._answers.row(numbers)


def paths_of(data: PreferenceData) -> list[str]:
    """Where the files were, in the order of the answers' numbers."""
    return [file.path for file in data.plan.files]


def wanted_answers(data: PreferenceData, *, validation_sequences: int | None) -> Numbers:
    """What a run trains on or validates with.

    Args:
        data: What the run reads.
        validation_sequences: Held-out sequences that are scored per source; None for all.

    Returns:
        Numbers of the answers, each once, ascending, int64.
    """
    parts = [(data.train, len(data.train))]
    for sequences in data.validation.values():
        total = len(sequences)
        parts.append((sequences, min(total, validation_sequences or total)))
    found = [answers_between(data.records, sequences, 0, stop) for sequences, stop in parts]
    return np.unique(np.concatenate(found))


def answers_between(
    records: Preferences, sequences: PackedSequences[PreferenceRow], start: int, stop: int
) -> Numbers:
    """Numbers of the answers of consecutive sequences, file by file.

    Args:
        records: The records of all files.
        sequences: Sequences of them.
        start: The first.
        stop: One past the last; those past the end hold nothing.

    Returns:
        Int64 ``[n]``; an answer that is read twice is there twice.
    """
    numbers = sequences.numbers(start, stop).astype(np.int64)
    owners = np.searchsorted(records.bases, numbers, side="right") - 1
    found = [np.empty(0, dtype=np.int64)]
    for place in np.unique(owners).tolist():
        mine = numbers[owners == place] - records.bases[place]
        answers = records.files[place].selection.answers_of(mine)
        found.append(answers + records.answers.bases[place])
    return np.concatenate(found)


def reading_facts(reading: Reading) -> dict[str, Any]:
    """The settings that decide which of the tokens count that are read."""
    return {
        "chat.train_on_prompt": reading.train_on_prompt,
        "chat.last_turn_only": reading.last_turn_only,
    }


def _scored(file: ReadPreferences, path: str, reading: Reading) -> ScoredFile:
    assert not reading.whole, "a reward needs no reference"
    read = file.selection.answers
    return ScoredFile(
        path=path,
        facts={"answers": Answers.name, "content": file.store.key, **reading_facts(reading)},
        readings=reading_of(read.begin, read.stop, read.counted),
        counted=read.counted,
        lines=file.store.answers.rows["line"],
    )
