"""Documents to an indexed dataset: reader → encoder → writer.

The reader (``readers.py``) and the writer (``index_writer.py``) run in this process, the encoder
in as many as wanted. Blocks come back in order, so the output does not depend on how many.
"""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.documents import Block, parse_block
from megatron_cgn.data.index_writer import IndexWriter
from megatron_cgn.data.indexed import SUFFIXES, Sidecar, SourceFile, token_dtype
from megatron_cgn.data.readers import check_inputs, read_blocks
from megatron_cgn.errors import DataError
from tokenizer.wrapper import Tokenizer

# Blocks in flight per worker, enough to keep it busy; and fewer where they are large, to hold them.
_BLOCKS_AHEAD = 3
_BYTES_AHEAD = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Ids of the documents of one block."""

    source: int
    """Place of the input among the inputs."""
    tokens: npt.NDArray[np.integer[Any]]
    """Ids, documents one after another, ``[sum(lengths)]``."""
    lengths: npt.NDArray[np.int32]
    """Tokens of each document, int32 ``[documents]``."""
    text_bytes: int
    """UTF-8 bytes of the documents."""
    empty: int
    """Documents skipped because nothing is in them."""
    repaired: int
    """Documents in which lone surrogates were replaced."""
    progress_bytes: int
    """Bytes of the input used up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run of `preprocess` did."""

    sidecar: Sidecar
    """What was written to ``P.json``."""
    empty: int
    """Documents skipped because nothing is in them."""
    repaired: int
    """Documents in which lone surrogates were replaced by U+FFFD."""
    seconds: float
    """Wall-clock time."""


class Encoder:
    """Turns a block of raw lines or rows into ids."""

    def __init__(self, tokenizer: Tokenizer, *, field: str, append_eod: bool) -> None:
        """Fix the rules.

        Args:
            tokenizer: The tokenizer.
            field: Name of the text's field.
            append_eod: End every document with the tokenizer's ``eod_id``.

        Raises:
            DataError: If the tokenizer has no token that ends a document.
        """
        self._tokenizer = tokenizer
        self._field = field
        self._ending = [tokenizer.eod_id] if append_eod else []
        self._dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, block: Block) -> Encoded:
        """Parse and encode a block.

        Raises:
            DataError: If a line or row is not a document; names it.
        """
        parsed = parse_block(block, field=self._field)
        pairs = zip(parsed.texts, self._tokenizer.encode_batch(parsed.texts), strict=True)
        kept = [(text, ids + self._ending) for text, ids in pairs if ids]
        lengths = np.array([len(ids) for _, ids in kept], dtype=np.int32)
        tokens = np.fromiter(
            itertools.chain.from_iterable(ids for _, ids in kept),
            dtype=self._dtype,
            count=int(lengths.sum(dtype=np.int64)),
        )
        return Encoded(
            source=block.source,
            tokens=tokens,
            lengths=lengths,
            text_bytes=sum(len(text.encode()) for text, _ in kept),
            empty=parsed.empty + len(parsed.texts) - len(kept),
            repaired=parsed.repaired,
            progress_bytes=block.progress_bytes,
        )


def preprocess(
    inputs: Sequence[str | Path],
    *,
    tokenizer_dir: str | Path,
    output_prefix: str | Path,
    field: str = "text",
    append_eod: bool = True,
    workers: int = 1,
    overwrite: bool = False,
    report: Callable[[int], object] | None = None,
) -> Summary:
    """Write an indexed dataset from documents.

    Args:
        inputs: Files and directories, read in this order: see ``readers.py``.
        tokenizer_dir: Hugging Face tokenizer directory.
        output_prefix: Path of the output without suffix.
        field: Name of the text's field.
        append_eod: End every document with the tokenizer's ``eod_id``.
        workers: Processes that encode; 1 encodes in this one. The output is the same.
        overwrite: Replace an existing index.
        report: Called with the input bytes used up since its last call.

    Returns:
        What was done.

    Raises:
        DataError: If an input, the tokenizer or the output is unusable. Nothing is left behind.
    """
    started = time.monotonic()
    tokenizer = Tokenizer.from_pretrained(tokenizer_dir)
    encoder = Encoder(tokenizer, field=field, append_eod=append_eod)
    check_inputs(inputs)
    _check_output(output_prefix, inputs)
    documents = [0] * len(inputs)
    text_bytes = empty = repaired = 0
    with IndexWriter(output_prefix, vocab_size=tokenizer.vocab_size, overwrite=overwrite) as writer:
        blocks = read_blocks(inputs, field=field)
        if workers > 1:
            encoded = _encode_elsewhere(blocks, workers, (tokenizer_dir, field, append_eod))
        else:
            encoded = map(encoder, blocks)
        for part in encoded:
            writer.add(part.tokens, part.lengths)
            documents[part.source] += len(part.lengths)
            text_bytes += part.text_bytes
            empty += part.empty
            repaired += part.repaired
            if report is not None:
                report(part.progress_bytes)
        if not any(documents):
            raise DataError(
                f"{', '.join(map(str, inputs))}: no documents ({empty} empty ones). Give an input "
                f"whose field {field!r} holds text."
            )
        sidecar = writer.finish(
            tokenizer_fingerprint=tokenizer.fingerprint(),
            tokenizer_name=tokenizer.name,
            eod_id=tokenizer.eod_id if append_eod else None,
            text_bytes=text_bytes,
            sources=[
                SourceFile(name=Path(path).name, documents=count)
                for path, count in zip(inputs, documents, strict=True)
            ],
        )
    seconds = time.monotonic() - started
    return Summary(sidecar=sidecar, empty=empty, repaired=repaired, seconds=seconds)


def _check_output(prefix: str | Path, inputs: Sequence[str | Path]) -> None:
    """Refuse to write over an input, whatever it is called and whether or not told to."""
    for output in (Path(f"{prefix}{suffix}") for suffix in SUFFIXES):
        for path in map(Path, inputs):
            try:
                same = output.samefile(path)
            except OSError:  # the output is not there yet
                continue
            if same:
                raise DataError(
                    f"{path}: is an input, and --output-prefix {prefix} would write over it. "
                    "Choose another --output-prefix."
                )


def _encode_elsewhere(
    blocks: Iterator[Block], workers: int, settings: tuple[str | Path, str, bool]
) -> Iterator[Encoded]:
    """Encode in other processes, in order, with a bounded number of blocks under way."""
    # Spawned, not forked: a fork would inherit the locks of this process's tokenizer threads.
    context = multiprocessing.get_context("spawn")
    pending: deque[tuple[int, Future[Encoded]]] = deque()
    under_way = 0
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=settings
    )
    try:
        for block in blocks:
            while pending and (
                len(pending) >= workers * _BLOCKS_AHEAD
                or under_way + block.size > workers * _BYTES_AHEAD
            ):
                size, done = pending.popleft()
                yield done.result()
                under_way -= size
            pending.append((block.size, pool.submit(_encode_here, block)))
            under_way += block.size
        for _, done in pending:
            yield done.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, probably for want of memory. Run with fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None  # a worker's own, set once when it starts


def _start_worker(tokenizer_dir: str | Path, field: str, append_eod: bool) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tokenizer = Tokenizer.from_pretrained(tokenizer_dir)
    _encoder = Encoder(tokenizer, field=field, append_eod=append_eod)


def _end_with_parent() -> None:
    """End this worker when the main process is killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode_here(block: Block) -> Encoded:
    assert _encoder is not None
    return _encoder(block)
