"""A file of a run that reads conversations, or preferences: while it is divided, and afterwards."""

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_cgn.config.schema import FileConfig
from megatron_cgn.data.sft_selection import NOTHING_COUNTED, TOO_LONG, TRUNCATED, Tally
from megatron_cgn.data.sources import exact

type Numbers = npt.NDArray[np.int64]


class Store(Protocol):
    """What a file holds: `sft_store.SftStore`, or records of preferences."""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        ...

    @property
    def key(self) -> str:
        """Stands for the content."""
        ...

    @property
    def rows(self) -> npt.NDArray[np.void]:
        """Of each, the ``line`` in the file and the hash of the ``question``."""
        ...

    @property
    def unit(self) -> str:
        """What it is counted in, for messages."""
        ...

    def __len__(self) -> int:
        """How many there are."""
        ...


class Selected(Protocol):
    """What is read of a file: `sft_selection.Selection`, or a selection of records."""

    @property
    def places(self) -> npt.NDArray[np.int32]:
        """What each takes of a row, int32 ``[N]``."""
        ...

    @property
    def state(self) -> npt.NDArray[np.int8]:
        """What became of each, int8 ``[N]``: see `sft_selection`."""
        ...

    @property
    def read(self) -> npt.NDArray[np.bool_]:
        """Which are read, bool ``[N]``."""
        ...

    def spans(self, which: npt.NDArray[np.integer[Any]]) -> bytes:
        """Stands for what is read of some."""
        ...

    def tally(self, which: npt.NDArray[np.integer[Any]]) -> Tally:
        """Count some, as often as each is given."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SftFile:
    """A file of conversations."""

    path: str
    """Where it was."""
    folder: Path
    """Its conversations, encoded."""
    weight: Fraction | None
    """Share of the source's tokens, relative to its other files; None: by their tokens."""
    records: int
    """Conversations that it holds."""
    truncated: int
    """Of these, read in part."""
    too_long: int
    """Left out, being longer than ``data.seq_length``."""
    nothing_counted: int
    """Left out, since nothing that is read of them would count."""
    training: Tally
    """What is trained on, once."""
    held_out: Tally
    """What is not."""
    known_questions: int = 0
    """Conversations held out whose question is also trained on."""


@dataclass(slots=True, kw_only=True)
class OpenedFile[S: Store, C: Selected]:
    """A file while it is divided."""

    source: int
    """Place of its source."""
    config: FileConfig
    """Its path and weight."""
    store: S
    """Its conversations."""
    selection: C
    """What is read of them."""
    is_validation: bool
    """Whether it is held out whole."""
    held: npt.NDArray[np.bool_] = field(init=False)
    """Which are held out, bool ``[N]``."""

    def __post_init__(self) -> None:
        """All or none are held out at first."""
        self.held = np.full(len(self.store), self.is_validation)

    @property
    def training(self) -> Numbers:
        """Conversations that are trained on."""
        return np.flatnonzero(self.selection.read & ~self.held)

    @property
    def held_out(self) -> Numbers:
        """Conversations that are held out."""
        return np.flatnonzero(self.selection.read & self.held)

    @property
    def questions(self) -> npt.NDArray[np.uint64]:
        """Hashes of the questions, uint64 ``[N]``."""
        found: npt.NDArray[np.uint64] = self.store.rows["question"]
        return found

    def describe(self, known_questions: int) -> SftFile:
        """What is known of it once it is divided."""
        states = np.bincount(self.selection.state, minlength=NOTHING_COUNTED + 1)
        return SftFile(
            path=self.config.path,
            folder=self.store.folder,
            weight=None if self.config.weight is None else exact(self.config.weight),
            records=len(self.store),
            truncated=int(states[TRUNCATED]),
            too_long=int(states[TOO_LONG]),
            nothing_counted=int(states[NOTHING_COUNTED]),
            training=self.selection.tally(self.training),
            held_out=self.selection.tally(self.held_out),
            known_questions=known_questions,
        )


type AnyFile = OpenedFile[Any, Any]
"""A file of conversations or of records."""
