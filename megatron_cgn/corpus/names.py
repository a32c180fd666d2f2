"""Ids of many documents in two mapped files: one by its place, without reading the others."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cgn.errors import DataError

_BYTES = "names.npy"
_ENDS = "ends.npy"


class Names:
    """A sequence of texts."""

    def __init__(self, content: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        """Join the two.

        Args:
            content: UTF-8 of all texts, one after another.
            ends: Where each ends.
        """
        self._content = content
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return len(self._content)

    def __getitem__(self, place: int) -> str:
        start = int(self._ends[place - 1]) if place else 0
        return self._content[start : int(self._ends[place])].tobytes().decode()

    @classmethod
    def load(cls, folder: Path) -> "Names":
        """Map what `save` wrote.

        Raises:
            DataError: If it is not there or damaged.
        """
        try:
            ends = np.load(folder / _ENDS, mmap_mode="r" if _filled(folder / _ENDS) else None)
            content = np.load(folder / _BYTES, mmap_mode="r" if len(ends) else None)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{folder}: ids of an earlier corpus cannot be read ({error}). Make it again."
            ) from error
        return cls(content, ends)


def _filled(path: Path) -> bool:
    # A file that holds nothing but its header cannot be mapped.
    return path.stat().st_size > 128


def save_names(folder: Path, names: Iterable[bytes]) -> None:
    """Write texts.

    Args:
        folder: Where ``names.npy`` and ``ends.npy`` go.
        names: Their UTF-8.
    """
    lengths: list[int] = []
    pieces: list[bytes] = []
    for name in names:
        pieces.append(name)
        lengths.append(len(name))
    np.save(folder / _BYTES, np.frombuffer(b"".join(pieces), dtype=np.uint8))
    np.save(folder / _ENDS, np.cumsum(lengths, dtype=np.int64))


def join_names(folder: Path, parts: Sequence[Names]) -> None:
    """Write the texts of many sequences as one, without holding them all.

    Args:
        folder: Where ``names.npy`` and ``ends.npy`` go.
        parts: In order.
    """
    num_bytes, num_names = sum(part.num_bytes for part in parts), sum(map(len, parts))
    if not num_names:
        save_names(folder, ())
        return
    content = _create(folder / _BYTES, np.uint8, num_bytes)
    ends = _create(folder / _ENDS, np.int64, num_names)
    first = start = 0
    for part in parts:
        content[start : start + part.num_bytes] = part._content
        ends[first : first + len(part)] = part._ends + start
        first, start = first + len(part), start + part.num_bytes
    content.flush()
    ends.flush()


def _create(path: Path, kind: type[np.generic], length: int) -> "np.memmap[Any, Any]":
    return np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=(length,))
