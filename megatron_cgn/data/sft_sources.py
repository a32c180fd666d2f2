"""Sources of conversations: their files encoded, selected from, and divided.

A conversation is held out by what it asks, not by where it stands: a hash of the question decides,
so that adding data or shuffling a file moves nothing to the other side, and two answers to one
question are on the same side, in whichever source they are.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_cgn.config.data_rules import data_faults
from megatron_cgn.config.schema import DataConfig, FileConfig, SourceConfig
from megatron_cgn.data.sft_selection import (
    NOTHING_COUNTED,
    TOO_LONG,
    TRUNCATED,
    Reading,
    Selection,
    Tally,
    select,
)
from megatron_cgn.data.sft_store import SftStore, open_store
from megatron_cgn.data.sources import exact
from megatron_cgn.errors import ConfigError, DataError

_SHOWN = 10

type Numbers = npt.NDArray[np.int64]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SftSource:
    """A source."""

    name: str
    """Its name."""
    files: tuple[SftFile, ...]
    """What is trained on, and held out of it."""
    validation: SftFile | None
    """A file that is held out whole, or None."""

    @property
    def training(self) -> Tally:
        """What is trained on, once."""
        return sum((file.training for file in self.files), Tally())

    @property
    def held_out(self) -> Tally:
        """What is held out."""
        return sum((file.held_out for file in self.all_files), Tally())

    @property
    def all_files(self) -> tuple[SftFile, ...]:
        """Its files, the one that is held out whole last."""
        return self.files if self.validation is None else (*self.files, self.validation)


@dataclass(slots=True, kw_only=True)
class OpenedFile:
    """A file while it is divided."""

    source: int
    """Place of its source."""
    config: FileConfig
    """Its path and weight."""
    store: SftStore
    """Its conversations."""
    selection: Selection
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


def files_of(source: SourceConfig) -> tuple[FileConfig, ...]:
    """The files of a source that are not held out whole."""
    return source.files or (FileConfig(path=source.path or ""),)


def open_files(
    data: DataConfig, reading: Reading, build: Callable[[str], Path]
) -> list[OpenedFile]:
    """Encode, open and divide the files of all sources.

    Args:
        data: The settings.
        reading: How conversations are read.
        build: Encodes a file and returns the folder of its store.

    Returns:
        The files, source by source, each one's ``validation_path`` last.

    Raises:
        ConfigError: If settings contradict each other.
        DataError: If a file is unusable, given twice, or nothing is left of it; or if
            conversations are too long and ``chat.truncation`` is ``error``.
    """
    faults = list(data_faults(data))
    if data.phases:
        faults.append("data.phases: conversations are read in one mix; give data.mix.")
    if faults:
        raise ConfigError("\n".join(faults))
    files = []
    for place, source in enumerate(data.sources):
        configs = [(file, False) for file in files_of(source)]
        if source.validation_path is not None:
            configs.append((FileConfig(path=source.validation_path), True))
        for config, is_validation in configs:
            store = open_store(build(config.path))
            files.append(
                OpenedFile(
                    source=place,
                    config=config,
                    store=store,
                    selection=select(store, reading),
                    is_validation=is_validation,
                )
            )
    _refuse_copies(files)
    if reading.truncation == "error":
        _refuse_long(files, reading)
    _hold_out(files, data)
    return files


def sources_of(data: DataConfig, files: Sequence[OpenedFile]) -> tuple[SftSource, ...]:
    """Describe the sources once they are divided.

    Args:
        data: The settings.
        files: From `open_files`.

    Returns:
        The sources, in order.
    """
    trained = np.unique(np.concatenate([f.questions[f.training] for f in files]))
    result = []
    for place, source in enumerate(data.sources):
        mine = [file for file in files if file.source == place]
        described = [
            file.describe(int(np.isin(file.questions[file.held_out], trained).sum()))
            for file in mine
        ]
        result.append(
            SftSource(
                name=source.name,
                files=tuple(d for d, f in zip(described, mine, strict=True) if not f.is_validation),
                validation=next(
                    (d for d, f in zip(described, mine, strict=True) if f.is_validation), None
                ),
            )
        )
    return tuple(result)


def _refuse_copies(files: Sequence[OpenedFile]) -> None:
    seen: dict[str, str] = {}
    faults = []
    for file in files:
        if file.store.key in seen:
            faults.append(
                f"data.sources: {file.config.path} holds exactly what {seen[file.store.key]} does. "
                "Give it once: to train on, or held out."
            )
        seen[file.store.key] = file.config.path
    if faults:
        raise DataError("\n".join(faults))


def _refuse_long(files: Sequence[OpenedFile], reading: Reading) -> None:
    total = sum(int((file.selection.state == TOO_LONG).sum()) for file in files)
    if not total:
        return
    first = itertools.islice(itertools.chain.from_iterable(map(_long, files)), _SHOWN)
    raise DataError(
        "\n".join(
            [
                f"chat.truncation=error: {total:,} conversations take more than data.seq_length="
                f"{reading.seq_length:,} tokens:",
                *(f"  {line}" for line in first),
                "Raise data.seq_length, shorten them, or choose drop, keep_start or keep_end.",
            ]
        )
    )


def _long(file: OpenedFile) -> Iterator[str]:
    for number in np.flatnonzero(file.selection.state == TOO_LONG)[:_SHOWN].tolist():
        places = int(file.selection.places[number])
        yield f"{file.config.path}:{file.store.rows[number]['line']}: {places:,} tokens"


def _hold_out(files: Sequence[OpenedFile], data: DataConfig) -> None:
    """Divide the sources without a file of their own to validate on."""
    own = {file.source for file in files if file.is_validation}
    divided = [file for file in files if file.source not in own]
    if not data.validation_fraction or not divided:
        return
    limit = int(exact(data.validation_fraction) * 2**64)
    held = []
    for _, group in itertools.groupby(divided, key=lambda file: file.source):
        questions = np.concatenate([f.questions[f.selection.read] for f in group])
        if len(questions):  # at least one question
            held.append(questions[questions <= max(np.uint64(limit), questions.min())])
    everywhere = np.unique(np.concatenate(held)) if held else np.empty(0, dtype=np.uint64)
    for file in divided:
        file.held = np.isin(file.questions, everywhere)
