"""Prompts with their answers as tokens on disk: made once, mapped by every process.

::

    <cache>/preference-<key>/records.bin, values.bin, and what a store of conversations has

Every answer is stored as a conversation of instruction tuning is, with its prompt in front; its
turns are those of the assistant behind the prompt. Answers of a record are neighbours.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.preference_formats import Kind
from megatron_cgn.data.preference_records import (
    Preference,
    encode_preferences,
    pairs_of,
    read_preferences,
)
from megatron_cgn.data.sft_store import SftStore, StoreWriter, map_file, open_store, question_hash
from megatron_cgn.data.store_folder import Progress, Report, build_folder, without_faults
from megatron_cgn.errors import DataError
from tokenizer.chat import ChatTemplate, EncodedChat
from tokenizer.wrapper import Tokenizer

FORMAT = 1
"""Version of the files; caches of another are not read."""
RECORD = np.dtype(
    [
        ("answer", "<i8"),
        ("answers", "<i4"),
        ("margin", "<f4"),
        ("line", "<i8"),
        ("question", "<u8"),
    ]
)
"""Of each record: its first answer, how many it has, by how much the better one of a pair is
better, its line in the file, and a hash of what was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceStore:
    """The records of one file, mapped."""

    answers: SftStore
    """Every answer with its prompt, as a conversation."""
    rows: npt.NDArray[np.void]
    """See `RECORD`."""
    values: npt.NDArray[np.float64]
    """Orders the answers of a record, larger being better; of unpaired data 1 for a good answer
    and 0 for a bad one; float64 ``[answers]``."""
    kind: Kind
    """What can be learned from the records."""
    repeated: int
    """Answers that were left out, since their records give them twice."""

    unit: ClassVar = "records"
    """What it is counted in."""

    def __len__(self) -> int:
        """Number of records."""
        return len(self.rows)

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.answers.folder

    @property
    def key(self) -> str:
        """Stands for the content."""
        return self.folder.name

    @property
    def bounds(self) -> npt.NDArray[np.int64]:
        """The first answer of each record, and the end, int64 ``[N + 1]``."""
        return np.append(self.rows["answer"], len(self.answers))

    def answers_of(self, record: int) -> range:
        """Numbers of a record's answers."""
        row = self.rows[record]
        return range(int(row["answer"]), int(row["answer"]) + int(row["answers"]))


def build_preferences(
    path: str | Path,
    *,
    chat: ChatTemplate,
    tokenizer: Tokenizer,
    cache: Path,
    report: Report | None = None,
) -> Path:
    """Encode a file's records, unless that has been done.

    Args:
        path: File of preference data.
        chat: Encodes prompts and answers.
        tokenizer: The model's tokenizer.
        cache: Where stores belong.
        report: Told of the progress.

    Returns:
        The store's folder.

    Raises:
        DataError: As `sft_store.build_store`.
    """
    return build_folder(
        path,
        "preference",
        lambda folder: _encode(
            path, folder, chat=chat, vocab_size=tokenizer.vocab_size, report=report
        ),
        format=FORMAT,
        chat=chat,
        tokenizer=tokenizer,
        cache=cache,
    )


def open_preferences(folder: Path) -> PreferenceStore:
    """Map a store.

    Args:
        folder: From `build_preferences`, perhaps on another node.

    Returns:
        The store.

    Raises:
        DataError: If it does not become visible or is damaged.
    """
    answers = open_store(folder)
    try:
        facts = json.loads((folder / "facts.json").read_text("utf-8"))
        store = PreferenceStore(
            answers=answers,
            rows=map_file(folder / "records.bin", RECORD),
            values=map_file(folder / "values.bin", "<f8"),
            kind=facts["kind"],
            repeated=facts["repeated"],
        )
        if (len(store), len(store.values)) != (facts["records"], len(answers)):
            raise ValueError("its files have other sizes than when it was written")
        return store
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: cannot read the encoded answers ({error}). Delete this folder; it is built "
            "again."
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparisons:
    """Records of a store, counted."""

    records: int = 0
    """How many."""
    answers: int = 0
    """Their answers."""
    pairs: int = 0
    """Pairs of answers of which one is better."""
    ties: int = 0
    """Pairs of answers of equal rank, which are not compared."""
    margins: int = 0
    """Records that say by how much."""
    desirable: int = 0
    """Of unpaired answers, the good ones."""

    def __add__(self, other: "Comparisons") -> "Comparisons":
        """Both together."""
        return Comparisons(
            records=self.records + other.records,
            answers=self.answers + other.answers,
            pairs=self.pairs + other.pairs,
            ties=self.ties + other.ties,
            margins=self.margins + other.margins,
            desirable=self.desirable + other.desirable,
        )


def count(store: PreferenceStore, records: npt.NDArray[np.int64]) -> Comparisons:
    """Count what records of a store compare.

    Args:
        store: The records.
        records: Which, int64 ``[N]``.

    Returns:
        The counts.
    """
    rows = store.rows[records]
    sizes = rows["answers"].astype(np.int64)
    desirable = pairs = 0
    if store.kind == "unpaired":
        desirable = int(store.values[rows["answer"]].sum())
    else:
        pairs = sum(_pairs(store, rows))
    return Comparisons(
        records=len(records),
        answers=int(sizes.sum()),
        pairs=pairs,
        ties=int((sizes * (sizes - 1) // 2).sum()) - pairs,
        margins=int(np.count_nonzero(rows["margin"])),
        desirable=desirable,
    )


def _pairs(store: PreferenceStore, rows: npt.NDArray[np.void]) -> Iterator[int]:
    """Pairs of records: a pair has one, which need not be looked up."""
    larger = rows[rows["answers"] > 2]
    yield len(rows) - len(larger)
    for begin, size in zip(larger["answer"].tolist(), larger["answers"].tolist(), strict=True):
        better, _ = pairs_of(store.values[begin : begin + size])
        yield len(better)


class _Writer:
    """Appends records to the files of a store. Use as a context manager."""

    def __init__(self, folder: Path, *, vocab_size: int) -> None:
        self._folder = folder
        self._answers = StoreWriter(folder, vocab_size=vocab_size)
        self._stack = ExitStack()
        self._done = {"records": 0, "answers": 0, "repeated": 0}
        self._kind: Kind = "pairs"

    def __enter__(self) -> Self:
        self._stack.enter_context(self._answers)
        self._rows, self._values = (
            self._stack.enter_context((self._folder / name).open("wb"))
            for name in ("records.bin", "values.bin")
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def add(self, preference: Preference, encoded: list[EncodedChat]) -> None:
        """Append a record."""
        record = preference.record
        question = question_hash(record.prompt)
        for answer in encoded:
            self._answers.add(answer, id=preference.id, line=preference.line, question=question)
        row = (self._done["answers"], len(encoded), record.margin, preference.line, question)
        self._rows.write(np.array(row, dtype=RECORD).tobytes())
        values = [answer.value for answer in record.answers]
        self._values.write(np.array(values, dtype="<f8").tobytes())
        self._kind = record.kind
        self._done["records"] += 1
        self._done["answers"] += len(encoded)
        self._done["repeated"] += record.repeated

    def finish(self) -> None:
        """Write what the files hold."""
        self._answers.finish(kind=self._kind, **self._done)


def _encode(
    path: str | Path, folder: Path, *, chat: ChatTemplate, vocab_size: int, report: Report | None
) -> None:
    records = read_preferences(path, report=Progress(path, report))
    usable = without_faults(
        encode_preferences(records, chat=chat), path, what="record", option="--preference"
    )
    with _Writer(folder, vocab_size=vocab_size) as writer:
        for preference, encoded in usable:
            writer.add(preference, encoded)
        writer.finish()
