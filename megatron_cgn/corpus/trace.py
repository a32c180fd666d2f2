"""What became of a document: where it is in a corpus, or why it is not, and what it went into.

Indexes, runs and checkpoints are looked into by ``data/trace.py``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cgn.corpus.plan import plain
from megatron_cgn.corpus.work import read_json, read_rows
from megatron_cgn.data import trace as data_trace
from megatron_cgn.errors import DataError

_STEPS = ("clean", "deduplicate", "redact", "decontaminate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A document in the table of a corpus."""

    corpus: Path
    """The corpus."""
    row: dict[str, Any]
    """Its row in ``documents.parquet``."""
    evidence: str | None
    """What shows the reason, if it was dropped."""


def find_documents(document_id: str, *, corpora: Sequence[str | Path]) -> Iterator[Found]:
    """Look for a document in corpora.

    Args:
        document_id: Its id; documents that had the same id and got a suffix are found too.
        corpora: Output directories.

    Yields:
        Every document of that id.

    Raises:
        DataError: If a directory holds no corpus.
    """
    for corpus in map(Path, corpora):
        table = corpus / "documents.parquet"
        if not _is_corpus(corpus):
            raise DataError(f"{corpus}: holds no corpus. Give an --output of prepare_corpus.py.")
        for row in _rows(table, document_id):
            yield Found(corpus=corpus, row=row, evidence=_evidence(corpus, row))


def trace_document(document_id: str, directories: Sequence[str | Path]) -> list[str]:
    """Say what became of a document, from the corpus to the checkpoints.

    Args:
        document_id: Its id.
        directories: Corpora, and what `data.trace.look_around` takes: directories in and below
            which indexes, runs and checkpoints are, or prefixes of indexes.

    Returns:
        Lines to print.

    Raises:
        DataError: If nothing has it, or a directory holds nothing of the kind.
    """
    corpora = [path for path in map(Path, directories) if _is_corpus(path)]
    others = [path for path in map(Path, directories) if path not in corpora]
    found = find_documents(document_id, corpora=corpora)
    lines = [line for one in found for line in _describe(one)]
    used = data_trace.trace_document(document_id, others)
    if not lines and not used:
        raise DataError(
            f"{document_id}: no document of this id in {', '.join(map(str, directories))}. An id "
            "is a document's own, or <source>/<file>#<line>."
        )
    return [*(lines or [document_id]), *used]


def _is_corpus(path: Path) -> bool:
    return (path / "manifest.json").exists() and (path / "documents.parquet").exists()


def _rows(table: Path, document_id: str) -> Iterator[dict[str, Any]]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(table) as file:
        for group in range(file.metadata.num_row_groups):
            ids = file.read_row_group(group, columns=["id"]).column("id")
            same = pc.or_(pc.equal(ids, document_id), pc.starts_with(ids, f"{document_id}~"))
            if pc.any(same).as_py():
                rows = file.read_row_group(group).filter(same).to_pylist()
                yield from plain(rows)


def _evidence(corpus: Path, row: dict[str, Any]) -> str | None:
    if row["status"] != "dropped":
        return None
    for place, dropped in enumerate(read_rows(corpus / row["shard"])):
        if place == row["row"]:
            evidence: str | None = dropped["evidence"]
            return evidence
    return None


def _describe(found: Found) -> Iterator[str]:
    row = found.row
    yield f"{row['id']}"
    yield f"  corpus          {found.corpus}"
    for name in ("source", "license", "classification", "language", "raw_hash", "hash"):
        if row[name] is not None:
            yield f"  {name:<16}{row[name]}"
    yield f"  steps           {', '.join(_steps(found.corpus))}"
    if row["changes"]:
        yield f"  changes         {row['changes']}"
    if row["status"] == "dropped":
        yield f"  dropped         {row['reason']}: {found.evidence}"
        yield f"  recorded in     {row['shard']}, row {row['row']}"
    else:
        yield f"  in              {row['shard']}, row {row['row']}"


def _steps(corpus: Path) -> list[str]:
    """Steps that the corpus was made with."""
    settings = read_json(corpus / "manifest.json")["settings"]
    steps = [name for name in _STEPS if settings[name].get("enabled", True)]
    if not settings["decontaminate"].get("evaluation_files"):
        steps.remove("decontaminate")
    return ["read", *steps, "split"]
