"""Which tokens of stored conversations are read, which of them count, and what is left out.

A conversation of n tokens has n - 1 places in a row: token i stands for the prediction of token
i + 1, and the last predicts nothing. Nor does what follows the last token that counts (the line
feed behind ChatML's end of turn, or a closing question): it would change no loss and is never
read. So what a conversation *takes* of ``data.seq_length`` is the tokens in front of its last
counted one, as a sequence of pre-training has ``seq_length`` labels.

Where a conversation is read *whole*, as for a reward, all of its n tokens are read: n places, of
which the last predicts nothing.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_cgn.config.schema import RunConfig
from megatron_cgn.data.sft_store import SftStore

KEPT, TRUNCATED, TOO_LONG, NOTHING_COUNTED = range(4)
"""What became of a conversation: read whole, read in part, or left out for one of two reasons."""
_CHUNK = 1 << 16

type Truncation = Literal["error", "drop", "keep_start", "keep_end"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Some conversations, counted."""

    conversations: int = 0
    """How many."""
    tokens: int = 0
    """Places they take of rows, in all."""
    counted: int = 0
    """Tokens of these whose prediction counts."""

    def __add__(self, other: "Tally") -> "Tally":
        """Both together."""
        return Tally(
            conversations=self.conversations + other.conversations,
            tokens=self.tokens + other.tokens,
            counted=self.counted + other.counted,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How conversations are read: the settings that decide it."""

    seq_length: int
    """Longest conversation, in places."""
    truncation: Truncation
    """What becomes of longer ones; see `ChatConfig.truncation`. "error" leaves them out here, and
    who asks refuses the run if there are any."""
    train_on_prompt: bool
    """Whether every token counts."""
    last_turn_only: bool
    """Whether of the assistant's turns only the last counts."""
    whole: bool = False
    """Whether the last token is read too, though it predicts nothing."""

    @classmethod
    def of(cls, run: RunConfig) -> "Reading":
        """Take the settings of a run."""
        return cls(
            seq_length=run.data.seq_length,
            truncation=run.chat.truncation,
            train_on_prompt=run.chat.train_on_prompt,
            last_turn_only=run.chat.last_turn_only,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is read of each conversation of a store."""

    begin: npt.NDArray[np.int32]
    """First token, in tokens from the conversation's first, int32 ``[N]``."""
    stop: npt.NDArray[np.int32]
    """One past the last label, int32 ``[N]``."""
    counted: npt.NDArray[np.int32]
    """Labels that count, int32 ``[N]``."""
    state: npt.NDArray[np.int8]
    """`KEPT`, `TRUNCATED`, `TOO_LONG` or `NOTHING_COUNTED`, int8 ``[N]``."""

    @property
    def places(self) -> npt.NDArray[np.int32]:
        """What each conversation takes of a row, int32 ``[N]``; at least 1 for those read."""
        return self.stop - self.begin - np.int32(1)

    @property
    def read(self) -> npt.NDArray[np.bool_]:
        """Which conversations are read, bool ``[N]``."""
        return self.state <= TRUNCATED

    def spans(self, which: npt.NDArray[np.integer[Any]]) -> bytes:
        """Stands for what is read of some conversations."""
        parts = (self.begin[which], self.stop[which])
        return b"".join(part.astype("<i4").tobytes() for part in parts)

    def tally(self, which: npt.NDArray[np.integer[Any]]) -> Tally:
        """Count some conversations, as often as each is given."""
        places = self.stop[which] - self.begin[which] - np.int32(1)
        return Tally(
            conversations=len(which),
            tokens=int(places.sum(dtype=np.int64)),
            counted=int(self.counted[which].sum(dtype=np.int64)),
        )


def select(
    store: SftStore, reading: Reading, *, limits: npt.NDArray[np.int64] | None = None
) -> Selection:
    """Decide what is read of every conversation of a store.

    Args:
        store: The conversations.
        reading: How they are read.
        limits: Most places of each, int64 ``[N]``, instead of ``reading.seq_length`` for all.

    Returns:
        The selection: 13 bytes a conversation.
    """
    if limits is None:
        limits = np.full(len(store), reading.seq_length, dtype=np.int64)
    parts = [
        _select(store, slice(first, first + _CHUNK), reading, limits[first : first + _CHUNK])
        for first in range(0, len(store), _CHUNK)
    ]
    begin, stop, counted, state = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Selection(begin=begin, stop=stop, counted=counted, state=state)


def counted_labels(
    store: SftStore, conversation: int, reading: Reading, *, begin: int, stop: int
) -> npt.NDArray[np.bool_]:
    """Which labels of a conversation count.

    Args:
        store: Holds it.
        conversation: Its number.
        reading: How it is read.
        begin: First token that is read.
        stop: One past the last.

    Returns:
        Of each place, whether the token behind it counts, bool ``[stop - begin - 1]``.
    """
    counted = np.full(stop - begin - 1, reading.train_on_prompt)
    if not reading.train_on_prompt:
        row = store.rows[conversation]
        last = int(row["turn"]) + int(row["turns"])
        first = last - 1 if reading.last_turn_only else int(row["turn"])
        for start, end in store.turns[first:last].tolist():
            counted[max(0, start - begin - 1) : max(0, end - begin - 1)] = True
    if reading.whole:
        counted[-1:] = False  # nothing is read behind it
    return counted


type _Part = tuple[
    npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int8]
]


def _select(store: SftStore, part: slice, reading: Reading, limits: npt.NDArray[np.int64]) -> _Part:
    rows = store.rows[part]
    owners, starts, ends = _spans(store, rows, reading)
    whole = _last(owners, ends, size=len(rows))
    if reading.whole:
        whole = rows["tokens"].astype(np.int64) + 1
    longest = limits + 1
    long = whole > longest
    begin = np.zeros(len(rows), dtype=np.int64)
    stop = whole.copy()
    if reading.truncation == "keep_start" and reading.whole:
        stop = np.minimum(whole, longest)
    elif reading.truncation == "keep_start":
        most = longest[owners]
        reached = starts < most
        stop = _last(owners[reached], np.minimum(ends, most)[reached], size=len(rows))
    elif reading.truncation == "keep_end":
        begin[long] = whole[long] - longest[long]
    # The first token that is read has no place in front of it, so it is nobody's label.
    last = stop[owners] - int(reading.whole)
    inside = np.minimum(ends, last) - np.maximum(starts, begin[owners] + 1)
    counted = np.bincount(owners, np.maximum(inside, 0), minlength=len(rows)).astype(np.int32)
    state = np.full(len(rows), KEPT, dtype=np.int8)
    if reading.truncation in ("keep_start", "keep_end"):
        state[long] = TRUNCATED
    state[counted == 0] = NOTHING_COUNTED
    if reading.truncation in ("drop", "error"):
        state[long] = TOO_LONG
    return begin.astype(np.int32), stop.astype(np.int32), counted, state


def _spans(
    store: SftStore, rows: npt.NDArray[np.void], reading: Reading
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """What counts: the conversation of each span, its first token and one past its last."""
    if reading.train_on_prompt:
        owners = np.arange(len(rows))
        return owners, np.zeros(len(rows), dtype=np.int64), rows["tokens"].astype(np.int64)
    first, last = int(rows["turn"][0]), int(rows["turn"][-1]) + int(rows["turns"][-1])
    turns = store.turns[first:last].astype(np.int64)
    owners = np.repeat(np.arange(len(rows)), rows["turns"])
    if reading.last_turn_only:
        final = np.ones(len(owners), dtype=np.bool_)
        final[:-1] = owners[1:] != owners[:-1]
        owners, turns = owners[final], turns[final]
    return owners, turns[:, 0], turns[:, 1]


def _last(
    owners: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], *, size: int
) -> npt.NDArray[np.int64]:
    """The largest end of each owner's spans, 1 where it has none."""
    result = np.ones(size, dtype=np.int64)
    np.maximum.at(result, owners, ends)
    return result
