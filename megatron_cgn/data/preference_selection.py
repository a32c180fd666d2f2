"""Which tokens of stored answers are read, and which records are left out.

All answers of a record share a sequence, so together they must not take more than
``data.seq_length`` places. Of a record that does, ``chat.truncation`` leaves nothing (``drop``,
``error``), or each answer its share of the sequence: ``data.seq_length`` over the number of
answers. A record is left out too if nothing counts in what would be read of one of its answers, or
if answers that are compared would be read alike.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.preference_store import PreferenceStore
from megatron_cgn.data.sft_selection import (
    KEPT,
    NOTHING_COUNTED,
    TOO_LONG,
    TRUNCATED,
    Reading,
    Selection,
    Tally,
    select,
)

_NO_LIMIT = 2**31 - 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSelection:
    """What is read of each record of a store."""

    answers: Selection
    """What is read of each answer."""
    bounds: npt.NDArray[np.int64]
    """The first answer of each record, and the end, int64 ``[N + 1]``."""
    places: npt.NDArray[np.int32]
    """What each record takes of a row, int32 ``[N]``."""
    counted: npt.NDArray[np.int32]
    """Labels that count, int32 ``[N]``."""
    state: npt.NDArray[np.int8]
    """`KEPT`, `TRUNCATED`, `TOO_LONG` or `NOTHING_COUNTED`, int8 ``[N]``."""

    @property
    def read(self) -> npt.NDArray[np.bool_]:
        """Which records are read, bool ``[N]``."""
        return self.state <= TRUNCATED

    def spans(self, which: npt.NDArray[np.integer[Any]]) -> bytes:
        """Stands for what is read of some records."""
        return self.answers.spans(self.answers_of(which))

    def answers_of(self, which: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """The answers of some records, one after another, int64."""
        sizes = self.bounds[which + 1] - self.bounds[which]
        ends = np.cumsum(sizes)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)
        answers: npt.NDArray[np.int64] = np.repeat(self.bounds[which], sizes) + within
        return answers

    def tally(self, which: npt.NDArray[np.integer[Any]]) -> Tally:
        """Count some records, as often as each is given."""
        return Tally(
            conversations=len(which),
            tokens=int(self.places[which].sum(dtype=np.int64)),
            counted=int(self.counted[which].sum(dtype=np.int64)),
        )


def select_records(store: PreferenceStore, reading: Reading) -> RecordSelection:
    """Decide what is read of every record of a store.

    Args:
        store: The records.
        reading: How their answers are read.

    Returns:
        The selection: 13 bytes an answer and 17 a record.
    """
    bounds = store.bounds
    limits = np.full(len(store.answers), _NO_LIMIT, dtype=np.int64)
    whole = dataclasses.replace(reading, truncation="drop")
    answers = select(store.answers, whole, limits=limits)
    long = _sums(answers.places, bounds) > reading.seq_length
    if reading.truncation in ("keep_start", "keep_end") and long.any():
        sizes = np.diff(bounds)
        share = np.where(long, reading.seq_length // sizes, _NO_LIMIT)
        answers = select(store.answers, reading, limits=np.repeat(share, sizes))
    state = np.full(len(store), KEPT, dtype=np.int8)
    state[long] = TRUNCATED if reading.truncation in ("keep_start", "keep_end") else TOO_LONG
    void = np.add.reduceat(answers.counted == 0, bounds[:-1], dtype=np.int64) > 0
    state[void & (state != TOO_LONG)] = NOTHING_COUNTED
    for record in np.flatnonzero(state == TRUNCATED).tolist():
        if _alike(store, record, answers, reading):
            state[record] = NOTHING_COUNTED
    return RecordSelection(
        answers=answers,
        bounds=bounds,
        places=_sums(answers.places, bounds).astype(np.int32),
        counted=_sums(answers.counted, bounds).astype(np.int32),
        state=state,
    )


def _alike(store: PreferenceStore, record: int, read: Selection, reading: Reading) -> bool:
    """Whether two of a record's answers of different rank are read alike, being cut."""
    values: dict[bytes, float] = {}
    for answer in store.answers_of(record):
        first = int(store.answers.rows[answer]["token"])
        begin, end = int(read.begin[answer]), int(read.stop[answer]) - int(reading.whole)
        tokens = store.answers.tokens[first + begin : first + end].tobytes()
        value = float(store.values[answer])
        if values.setdefault(tokens, value) != value:
            return True
    return False


def _sums(values: npt.NDArray[np.int32], bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Sum over the answers of each record."""
    sums: npt.NDArray[np.int64] = np.add.reduceat(values, bounds[:-1], dtype=np.int64)
    return sums
