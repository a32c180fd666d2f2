"""Which documents agree in a band of their signatures, and of those, which are similar.

Locality-sensitive hashing after Indyk and Motwani (1998): a signature is cut into bands of some
rows; documents that are equal in all rows of a band share a bucket, and only those are compared.
Two documents of similarity ``s`` meet with probability ``1 - (1 - s^rows)^bands``.
"""

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from megatron_cgn.corpus.dedup.signature import EMPTY, Signatures
from megatron_cgn.corpus.dedup.tokens import Hashes, mix

Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# A pair at the threshold meets in at least one band at least this often.
_RECALL: Final = 0.98
_PAIRS_AT_ONCE: Final = 1 << 11
_ROWS_AT_ONCE: Final = 1 << 16
# Rows read from mapped files before their pages are given back. A row may map 16 pages around it.
_ROWS_TO_HOLD: Final = 1 << 12


@dataclass(frozen=True, slots=True)
class Banding:
    """How signatures are cut."""

    bands: int
    """Number of bands."""
    rows: int
    """Places of the signature in each."""

    def probability(self, similarity: float) -> float:
        """How likely two documents of this similarity meet in at least one band."""
        return 1 - (1 - similarity**self.rows) ** self.bands


def banding(num_permutations: int, threshold: float) -> Banding:
    """Choose the longest bands that still let pairs at the threshold meet.

    Args:
        num_permutations: Places of a signature.
        threshold: Similarity from which pairs must be found, above 0 and at most 1.

    Returns:
        The bands: the most rows with which a pair at the threshold meets with a probability of
        0.98 or more. Fewer rows would find no more and compare more.
    """
    for rows in range(num_permutations, 1, -1):
        chosen = Banding(num_permutations // rows, rows)
        if chosen.probability(threshold) >= _RECALL:
            return chosen
    return Banding(num_permutations, 1)


@dataclass(frozen=True, slots=True)
class Edges:
    """Pairs of similar documents. Legend: E pairs."""

    first: Indices
    """`[E]`: index of the earlier document."""
    second: Indices
    """`[E]`: index of the later one."""
    similarity: npt.NDArray[np.float32]
    """`[E]`: estimated Jaccard similarity."""

    def __len__(self) -> int:
        return len(self.first)


NO_EDGES: Final = Edges(
    np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
)


class Rows:
    """Signatures of all parts, as one matrix that is never in memory as a whole.

    Args:
        parts: Signatures in order; equal in width.
    """

    def __init__(self, parts: Sequence[Signatures]) -> None:
        self._parts = [part.minhashes for part in parts]
        self._ends = np.cumsum([len(part) for part in parts])
        self._maps = [found for part in self._parts if (found := _mapping(part)) is not None]
        self._num_read = 0

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def gather(self, indices: Indices) -> npt.NDArray[np.uint32]:
        """Copy the rows of these documents."""
        self._give_back(len(indices))
        if len(self._parts) == 1:
            return self._parts[0][indices]
        rows = np.empty((len(indices), self._parts[0].shape[1]), dtype=np.uint32)
        order = np.argsort(indices, kind="stable")
        in_order = indices[order]
        # Between which of them each part's documents are.
        cuts = np.searchsorted(in_order, np.concatenate(([0], self._ends)))
        for part in np.flatnonzero(cuts[1:] > cuts[:-1]):
            here = slice(cuts[part], cuts[part + 1])
            begin = self._ends[part] - len(self._parts[part])
            rows[order[here]] = self._parts[part][in_order[here] - begin]
        return rows

    def blocks(self) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
        """Read all rows in order, a block at a time, each with its first row's index."""
        begin = 0
        for part in self._parts:
            for low in range(0, len(part), _ROWS_AT_ONCE):
                block = np.asarray(part[low : low + _ROWS_AT_ONCE])
                self._give_back(len(block))
                yield begin + low, block
            begin += len(part)

    def _give_back(self, num_rows: int) -> None:
        """Now and then have the kernel unmap what was read: it stays in the page cache."""
        self._num_read += num_rows
        if self._num_read > _ROWS_TO_HOLD:
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)
            self._num_read = 0

    def similarities(self, first: Indices, second: Indices) -> npt.NDArray[np.float32]:
        """Estimate the similarity of pairs: the share of equal places."""
        found = np.empty(len(first), dtype=np.float32)
        for low in range(0, len(first), _PAIRS_AT_ONCE):
            here = slice(low, low + _PAIRS_AT_ONCE)
            found[here] = _share_equal(self.gather(first[here]), self.gather(second[here]))
        return found


def _mapping(array: npt.NDArray[np.uint32]) -> mmap.mmap | None:
    """The mapped file that an array, however sliced, is in; None if it is in memory."""
    base = array.base
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def _share_equal(
    first: npt.NDArray[np.uint32], second: npt.NDArray[np.uint32]
) -> npt.NDArray[np.float32]:
    """Share of equal places in each row."""
    return np.asarray(np.count_nonzero(first == second, axis=1) / first.shape[1], np.float32)


def signed(rows: Rows) -> Flags:
    """Tell which documents have a signature: those not too short for one."""
    has_one = np.empty(len(rows), dtype=np.bool_)
    for begin, block in rows.blocks():
        has_one[begin : begin + len(block)] = (block != EMPTY).any(axis=1)
    return has_one


def sorted_bands(
    rows: Rows, cut: Banding, live: Flags, *, memory_bytes: int
) -> Iterator[npt.NDArray[np.uint64]]:
    """Sort the live documents of each band by bucket, in each bucket by index.

    Args:
        rows: All signatures, N of them; read once for as many bands as the memory has room for.
        cut: Bands.
        live: `[N]`: which documents take part.
        memory_bytes: For the keys of several bands: 4 bytes a band and live document.

    Yields:
        A band's `[number live]` uint64: the bucket in the upper 32 bits, the document in the
        lower. Two buckets may fall together; comparing what is in one finds the difference.
    """
    indices = np.flatnonzero(live).astype(np.uint64)
    at_once = max(1, min(cut.bands, memory_bytes // max(1, 4 * len(indices))))
    for low in range(0, cut.bands, at_once):
        count = min(at_once, cut.bands - low)
        keys = np.empty((count, len(indices)), dtype=np.uint32)
        done = 0
        for begin, block in rows.blocks():
            block = block[live[begin : begin + len(block)]]
            for band in range(count):
                column = (low + band) * cut.rows
                keys[band, done : done + len(block)] = _keys(block[:, column : column + cut.rows])
            done += len(block)
        for band in range(count):
            packed = keys[band].astype(np.uint64) << np.uint64(32)
            packed |= indices
            packed.sort()
            yield packed


def _keys(rows: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Hash each row of a band to 32 bits."""
    total: Hashes = np.zeros(len(rows), dtype=np.uint64)
    for column in range(rows.shape[1]):
        total = mix(total + rows[:, column] + np.uint64(0x9E3779B97F4A7C15))
    return (total >> np.uint64(32)).astype(np.uint32)


def compare_bucket_mates(
    packed: npt.NDArray[np.uint64],
    similar: Callable[[Indices, Indices], Flags],
    *,
    finer: Hashes,
    max_leaders: int,
) -> Indices:
    """Compare the documents of each bucket with the bucket's leaders.

    The first document of a bucket is its first leader. Every other is compared with it; of those
    that are not similar the first is the next leader, and so on. So a bucket of m copies takes m
    comparisons instead of m²/2. A bucket of many different documents, such as records of one form,
    is split by `finer` when it has had `max_leaders`; what is in one then has as many again.

    Args:
        packed: A band, as `sorted_bands` yields it.
        similar: Told of leaders and others, pair by pair, says which are similar.
        finer: `[N]`: what duplicates in a crowded bucket are expected to have in common.
        max_leaders: Leaders a bucket may have.

    Returns:
        The documents that were left without a leader like them when the limit was first reached.
    """
    bucket, member = packed >> np.uint64(32), (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)
    bucket, member = _follow_leaders(bucket, member, similar, max_leaders)
    if len(bucket):
        bucket = mix(bucket ^ finer[member])
        # Stable: documents stay in order in each bucket.
        order = np.argsort(bucket, kind="stable")
        _follow_leaders(bucket[order], member[order], similar, max_leaders)
    return member


def _follow_leaders(
    bucket: Hashes,
    member: Indices,
    similar: Callable[[Indices, Indices], Flags],
    max_leaders: int,
) -> tuple[Hashes, Indices]:
    """Compare with up to `max_leaders` leaders; return who is left, in the same order."""
    for _ in range(max_leaders):
        begins = np.empty(len(bucket), dtype=np.bool_)
        begins[:1] = True
        np.not_equal(bucket[1:], bucket[:-1], out=begins[1:])
        alone = begins & np.append(begins[1:], True)
        bucket, member, begins = bucket[~alone], member[~alone], begins[~alone]
        if not len(bucket):
            break
        leaders = np.repeat(member[begins], np.diff(np.flatnonzero(begins), append=len(member)))
        bucket, others, leaders = bucket[~begins], member[~begins], leaders[~begins]
        rest = ~similar(leaders, others)
        bucket, member = bucket[rest], others[rest]
    return bucket, member
