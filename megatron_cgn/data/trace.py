"""From a document to the indexes that hold it and the runs and checkpoints that read it.

The way back is ``taught.py``; what became of a document before it was indexed is the corpus' own to
say: ``corpus/trace.py``.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_cgn.data.account import ACCOUNT_FILE
from megatron_cgn.data.blend import Blend
from megatron_cgn.data.consumed import documents_consumed, read_account
from megatron_cgn.data.indexed import IndexInfo, check_index
from megatron_cgn.data.lineage import LINEAGE_SUFFIX, find_documents, has_lineage
from megatron_cgn.errors import DataError

_CHECKPOINT_FILE = "checkpoint.json"
_PARTIAL_SUFFIX = ".partial"  # of a checkpoint that is being written or deleted, or was when killed


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Indexes, runs and checkpoints below some directories."""

    indexes: tuple[str, ...]
    """Prefixes of indexes that know their documents."""
    runs: tuple[Path, ...]
    """Directories of runs, which hold their plan."""
    checkpoints: tuple[Path, ...]
    """Checkpoints that hold their account."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a run or a checkpoint reads of one document."""

    where: Path
    """The run, as planned, or the checkpoint, as consumed."""
    source: str
    """Name of the source in the blend."""
    prefix: str
    """The index."""
    document: int
    """Number of the document in the index."""
    trained_on: bool
    """Whether the document is among those to train on; others are held out."""
    tokens: int
    """Tokens of it, every pass counted."""
    passes: float
    """The same in passes."""


def look_around(directories: Sequence[str | Path]) -> Place:
    """Find indexes, runs and checkpoints in directories and below.

    Args:
        directories: Directories, or prefixes of indexes.

    Returns:
        What there is, in order of path.

    Raises:
        DataError: If one is neither a directory nor the prefix of an index.
    """
    indexes: dict[str, None] = {}
    accounts: dict[Path, None] = {}
    for directory in map(Path, directories):
        if has_lineage(directory):
            indexes[str(directory)] = None
        elif not directory.is_dir():
            raise DataError(
                f"{directory}: neither a directory nor the prefix of an index that knows its "
                f"documents ({directory}{LINEAGE_SUFFIX}). Check the path."
            )
        for folder, below, names in os.walk(directory):
            below[:] = sorted(
                name
                for name in below
                if not name.startswith(".") and not name.endswith(_PARTIAL_SUFFIX)
            )
            for name in sorted(names):
                if name.endswith(LINEAGE_SUFFIX) and name != LINEAGE_SUFFIX:
                    indexes[os.path.join(folder, name.removesuffix(LINEAGE_SUFFIX))] = None
                elif name == ACCOUNT_FILE:
                    accounts[Path(folder)] = None
    saved = [path for path in accounts if (path / _CHECKPOINT_FILE).exists()]
    return Place(
        indexes=tuple(indexes),
        runs=tuple(path for path in accounts if path not in saved),
        checkpoints=tuple(saved),
    )


def find_in_indexes(document_id: str, place: Place) -> Iterator[tuple[IndexInfo, int]]:
    """Find a document in indexes.

    Args:
        document_id: Its id.
        place: From `look_around`.

    Yields:
        An index and the document's number in it, for every document of that id.
    """
    for prefix in place.indexes:
        numbers = find_documents(prefix, [document_id])[document_id]
        if numbers:
            index = check_index(prefix)
            yield from ((index, number) for number in numbers)


def find_uses(found: Sequence[tuple[IndexInfo, int]], place: Place) -> Iterator[Use]:
    """Find what reads documents: runs as planned, then checkpoints as consumed.

    Args:
        found: Documents, from `find_in_indexes`.
        place: From `look_around`.

    Yields:
        One result for every run or checkpoint whose blend holds a document's index.
    """
    for where in (*place.runs, *place.checkpoints):
        blend, consumed = read_account(where)
        for index, number in found:
            yield from _uses(where, blend, consumed, index, number)


def _uses(where: Path, blend: Blend, consumed: int, index: IndexInfo, number: int) -> Iterator[Use]:
    files = [
        (source, file)
        for source in blend.sources
        for file in source.files
        if file.digest == index.sidecar.digest
    ]
    if not files:
        yield from _held_out_uses(where, blend, index, number)
        return
    read = list(
        documents_consumed(
            blend,
            consumed=consumed,
            prefixes={file.path: index.prefix for _, file in files},
            digest=index.sidecar.digest,
        )
    )
    for source, file in files:
        tokens = sum(
            part.tokens_of(number)
            for part in read
            if part.source == source.name and part.file == file
        )
        yield Use(
            where=where,
            source=source.name,
            prefix=index.prefix,
            document=number,
            trained_on=file.start <= number < file.stop,
            tokens=tokens,
            passes=tokens / max(1, int(index.lengths[number])),
        )


def _held_out_uses(where: Path, blend: Blend, index: IndexInfo, number: int) -> Iterator[Use]:
    """Uses of an index that a blend does not train on: what a ``validation_path`` names."""
    for source in blend.sources:
        if index.sidecar.digest in (identity.partition("[")[0] for identity in source.held_out):
            yield Use(
                where=where,
                source=source.name,
                prefix=index.prefix,
                document=number,
                trained_on=False,
                tokens=0,
                passes=0.0,
            )


def _read_elsewhere(place: Place) -> tuple[list[str], list[str]]:
    """Find what runs and checkpoints train on that is not in the place.

    Returns:
        Prefixes of indexes that still lie where they were read; and of those that do not, or do
        not know their documents.
    """
    known = set(map(_digest, place.indexes))
    wanted: dict[str, str] = {}
    for where in (*place.runs, *place.checkpoints):
        blend, _ = read_account(where)
        for file in (file for source in blend.sources for file in source.files):
            if file.digest not in known:
                wanted[file.digest] = file.path
    there = {d: path for d, path in wanted.items() if has_lineage(path) and _digest(path) == d}
    return list(there.values()), [path for d, path in wanted.items() if d not in there]


def _digest(prefix: str) -> str | None:
    """An index's digest; None if it is unusable, which need not concern the document looked for."""
    try:
        return check_index(prefix).sidecar.digest
    except DataError:
        return None


def trace_document(document_id: str, directories: Sequence[str | Path]) -> list[str]:
    """Say which indexes hold a document, and which runs and checkpoints read it.

    Args:
        document_id: Its id.
        directories: Where to look: see `look_around`. Indexes that runs found there have read are
            looked into where they were read, too.

    Returns:
        Lines to print, also of what could not be looked into; none if no index holds it.
    """
    place = look_around(directories)
    elsewhere, unknown = _read_elsewhere(place)
    place = replace(place, indexes=(*place.indexes, *elsewhere))
    found = list(find_in_indexes(document_id, place))
    lines = [
        f"  index           {index.prefix}: document {number:,} of {index.documents:,}, "
        f"{int(index.lengths[number]):,} tokens"
        for index, number in found
    ]
    for use in find_uses(found, place):
        kind = "run (plan)" if use.where in place.runs else "checkpoint"
        what = f"{use.tokens:,} tokens, {use.passes:.2f} passes" if use.tokens else "not read"
        if not use.trained_on:
            what = "held out"
        lines.append(f"  {kind:<16}{use.where}: source {use.source}: {what}")
    return lines + [
        f"  not known       {path}: read by a run, but not found, or without the lineage of its "
        "documents; if it was moved, name its directory too"
        for path in unknown
    ]
