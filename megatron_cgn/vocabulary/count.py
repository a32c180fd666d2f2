"""Counts the words of a corpus with many processes.

Inputs are read as ``tools/preprocess_data.py`` reads them, in the calling process; documents are
parsed, chosen and cut into words by the others. What comes out does not depend on how many they
are. What is counted, and how, is in ``tokenizer/words.py``.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_cgn.data.documents import Block, parse_block
from megatron_cgn.data.pool import map_in_order
from megatron_cgn.data.readers import check_inputs, read_blocks
from megatron_cgn.errors import DataError
from tokenizer.splitters import ByteLevelSplitter, NotEqual
from tokenizer.words import Splitter, WordCounter, Words

log = logging.getLogger(__name__)

Keep = Callable[[str], bool]
"""Whether a document, given as its text, is counted. Can be pickled."""

_TASK_BYTES = 8 << 20
_HASHES = 2**64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """Which documents are counted, and how they are found in a block."""

    field: str
    keep: Keep | None
    seed: int
    share: float = 1.0
    """Of the documents, by the hash of their text."""

    def texts(self, blocks: Sequence[Block]) -> list[str]:
        """Documents of blocks that are to be counted."""
        texts = [text for block in blocks for text in parse_block(block, field=self.field).texts]
        if self.keep is not None:
            texts = [text for text in texts if self.keep(text)]
        if self.share < 1.0:
            texts = [text for text in texts if self._hash(text) < self.share * _HASHES]
        return texts

    def _hash(self, text: str) -> int:
        salt = self.seed.to_bytes(16, "little", signed=True)
        digest = hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest()
        return int.from_bytes(digest, "little")


def count_words(
    inputs: Sequence[str | Path],
    *,
    split: Splitter,
    field: str = "text",
    workers: int = 1,
    max_bytes: int | None = None,
    seed: int = 0,
    keep: Keep | None = None,
    report: Callable[[int], object] | None = None,
    sampled: Callable[[int], object] | None = None,
) -> Words:
    """Count the words of documents.

    Args:
        inputs: Files and directories: see ``data/readers.py``.
        split: Cuts a text into words.
        field: Name of the text's field.
        workers: Processes; 1 counts in this one. The result is the same.
        max_bytes: Most UTF-8 bytes of text, about; of a larger corpus a sample is counted, whole
            documents chosen by a hash. It needs a first pass over the inputs to measure them.
            None counts everything. Memory grows with the distinct words: counting and merging
            together take about nine bytes for each byte of Chinese text.
        seed: Of the sample.
        keep: Which documents are counted; None counts all.
        report: Called with the input bytes used up since its last call; over both passes they add
            up to what `check_inputs` gives.
        sampled: Called with the UTF-8 bytes of all text, where only a sample of it is counted.

    Returns:
        The words.

    Raises:
        DataError: If an input is unusable, or no document is left.
    """
    size = check_inputs(inputs)
    chosen = _Chosen(field=field, keep=keep, seed=seed)
    passes = 1
    if max_bytes is not None and (size > max_bytes or not _is_plain(inputs)):
        passes = 2
        chosen, total = _sample(inputs, chosen, max_bytes=max_bytes, workers=workers, report=report)
        if sampled is not None and chosen.share < 1.0:
            sampled(total)
    try:
        return _count(inputs, chosen, split=split, workers=workers, report=report, passes=passes)
    except NotEqual as error:
        assert isinstance(split, ByteLevelSplitter)
        log.warning("Counting again, cutting text the slow way: %s", error)
    return _count(inputs, chosen, split=split.slow(), workers=workers, report=report, passes=passes)


def _is_plain(inputs: Sequence[str | Path]) -> bool:
    """Whether the texts are no larger than the files."""
    return all(Path(path).suffix in (".jsonl", ".ndjson", ".json") for path in inputs)


def _sample(
    inputs: Sequence[str | Path],
    chosen: _Chosen,
    *,
    max_bytes: int,
    workers: int,
    report: Callable[[int], object] | None,
) -> tuple[_Chosen, int]:
    """Measure the corpus in bytes, and choose the share of it that is counted."""
    total = 0
    make = partial(_Measure, chosen)
    tasks = _tasks(inputs, field=chosen.field)
    for task_bytes, used in map_in_order(make, tasks, workers=workers, describe=_describe):
        total += task_bytes
        if report is not None:
            report(used // 2)
    share = min(1.0, max_bytes / max(total, 1))
    if share < 1.0:
        log.info(
            "Counting the words of %.1f %% of the documents: the corpus has %d MB of text, and "
            "the limit is %d MB.",
            100 * share,
            total // 10**6,
            max_bytes // 10**6,
        )
    return replace(chosen, share=share), total


def _count(
    inputs: Sequence[str | Path],
    chosen: _Chosen,
    *,
    split: Splitter,
    workers: int,
    report: Callable[[int], object] | None,
    passes: int,
) -> Words:
    counter = WordCounter(split)
    make = partial(_Count, chosen, split)
    tasks = _tasks(inputs, field=chosen.field)
    reported = 0
    try:
        for words, used in map_in_order(make, tasks, workers=workers, describe=_describe):
            counter.update(words)
            part = used if passes == 1 else used - used // 2
            reported += part
            if report is not None:
                report(part)
    except NotEqual:
        if report is not None:
            report(-reported)
        raise
    found = counter.words()
    if not found.documents:
        raise DataError(
            f"{', '.join(map(str, inputs))}: no documents to count words of. Give an input whose "
            f"field {chosen.field!r} holds text."
        )
    return found


@dataclass(frozen=True, slots=True)
class _Measure:
    """A process's work in the first pass: bytes of text, and bytes of input."""

    chosen: _Chosen

    def __call__(self, blocks: Sequence[Block]) -> tuple[int, int]:
        texts = self.chosen.texts(blocks)
        return sum(len(text.encode()) for text in texts), _used(blocks)


@dataclass(frozen=True, slots=True)
class _Count:
    """A process's work in the last pass: words, and bytes of input."""

    chosen: _Chosen
    split: Splitter

    def __call__(self, blocks: Sequence[Block]) -> tuple[Words, int]:
        texts = self.chosen.texts(blocks)
        if isinstance(self.split, ByteLevelSplitter):
            self.split.check(texts)
        counter = WordCounter(self.split)
        counter.add(texts)
        return counter.words(in_order=False), _used(blocks)


def _tasks(inputs: Sequence[str | Path], *, field: str) -> Iterator[list[Block]]:
    """Blocks, some megabytes together, so that a word is handed over once for many places."""
    waiting: list[Block] = []
    size = 0
    for block in read_blocks(inputs, field=field):
        waiting.append(block)
        size += block.size
        if size >= _TASK_BYTES:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def _used(blocks: Sequence[Block]) -> int:
    return sum(block.progress_bytes for block in blocks)


def _describe(blocks: Sequence[Block]) -> str:
    return f"{blocks[0].path}, from line or row {blocks[0].first}"
