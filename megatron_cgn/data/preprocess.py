"""Documents to an indexed dataset: reader → encoder → writer.

The reader (``readers.py``) and the writer (``index_writer.py``) run in the calling thread, the
encoder (``encode.py``) in as many as wanted. Blocks come back in order, so the output does not
depend on how many. Threads, not processes: the encoders work outside the interpreter's lock, share
one vocabulary, and nothing is copied between them.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cgn.data.encode import BatchEncoder, BlockEncoder, OriginalEncoder, choose
from megatron_cgn.data.index_writer import ALL_SUFFIXES, IndexWriter
from megatron_cgn.data.indexed import Sidecar, SourceFile
from megatron_cgn.data.pool import map_in_order
from megatron_cgn.data.readers import check_inputs, read_blocks
from megatron_cgn.errors import DataError
from tokenizer.fast import NotEqual
from tokenizer.wrapper import Tokenizer

log = logging.getLogger(__name__)

# Blocks in flight per worker, enough to keep it busy; and fewer where they are large, to hold them.
_BLOCKS_AHEAD = 3
_BYTES_AHEAD = 4 << 20


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
        workers: Threads that encode; 1 encodes in this one. The output is the same.
        overwrite: Replace an existing index.
        report: Called with the input bytes used up since its last call.

    Returns:
        What was done.

    Raises:
        DataError: If an input, the tokenizer or the output is unusable. Nothing is left behind.
    """
    started = time.monotonic()
    tokenizer = Tokenizer.from_pretrained(tokenizer_dir)
    eod_id = tokenizer.eod_id if append_eod else None
    check_inputs(inputs)
    _check_output(output_prefix, inputs)
    run = _Run(
        inputs=inputs,
        tokenizer=tokenizer,
        output_prefix=output_prefix,
        field=field,
        eod_id=eod_id,
        workers=workers,
        overwrite=overwrite,
        report=report,
    )
    if not all(Path(path).is_file() or Path(path).is_dir() for path in inputs):
        # Were the fast encoder found wrong in the middle, a pipe could not be read again.
        log.info("An input is a pipe: encoding it the slow way. Give a file to be faster.")
        return run(OriginalEncoder(tokenizer), started=started)
    try:
        return run(choose(tokenizer, threads=workers), started=started)
    except NotEqual as error:
        log.warning(
            "Starting again with Hugging Face's tokenizers, about ten times slower. (gigatoken "
            "does not do %s: %s)",
            tokenizer.name,
            error,
        )
    return run(OriginalEncoder(tokenizer), started=started)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Everything about a run but who makes the ids."""

    inputs: Sequence[str | Path]
    tokenizer: Tokenizer
    output_prefix: str | Path
    field: str
    eod_id: int | None
    workers: int
    overwrite: bool
    report: Callable[[int], object] | None

    def __call__(self, encoder: BatchEncoder, *, started: float) -> Summary:
        documents = [0] * len(self.inputs)
        text_bytes = empty = repaired = used_bytes = 0
        vocab_size = self.tokenizer.vocab_size
        with IndexWriter(
            self.output_prefix, vocab_size=vocab_size, overwrite=self.overwrite
        ) as writer:
            encoded = map_in_order(
                BlockEncoder(encoder, field=self.field, eod_id=self.eod_id, vocab_size=vocab_size),
                read_blocks(self.inputs, field=self.field),
                workers=self.workers,
                size_of=lambda block: block.size,
                items_ahead=self.workers * _BLOCKS_AHEAD,
                bytes_ahead=self.workers * _BYTES_AHEAD,
            )
            try:
                for part in encoded:
                    writer.add(part.tokens, part.lengths, lineage=part.lineage)
                    documents[part.source] += len(part.lengths)
                    text_bytes += part.text_bytes
                    empty += part.empty
                    repaired += part.repaired
                    used_bytes += part.progress_bytes
                    self._report(part.progress_bytes)
            except NotEqual:
                self._report(-used_bytes)
                raise
            finally:
                encoded.close()
            if not any(documents):
                raise DataError(
                    f"{', '.join(map(str, self.inputs))}: no documents ({empty} empty ones). Give "
                    f"an input whose field {self.field!r} holds text."
                )
            sidecar = writer.finish(
                tokenizer_fingerprint=self.tokenizer.fingerprint(),
                tokenizer_name=self.tokenizer.name,
                eod_id=self.eod_id,
                text_bytes=text_bytes,
                sources=[
                    SourceFile(name=Path(path).name, documents=count)
                    for path, count in zip(self.inputs, documents, strict=True)
                ],
            )
        seconds = time.monotonic() - started
        return Summary(sidecar=sidecar, empty=empty, repaired=repaired, seconds=seconds)

    def _report(self, used_bytes: int) -> None:
        if self.report is not None:
            self.report(used_bytes)


def _check_output(prefix: str | Path, inputs: Sequence[str | Path]) -> None:
    """Refuse to write over an input, whatever it is called and whether or not told to."""
    for output in (Path(f"{prefix}{suffix}") for suffix in ALL_SUFFIXES):
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
