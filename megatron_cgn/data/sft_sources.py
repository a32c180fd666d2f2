"""Sources of conversations: their files encoded, selected from, and divided.

A conversation is held out by what it asks, not by where it stands: a hash of the question decides,
so that adding data or shuffling a file moves nothing to the other side, and two answers to one
question are on the same side, in whichever source they are.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_cgn.config.data_rules import data_faults
from megatron_cgn.config.schema import DataConfig, FileConfig, SourceConfig
from megatron_cgn.data.sft_files import AnyFile, OpenedFile, Selected, SftFile, Store
from megatron_cgn.data.sft_selection import TOO_LONG, Reading, Tally
from megatron_cgn.data.sources import exact
from megatron_cgn.errors import ConfigError, DataError

_SHOWN = 10


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


def files_of(source: SourceConfig) -> tuple[FileConfig, ...]:
    """The files of a source that are not held out whole."""
    return source.files or (FileConfig(path=source.path or ""),)


def open_files[S: Store, C: Selected](
    data: DataConfig, reading: Reading, open_file: Callable[[str], tuple[S, C]]
) -> list[OpenedFile[S, C]]:
    """Encode, open and divide the files of all sources.

    Args:
        data: The settings.
        reading: How conversations are read.
        open_file: Encodes a file, and returns what it holds and what is read of it.

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
            store, selection = open_file(config.path)
            files.append(
                OpenedFile(
                    source=place,
                    config=config,
                    store=store,
                    selection=selection,
                    is_validation=is_validation,
                )
            )
    _refuse_copies(files)
    if reading.truncation == "error":
        _refuse_long(files, reading)
    _hold_out(files, data)
    return files


def sources_of(data: DataConfig, files: Sequence[AnyFile]) -> tuple[SftSource, ...]:
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


def _refuse_copies(files: Sequence[AnyFile]) -> None:
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


def _refuse_long(files: Sequence[AnyFile], reading: Reading) -> None:
    total = sum(int((file.selection.state == TOO_LONG).sum()) for file in files)
    if not total:
        return
    first = itertools.islice(itertools.chain.from_iterable(map(_long, files)), _SHOWN)
    raise DataError(
        "\n".join(
            [
                f"chat.truncation=error: {total:,} {files[0].store.unit} take more than "
                f"data.seq_length={reading.seq_length:,} tokens:",
                *(f"  {line}" for line in first),
                "Raise data.seq_length, shorten them, or choose drop, keep_start or keep_end.",
            ]
        )
    )


def _long(file: AnyFile) -> Iterator[str]:
    for number in np.flatnonzero(file.selection.state == TOO_LONG)[:_SHOWN].tolist():
        places = int(file.selection.places[number])
        yield f"{file.config.path}:{file.store.rows[number]['line']}: {places:,} tokens"


def _hold_out(files: Sequence[AnyFile], data: DataConfig) -> None:
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
