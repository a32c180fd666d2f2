"""What is read of conversations and what counts, against the same told place by place."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cgn.data import sft_selection
from megatron_cgn.data.sft_selection import (
    KEPT,
    NOTHING_COUNTED,
    TOO_LONG,
    TRUNCATED,
    Reading,
    counted_labels,
    select,
)
from megatron_cgn.data.sft_store import ROW, SftStore

type Chat = tuple[int, list[tuple[int, int]]]
"""Tokens of a conversation, and the assistant's turns in it."""


@st.composite
def chats(draw: st.DrawFn) -> Chat:
    """A question of at least a token before each turn but for turns on end, and perhaps more."""
    turns, place = [], draw(st.integers(1, 6))
    for _ in range(draw(st.integers(1, 4))):
        turns.append((place, place + draw(st.integers(2, 6))))
        place = turns[-1][1] + draw(st.integers(0, 5))
    return place + draw(st.integers(0, 2)), turns


def store_of(conversations: list[Chat]) -> SftStore:
    rows = np.zeros(len(conversations), dtype=ROW)
    sizes = [size for size, _ in conversations]
    counts = [len(turns) for _, turns in conversations]
    for name, values in (("token", sizes), ("turn", counts)):
        rows[f"{name}s"] = values
        rows[name] = [0, *itertools.accumulate(values[:-1])]
    return SftStore(
        folder=Path("nowhere"),
        tokens=np.arange(sum(sizes)),
        rows=rows,
        turns=np.array([turn for _, turns in conversations for turn in turns], dtype=np.int32),
        ids=np.empty(0, dtype=np.uint8),
    )


def expected(chat: Chat, reading: Reading) -> tuple[int, int, list[bool]]:
    """What becomes of a conversation, the first token that is read, and which labels count."""
    size, turns = chat
    turns = turns[-1:] if reading.last_turn_only else turns
    inside = {token for begin, end in turns for token in range(begin, end)}
    # Place i reads token i and predicts token i + 1; behind the last that counts nothing is read.
    labels = [reading.train_on_prompt or token in inside for token in range(1, size)]
    labels = labels[: max(place for place, counts in enumerate(labels) if counts) + 1]
    begin, state = 0, KEPT
    if len(labels) > reading.seq_length:
        if reading.truncation in ("drop", "error"):
            return TOO_LONG, 0, []
        state = TRUNCATED
        if reading.truncation == "keep_end":
            begin = len(labels) - reading.seq_length
        labels = labels[begin : begin + reading.seq_length]
        while labels and not labels[-1]:
            labels.pop()
    return (state, begin, labels) if labels else (NOTHING_COUNTED, 0, [])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(chats(), min_size=1, max_size=12),
    st.integers(1, 30),
    st.sampled_from(["error", "drop", "keep_start", "keep_end"]),
    st.sampled_from([(False, False), (True, False), (False, True)]),
)
def test_labels_are_those_told_place_by_place(
    conversations: list[Chat],
    limit: int,
    truncation: sft_selection.Truncation,
    how: tuple[bool, bool],
) -> None:
    reading = Reading(
        seq_length=limit, truncation=truncation, train_on_prompt=how[0], last_turn_only=how[1]
    )
    store = store_of(conversations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_selection, "_CHUNK", 5)  # in several parts
        found = select(store, reading)
    for number, chat in enumerate(conversations):
        state, begin, labels = expected(chat, reading)
        assert found.state[number] == state
        assert found.read[number] == (state in (KEPT, TRUNCATED))
        if found.read[number]:
            assert found.begin[number] == begin
            assert found.places[number] == len(labels)
            assert found.counted[number] == sum(labels)
            stop = int(found.stop[number])
            counted = counted_labels(store, number, reading, begin=begin, stop=stop)
            assert counted.tolist() == labels
