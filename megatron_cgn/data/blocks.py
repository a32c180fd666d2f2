"""Blocks of a reading order on disk, and samples read through them.

::

    <cache>/order-<key>-<block>/documents.npy, starts.npy

A folder appears only when it is complete, and is keyed by the content of the index: a changed
index is never read through an old order, and a longer run only adds blocks.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.folders import new_folder, wait_for_folder
from megatron_cgn.data.indexed import HEADER, IndexInfo, map_tokens
from megatron_cgn.data.order import Block, ReadingOrder
from megatron_cgn.data.sources import Documents
from megatron_cgn.errors import DataError

HANDLES_PER_INDEX = 7
"""Open files of an index that is read, since a mapped file stays open: its tokens, lengths and
places, and two arrays of each of two blocks."""


def reading_order(documents: Documents, *, seq_length: int, seed: int) -> ReadingOrder:
    """The order in which a range of documents is read."""
    return ReadingOrder(
        identity=documents.identity,
        num_documents=len(documents),
        tokens=documents.tokens,
        seq_length=seq_length,
        seed=seed,
    )


def lengths_of(documents: Documents) -> npt.NDArray[np.int32]:
    """Tokens of each document, int32 ``[len(documents)]``, mapped."""
    return documents.index.lengths[documents.start : documents.stop]


def fill_cache(order: ReadingOrder, documents: Documents, *, samples: int, cache: Path) -> None:
    """Build the blocks that the first ``samples`` samples need, unless they are there.

    Args:
        order: The order.
        documents: What it is the order of.
        samples: How many samples will be read.
        cache: Where blocks belong.

    Raises:
        DataError: If the cache cannot be written.
    """
    for block in range(order.blocks_for(samples)):
        folder = _folder(cache, order, block)
        try:
            if not folder.is_dir():
                _write(order.build(block, lengths_of(documents)), folder)
        except OSError as error:
            raise DataError(
                f"{cache}: cannot write the shuffled indices ({error.strerror or error}). Make "
                "room there, or set data.cache_dir to a directory that can be written."
            ) from error


class SampleReader:
    """Samples of one index in the order of training. Maps files, so it may cross a fork."""

    def __init__(self, documents: Documents, order: ReadingOrder, *, samples: int, cache: Path):
        """Open every block once, so that a fault shows before training.

        Args:
            documents: What is read.
            order: In which order.
            samples: How many samples will be read; their blocks must have been built.
            cache: Where they are.

        Raises:
            DataError: If a block does not become visible or is damaged, or the index has gone.
        """
        self._order = order
        self._samples = samples
        self._cache = cache
        self._first_document = documents.start
        self._tokens = map_tokens(documents.index).view(np.ndarray)
        self._lengths = documents.index.lengths.view(np.ndarray)
        self._positions = map_starts(documents.index)
        self._blocks: dict[int, Block] = {}
        for block in range(order.blocks_for(samples)):
            self._block(block)

    def read(self, sample: int) -> npt.NDArray[np.int64]:
        """Tokens of a sample, int64 ``[seq_length + 1]``."""
        assert 0 <= sample < self._samples, (sample, self._samples)
        number = self._order.block_of(sample)
        block = self._block(number)
        place, offset = block.starts[sample - self._order.first_sample(number)].tolist()
        text = np.empty(self._order.seq_length + 1, dtype=np.int64)
        filled = 0
        while filled < len(text):
            if place == len(block.documents):
                number, place = number + 1, 0
                block = self._block(number)
            document = self._first_document + int(block.documents[place])
            take = min(int(self._lengths[document]) - offset, len(text) - filled)
            begin = int(self._positions[document]) // self._tokens.itemsize + offset
            text[filled : filled + take] = self._tokens[begin : begin + take]
            filled, place, offset = filled + take, place + 1, 0
        return text

    def _block(self, number: int) -> Block:
        """Map a block. Two stay mapped: a run with many files would run out of file handles."""
        found = self._blocks.get(number)
        if found is None:
            found = _open(self._order, number, _folder(self._cache, self._order, number))
            if len(self._blocks) == 2:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = found
        return found


def map_starts(index: IndexInfo) -> npt.NDArray[np.int64]:
    """Byte at which each document starts in the ``.bin``, int64 ``[documents]``, mapped.

    Raises:
        DataError: If the ``.idx`` cannot be read.
    """
    path = index.prefix + ".idx"
    try:
        mapped = np.memmap(
            path,
            dtype="<i8",
            mode="r",
            offset=HEADER.size + 4 * index.documents,
            shape=(index.documents,),
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    return mapped.view(np.ndarray)


def _folder(cache: Path, order: ReadingOrder, block: int) -> Path:
    return cache / f"order-{order.key()}-{block:05d}"


def _write(block: Block, folder: Path) -> None:
    arrays: Mapping[str, object] = {"documents": block.documents, "starts": block.starts}
    with new_folder(folder) as temporary:
        for name, array in arrays.items():
            with (temporary / f"{name}.npy").open("wb") as stream:
                np.save(stream, np.asarray(array))


def _open(order: ReadingOrder, number: int, folder: Path) -> Block:
    """Map a block, waiting for a slow network file system."""
    wait_for_folder(folder)
    try:
        block = Block(
            documents=np.load(folder / "documents.npy", mmap_mode="r").view(np.ndarray),
            starts=np.load(folder / "starts.npy", mmap_mode="r").view(np.ndarray),
        )
        samples = order.first_sample(number + 1) - order.first_sample(number)
        expected = ((order.epochs_per_block * order.num_documents,), (samples, 2))
        if (block.documents.shape, block.starts.shape) != expected:
            raise ValueError("its arrays have other shapes")
        return block
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{folder}: cannot read the shuffled indices ({error}). Delete this folder; it is "
            "built again."
        ) from error
