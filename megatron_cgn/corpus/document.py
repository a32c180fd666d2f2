"""A document on its way from a raw file to a shard, and the interface of the steps it passes.

The order of the steps is fixed: read, clean, deduplicate, redact, decontaminate, split, write. Each
is a module of its own that knows nothing of the others; ``pipeline.py`` runs them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text and where it comes from. All of it but the text goes with it into the index."""

    id: str
    """Identity through every step; unique in a corpus."""
    text: str
    """The text: valid Unicode without lone surrogates."""
    source: str
    """Name of the source, e.g. ``domain``."""
    license: str | None = None
    """Licence under which it may be used, as its provider states it."""
    classification: str | None = None
    """Confidentiality class, as its owner states it, e.g. ``internal``."""
    language: str | None = None
    """ISO 639-1 code (``zh``, ``en``, …), once identified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a step did to one document."""

    text: str | None
    """The text that goes on, or None: the document is dropped."""
    reason: str | None = None
    """Why it is dropped: a short stable word such as ``too_short``; None if it goes on."""
    evidence: str | None = None
    """What shows the reason: the figure and its limit, or the matching passage."""
    language: str | None = None
    """Language, from the step that identifies it."""
    changes: Mapping[str, int] = field(default_factory=dict)
    """How often the step changed something, by kind, e.g. ``{"redact/email": 2}``."""
