"""Documents to an indexed dataset: reader → encoders → writer.

The reader (``readers.py``) and the writer (``index_writer.py``) run in the main process, the
encoders (``encode.py``) in as many copies of it as wanted, which share its tokenizer and, for
blocks and ids, memory (``shared.py``). Blocks come back in order, so the output does not depend on
how many there are. The original tokenizer, which is slow to open, has a process of its own: the
others are at work before it is ready.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from megatron_cgn.data.encode import BatchEncoder, BlockEncoder, Encoded, OriginalIds
from megatron_cgn.data.facts import Facts
from megatron_cgn.data.index_writer import ALL_SUFFIXES, IndexWriter
from megatron_cgn.data.indexed import Sidecar, SourceFile
from megatron_cgn.data.original import Original
from megatron_cgn.data.readers import check_inputs, read_blocks
from megatron_cgn.data.shared import Encoders
from megatron_cgn.errors import DataError
from tokenizer.fast import FastIds, sample_ids
from tokenizer.fast_definition import NotEqual, read_definition
from tokenizer.hard_texts import hard_texts
from tokenizer.wrapper import Tokenizer

log = logging.getLogger(__name__)

_SMALL_BYTES = 2 << 20
"""Inputs that are done before processes are started."""


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
        workers: Processes that encode; with 1 this one does everything. The output is the same.
        overwrite: Replace an existing index.
        report: Called with the input bytes used up since its last call.

    Returns:
        What was done.

    Raises:
        DataError: If an input, the tokenizer or the output is unusable. Nothing is left behind.
    """
    started = time.monotonic()
    if check_inputs(inputs) <= _SMALL_BYTES:
        workers = 1
    _check_output(output_prefix, inputs)
    run = _Run(
        inputs=inputs,
        tokenizer_dir=tokenizer_dir,
        output_prefix=output_prefix,
        field=field,
        append_eod=append_eod,
        processes=workers if workers > 1 else 0,
        overwrite=overwrite,
        report=report,
    )
    summary = run.fast() or run.slow()
    return replace(summary, seconds=time.monotonic() - started)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A run, one way or the other."""

    inputs: Sequence[str | Path]
    tokenizer_dir: str | Path
    output_prefix: str | Path
    field: str
    append_eod: bool
    processes: int
    overwrite: bool
    report: Callable[[int], object] | None

    def fast(self) -> Summary | None:
        """Index with the fast encoder; None, with the reason in the log, if that cannot be."""
        if not all(Path(path).is_file() or Path(path).is_dir() for path in self.inputs):
            # Were the fast encoder found wrong in the middle, a pipe could not be read again.
            log.info("An input is a pipe: encoding it the slow way. Give a file to be faster.")
            return None
        name = Path(self.tokenizer_dir).resolve().name
        original = Original(
            partial(Tokenizer.from_pretrained, self.tokenizer_dir),
            append_eod=self.append_eod,
            apart=self.processes > 0,
        )
        with original:
            try:
                ids = _open_fast(self.tokenizer_dir, original)
            except ImportError:
                reason = "gigatoken is not installed: pip install 'megatron-cgn[fast]'"
            except NotEqual as error:
                reason = f"gigatoken does not do {name}: {error}"
            else:
                try:
                    return self._index(ids, original)
                except NotEqual as error:
                    log.warning(
                        "Starting again with Hugging Face's tokenizers, about ten times slower. "
                        "(gigatoken does not do %s: %s)",
                        name,
                        error,
                    )
                    return None
            original.facts()  # a tokenizer that is damaged says so here
        log.info("Encoding with Hugging Face's tokenizers, about ten times slower. (%s)", reason)
        return None

    def slow(self) -> Summary:
        """Index with the original tokenizer."""
        tokenizer = Tokenizer.from_pretrained(self.tokenizer_dir)
        original = Original(lambda: tokenizer, append_eod=self.append_eod, apart=False)
        with original, _without_threads():
            return self._index(OriginalIds(tokenizer), original)

    def _index(self, encoder: BatchEncoder, original: Original) -> Summary:
        facts = original.facts()
        if isinstance(encoder, FastIds):
            original.check(sample_ids(encoder, hard_texts(encoder.added_tokens)))
        original.begin_fingerprint()
        encode = BlockEncoder(encoder, field=self.field, facts=facts)
        with (
            Encoders(encode, processes=self.processes) as encoders,
            IndexWriter(
                self.output_prefix, vocab_size=facts.vocab_size, overwrite=self.overwrite
            ) as writer,
        ):
            total = _Totals(documents=[0] * len(self.inputs))
            try:
                for part in encoders(read_blocks(self.inputs, field=self.field)):
                    if part.samples is not None:
                        original.check(part.samples)
                    if part.left is not None:
                        part = original.completed(part, facts)
                    writer.add(part.tokens, part.lengths, lineage=part.lineage)
                    total.add(part)
                    self._report(part.progress_bytes)
                fingerprint = original.fingerprint()
            except NotEqual:
                self._report(-total.used_bytes)
                raise
            return self._finish(writer, total, facts, fingerprint)

    def _finish(
        self, writer: IndexWriter, total: "_Totals", facts: Facts, fingerprint: str
    ) -> Summary:
        if not any(total.documents):
            raise DataError(
                f"{', '.join(map(str, self.inputs))}: no documents ({total.empty} empty ones). "
                f"Give an input whose field {self.field!r} holds text."
            )
        sidecar = writer.finish(
            tokenizer_fingerprint=fingerprint,
            tokenizer_name=facts.name,
            eod_id=facts.eod_id,
            text_bytes=total.text_bytes,
            sources=[
                SourceFile(name=Path(path).name, documents=count)
                for path, count in zip(self.inputs, total.documents, strict=True)
            ],
        )
        return Summary(sidecar=sidecar, empty=total.empty, repaired=total.repaired, seconds=0.0)

    def _report(self, used_bytes: int) -> None:
        if self.report is not None:
            self.report(used_bytes)


@dataclass(slots=True, kw_only=True)
class _Totals:
    """Of what was written."""

    documents: list[int]
    """Of each input."""
    text_bytes: int = 0
    empty: int = 0
    repaired: int = 0
    used_bytes: int = 0

    def add(self, part: Encoded) -> None:
        self.documents[part.source] += len(part.lengths)
        self.text_bytes += int(np.asarray(part.lineage.column("text_bytes")).sum())
        self.empty += part.empty
        self.repaired += part.repaired
        self.used_bytes += part.progress_bytes


def _open_fast(directory: str | Path, original: Original) -> FastIds:
    """Open the fast encoder on ``tokenizer.json`` itself, before the original is open, if it can.

    Raises:
        ImportError: If the package is not installed.
        NotEqual: If it cannot do this tokenizer.
    """
    name = Path(directory).resolve().name
    definition = read_definition(directory)
    if definition is not None:
        return FastIds(definition, name=name)
    return FastIds(original.definition(), name=name)


@contextlib.contextmanager
def _without_threads() -> Iterator[None]:
    """Keep Hugging Face's library from starting threads, which copies of a process would lack."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


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
