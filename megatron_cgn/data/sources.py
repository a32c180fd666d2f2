"""Which documents of which source are trained on, and which are held out.

Checks indices and divides them; how much of them a run reads is `blend.py`'s.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_cgn.config.data_rules import data_faults
from megatron_cgn.config.schema import DataConfig, FileConfig, SourceConfig
from megatron_cgn.data.indexed import IndexInfo, check_index
from megatron_cgn.errors import ConfigError, DataError, UserError


@dataclass(frozen=True, kw_only=True)
class Documents:
    """A range of documents of one index."""

    index: IndexInfo
    """The index."""
    start: int
    """First document."""
    stop: int
    """One past the last document."""

    def __len__(self) -> int:
        """Number of documents."""
        return self.stop - self.start

    @property
    def identity(self) -> str:
        """Equal for the same documents, whatever files hold them."""
        return f"{self.index.sidecar.digest}[{self.start}:{self.stop}]"

    @functools.cached_property
    def tokens(self) -> int:
        """Number of tokens in them."""
        return self.index.tokens_of(self.start, self.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One source, divided. Training and held-out documents never overlap."""

    name: str
    """Its name."""
    training: tuple[Documents, ...]
    """Documents to train on, file by file."""
    weights: tuple[Fraction, ...]
    """Weight of each file within the source; their sum is not 1."""
    validation: tuple[Documents, ...]
    """Documents held out, if any."""


def check_sources(
    data: DataConfig, *, tokenizer_fingerprint: str | None = None
) -> tuple[Source, ...]:
    """Check every source and divide it into training and held-out documents.

    Args:
        data: The settings; ``validation_fraction`` applies to sources without
            ``validation_path`` and takes the last documents of each file, rounded, at least one.
        tokenizer_fingerprint: Identity of the tokenizer in use; None skips that check.

    Returns:
        The sources, in order.

    Raises:
        ConfigError: If names, paths or weights contradict each other.
        DataError: If an index is unusable; all faulty sources are named at once.
    """
    if wrong := list(data_faults(data)):
        raise ConfigError("\n".join(wrong))
    trained = {name for mix in mixes_of(data) for name in mix}
    sources, faults = [], []
    for source in data.sources:
        try:
            sources.append(
                _check_source(source, data, tokenizer_fingerprint, trained=source.name in trained)
            )
        except UserError as error:
            faults.append(f"data.sources[{source.name}]: {error}")
    faults += _copies(sources)
    if faults:
        raise DataError("\n".join(faults))
    return tuple(sources)


def _copies(sources: Sequence[Source]) -> Iterator[str]:
    """Find documents that are given twice under different names, held-out ones above all."""
    seen: dict[str, str] = {}
    for source in sources:
        prefixes = {
            documents.index.prefix: documents.index.sidecar.digest
            for documents in (*source.training, *source.validation)
        }
        for prefix, digest in prefixes.items():
            if digest in seen:
                yield (
                    f"data.sources[{source.name}]: {prefix} holds exactly the documents of "
                    f"{seen[digest]}. Give them once: to train on, or held out."
                )
            seen[digest] = prefix


def mixes_of(data: DataConfig) -> list[Mapping[str, Fraction]]:
    """Weights of the sources that are trained on, phase by phase."""
    if data.phases:
        return [_exact(phase.mix) for phase in data.phases]
    if data.mix is not None:
        return [_exact(data.mix)]
    weights = {s.name: 1.0 if s.weight is None else s.weight for s in data.sources}
    return [_exact({name: weight for name, weight in weights.items() if weight})]


def _exact(mix: Mapping[str, float]) -> dict[str, Fraction]:
    return {name: exact(share) for name, share in mix.items()}


def _check_source(
    source: SourceConfig, data: DataConfig, fingerprint: str | None, *, trained: bool
) -> Source:
    files = source.files or (FileConfig(path=source.path or ""),)
    indices = [check_index(file.path, tokenizer_fingerprint=fingerprint) for file in files]
    held_out: list[Documents] = []
    bounds = [index.documents for index in indices]
    if source.validation_path is not None:
        index = check_index(source.validation_path, tokenizer_fingerprint=fingerprint)
        held_out.append(Documents(index=index, start=0, stop=index.documents))
    elif data.validation_fraction:
        for place, index in enumerate(indices):
            bounds[place] -= max(1, round(data.validation_fraction * index.documents))
            held_out.append(Documents(index=index, start=bounds[place], stop=index.documents))
    training = tuple(
        Documents(index=index, start=0, stop=bound)
        for index, bound in zip(indices, bounds, strict=True)
    )
    if trained:
        _demand_tokens(training, data)
    return Source(
        name=source.name,
        training=training,
        weights=_weights(files, training),
        validation=tuple(held_out),
    )


def _demand_tokens(training: Sequence[Documents], data: DataConfig) -> None:
    for documents in training:
        if not documents.tokens:
            raise DataError(
                f"{documents.index.prefix}: nothing is left to train on: data.validation_fraction="
                f"{data.validation_fraction} holds out all of its {documents.index.documents} "
                "document(s). Lower the fraction, add documents, or give a validation_path."
            )


def _weights(files: Sequence[FileConfig], training: Sequence[Documents]) -> tuple[Fraction, ...]:
    """Weights as the user wrote them (0.1 is a tenth), or the files' tokens."""
    return tuple(
        Fraction(documents.tokens) if file.weight is None else exact(file.weight)
        for file, documents in zip(files, training, strict=True)
    )


def exact(number: int | float) -> Fraction:
    """The fraction that a setting spells: 0.8 is 4/5, which no binary fraction is."""
    return Fraction(str(number))
