"""The order within one index: epochs are exact, and the k-th sample never depends on what follows.

Expected values come from the permuted documents laid end to end in a plain list.
"""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cgn.data import order as order_module
from megatron_cgn.data.blocks import SampleReader, fill_cache, reading_order
from megatron_cgn.data.indexed import check_index
from megatron_cgn.data.order import ReadingOrder
from megatron_cgn.data.sources import Documents
from tests.unit.data_samples import numbered_documents, write_index


def make(lengths: list[int], seq_length: int, *, seed: int = 1, name: str = "x") -> ReadingOrder:
    return ReadingOrder(
        identity=name,
        num_documents=len(lengths),
        tokens=sum(lengths),
        seq_length=seq_length,
        seed=seed,
    )


def starts(order: ReadingOrder, lengths: list[int], blocks: int) -> list[int]:
    """Where each sample starts in the stream of the epochs."""
    found = []
    for number in range(blocks):
        block = order.build(number, np.array(lengths, dtype=np.int32))
        bounds = np.concatenate([[0], np.cumsum(np.array(lengths)[block.documents])])
        base = number * order.block_tokens
        found += [base + int(bounds[place]) + int(offset) for place, offset in block.starts]
    return found


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of about 40 tokens, so that small examples have several."""
    monkeypatch.setattr(order_module, "_BLOCK_TOKENS", 40)


LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lengths=LENGTHS, seq_length=st.integers(1, 50))
def test_windows_tile_the_stream_epoch_by_epoch(lengths: list[int], seq_length: int) -> None:
    order, tokens = make(lengths, seq_length), sum(lengths)
    found = starts(order, lengths, 3)
    assert sorted(found) == [k * seq_length for k in range(len(found))]
    epochs = [start // tokens for start in found]
    assert epochs == sorted(epochs)
    for epoch, group in itertools.groupby(found, key=lambda start: start // tokens):
        members = list(group)
        assert members[-1] == max(members), epoch  # the one that may reach into the next epoch
        assert all(start + seq_length < (epoch + 1) * tokens for start in members[:-1])
    for number in range(3):
        documents = order.build(number, np.array(lengths, dtype=np.int32)).documents
        for epoch_documents in documents.reshape(order.epochs_per_block, len(lengths)):
            assert sorted(epoch_documents.tolist()) == list(range(len(lengths)))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=LENGTHS,
    seq_length=st.integers(1, 50),
    epochs=st.integers(1, 4),
    more=st.integers(0, 60),
)
def test_so_many_epochs_hold_every_token_so_often(
    tmp_path: Path, lengths: list[int], seq_length: int, epochs: int, more: int
) -> None:
    """Read through the cache: every token E times, but the first and what fills no window."""
    tokens = sum(lengths)
    samples = (epochs * tokens - 1) // seq_length
    prefix = write_index(tmp_path / "p", numbered_documents(lengths), overwrite=True)
    documents = Documents(index=check_index(prefix), start=0, stop=len(lengths))
    order = reading_order(documents, seq_length=seq_length, seed=7)
    fill_cache(order, documents, samples=samples + more, cache=tmp_path / "cache")
    reader = SampleReader(documents, order, samples=samples + more, cache=tmp_path / "cache")
    read = [reader.read(k) for k in range(samples + more)]
    counts = Counter(token for text in read[:samples] for token in text[1:].tolist())
    assert sum(counts.values()) == samples * seq_length
    assert max(counts.values(), default=0) <= epochs
    missing = sum(epochs - counts[token] for token in range(1, tokens + 1))
    assert missing == epochs * tokens - samples * seq_length <= seq_length
    # A shorter run reads the same.
    shorter = SampleReader(documents, order, samples=samples, cache=tmp_path / "cache")
    for k in range(samples):
        assert shorter.read(k).tolist() == read[k].tolist()


def test_samples_are_the_stream(tmp_path: Path) -> None:
    """Token by token: the permuted documents of all epochs, laid end to end."""
    lengths = [3, 0, 17, 1, 8, 90, 2]
    texts = numbered_documents(lengths)
    index = check_index(write_index(tmp_path / "p", [[9, 9], *texts, [8]]))
    documents = Documents(index=index, start=1, stop=8)
    order = reading_order(documents, seq_length=16, seed=3)
    fill_cache(order, documents, samples=60, cache=tmp_path)
    blocks = [order.build(number, np.array(lengths, dtype=np.int32)) for number in range(9)]
    stream = [t for block in blocks for d in block.documents.tolist() for t in texts[d]]
    reader = SampleReader(documents, order, samples=60, cache=tmp_path)
    for k, start in enumerate(starts(order, lengths, 8)[:60]):
        assert reader.read(k).tolist() == stream[start : start + 17]


def test_the_order_is_drawn_from_seed_content_and_epoch() -> None:
    lengths = [1] * 200
    first = make(lengths, 10).build(0, np.array(lengths, dtype=np.int32))
    sizes = np.array(lengths, dtype=np.int32)
    for other in (
        make(lengths, 10, seed=2).build(0, sizes),
        make(lengths, 10, name="y").build(0, sizes),
        make(lengths, 10).build(1, sizes),
    ):
        assert first.documents.tolist() != other.documents.tolist()
        assert first.starts.tolist() != other.starts.tolist()
    # A permutation of 0 … 199 with next to no fixed points and no order left.
    assert sum(first.documents == np.arange(200)) < 8
    assert abs(np.corrcoef(first.documents, np.arange(200))[0, 1]) < 0.25
    again = make(lengths, 10).build(0, sizes)
    assert again.documents.tolist() == first.documents.tolist()


def test_the_order_stays_the_same_over_versions() -> None:
    """A checkpoint of last year goes on with what it has not read: this must not change."""
    block = make([1] * 12, 2, seed=5, name="digest[0:12]").build(0, np.ones(12, dtype=np.int32))
    assert block.documents[:12].tolist() == PINNED_DOCUMENTS
    assert block.starts[:6, 0].tolist() == PINNED_STARTS


PINNED_DOCUMENTS = [0, 1, 6, 4, 8, 10, 2, 9, 7, 3, 11, 5]
PINNED_STARTS = [0, 4, 8, 6, 2, 10]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_permutation_is_as_likely(size: int) -> None:
    """Chi-squared over 6,000 draws of the permutations of up to five documents."""
    drawn: Counter[tuple[int, ...]] = Counter()
    sizes = np.ones(size, dtype=np.int32)
    order = make([1] * size, 1)
    for number in range(-(-6000 // order.epochs_per_block)):
        documents = order.build(number, sizes).documents.reshape(-1, size)
        drawn.update(map(tuple, documents.tolist()))
    kinds = list(itertools.permutations(range(size)))
    expected = drawn.total() / len(kinds)
    statistic = sum((drawn[kind] - expected) ** 2 / expected for kind in kinds)
    freedom = len(kinds) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


def test_numbers_beyond_31_bits() -> None:
    """Arithmetic of an index of 10^13 tokens, of which no array is built."""
    order = ReadingOrder(identity="x", num_documents=10**9, tokens=10**13, seq_length=4096, seed=1)
    last = (3 * 10**13 - 1) // 4096  # samples in three epochs
    assert order.epochs_per_block == 1
    assert order.block_of(last - 1) == 2
    assert order.blocks_for(last) == 3
    assert order.blocks_for(last + 1) == 4  # one more reads the next epoch's first tokens
    assert order.first_sample(3) == last + 1


def test_offsets_beyond_31_bits() -> None:
    """Three documents of 10^9 tokens each: places and offsets, over 2^31 tokens in."""
    lengths = [10**9, 10**9, 10**9]
    order = make(lengths, 5 * 10**7)
    found = starts(order, lengths, 2)
    assert sorted(found) == [k * 5 * 10**7 for k in range(120)]
