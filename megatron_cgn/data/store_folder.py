"""Encoding a file into the cache: once for each content, whole or not at all, without faults.

The key is a hash of all that decides the content: the file, the tokenizer and the template.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megatron_cgn.data.conversations import Fault
from megatron_cgn.data.folders import new_folder
from megatron_cgn.errors import DataError
from tokenizer.chat import ChatTemplate
from tokenizer.wrapper import Tokenizer

_FAULTS_SHOWN = 10

type Report = Callable[[str, int, int], None]
"""Told of a file, how many of its bytes are encoded, and how many it has."""


def build_folder(
    path: str | Path,
    name: str,
    write: Callable[[Path], object],
    *,
    format: int,
    chat: ChatTemplate,
    tokenizer: Tokenizer,
    cache: Path,
) -> Path:
    """Encode a file into a folder of the cache, unless that has been done.

    Args:
        path: The file.
        name: What the folder's name begins with.
        write: Fills the folder.
        format: Version of what it writes.
        chat: Encodes conversations.
        tokenizer: The model's tokenizer.
        cache: Where folders belong.

    Returns:
        The folder.

    Raises:
        DataError: If the file cannot be read, is faulty, or changes meanwhile; or if the cache
            cannot be written.
    """
    before = _state(path)
    folder = cache / f"{name}-{_key(path, format, chat, tokenizer)}"
    if folder.is_dir():
        return folder
    try:
        with new_folder(folder) as temporary:
            write(temporary)
            if _state(path) != before:  # what was encoded need not be what the key stands for
                raise DataError(f"{path}: changed while it was read. Start again once it is whole.")
    except OSError as error:
        raise DataError(
            f"{cache}: cannot write the encoded conversations of {path} "
            f"({error.strerror or error}). Make room there, or set data.cache_dir to a directory "
            "that can be written."
        ) from error
    return folder


def without_faults[T](
    records: Iterable[T | Fault], path: str | Path, *, what: str, option: str
) -> Iterator[T]:
    """Pass records on until one is faulty, and then look for more faults.

    Args:
        records: Of a file.
        path: The file.
        what: What it holds, for messages.
        option: Of tools/preprocess_data.py, which lists the faults of such a file.

    Yields:
        The records in front of the first faulty one.

    Raises:
        DataError: At the end, if there are faulty records, of which the first are named, or none
            at all.
    """
    faults: list[Fault] = []
    done = 0
    for record in records:
        if isinstance(record, Fault):
            faults.append(record)
            if len(faults) == _FAULTS_SHOWN:
                break
        elif not faults:
            yield record
            done += 1
    if faults:
        raise DataError(_faulty(path, faults, option))
    if not done:
        raise DataError(f"{path}: holds no {what}. Give a file that does.")


class Progress:
    """Adds up the bytes read of a file."""

    def __init__(self, path: str | Path, report: Report | None) -> None:
        """Begin at none of them."""
        self._path = str(path)
        self._report = report or _silent
        self._total = sum(file.stat().st_size for file in _content(Path(path)))
        self._done = 0

    def __call__(self, more: int) -> None:
        """Report so many more."""
        self._done += more
        self._report(self._path, self._done, self._total)


def _faulty(path: str | Path, faults: list[Fault], option: str) -> str:
    first = "The first faulty records" if len(faults) == _FAULTS_SHOWN else "Faulty records"
    return "\n".join(
        [
            f"{first} of {path}:",
            *(f"  {fault}" for fault in faults),
            f"Mend or remove them. tools/preprocess_data.py {option} --validate lists all of a "
            "file.",
        ]
    )


def _key(path: str | Path, format: int, chat: ChatTemplate, tokenizer: Tokenizer) -> str:
    """Hash of everything that decides a store's content."""
    content = hashlib.blake2b(digest_size=16)
    try:
        for file in _content(Path(path)):
            with file.open("rb") as stream:
                content.update(hashlib.file_digest(stream, hashlib.blake2b).digest())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}). Check the path and its "
            "permissions."
        ) from error
    suffix = Path(path).suffix  # decides how the file is read
    facts = [format, content.hexdigest(), suffix, tokenizer.fingerprint(), chat.fingerprint()]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def _state(path: str | Path) -> list[tuple[str, int, int, int]]:
    """What changes with a dataset's files, without reading them; empty if they cannot be found."""
    try:
        found = [(str(file), file.stat()) for file in _content(Path(path))]
    except OSError:
        return []
    return [(name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in found]


def _content(path: Path) -> list[Path]:
    """The files of a dataset: itself, or those in its directory."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _silent(path: str, done: int, total: int) -> None:
    """Report nothing."""
