"""In which order one index is read: sample k is the same however long the run is.

An *epoch* visits every document once, in a permutation of its own. The epochs, one after another,
are an endless stream of tokens, and window w is its tokens ``[w * S, w * S + S]``, the last of
which is the first of window w + 1: S labels each. The windows that start in an epoch are visited in
a permutation too, but the last of them, which alone may reach into the next epoch, comes last. So
``ceil(E * T / S) - 1`` samples, with T tokens an epoch, are exactly what E epochs hold.

Permutations depend on the seed, the documents' content and the epoch, never on paths or on the
run. They are kept *block* by block: an epoch, or as many as make 4 million tokens and a window of a
small index. A block lies on disk as two arrays that every process maps; see `blocks.py`.
"""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer[Any]]

_BLOCK_TOKENS = 1 << 22
_VERSION = 1
"""Changes with every change of the order, so that caches of another are not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some epochs of an index."""

    documents: Integers
    """Documents in the order of the stream, counted from the first to train on, ``[N]``."""
    starts: Integers
    """Where each sample starts, in the order of training: its place in ``documents`` and its
    offset in that document in tokens, ``[samples, 2]``."""


@dataclass(frozen=True, kw_only=True)
class ReadingOrder:
    """The order of one index, as arithmetic."""

    identity: str
    """Stands for the content of the documents."""
    num_documents: int
    """Documents of an epoch."""
    tokens: int
    """Tokens of an epoch, at least one."""
    seq_length: int
    """Labels of one sample (S)."""
    seed: int
    """Seed of the order."""

    @functools.cached_property
    def epochs_per_block(self) -> int:
        """Epochs of one block; the blocks are long enough for a sample to meet two at most."""
        return -(-max(_BLOCK_TOKENS, self.seq_length + 1) // self.tokens)

    @functools.cached_property
    def block_tokens(self) -> int:
        """Tokens of one block."""
        return self.epochs_per_block * self.tokens

    def block_of(self, sample: int) -> int:
        """The block in which a sample lies."""
        return sample * self.seq_length // self.block_tokens

    def first_sample(self, block: int) -> int:
        """The first sample of a block."""
        return -(-block * self.block_tokens // self.seq_length)

    def blocks_for(self, samples: int) -> int:
        """How many blocks the first ``samples`` samples read: their last label's and before."""
        return samples * self.seq_length // self.block_tokens + 1 if samples else 0

    def key(self) -> str:
        """Hash of everything that decides the order."""
        facts = f"{_VERSION}/{self.seed}/{self.seq_length}/{self.identity}"
        return hashlib.blake2b(facts.encode(), digest_size=12).hexdigest()

    def build(self, block: int, lengths: npt.NDArray[np.int32]) -> Block:
        """Draw a block.

        Takes about 24 bytes a document and 40 bytes a sample of memory.

        Args:
            block: Its number.
            lengths: Tokens of each document of an epoch, int32 ``[num_documents]``.

        Returns:
            The block.
        """
        assert len(lengths) == self.num_documents, (len(lengths), self.num_documents)
        documents = self._permute_documents(block)
        ends = np.cumsum(lengths[documents], dtype=np.int64)
        windows = self._windows(block)
        # Not "left": a document without tokens holds no window's start.
        places = np.searchsorted(ends, windows, side="right")
        dtype = np.int32 if len(documents) < 1 << 31 else np.int64
        starts = np.empty((len(windows), 2), dtype=dtype)
        visit = self._permute_windows(block, windows)
        starts[:, 0] = places[visit]
        starts[:, 1] = (windows - ends[places] + lengths[documents[places]])[visit]
        return Block(documents=documents, starts=starts)

    def _windows(self, block: int) -> npt.NDArray[np.int64]:
        """Where the windows of a block start, in tokens from the block's first."""
        begin = self.first_sample(block) * self.seq_length - block * self.block_tokens
        return np.arange(begin, self.block_tokens, self.seq_length, dtype=np.int64)

    def _permute_documents(self, block: int) -> Integers:
        """One permutation an epoch, one after another."""
        keys = self._random(block, "documents", self.epochs_per_block * self.num_documents)
        keys = keys.reshape(self.epochs_per_block, self.num_documents)
        mask = _mask(self.num_documents)
        keys &= ~mask
        keys |= np.arange(self.num_documents, dtype=np.uint64)
        keys.sort(axis=1)
        keys &= mask
        dtype = np.int32 if self.num_documents < 1 << 31 else np.int64
        return keys.reshape(-1).astype(dtype)

    def _permute_windows(self, block: int, windows: npt.NDArray[np.int64]) -> Integers:
        """A permutation of each epoch's windows that leaves its last one in place."""
        epochs = windows // self.tokens
        last = np.ones(len(windows), dtype=np.bool_)
        last[:-1] = epochs[1:] != epochs[:-1]
        keys = self._random(block, "windows", len(windows))
        # Sorted by epoch, then the last window behind the others, then at random.
        group_bits = (2 * self.epochs_per_block).bit_length()
        mask = _mask(len(windows))
        keys >>= np.uint64(group_bits)
        keys &= ~mask
        keys |= (2 * epochs + last).astype(np.uint64) << np.uint64(64 - group_bits)
        keys |= np.arange(len(windows), dtype=np.uint64)
        keys.sort()
        keys &= mask
        return keys.astype(np.int64)

    def _random(self, block: int, what: str, size: int) -> npt.NDArray[np.uint64]:
        """Random bits. NumPy keeps raw bits the same over its versions, unlike permutations."""
        name = f"{_VERSION}/{self.seed}/{self.identity}/{block}/{what}"
        key = hashlib.blake2b(name.encode(), digest_size=16).digest()
        bits: npt.NDArray[np.uint64] = np.random.Philox(
            key=int.from_bytes(key, "little")
        ).random_raw(size)
        return bits


def _mask(size: int) -> np.uint64:
    """Low bits that hold numbers below ``size``.

    In the low bits of the sort keys they make all keys different, so every sorting algorithm gives
    the same permutation; 64 bits leave more than 30 random ones for 10^9 documents.
    """
    return np.uint64((1 << max(1, size - 1).bit_length()) - 1)
