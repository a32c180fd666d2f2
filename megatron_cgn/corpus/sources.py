"""Which files a corpus is made from: sources in order of priority, and the files of each.

Nothing is parsed here. Folders are walked in sorted order, so that the same files always come in
the same order; hidden files and kinds nobody can read are left out and counted.
"""

import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_cgn.errors import ConfigError, DataError

Kind = Literal["lines", "table", "file"]

_LINES = (".jsonl", ".ndjson", ".json")
_FILES = frozenset(
    (".txt", ".text", ".md", ".markdown", ".rst", ".html", ".htm", ".xhtml", ".pdf", ".docx")
)
_TABLES = (".parquet", ".arrow")
_KINDS = (
    "JSON Lines (.jsonl, plain, .gz or .zst), .parquet, .arrow, .txt, .md, .rst, .html, .pdf or "
    ".docx"
)
_NAME = re.compile(r"[\w-]+")
_DIGEST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Documents of one origin. Of equal documents, that of an earlier source is kept."""

    name: str
    """Letters, digits, ``_`` and ``-``, e.g. ``domain``."""
    paths: tuple[str, ...]
    """Files and folders."""
    named: bool = True
    """Whether the user named it: then a document's own ``source`` does not count."""
    license: str | None = None
    """Licence of documents that do not state one."""
    classification: str | None = None
    """Confidentiality class of documents that do not state one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """A file to read."""

    source: int
    """Place of its source among the sources."""
    path: str
    """Where it is."""
    name: str
    """``<source>/<path within the folder given>``: the same wherever the folder lies."""
    kind: Kind
    """``lines`` (JSON Lines), ``table`` (Parquet, Arrow) or ``file`` (one document)."""
    size_bytes: int
    """Bytes on the disk."""
    modified_ns: int
    """Time of its last change, in ns since 1970: tells a changed file from an unchanged one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """All files of all sources."""

    files: tuple[InputFile, ...]
    """In the order of reading."""
    skipped: dict[str, dict[str, int]]
    """By source: files left out, by suffix (or ``hidden``, ``broken link``)."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all files on the disk."""
        return sum(file.size_bytes for file in self.files)


def find_inputs(sources: Sequence[Source], *, output: Path) -> Inputs:
    """Find every file of every source.

    Args:
        sources: In order of priority.
        output: Directory of the output, which may not hold inputs nor lie among them.

    Returns:
        The files in the order of reading.

    Raises:
        ConfigError: If a source's name is not usable or not unique.
        DataError: If a path is missing, unreadable, of an unknown kind or given twice, if a folder
            holds nothing to read, or if inputs and output lie in each other.
    """
    _check_names(sources)
    files: list[InputFile] = []
    skipped: dict[str, dict[str, int]] = {}
    given: dict[str, str] = {}
    for index, source in enumerate(sources):
        left_out: Counter[str] = Counter()
        for text in source.paths:
            path = Path(text)
            _check_given(path, output, given)
            found = list(_find(path, index, source.name, left_out))
            if not found:
                kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
                raise DataError(
                    f"{path}: holds nothing to read ({kinds or 'it is empty'}). Give {_KINDS}, or "
                    "a folder of them."
                )
            files += found
        if left_out:
            skipped[source.name] = dict(sorted(left_out.items()))
    _check_nested(given)
    return Inputs(files=tuple(files), skipped=skipped)


def digest(path: str) -> str:
    """Blake2b-16 of a file's bytes, in hexadecimal.

    Raises:
        DataError: If the file cannot be read.
    """
    state = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(_DIGEST_BYTES):
                state.update(piece)
    except OSError as error:
        raise _unreadable(path, error) from error
    return state.hexdigest()


def _check_names(sources: Sequence[Source]) -> None:
    seen: set[str] = set()
    for source in sources:
        if not _NAME.fullmatch(source.name):
            raise ConfigError(
                f"source {source.name!r}: a name has letters, digits, '_' and '-' only. Rename it."
            )
        if source.name in seen:
            raise ConfigError(f"source {source.name!r}: is given twice. Join its inputs.")
        seen.add(source.name)


def _check_given(path: Path, output: Path, given: dict[str, str]) -> None:
    """Refuse what is missing, what is given twice, and what meets the output."""
    if not os.path.exists(path):  # also of a name that is too long
        raise DataError(f"{path}: there is no such input. Check the path.")
    real, target = os.path.realpath(path), os.path.realpath(output)
    if real in given:
        raise DataError(
            f"{path}: is given twice (as {given[real]}). Its documents would count twice: name it "
            "once."
        )
    given[real] = str(path)
    if _within(target, real):
        raise DataError(
            f"{output}: the output would lie inside the input {path}. Choose another --output."
        )
    if _within(real, target):
        raise DataError(
            f"{path}: the input lies inside the output {output}. Choose another --output."
        )


def _check_nested(given: dict[str, str]) -> None:
    for real, path in given.items():
        for parent in map(str, Path(real).parents):
            if parent in given:
                raise DataError(
                    f"{path}: is given twice, by itself and as part of {given[parent]}. Its "
                    "documents would count twice: name it once."
                )


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _find(path: Path, source: int, name: str, left_out: Counter[str]) -> Iterator[InputFile]:
    if not path.is_dir():
        file = _input_file(path, f"{name}/{path.name}", source)
        if file is None:
            raise DataError(f"{path}: unknown kind of input. Give {_KINDS}, or a folder of them.")
        yield file
        return
    for entry in _walk(path, visited=set()):
        relative = entry.relative_to(path)
        if any(part.startswith(".") for part in relative.parts):
            left_out["hidden"] += 1
        elif not entry.exists():
            left_out["broken link"] += 1
        elif file := _input_file(entry, f"{name}/{relative.as_posix()}", source):
            yield file
        else:
            left_out[entry.suffix.lower() or "no suffix"] += 1


def _walk(folder: Path, *, visited: set[tuple[int, int]]) -> Iterator[Path]:
    """Files below a folder, sorted. Links are followed; no folder is entered twice."""
    try:
        about = folder.stat()
        if (about.st_dev, about.st_ino) in visited:
            return
        visited.add((about.st_dev, about.st_ino))
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error
    names = {entry.name for entry in entries}
    if "dataset_dict.json" in names:
        splits = ", ".join(entry.name for entry in entries if entry.is_dir())
        raise DataError(
            f"{folder}: a saved Hugging Face dataset of several splits ({splits}). Name those to "
            "read."
        )
    if names >= {"state.json", "dataset_info.json"}:
        yield from _dataset_files(folder)
        return
    for entry in entries:
        if entry.is_dir():
            yield from _walk(folder / entry.name, visited=visited)
        else:
            yield folder / entry.name


def _dataset_files(folder: Path) -> Iterator[Path]:
    """Files of a directory that `datasets` saved, in order; it may hold caches besides."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        names = [str(file["filename"]) for file in state["_data_files"]]
        picked = state.get("_indices_data_files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder / 'state.json'}: is not what a saved Hugging Face dataset has ({error}). "
            "Save it again."
        ) from error
    if picked:
        raise DataError(
            f"{folder}: a dataset whose rows were picked but not copied. Save it again, after "
            "flatten_indices()."
        )
    for name in names:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: is missing from the dataset. Copy it again.")
        yield folder / name


def _input_file(path: Path, name: str, source: int) -> InputFile | None:
    """Describe a file; None if it is of no known kind."""
    kind = _kind(path)
    if kind is None:
        return None
    try:
        about = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(about.st_mode):
        raise DataError(
            f"{path}: is no regular file, and is read more than once. Give a copy of what it holds."
        )
    return InputFile(
        source=source,
        path=str(path),
        # A file's name may be no valid text; ids and reports must be.
        name=name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
        kind=kind,
        size_bytes=about.st_size,
        modified_ns=about.st_mtime_ns,
    )


def _kind(path: Path) -> Kind | None:
    suffix = path.suffix.lower()
    if suffix in (".gz", ".zst"):
        return "lines" if Path(path.stem).suffix.lower() in _LINES else None
    if suffix in _LINES:
        return "lines"
    if suffix in _TABLES:
        return "table"
    return "file" if suffix in _FILES else None


def _unreadable(path: str | Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: cannot be read ({os.strerror(error.errno or 0)}). Ask its owner for permission, "
        "or leave it out."
    )
