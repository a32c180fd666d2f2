"""Mismatched answers: each prompt with an answer to another one, for the baseline of KTO.

KTO measures an answer's reward against how far the policy has moved from the reference in general,
and estimates that from prompts with answers that have nothing to do with them (Ethayarajh et al.
2024, https://arxiv.org/abs/2402.01306, section 4.1). Here a prompt gets the answer of the record
before it in its file, the first that of the last. Where that record asks the same, as when both
answers of a pair became records, the nearest before it that asks something else is taken: an
answer to the same question would be no mismatch. What is longer than ``data.seq_length`` is cut at
its end, with ``chat.truncation=keep_end`` at its beginning.

So which answers belong together depends on nothing but the file and which records are read of it,
and what the reference says of them is scored once, as of other answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.preference import PreferenceData
from megatron_cgn.data.preference_rows import ReadPreferences
from megatron_cgn.data.preference_store import PreferenceStore
from megatron_cgn.data.reference import ScoredFile
from megatron_cgn.data.reference_answers import paths_of, reading_facts
from megatron_cgn.data.reference_store import reading_of
from megatron_cgn.data.sft_loader import ConversationRow
from megatron_cgn.data.sft_selection import Reading
from megatron_cgn.errors import DataError

NOBODY = -1
"""Partner of a record that is not read."""

type Numbers = npt.NDArray[np.int64]


class Mismatched:
    """A mismatched answer to every prompt, under the numbers of the answers; see `Scored`."""

    name = "mismatched answers"

    def __init__(
        self, files: Sequence[ReadPreferences], paths: Sequence[str], reading: Reading
    ) -> None:
        """Find partners.

        Args:
            files: Unpaired data, in the order of the answers' numbers.
            paths: Where each was.
            reading: How answers are read.

        Raises:
            DataError: If a file has answers to one prompt alone.
        """
        named = list(zip(files, paths, strict=True))
        self._parts = [_Part.of(file, path, reading) for file, path in named]
        self._bases = np.cumsum([0, *(len(part.partners) for part in self._parts)])
        # Asked for before every step, so not counted anew each time.
        self.lengths: npt.NDArray[np.int32] = np.concatenate([p.lengths for p in self._parts])
        """Places that each takes of a row, int32 ``[A]``; 0 of answers that are not read."""
        self.files = [
            _scored(path, part) for (_, path), part in zip(named, self._parts, strict=True)
        ]

    @classmethod
    def of(cls, data: PreferenceData) -> Self:
        """Find partners in the data of a run; raises as the constructor does."""
        return cls(data.records.files, paths_of(data), data.plan.reading)

    def row(self, numbers: Sequence[int]) -> ConversationRow:
        """Read mismatched answers, end to end."""
        rows = [self._read(number) for number in numbers]
        return ConversationRow(
            tokens=np.concatenate([tokens[:-1] for tokens, _ in rows]),
            labels=np.concatenate([tokens[1:] for tokens, _ in rows]),
            loss_mask=np.concatenate([counted for _, counted in rows]),
            lengths=tuple(len(counted) for _, counted in rows),
            sources=(0,) * len(rows),
        )

    def _read(self, number: int) -> tuple[Numbers, npt.NDArray[np.bool_]]:
        place = int(np.searchsorted(self._bases, number, side="right")) - 1
        return self._parts[place].read(number - int(self._bases[place]))


def partners_of(questions: npt.NDArray[np.uint64]) -> Numbers | None:
    """Whose answer each prompt gets: that of the nearest before it which asks something else.

    Args:
        questions: Hashes of what records ask, uint64 ``[N]``.

    Returns:
        Places, int64 ``[N]``; what is before the first is the last. None if all ask the same.
    """
    # A run of equal questions begins where the one before it is another.
    begins = questions != np.roll(questions, 1)
    if not begins.any():
        return None
    places = np.where(begins, np.arange(len(questions)), -1)
    places = np.maximum.accumulate(places)
    places[places < 0] = np.flatnonzero(begins)[-1]  # the last run goes on at the beginning
    partners: Numbers = (places - 1) % len(questions)
    return partners


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The mismatched answers of one file: a piece of one record and a piece of another."""

    store: PreferenceStore
    reading: Reading
    partners: Numbers
    """Whose answer, int64 ``[N]``, or `NOBODY`."""
    begin: Numbers
    """First token of the prompt, int64 ``[N]``."""
    end: Numbers
    """One past its last."""
    answer: Numbers
    """First token of the partner's answer."""
    stop: Numbers
    """One past its last."""

    @classmethod
    def of(cls, file: ReadPreferences, path: str, reading: Reading) -> "_Part":
        """Put together what a file's records give."""
        store, rows = file.store, file.store.answers.rows
        used = np.flatnonzero(file.selection.read)
        found = partners_of(rows["question"][used])
        if len(used) and found is None:
            raise DataError(
                f"{path}: all its answers are to one question, but loss.type=kto compares "
                "each with an answer to another question. Add records that ask something else, or "
                "train on pairs with another loss."
            )
        partners = np.full(len(rows), NOBODY, dtype=np.int64)
        if found is not None:
            partners[used] = used[found]
        turns = store.answers.turns.astype(np.int64)
        end = turns[rows["turn"], 0]
        answer, stop = end[partners], turns[rows["turn"] + rows["turns"] - 1, 1][partners]
        begin = np.zeros_like(end)
        excess = np.maximum(0, end + (stop - answer) - (reading.seq_length + 1))
        if reading.truncation == "keep_end":
            begin = np.minimum(excess, end)
            answer = answer + (excess - begin)
        else:
            stop = stop - excess
        return cls(
            store=store,
            reading=reading,
            partners=partners,
            begin=begin,
            end=end,
            answer=answer,
            stop=stop,
        )

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Places of a row."""
        places = (self.end - self.begin) + (self.stop - self.answer) - 1
        return np.where(self.partners == NOBODY, 0, places).astype(np.int32)

    @property
    def counted(self) -> npt.NDArray[np.int32]:
        """Labels that count, int32 ``[N]``."""
        owners, starts, ends = self._spans()
        first = self.answer[owners] + (self.end[owners] == self.begin[owners])
        inside = np.minimum(ends, self.stop[owners]) - np.maximum(starts, first)
        counts = np.bincount(owners, np.maximum(inside, 0), minlength=len(self.partners))
        return counts.astype(np.int32)

    def read(self, number: int) -> tuple[Numbers, npt.NDArray[np.bool_]]:
        """Tokens of one, int64 ``[n]``, and of each but the last whether the next counts."""
        answers, partner = self.store.answers, int(self.partners[number])
        begin, end, answer, stop = (
            int(x[number]) for x in (self.begin, self.end, self.answer, self.stop)
        )
        first, other = (int(answers.rows[n]["token"]) for n in (number, partner))
        pieces = (
            answers.tokens[first + begin : first + end],
            answers.tokens[other + answer : other + stop],
        )
        tokens = np.concatenate(pieces).astype(np.int64)
        counted = np.zeros(len(tokens) - 1, dtype=np.bool_)
        shift = (end - begin) - answer - 1  # from a token of the answer to the place in front of it
        last = int(answers.rows[partner]["turn"]) + int(answers.rows[partner]["turns"])
        turn = last - 1 if self.reading.last_turn_only else int(answers.rows[partner]["turn"])
        for start, behind in answers.turns[turn:last].tolist():
            counted[max(0, max(start, answer) + shift) : max(0, behind + shift)] = True
        return tokens, counted

    def _spans(self) -> tuple[Numbers, Numbers, Numbers]:
        """The partners' turns: whose mismatched answer each is in, its first token and its end."""
        used = np.flatnonzero(self.partners != NOBODY)
        rows = self.store.answers.rows[self.partners[used]]
        first, sizes = rows["turn"].astype(np.int64), rows["turns"].astype(np.int64)
        if self.reading.last_turn_only:
            first, sizes = first + sizes - 1, np.ones_like(sizes)
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        turns = self.store.answers.turns[np.repeat(first, sizes) + within].astype(np.int64)
        return np.repeat(used, sizes), turns[:, 0], turns[:, 1]


def _scored(path: str, part: _Part) -> ScoredFile:
    assert not part.reading.train_on_prompt, "validation refuses it"
    counted = part.counted
    return ScoredFile(
        path=path,
        facts={
            "answers": Mismatched.name,
            "content": part.store.key,
            **reading_facts(part.reading),
        },
        readings=reading_of(part.begin, part.end, part.partners, part.answer, part.stop, counted),
        counted=counted,
        lines=part.store.answers.rows["line"],
    )
