"""The stream of conversations: epochs, shares, windows, and what they do not depend on."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cgn.data.packing import Packs
from megatron_cgn.data.sft_order import (
    ConversationPool,
    Window,
    pack_window,
    permutation,
    windows,
)


def pool(name: str, lengths: list[int], share: Fraction, *, first: int = 0) -> ConversationPool:
    return ConversationPool(
        identity=name,
        conversations=np.arange(first, first + len(lengths)),
        lengths=np.array(lengths, dtype=np.int32),
        share=share,
    )


def take(pools: list[ConversationPool], number: int, **how: float) -> list[Window]:
    how = {"epoch": math.inf, **how}
    return list(itertools.islice(windows(pools, seed=1, **how), number))  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 17))
def test_every_epoch_of_one_pool_holds_each_conversation_once(
    lengths: list[int], size: int
) -> None:
    per_epoch = -(-len(lengths) // size)
    found = take(
        [pool("a", lengths, Fraction(1))], 3 * per_epoch, epoch=float(sum(lengths)), size=size
    )
    for number in range(3):
        epoch = found[number * per_epoch : (number + 1) * per_epoch]
        assert {window.epoch for window in epoch} == {number}
        assert all(len(window.conversations) <= size for window in epoch)
        drawn = np.concatenate([window.conversations for window in epoch])
        assert sorted(drawn.tolist()) == list(range(len(lengths)))


def test_epochs_have_orders_of_their_own() -> None:
    lengths = [5] * 50
    first, second = take([pool("a", lengths, Fraction(1))], 2, epoch=250.0)
    assert first.conversations.tolist() != second.conversations.tolist()
    assert first.conversations.tolist() != list(range(50))


def test_pools_of_one_size_have_orders_of_their_own() -> None:
    half = Fraction(1, 2)
    (window,) = take([pool("a", [5] * 50, half), pool("b", [5] * 50, half, first=50)], 1, size=100)
    a, b = ([c % 50 for c in window.conversations.tolist() if c // 50 == who] for who in (0, 1))
    assert sorted(a) == sorted(b) and a != b


shares = st.lists(st.integers(1, 9), min_size=2, max_size=4).map(
    lambda weights: [Fraction(w, sum(weights)) for w in weights]
)


@settings(max_examples=25, deadline=None)
@given(shares, st.integers(0, 2**32))
def test_at_any_time_each_pool_has_given_its_share(parts: list[Fraction], seed: int) -> None:
    draw = np.random.default_rng(seed)
    pools, first = [], 0
    for number, share in enumerate(parts):
        lengths = draw.integers(1, 40, size=draw.integers(1, 60)).tolist()
        pools.append(pool(str(number), lengths, share, first=first))
        first += len(lengths)
    (window,) = take(pools, 1, size=400)
    lengths_of = np.concatenate([p.lengths for p in pools])
    owner = np.repeat(np.arange(len(pools)), [len(p.lengths) for p in pools])
    tokens = np.zeros(len(pools))
    longest = lengths_of.max()
    for conversation in window.conversations:
        tokens[owner[conversation]] += lengths_of[conversation]
        wanted = np.array([float(share) for share in parts]) * tokens.sum()
        # Each is less than one conversation off its own time, and so is their sum's.
        assert (np.abs(tokens - wanted) <= longest * len(pools)).all()
    # Nothing is skipped: every pool goes through its conversations equally often.
    times = Counter(window.conversations.tolist())
    for p in pools:
        counts = [times[c] for c in p.conversations.tolist()]
        assert max(counts) - min(counts) <= 1


def test_windows_do_not_depend_on_how_pools_are_numbered() -> None:
    a, b = [3, 9, 4, 7] * 10, [20, 30, 10]
    one = take([pool("a", a, Fraction(2, 3)), pool("b", b, Fraction(1, 3), first=40)], 3, size=30)
    other = take([pool("b", b, Fraction(1, 3)), pool("a", a, Fraction(2, 3), first=3)], 3, size=30)
    for x, y in zip(one, other, strict=True):
        renamed = [c + 3 if c < 40 else c - 40 for c in x.conversations.tolist()]
        assert y.conversations.tolist() == renamed


def test_an_epoch_of_one_pool_of_several_ends_a_window() -> None:
    base = pool("base", [10] * 30, Fraction(3, 4))
    other = pool("other", [25] * 5, Fraction(1, 4), first=30)
    found = take([base, other], 4, epoch=300 / 0.75)
    for window in found:
        drawn = [c for c in window.conversations.tolist() if c < 30]
        assert sorted(drawn) == list(range(30))


def items_of(packs: Packs) -> list[list[int]]:
    return [packs.items[a:b].tolist() for a, b in itertools.pairwise(packs.bounds)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_a_window_is_packed_whole(lengths: list[int]) -> None:
    array = np.array(lengths, dtype=np.int32)
    found = items_of(pack_window(array, seq_length=64, packing=True, name="w"))
    assert sorted(itertools.chain.from_iterable(found)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= 64 for pack in found)
    alone = items_of(pack_window(array, seq_length=64, packing=False, name="w"))
    assert alone == [[i] for i in range(len(lengths))]


def test_packs_of_a_window_are_shuffled() -> None:
    lengths = np.arange(1, 65, dtype=np.int32)
    orders = [
        items_of(pack_window(lengths, seq_length=64, packing=True, name=name)) for name in "ab"
    ]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    longest = [max(pack) for pack in orders[0]]
    assert longest != sorted(longest, reverse=True), "long conversations must not come first"


def test_permutations_are_those_of_every_numpy() -> None:
    """Recorded: another order would go on from a checkpoint with other conversations."""
    assert permutation(8, "x").tolist() == [7, 3, 6, 5, 2, 1, 4, 0]


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_permutation_holds_each_number_once(size: int) -> None:
    assert sorted(permutation(size, "x").tolist()) == list(range(size))
