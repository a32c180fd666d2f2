"""Settings of ``tools/prepare_corpus.py``: name, type, default and meaning of each.

Every step has a group of its own, and can be turned off. Rules live in each group's ``faults``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanConfig:
    """Unicode, boilerplate, quality and language of each document."""

    enabled: bool = True
    """Whether to clean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeduplicateConfig:
    """Equal and nearly equal documents."""

    enabled: bool = True
    """Whether to deduplicate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RedactConfig:
    """Personal data and whatever else must not be trained on."""

    enabled: bool = True
    """Whether to redact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecontaminateConfig:
    """Overlap with evaluation files."""

    evaluation_files: tuple[str, ...] = ()
    """Files whose content must not be trained on; none turns the step off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig:
    """Held-out documents."""

    validation_fraction: float = 0.01
    """Share of the documents held out, decided by the hash of each document's id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    """Everything that decides what ``prepare_corpus.py`` makes of its input."""

    clean: CleanConfig = field(default_factory=CleanConfig)
    deduplicate: DeduplicateConfig = field(default_factory=DeduplicateConfig)
    redact: RedactConfig = field(default_factory=RedactConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    split: SplitConfig = field(default_factory=SplitConfig)

    def faults(self) -> Iterator[str]:
        """Find what is wrong with the settings, whatever the input.

        Yields:
            A message a fault: path, value, limit and remedy.
        """
        if not 0 <= self.split.validation_fraction < 1:
            yield (
                f"split.validation_fraction: {self.split.validation_fraction}; must be at least 0 "
                "and below 1."
            )
