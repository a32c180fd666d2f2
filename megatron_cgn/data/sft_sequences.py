"""Sequences of stored conversations: what each holds, as tokens, as ids of records, and counted."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from megatron_cgn.data.sft_loader import ConversationRow, blank
from megatron_cgn.data.sft_packs import PackList
from megatron_cgn.data.sft_selection import Reading, Selection, Tally, counted_labels
from megatron_cgn.data.sft_store import SftStore

_COUNTED_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """How a conversation begins."""

    prompt: list[int]
    """Ids up to where the assistant first writes, the generation prompt included."""
    answer: list[int]
    """Ids of the assistant's first turn, its end-of-turn token included."""


@dataclass(frozen=True, slots=True)
class ReadFile:
    """A file as it is read."""

    store: SftStore
    """Its conversations."""
    selection: Selection
    """What is read of them."""
    source: int
    """Place of its source."""


class Numbered[R](Protocol):
    """What is read, numbered through over all files: conversations, or records of preferences."""

    bases: npt.NDArray[np.int64]
    """Number of each file's first, and the end."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """What each takes of a row, int32 ``[N]``."""
        ...

    @property
    def numbering(self) -> str:
        """Stands for how they are numbered."""
        ...

    def row(self, numbers: Sequence[int]) -> R:
        """Read some, end to end."""
        ...

    def record_id(self, number: int) -> str:
        """The id of a record."""
        ...

    def beginning(self, number: int) -> Beginning:
        """What is asked, and how it is answered first."""
        ...

    def tally(self, numbers: npt.NDArray[np.integer[Any]]) -> tuple[Tally, ...]:
        """Count file by file, as often as each is given."""
        ...


class Conversations:
    """The conversations of all files, numbered through."""

    def __init__(self, files: Sequence[ReadFile], reading: Reading) -> None:
        """Put files together."""
        self._files = files
        self._reading = reading
        self.bases = np.cumsum([0, *(len(file.store) for file in files)])
        """Number of each file's first conversation, and the end."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """What each conversation takes of a row, int32 ``[N]``."""
        return np.concatenate([file.selection.places for file in self._files])

    @property
    def numbering(self) -> str:
        """Stands for how conversations are numbered."""
        return "/".join(file.store.key for file in self._files)

    def row(self, numbers: Sequence[int]) -> ConversationRow:
        """Read conversations, end to end."""
        parts = [self._read(*self._place(number)) for number in numbers]
        return ConversationRow(
            tokens=np.concatenate([tokens[:-1] for tokens, _, _ in parts]),
            labels=np.concatenate([tokens[1:] for tokens, _, _ in parts]),
            loss_mask=np.concatenate([counted for _, counted, _ in parts]),
            lengths=tuple(len(counted) for _, counted, _ in parts),
            sources=tuple(source for _, _, source in parts),
        )

    def record_id(self, number: int) -> str:
        """The id of a conversation's record."""
        file, conversation = self._place(number)
        return file.store.record_id(conversation)

    def beginning(self, number: int) -> Beginning:
        """What a conversation asks, and how it is answered first."""
        file, conversation = self._place(number)
        row = file.store.rows[conversation]
        begin, end = file.store.turns[int(row["turn"])].tolist()
        first = int(row["token"])
        tokens: list[int] = file.store.tokens[first : first + end].tolist()
        return Beginning(prompt=tokens[:begin], answer=tokens[begin:])

    def tally(self, numbers: npt.NDArray[np.integer[Any]]) -> tuple[Tally, ...]:
        """Count conversations file by file, as often as each is given."""
        return count_by_file(numbers, self.bases, [f.selection.tally for f in self._files])

    def _place(self, number: int) -> tuple[ReadFile, int]:
        place, inside = place_of(number, self.bases)
        return self._files[place], inside

    def _read(
        self, file: ReadFile, number: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], int]:
        begin, stop = int(file.selection.begin[number]), int(file.selection.stop[number])
        first = int(file.store.rows[number]["token"])
        end = min(stop, int(file.store.rows[number]["tokens"]))
        tokens = np.zeros(stop - begin, dtype=np.int64)  # 0 where nothing is left to predict
        tokens[: end - begin] = file.store.tokens[first + begin : first + end]
        counted = counted_labels(file.store, number, self._reading, begin=begin, stop=stop)
        return tokens, counted, file.source


def count_by_file(
    numbers: npt.NDArray[np.integer[Any]],
    bases: npt.NDArray[np.int64],
    tallies: Sequence[Callable[[npt.NDArray[np.integer[Any]]], Tally]],
) -> tuple[Tally, ...]:
    """Count what numbers stand for, file by file.

    Args:
        numbers: Of conversations or records, each as often as it counts.
        bases: Number of each file's first, and the end.
        tallies: Count some of a file.

    Returns:
        A tally a file.
    """
    totals = [Tally() for _ in tallies]
    for begin in range(0, len(numbers), _COUNTED_AT_ONCE):
        part = numbers[begin : begin + _COUNTED_AT_ONCE]
        owners = np.searchsorted(bases, part, side="right") - 1
        for place, tally in enumerate(tallies):
            totals[place] += tally(part[owners == place] - bases[place])
    return tuple(totals)


def place_of(number: int, bases: npt.NDArray[np.int64]) -> tuple[int, int]:
    """The file of a number, and its number in the file."""
    place = int(np.searchsorted(bases, number, side="right")) - 1
    return place, number - int(bases[place])


class PackedSequences[R](Dataset[R]):
    """Sequences in order; blank ones fill the last step. Maps files, so it may cross a fork."""

    def __init__(
        self,
        conversations: Numbered[R],
        packs: PackList,
        *,
        multiple_of: int,
        blank: Callable[[], R],
    ) -> None:
        """Put conversations and their order together.

        Args:
            conversations: Of all files; or records of preferences.
            packs: Which of them each sequence holds.
            multiple_of: The number of sequences is filled up to a multiple of this.
            blank: Makes a sequence without any.
        """
        self._conversations = conversations
        self.blank = blank
        self._packs = packs
        self._length = -(-len(packs) // multiple_of) * multiple_of

    def __len__(self) -> int:
        """Number of sequences, blank ones at the end included."""
        return self._length

    def __getitem__(self, index: int) -> R:
        """Sequence ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index >= len(self._packs):
            return self.blank()
        return self._conversations.row(self._packs[index])

    def record_ids(self, sequence: int) -> list[str]:
        """Ids of the records that a sequence holds, in its order; none of a blank one."""
        if sequence >= len(self._packs):
            return []
        return [self._conversations.record_id(number) for number in self._packs[sequence]]

    def tally(self, start: int, stop: int) -> tuple[Tally, ...]:
        """Count what consecutive sequences hold of each file."""
        return self._conversations.tally(self._packs.between(start, stop))

    def numbers(self, start: int, stop: int) -> npt.NDArray[np.integer[Any]]:
        """Numbers of what consecutive sequences hold; blank ones hold nothing."""
        first, last = (min(place, len(self._packs)) for place in (start, stop))
        return self._packs.between(first, last)

    def beginnings(self) -> Iterator[Beginning]:
        """What each conversation asks and how it is answered first, in this order."""
        for sequence in range(len(self._packs)):
            yield from map(self._conversations.beginning, self._packs[sequence])


class ConversationSequences(PackedSequences[ConversationRow]):
    """Sequences of conversations."""

    def __init__(self, conversations: Conversations, packs: PackList, *, multiple_of: int) -> None:
        """Put conversations and their order together: see `PackedSequences`."""
        super().__init__(conversations, packs, multiple_of=multiple_of, blank=blank)
