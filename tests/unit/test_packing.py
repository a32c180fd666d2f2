"""First-fit-decreasing against the same in a plain loop, item by item."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cgn.data.packing import first_fit_decreasing


def plain(lengths: list[int], capacity: int) -> list[list[int]]:
    """Johnson's algorithm as it is told: the longest first, each into the first bin with room."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for place, left in enumerate(room):
            if left >= lengths[item]:
                bins[place].append(item)
                room[place] -= lengths[item]
                break
        else:
            bins.append([item])
            room.append(capacity - lengths[item])
    return bins


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 60))
    return draw(st.lists(st.integers(1, capacity), max_size=60)), capacity


@settings(max_examples=200, deadline=None)
@given(cases())
def test_bins_are_those_of_the_plain_algorithm(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    packs = first_fit_decreasing(np.array(lengths, dtype=np.int32), capacity=capacity)
    found = [packs.items[a:b].tolist() for a, b in pairwise(packs.bounds)]
    assert found == plain(lengths, capacity)
    assert len(packs) == len(found)


def test_conversations_waste_next_to_nothing() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 20_000).clip(8, 4096).astype(np.int32)
    packs = first_fit_decreasing(lengths, capacity=4096)
    fewest = -(-int(lengths.sum()) // 4096)
    assert len(packs) <= fewest * 1.002
