"""Indexes out of indexes: several merged into one, one split into several.

Documents stay whole and keep their lineage; nothing is tokenised again, and memory does not depend
on the size. What an index holds is told by ``describe.py``.
"""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.index_writer import IndexWriter
from megatron_cgn.data.indexed import IndexInfo, Sidecar, SourceFile, check_index
from megatron_cgn.data.lineage import has_lineage
from megatron_cgn.data.portions import Portion, read_portions
from megatron_cgn.errors import ConfigError, DataError

_NO_LINEAGE = (
    "has no .documents.parquet, which says where its documents come from. Make it again with "
    "tools/preprocess_data.py --overwrite."
)

Report = Callable[[int], object]
"""Called with the tokens copied since its last call."""


def merge(
    prefixes: Sequence[str | Path],
    *,
    output_prefix: str | Path,
    overwrite: bool = False,
    report: Report | None = None,
) -> Sidecar:
    """Write the documents of several indexes, in their order, as one index.

    Args:
        prefixes: Indexes made with the same tokenizer, without suffix.
        output_prefix: The new index, without suffix.
        overwrite: Replace an existing index.
        report: Told about progress.

    Returns:
        What was written to the sidecar.

    Raises:
        DataError: If an index is damaged, given twice or of another tokenizer, if some have a
            lineage and others none, or if the output is in the way. Nothing is left behind.
    """
    indexes = [check_index(prefix) for prefix in prefixes]
    _check_outputs(indexes, [output_prefix])
    _check_alike(indexes)
    first = indexes[0].sidecar
    with IndexWriter(output_prefix, vocab_size=first.vocab_size, overwrite=overwrite) as writer:
        for index in indexes:
            for portion in read_portions(index):
                writer.add(portion.tokens, portion.lengths, lineage=portion.lineage)
                _tell(report, portion)
        return writer.finish(
            tokenizer_fingerprint=first.tokenizer_fingerprint,
            tokenizer_name=first.tokenizer_name,
            eod_id=first.eod_id,
            text_bytes=sum(index.sidecar.text_bytes for index in indexes),
            sources=_joined([source for index in indexes for source in index.sidecar.sources]),
        )


def split(
    prefix: str | Path,
    *,
    output_prefixes: Sequence[str | Path],
    hold_out: float | None = None,
    overwrite: bool = False,
    report: Report | None = None,
) -> list[Sidecar]:
    """Deal the documents of an index out to several.

    Args:
        prefix: The index, without suffix.
        output_prefixes: The new indexes, without suffix.
        hold_out: None cuts the documents, in their order, into parts of about as many tokens each.
            A share between 0 and 1 gives about that share of the documents to the second of two
            parts and the others to the first. Which ones is decided by a hash of the id, so a
            document stays on its side when others are added.
        overwrite: Replace existing indexes.
        report: Told about progress.

    Returns:
        What was written to the sidecars.

    Raises:
        ConfigError: If there are not two parts or more, or ``hold_out`` does not fit.
        DataError: If the index is damaged or has no lineage, if a part would be empty, or if an
            output is in the way.
    """
    if len(output_prefixes) < 2 or (hold_out is not None and len(output_prefixes) != 2):
        raise ConfigError(
            f"--output-prefix has {len(output_prefixes)} names. Give two for --hold-out (what "
            "stays, and what is held out), and two or more to cut into parts."
        )
    if hold_out is not None and not 0 < hold_out < 1:
        raise ConfigError(f"--hold-out {hold_out}: give a share between 0 and 1, e.g. 0.01.")
    index = check_index(prefix)
    _check_outputs([index], output_prefixes)
    if not has_lineage(index.prefix):
        raise DataError(f"{prefix}: {_NO_LINEAGE}")
    source = index.sidecar
    parts = [_Part() for _ in output_prefixes]
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                IndexWriter(output, vocab_size=source.vocab_size, overwrite=overwrite)
            )
            for output in output_prefixes
        ]
        for portion in read_portions(index):
            places = _places(portion, index, parts=len(parts), hold_out=hold_out)
            for number, (writer, part) in enumerate(zip(writers, parts, strict=True)):
                part.add(writer, portion, places == number, sources=source.sources)
            _tell(report, portion)
        for output, part in zip(output_prefixes, parts, strict=True):
            if not part.documents:
                raise DataError(
                    f"{output}: would be empty: {prefix} has {source.documents:,} documents. Ask "
                    "for fewer parts or another share."
                )
        return [
            writer.finish(
                tokenizer_fingerprint=source.tokenizer_fingerprint,
                tokenizer_name=source.tokenizer_name,
                eod_id=source.eod_id,
                text_bytes=part.text_bytes,
                sources=part.sources(source.sources),
            )
            for writer, part in zip(writers, parts, strict=True)
        ]


class _Part:
    """Counts what goes into one part of a split."""

    def __init__(self) -> None:
        self.documents = self.text_bytes = 0
        self._of_source: dict[int, int] = {}

    def add(
        self,
        writer: IndexWriter,
        portion: Portion,
        chosen: npt.NDArray[np.bool_],
        *,
        sources: Sequence[SourceFile],
    ) -> None:
        """Copy the chosen documents of a portion."""
        count = int(np.count_nonzero(chosen))
        if not count:
            return
        assert portion.lineage is not None
        lineage = portion.lineage
        tokens = portion.tokens
        if count < len(chosen):
            tokens = tokens[np.repeat(chosen, portion.lengths)]
            lineage = lineage.filter(chosen)
        writer.add(tokens, portion.lengths[chosen], lineage=lineage)
        self.documents += count
        self.text_bytes += int(np.sum(lineage.column("text_bytes").to_numpy()))
        ends = np.cumsum([source.documents for source in sources])
        places = np.searchsorted(ends, portion.first + np.flatnonzero(chosen), side="right")
        for place, documents in zip(*np.unique(places, return_counts=True), strict=True):
            self._of_source[int(place)] = self._of_source.get(int(place), 0) + int(documents)

    def sources(self, whole: Sequence[SourceFile]) -> list[SourceFile]:
        """The inputs of the index that was split, with what they gave to this part."""
        return [
            SourceFile(name=source.name, documents=self._of_source[place])
            for place, source in enumerate(whole)
            if place in self._of_source
        ]


def _places(
    portion: Portion, index: IndexInfo, *, parts: int, hold_out: float | None
) -> npt.NDArray[np.int64]:
    """To which part each document of a portion goes."""
    if hold_out is None:
        starts = np.cumsum(portion.lengths, dtype=np.int64) - portion.lengths + portion.start
        return starts * parts // index.tokens
    assert portion.lineage is not None
    limit = int(hold_out * 2**64)
    ids = portion.lineage.column("id").to_pylist()
    return np.array([_id_hash(name) < limit for name in ids], dtype=np.int64)


def _id_hash(name: str) -> int:
    """A number of 64 bits that depends on the id alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _check_alike(indexes: Sequence[IndexInfo]) -> None:
    first = indexes[0]
    for other in indexes[1:]:
        if other.sidecar.tokenizer_fingerprint != first.sidecar.tokenizer_fingerprint:
            raise DataError(
                f"{other.prefix}: made with another tokenizer ({other.sidecar.tokenizer_name!r}, "
                f"{other.sidecar.tokenizer_fingerprint}) than {first.prefix} "
                f"({first.sidecar.tokenizer_name!r}, {first.sidecar.tokenizer_fingerprint}). Index "
                "its documents again with the same one."
            )
        if other.sidecar.eod_id != first.sidecar.eod_id:
            raise DataError(
                f"{other.prefix}: ends its documents with {other.sidecar.eod_id}, {first.prefix} "
                f"with {first.sidecar.eod_id} (None: not at all). Index its documents again with "
                "the same --append-eod."
            )
        if has_lineage(other.prefix) != has_lineage(first.prefix):
            without = first if has_lineage(other.prefix) else other
            raise DataError(f"{without.prefix}: {_NO_LINEAGE}")


def _check_outputs(indexes: Sequence[IndexInfo], outputs: Sequence[str | Path]) -> None:
    names = [Path(f"{prefix}.bin").resolve() for prefix in [i.prefix for i in indexes]]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{name}: is given twice. Its documents would count twice.")
    written = [Path(f"{output}.bin").resolve() for output in outputs]
    for output, name in zip(outputs, written, strict=True):
        if name in names or written.count(name) > 1:
            raise DataError(
                f"{output}: is an input or given twice. Choose another --output-prefix."
            )


def _joined(sources: Sequence[SourceFile]) -> list[SourceFile]:
    """Neighbours of one name are parts of one input that was split."""
    joined: list[SourceFile] = []
    for source in sources:
        if joined and joined[-1].name == source.name:
            documents = joined.pop().documents + source.documents
            joined.append(SourceFile(name=source.name, documents=documents))
        else:
            joined.append(source)
    return joined


def _tell(report: Report | None, portion: Portion) -> None:
    if report is not None:
        report(len(portion.tokens))
