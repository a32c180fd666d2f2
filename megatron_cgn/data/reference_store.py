"""Log-probabilities of one file's answers under a reference model, on disk.

::

    <cache>/reference-<key>/facts.json, scores-<when>-<who>.bin

The key is a hash of all that decides the scores of a file, and ``facts.json`` has the same in
plain words. What is read of a single answer (``data.seq_length`` and ``chat.truncation`` decide
it) stands beside each score instead: changing a setting scores only the answers anew that are
read differently.

Whoever scores appends to a file of its own, in blocks with a checksum. So runs that share a cache
never wait for one another or write over each other, and one that is killed loses only what it had
not written yet. Of two scores of an answer the older is used, so that a run that goes on finds the
same numbers again.
"""

import hashlib
import json
import os
import struct
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.folders import new_folder
from megatron_cgn.errors import DataError

FORMAT = 1
"""Version of the files; it is one of the facts."""
ENTRY = np.dtype([("answer", "<i4"), ("counted", "<i4"), ("reading", "<u8"), ("logp", "<f8")])
"""An answer's number in its file, its tokens that count, what was read of it, and the score."""

_FACTS = "facts.json"
_HEADER = struct.Struct("<4sII")
"""In front of each block: `_MAGIC`, how many entries, and their CRC-32."""
_MAGIC = b"REF1"
_SYNC_S = 10.0
"""A machine that loses its power loses what was scored in so many seconds."""

type Numbers = npt.NDArray[np.int64]


def reading_of(*columns: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint64]:
    """Hash rows of integers that say what is read of each answer.

    Args:
        *columns: Integers ``[N]`` each.

    Returns:
        64 bits of each row, uint64 ``[N]`` (SplitMix64 over the columns, Steele et al. 2014).
    """
    state = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        state = (state ^ column.astype(np.int64).view(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


class ReferenceStore:
    """The scores of one file's answers. Use as a context manager; for one process.

    Attributes:
        logps: Log-probability of each answer, the sum over what counts, nats, float64 ``[N]``;
            NaN where it is not known.
        num_other: Answers that have scores, but of another reading alone.
    """

    def __init__(
        self,
        folder: Path,
        *,
        readings: npt.NDArray[np.uint64],
        counted: npt.NDArray[np.integer[Any]],
    ) -> None:
        """Read what there is; see `open_or_start`."""
        self._folder = folder
        self._readings = readings
        self._counted = counted
        self._descriptor: int | None = None
        self._synced = time.monotonic()
        self.logps: npt.NDArray[np.float64] = np.full(len(readings), np.nan)
        others = np.zeros(len(readings), dtype=np.bool_)
        for path in sorted(folder.glob("scores-*.bin")):
            for block in _blocks(path):
                self._take(block, others)
        self.num_other = int((others & np.isnan(self.logps)).sum())

    @classmethod
    def open_or_start(
        cls,
        cache: Path,
        facts: Mapping[str, Any],
        *,
        about: Mapping[str, str],
        readings: npt.NDArray[np.uint64],
        counted: npt.NDArray[np.integer[Any]],
    ) -> Self:
        """Open the scores of a file, or make a place for them.

        Args:
            cache: Where they belong.
            facts: All that decides the scores but for `readings`, as JSON.
            about: What may help a reader and decides nothing, such as paths.
            readings: Stands for what is read of each answer, uint64 ``[N]``; see `reading_of`.
            counted: Tokens of each answer that count, integers ``[N]``.

        Returns:
            The store.

        Raises:
            DataError: If the folder cannot be read or made, or is of another model or other data
                than its name says.
        """
        folder = cache / f"reference-{_key(facts)}"
        try:
            if not folder.is_dir():
                with new_folder(folder) as temporary:
                    text = json.dumps({"facts": facts, "about": about}, indent=1)
                    (temporary / _FACTS).write_text(text, "utf-8")
        except OSError as error:
            raise _unwritable(folder, error) from error
        try:
            written = read_facts(folder)
            if different := differing(written, facts):
                raise DataError(
                    f"{folder}: was renamed or edited: its {_FACTS} says other {different[0]} than "
                    "its name stands for. Delete this folder; the reference is scored again."
                )
            return cls(folder, readings=readings, counted=counted)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder}: cannot read the reference log-probabilities ({error}). Delete this "
                "folder, which is scored again, or set data.cache_dir to a directory that can be "
                "read and written."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            os.fsync(descriptor)
        except OSError as error:
            if kind is None:
                raise _unwritable(self._folder, error) from error
        finally:
            os.close(descriptor)

    def missing(self, wanted: Numbers) -> Numbers:
        """Those of some answers that have no score."""
        unknown: Numbers = wanted[np.isnan(self.logps[wanted])]
        return unknown

    def put(self, answers: Numbers, logps: npt.NDArray[np.float64]) -> None:
        """Keep scores. They are written at once, and from time to time made durable.

        Args:
            answers: Numbers in the file, int64 ``[n]``.
            logps: Their log-probabilities, float64 ``[n]``, finite.

        Raises:
            DataError: If the disk refuses.
        """
        entries = np.empty(len(answers), dtype=ENTRY)
        entries["answer"], entries["logp"] = answers, logps
        entries["counted"], entries["reading"] = self._counted[answers], self._readings[answers]
        content = entries.tobytes()
        block = _HEADER.pack(_MAGIC, len(entries), zlib.crc32(content)) + content
        try:
            self._append(block)
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        self.logps[answers] = logps

    def _append(self, block: bytes) -> None:
        if self._descriptor is None:
            name = f"scores-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.bin"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            self._descriptor = os.open(self._folder / name, flags, 0o644)
        left = memoryview(block)
        while left:
            left = left[os.write(self._descriptor, left) :]
        if time.monotonic() - self._synced >= _SYNC_S:
            os.fsync(self._descriptor)
            self._synced = time.monotonic()

    def _take(self, block: npt.NDArray[np.void], others: npt.NDArray[np.bool_]) -> None:
        """Take over the scores of a block that are of this reading and not known yet."""
        block = block[(block["answer"] >= 0) & (block["answer"] < len(self.logps))]
        answers = block["answer"].astype(np.int64)
        same = block["reading"] == self._readings[answers]
        same &= block["counted"] == self._counted[answers]
        others[answers[~same]] = True
        block, answers = block[same], answers[same]
        new = np.isnan(self.logps[answers])
        self.logps[answers[new]] = block["logp"][new]


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"{folder}: cannot write the reference log-probabilities ({error.strerror or error}). Make "
        "room there and start the run again: it goes on with those that were kept. Or set "
        "data.cache_dir to a directory that can be written."
    )


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Names of the facts that two stores do not share."""
    names = dict.fromkeys([*first, *second])
    return [name for name in names if first.get(name) != second.get(name)]


def read_facts(folder: Path) -> dict[str, Any]:
    """What decides the scores in a folder.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is damaged; or KeyError, or TypeError.
    """
    return dict(_read(folder)["facts"])


def read_about(folder: Path) -> dict[str, str]:
    """What else a folder says of its scores; raises as `read_facts` does."""
    return dict(_read(folder)["about"])


def _read(folder: Path) -> Any:
    return json.loads((folder / _FACTS).read_text("utf-8"))


def _key(facts: Mapping[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _blocks(path: Path) -> Iterator[npt.NDArray[np.void]]:
    """The blocks of a file up to the first that is not whole, as a killed run leaves its last."""
    content = memoryview(path.read_bytes())
    begin = 0
    while begin + _HEADER.size <= len(content):
        magic, count, checksum = _HEADER.unpack_from(content, begin)
        begin += _HEADER.size
        part = content[begin : begin + count * ENTRY.itemsize]
        if magic != _MAGIC or len(part) < count * ENTRY.itemsize or zlib.crc32(part) != checksum:
            return
        yield np.frombuffer(part, dtype=ENTRY)
        begin += len(part)
