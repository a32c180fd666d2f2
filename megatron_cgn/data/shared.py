"""Copies of the main process that encode blocks, and the memory in which these come and go.

There are as many places as there may be blocks under way. A block that does not fit into its place,
and ids that do not, go through the pipe instead.
"""

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from megatron_cgn.data.documents import Block
from megatron_cgn.data.encode import BlockEncoder, Encoded
from megatron_cgn.data.pool import Pool

Result = tuple[int, int, Encoded]
"""The place of a block, how many ids are there (-1: they are in what follows), and all else."""

# Blocks under way per process, enough to keep it busy; and fewer where they are large, to hold
# them.
_BLOCKS_AHEAD = 3
_BLOCK_BYTES = 4 << 18
_PLACE_BYTES = 4 << 20
"""A block of 1 MiB has at most as many tokens as bytes, of at most four bytes each."""


@dataclass(frozen=True, slots=True)
class Task:
    """A block to encode."""

    block: Block
    """Without its content, where that is shared."""
    place: int
    """Which of the places is this block's."""
    size: int
    """Bytes of the content that are shared, 0 if none are."""


class SharedBlocks:
    """The places; made before the processes are copied."""

    def __init__(self, num_places: int) -> None:
        """Ask for the memory: it is taken as it is used."""
        self._num_places = num_places
        self._memory = mmap.mmap(-1, num_places * _PLACE_BYTES)
        self._view = memoryview(self._memory)

    def tasks(self, blocks: Iterable[Block]) -> Iterator[Task]:
        """Put blocks into places, one place after another and over again."""
        for number, block in enumerate(blocks):
            place = number % self._num_places
            content = block.content
            if isinstance(content, bytes) and 0 < len(content) <= _PLACE_BYTES:
                self._at(place)[: len(content)] = content
                yield Task(replace(block, content=b""), place, len(content))
            else:
                yield Task(block, place, 0)

    def block(self, task: Task) -> Block:
        """Take a block from its place."""
        if not task.size:
            return task.block
        return replace(task.block, content=bytes(self._at(task.place)[: task.size]))

    def put(self, task: Task, encoded: Encoded) -> Result:
        """Put ids into the place where the block was; the rest is returned."""
        data = encoded.tokens
        if data.nbytes > _PLACE_BYTES or encoded.left:
            return task.place, -1, encoded
        self._at(task.place)[: data.nbytes] = memoryview(data).cast("B")
        return task.place, len(data), replace(encoded, tokens=data[:0])

    def take(self, result: Result) -> Encoded:
        """Give what `put` returned its ids again: they stay in shared memory."""
        place, count, encoded = result
        if count < 0:
            return encoded
        tokens = np.frombuffer(self._at(place), dtype=encoded.tokens.dtype, count=count)
        return replace(encoded, tokens=tokens)

    def _at(self, place: int) -> memoryview:
        return self._view[place * _PLACE_BYTES : (place + 1) * _PLACE_BYTES]


class _Worker:
    """Encodes blocks that are in shared memory."""

    def __init__(self, shared: SharedBlocks, encode: BlockEncoder) -> None:
        self._shared = shared
        self._encode = encode
        self.spent = encode.spent

    def __call__(self, task: Task) -> Result:
        return self._shared.put(task, self._encode(self._shared.block(task)))


class Encoders:
    """Copies of this process that encode blocks. Use as a context manager."""

    def __init__(self, encode: BlockEncoder, *, processes: int) -> None:
        """Settle what to do; nothing is started yet.

        Args:
            encode: Encodes a block.
            processes: How many; 0 encodes in this one.
        """
        self._encode = encode
        self._ahead = processes * _BLOCKS_AHEAD
        self._shared = SharedBlocks(self._ahead + 1) if processes else None
        self._pool: Pool[Task, Result] | None = None
        if self._shared is not None:
            self._pool = Pool(
                partial(_Worker, self._shared, encode),
                processes=processes,
                start="fork",
                describe=lambda task: f"{task.block.path} from line or row {task.block.first} on",
            )

    def __enter__(self) -> Self:
        """Start the processes."""
        if self._pool is not None:
            self._pool.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.__exit__(kind, error, trace)

    def __call__(self, blocks: Iterable[Block]) -> Iterator[Encoded]:
        """Encode blocks.

        Args:
            blocks: Read as they are needed.

        Yields:
            Their ids, in the same order; each is valid until the next is asked for.

        Raises:
            DataError: If a process was killed, or a block holds a fault.
            NotEqual: If the fast encoder fails.
        """
        if self._pool is None or self._shared is None:
            yield from map(self._encode, blocks)
            return
        results = self._pool.map(
            self._shared.tasks(blocks),
            tasks_ahead=self._ahead,
            size_of=lambda task: task.size or task.block.size,
            bytes_ahead=self._ahead * _BLOCK_BYTES,
        )
        for result in results:
            yield self._shared.take(result)
