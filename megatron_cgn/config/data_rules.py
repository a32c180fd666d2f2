"""Rules of ``data``: sources, their shares, phases and what ``train.epochs`` counts."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from megatron_cgn.config.schema import DataConfig, FileConfig, SourceConfig, TrainConfig

DOMAIN = "domain"
"""The source that ``train.epochs`` counts under a mix unless ``data.epochs_of`` names another."""


def data_faults(data: DataConfig) -> Iterator[str]:
    """Find what is wrong with the sources whatever their files hold.

    Args:
        data: The settings.

    Yields:
        A message a fault.
    """
    if not data.sources:
        yield "data.sources is empty. Name at least one source: {name, path, weight}."
        return
    yield from _names(data)
    yield from _paths(data)
    mixes = dict(_mixes(data))
    yield from _weights(data, mixed=bool(mixes) or data.mix is not None)
    if data.mix is not None and data.phases:
        yield "data.mix, data.phases: both given; give one mix, or every phase its own."
    for where, mix in mixes.items():
        yield from _mix(where, mix, [source.name for source in data.sources])
    yield from _untils(data)
    yield from _held_out(data)
    if data.num_workers < 0:
        yield f"data.num_workers: {data.num_workers}; must be at least 0."


def epoch_faults(data: DataConfig, train: TrainConfig) -> Iterator[str]:
    """Find what keeps ``train.epochs`` from saying how long the run is.

    Args:
        data: The settings.
        train: Their ``epochs``.

    Yields:
        A message a fault.
    """
    mixes = [mix for _, mix in _mixes(data)]
    if data.epochs_of is not None and (train.epochs is None or not mixes):
        needed = "data.mix or data.phases" if train.epochs is not None else "train.epochs"
        yield f"data.epochs_of: {data.epochs_of!r} has no effect without {needed}; set it to null."
    if train.epochs is None or not mixes:
        return
    name = data.epochs_of or DOMAIN
    # A fixed number of steps comes to an end, however many epochs are asked for.
    steps = [p.until for p in data.phases[:-1] if p.until is not None and p.until > 1]
    lasting = mixes[-1:] if steps else mixes
    if not any(name in mix for mix in mixes):
        yield (
            f"data.epochs_of: {data.epochs_of or 'not set'}; train.epochs={train.epochs:g} counts "
            f"passes over one source of the mix; name one of {_listed(mixes[0])}."
        )
    elif not any(name in mix for mix in lasting):
        yield (
            f"data.epochs_of: {name!r} is not in the mix of the last phase, so that it may never "
            f"be read {train.epochs:g} times; give train.train_iters instead of train.epochs."
        )


def _mixes(data: DataConfig) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Every mix by the setting that holds it."""
    if data.mix is not None:
        yield "data.mix", data.mix
    for index, phase in enumerate(data.phases):
        yield f"data.phases.{index}.mix", phase.mix


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _names(data: DataConfig) -> Iterator[str]:
    names = Counter(source.name for source in data.sources)
    yield from (
        f"data.sources: the name {name!r} is given {count} times. Names must differ."
        for name, count in names.items()
        if count > 1
    )
    for index, source in enumerate(data.sources):
        if not source.name or "/" in source.name:
            yield f"data.sources.{index}.name: {source.name!r}; must be a word without slashes."


def _paths(data: DataConfig) -> Iterator[str]:
    for source in data.sources:
        if (source.path is None) == (not source.files):
            state = "neither" if source.path is None else "both"
            yield (
                f"data.sources[{source.name}]: has {state} of path and files. Give the prefix of "
                "one index as path, or of several as files."
            )
    paths = Counter(_resolved(file.path) for s in data.sources for file in _files(s))
    yield from (
        f"data.sources: the path {path!r} is given {count} times. Give it once, with the weights "
        "added up."
        for path, count in paths.items()
        if count > 1
    )
    for source in data.sources:
        held_out = source.validation_path
        if held_out is not None and _resolved(held_out) in paths:
            yield (
                f"data.sources[{source.name}].validation_path={held_out!r} is also trained on. "
                "Hold out other documents, or set data.validation_fraction instead."
            )


def _files(source: SourceConfig) -> tuple[FileConfig, ...]:
    return source.files if source.path is None else (FileConfig(path=source.path), *source.files)


def _weights(data: DataConfig, *, mixed: bool) -> Iterator[str]:
    given = [s for s in data.sources if s.weight is not None]
    for source in given:
        if mixed:
            yield (
                f"data.sources[{source.name}].weight={source.weight}: data.mix and data.phases say "
                "what share a source has. Remove the weight, or the mix."
            )
        elif not _positive(source.weight, or_zero=True):
            yield f"data.sources[{source.name}].weight={source.weight}: must be 0 or more."
    if not mixed and all(source.weight == 0 for source in data.sources):
        yield "data.sources: every weight is 0. Give at least one source a weight above 0."
    for source in data.sources:
        weights = [file.weight for file in source.files]
        if None in weights and any(weight is not None for weight in weights):
            yield (
                f"data.sources[{source.name}].files: some have a weight. Give one to each, or to "
                "none, so that each is read equally often."
            )
        for file in source.files:
            if file.weight is not None and not _positive(file.weight):
                yield (
                    f"data.sources[{source.name}].files[{file.path}].weight={file.weight}: must be "
                    "above 0."
                )


def _positive(number: float | None, *, or_zero: bool = False) -> bool:
    if number is None or not math.isfinite(number):
        return False
    return number >= 0 if or_zero else number > 0


def _mix(where: str, mix: Mapping[str, float], names: list[str]) -> Iterator[str]:
    if not mix:
        yield f"{where}: is empty. Give shares by source name: {{{names[0]}: 1.0}}."
    for name, share in mix.items():
        if name not in names:
            yield f"{where}.{name}: no source has this name; choose from {_listed(names)}."
        if not _positive(share):
            yield f"{where}.{name}: {share}; must be above 0. Leave the source out to read none."


def _untils(data: DataConfig) -> Iterator[str]:
    if not data.phases:
        return
    last = data.phases[-1].until
    if last not in (None, 1):
        yield (
            f"data.phases.{len(data.phases) - 1}.until: {last}; the last phase goes to the end of "
            "the run. Leave until out, or set it to 1."
        )
    before: float = 0
    fractions = {p.until < 1 for p in data.phases[:-1] if p.until is not None}
    if len(fractions) > 1:
        yield "data.phases: some until are fractions, some step numbers; give one kind."
    for index, phase in enumerate(data.phases[:-1]):
        where, until = f"data.phases.{index}.until", phase.until
        if until is None or until == 1:
            yield f"{where}: {until}; only the last phase goes to the end of the run."
        elif not math.isfinite(until) or until <= before:
            yield f"{where}: {until}; must be above {before:g}, where the phase begins."
        elif until > 1 and until != int(until):
            yield f"{where}: {until}; above 1 it is the number of a step, a whole number."
        else:
            before = until


def _held_out(data: DataConfig) -> Iterator[str]:
    mixed = [name for _, mix in _mixes(data) for name in mix]
    for source in data.sources:
        unread = source.name not in mixed if mixed else source.weight == 0
        if unread and source.validation_path is None and not data.validation_fraction:
            what = ": is in no mix" if mixed else ".weight=0"
            yield (
                f"data.sources[{source.name}]{what} and nothing of it is held out, so it has no "
                "effect. Remove the source, or give it a share or a validation_path."
            )
    if not 0 <= data.validation_fraction < 1:
        yield (
            f"data.validation_fraction={data.validation_fraction}: must be at least 0 and below 1."
        )
    elif data.validation_fraction and all(s.validation_path is not None for s in data.sources):
        yield (
            f"data.validation_fraction={data.validation_fraction}: has no effect, since every "
            "source has a validation_path. Set it to 0."
        )


def _resolved(path: str) -> str:
    return str(Path(path).resolve())
