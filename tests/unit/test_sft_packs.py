"""The sequences of a run on disk: whole epochs over many windows, and parts of them."""

import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cgn.data.sft_order import WINDOW, ConversationPool
from megatron_cgn.data.sft_packs import PackList, PackOrder, build_packs, open_packs
from megatron_cgn.errors import DataError


def order_of(lengths: np.ndarray, *, seq_length: int = 64, packing: bool = True) -> PackOrder:
    pool = ConversationPool(
        identity="pool",
        conversations=np.arange(len(lengths)),
        lengths=lengths,
        share=Fraction(1),
    )
    return PackOrder(
        pools=(pool,),
        seed=3,
        seq_length=seq_length,
        packing=packing,
        epoch=float(lengths.sum(dtype=np.int64)),
    )


def build(
    order: PackOrder,
    cache: Path,
    *,
    epochs: Fraction | None = None,
    sequences: int | None = None,
) -> PackList:
    (pool,) = order.pools
    folder = build_packs(
        order, pool.lengths, sequences=sequences, epochs=epochs, numbering="n", cache=cache
    )
    return open_packs(folder)


def test_an_epoch_of_many_windows_holds_each_conversation_once(tmp_path: Path) -> None:
    count = 2 * WINDOW + 1000
    lengths = np.random.default_rng(0).integers(1, 65, count).astype(np.int32)
    packs = build(order_of(lengths), tmp_path, epochs=Fraction(2))
    assert np.bincount(packs.conversations, minlength=count).tolist() == [2] * count
    sizes = np.add.reduceat(lengths[packs.conversations].astype(int), packs.bounds[:-1])
    assert sizes.max() <= 64
    assert lengths.sum() * 2 / (64 * len(packs)) > 0.99
    # The first epoch's conversations all come before the second's.
    assert len(np.unique(packs.conversations[:count])) == count


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=40),
    st.fractions(Fraction(1, 50), 4, max_denominator=50),
    st.booleans(),
)
def test_a_run_of_any_length_is_the_beginning_of_a_longer_one(
    lengths: list[int], epochs: Fraction, packing: bool
) -> None:
    array = np.array(lengths, dtype=np.int32)
    order = order_of(array, packing=packing)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        whole = build(order, cache, epochs=Fraction(5))
        part = build(order, cache, epochs=epochs)
        same = build(order, cache, sequences=len(part))
    wanted = [whole[sequence] for sequence in range(len(part))]
    assert [part[sequence] for sequence in range(len(part))] == wanted
    assert [same[sequence] for sequence in range(len(same))] == wanted
    tokens = int(array[part.conversations].sum())
    asked = epochs * int(array.sum())
    if epochs.denominator == 1:
        assert tokens == asked
    else:
        # The conversation drawn at the end is in by half, and its sequence is read whole.
        assert asked - max(lengths) <= tokens <= asked + 64 + max(lengths)


@pytest.mark.parametrize("name", ["conversations.bin", "facts.json"])
def test_a_damaged_list_is_refused(tmp_path: Path, name: str) -> None:
    order = order_of(np.full(20, 10, dtype=np.int32))
    build(order, tmp_path, epochs=Fraction(1))
    (folder,) = tmp_path.iterdir()
    (folder / name).write_bytes((folder / name).read_bytes()[:-4])
    with pytest.raises(DataError, match="Delete this folder"):
        open_packs(folder)


def test_lists_of_other_settings_lie_elsewhere(tmp_path: Path) -> None:
    lengths = np.full(20, 10, dtype=np.int32)
    for order in (
        order_of(lengths),
        order_of(lengths, seq_length=100),
        order_of(lengths, packing=False),
    ):
        build(order, tmp_path, epochs=Fraction(1))
        build(order, tmp_path, epochs=Fraction(2))
        build(order, tmp_path, epochs=Fraction(1))
    assert len(list(tmp_path.iterdir())) == 6
