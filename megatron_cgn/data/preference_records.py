"""Prompts with answers out of files, one by one, with what is wrong with those that cannot be used.

As in ``conversations.py``, every record of a file comes out, as a record or as a fault. What
records look like is in ``preference_formats.py``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched, combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.conversations import Fault, read_rows, record_name
from megatron_cgn.data.preference_formats import FIELDS, AnswerRecord, Kind, read_answers
from megatron_cgn.errors import DataError
from tokenizer.chat import ChatTemplate, EncodedChat, Message

type Places = npt.NDArray[np.int64]

_BATCH = 64  # records tokenised at a time
_EXAMPLE = (
    "preference. Give prompt, chosen and rejected; prompt and answers; or prompt, completion and "
    "label."
)


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with its answers, and where it comes from."""

    id: str
    """The record's own ``id``, or the file's name and its line."""
    record: AnswerRecord
    """What it says; not yet held against a chat template."""
    path: str
    """The file."""
    line: int
    """Line of a JSON file where the record begins, or row of a table, counted from 1."""

    @property
    def conversations(self) -> list[tuple[Message, ...]]:
        """Each answer with the prompt in front of it."""
        return [(*self.record.prompt, *answer.messages) for answer in self.record.answers]


def read_preferences(
    path: str | Path, *, report: Callable[[int], object] | None = None
) -> Iterator[Preference | Fault]:
    """Read a file of preference data.

    Args:
        path: As for `conversations.read_conversations`.
        report: Called with how many more bytes of the file are read.

    Yields:
        Each record in order: its prompt and answers, or what is wrong with it. All are of the kind
        of the first: answers that are compared, or answers that are good or bad.

    Raises:
        DataError: If the file is missing, of an unknown kind or damaged.
    """
    path = Path(path)
    kind: Kind | None = None
    for line, row in read_rows(path, fields=FIELDS, example=_EXAMPLE, report=report):
        try:
            if isinstance(row, DataError):
                raise row
            record = read_answers(row)
            kind = kind or record.kind
            if record.kind != kind:
                raise DataError(
                    f"is {_IN_WORDS[record.kind]}, and the first record of the file is "
                    f"{_IN_WORDS[kind]}: give each kind a file of its own"
                )
        except DataError as fault:
            yield Fault(str(path), line, str(fault))
            continue
        yield Preference(record_name(row, path, line), record, str(path), line)


_IN_WORDS = {"pairs": "a comparison of answers", "unpaired": "one answer with a label"}


def encode_preferences(
    records: Iterable[Preference | Fault], *, chat: ChatTemplate
) -> Iterator[tuple[Preference, list[EncodedChat]] | Fault]:
    """Make tokens of answers.

    Args:
        records: As `read_preferences` gives them.
        chat: The template.

    Yields:
        Each record in order: its answers with the prompt in front, whose turns are those of the
        assistant behind the prompt; or what is wrong with it.
    """
    for group in batched(records, _BATCH):
        given = [record for record in group if isinstance(record, Preference)]
        encoded = iter(chat.encode_batch(c for record in given for c in record.conversations))
        for record in group:
            if isinstance(record, Fault):
                yield record
                continue
            results = [next(encoded) for _ in record.record.answers]
            try:
                yield record, _answers(record.record, results)
            except DataError as fault:
                yield Fault(record.path, record.line, str(fault))


def pairs_of(values: Sequence[float] | npt.NDArray[np.float64]) -> tuple[Places, Places]:
    """All pairs of a record's answers of which one is better.

    Args:
        values: What orders them, larger being better.

    Returns:
        Places of the better and of the worse answer of each pair, int64 ``[P]`` each.
    """
    order = np.asarray(values)
    better, worse = np.nonzero(order[:, None] > order[None, :])
    return better, worse


def _answers(record: AnswerRecord, results: Sequence[EncodedChat | DataError]) -> list[EncodedChat]:
    """The answers' tokens, with the turns of the prompt left out; refuses those that are equal."""
    in_prompt = sum(message.role == "assistant" for message in record.prompt)
    found = []
    for answer, result in zip(record.answers, results, strict=True):
        if isinstance(result, DataError):
            raise DataError(f"{answer.name}: {result}") from result
        found.append(EncodedChat(result.ids, result.turns[in_prompt:]))
    named = zip(record.answers, found, strict=True)
    for (one, ids), (other, others) in combinations(named, 2):
        if ids.ids == others.ids:
            raise DataError(
                f"{one.name} and {other.name} are equal once the chat template has written them: "
                "there is nothing to prefer. Remove one of them"
            )
    return found
