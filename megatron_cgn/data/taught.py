"""From a checkpoint back to the documents that it has been taught.

The other way round is ``trace.py``.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cgn.data.account import text_width
from megatron_cgn.data.blend import Blend
from megatron_cgn.data.consumed import ConsumedFile, documents_consumed, read_account
from megatron_cgn.data.indexed import check_index
from megatron_cgn.data.lineage import COLUMNS, LINEAGE_SUFFIX, has_lineage, read_lineage
from megatron_cgn.data.trace import Place, look_around
from megatron_cgn.errors import DataError

_GROUPED_BY = ("source", "license", "classification")


def consumed_documents(
    checkpoint: Path, *, directories: Sequence[str | Path] = ()
) -> Iterator[dict[str, Any]]:
    """List the documents that a checkpoint has consumed.

    Args:
        checkpoint: A checkpoint, or a run's directory for what it plans to read.
        directories: Where indexes lie now that lay elsewhere in training: see `look_around`.

    Yields:
        A row a document: what `lineage.COLUMNS` say of it (None if the index does not know its
        documents), ``blend_source``, ``index``, ``document``, ``tokens`` and ``passes``.

    Raises:
        DataError: If the account or an index is missing or not the one that was read.
    """
    blend, consumed = read_account(checkpoint)
    prefixes = _moved(blend, look_around(directories))
    for part in documents_consumed(blend, consumed=consumed, prefixes=prefixes):
        yield from _rows(part, prefixes.get(part.file.path, part.file.path))


def _moved(blend: Blend, place: Place) -> dict[str, str]:
    """Where the indexes of a blend lie now, by their digests."""
    now = {check_index(prefix).sidecar.digest: prefix for prefix in place.indexes}
    files = [file for source in blend.sources for file in source.files]
    return {file.path: now[file.digest] for file in files if file.digest in now}


def _rows(part: ConsumedFile, prefix: str) -> Iterator[dict[str, Any]]:
    for facts, number, tokens, passes in zip(
        _facts(prefix, part),
        part.documents.tolist(),
        part.tokens.tolist(),
        part.passes.tolist(),
        strict=True,
    ):
        yield {
            **facts,
            "blend_source": part.source,
            "index": prefix,
            "document": number,
            "tokens": tokens,
            "passes": round(passes, 6),
        }


def _facts(prefix: str, part: ConsumedFile) -> Iterator[Mapping[str, str | None]]:
    """What the index knows of each consumed document, in order."""
    if not has_lineage(prefix):
        nothing: dict[str, str | None] = dict.fromkeys(COLUMNS)
        yield from (nothing for _ in part.documents)
        return
    first = 0
    for batch in read_lineage(prefix):
        inside = (part.documents >= first) & (part.documents < first + batch.num_rows)
        yield from batch.take(part.documents[inside] - first).to_pylist()
        first += batch.num_rows
    if first != (documents := check_index(prefix).documents):
        raise DataError(
            f"{prefix}{LINEAGE_SUFFIX}: belongs to another index: it has {first:,} rows, not "
            f"{documents:,}. Make the index again with tools/preprocess_data.py --overwrite."
        )


def trace_checkpoint(
    checkpoint: Path, *, output: Path | None, directories: Sequence[str | Path] = ()
) -> list[str]:
    """Say what a checkpoint has consumed, and list the documents in a file.

    Args:
        checkpoint: As for `consumed_documents`.
        output: JSON Lines to write, one document a line; None lists nothing.
        directories: As for `consumed_documents`.

    Returns:
        Lines to print: documents and tokens by source, licence and classification.

    Raises:
        DataError: If something cannot be read, or ``output`` exists or cannot be written.
    """
    documents: Counter[tuple[str, ...]] = Counter()
    tokens: Counter[tuple[str, ...]] = Counter()
    if output is not None and output.exists():
        raise DataError(f"{output}: exists already. Choose another --output.")
    partial = output.with_name(output.name + ".partial") if output else Path(os.devnull)
    try:
        with partial.open("w", encoding="utf-8") as stream:
            for row in consumed_documents(checkpoint, directories=directories):
                group = (row["blend_source"], *(row[name] or "-" for name in _GROUPED_BY))
                documents[group] += 1
                tokens[group] += row["tokens"]
                if output is not None:
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            if output is not None:
                os.fsync(stream.fileno())
                partial.replace(output)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror or error}).") from error
    finally:
        if output is not None:
            partial.unlink(missing_ok=True)
    return _table(checkpoint, documents, tokens)


def _table(
    checkpoint: Path, documents: Counter[tuple[str, ...]], tokens: Counter[tuple[str, ...]]
) -> list[str]:
    head = ("blend source", *_GROUPED_BY, "documents", "tokens")
    rows = [(*group, f"{documents[group]:,}", f"{tokens[group]:,}") for group in sorted(documents)]
    rows.append(("all", "", "", "", f"{documents.total():,}", f"{tokens.total():,}"))
    widths = [max(text_width(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [f"{checkpoint}", *(_line(row, widths) for row in (head, *rows))]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    """A row of the table: names to the left, figures to the right."""
    cells = []
    for place, (text, width) in enumerate(zip(row, widths, strict=True)):
        space = " " * (width - text_width(text))
        cells.append(text + space if place <= len(_GROUPED_BY) else space + text)
    return "  " + "  ".join(cells)
