"""Finds personal and confidential data in a document and replaces it."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from megatron_cgn.config.corpus import RedactConfig
from megatron_cgn.corpus.document import Document, Outcome
from megatron_cgn.corpus.redact import contact, identity, network
from megatron_cgn.corpus.redact.names import names
from megatron_cgn.corpus.redact.patterns import UserPattern, load_patterns
from megatron_cgn.corpus.redact.replace import Replacer
from megatron_cgn.corpus.redact.view import Span, View
from megatron_cgn.errors import ConfigError

Detector = Callable[[View], Iterator[Span]]

# What each detector finds. The order of kinds decides between findings of equal length.
_DETECTORS: tuple[tuple[Detector, tuple[str, ...]], ...] = (
    (network.emails, ("email",)),
    (identity.identity_cards, ("id_card",)),
    (identity.credit_codes, ("credit_code",)),
    (identity.bank_cards, ("bank_card",)),
    (network.machines, ("mac", "ip")),
    (identity.passports, ("passport",)),
    (contact.telephones, ("mobile", "phone")),
    (identity.licence_plates, ("licence_plate",)),
    (names, ("name",)),
    (contact.addresses, ("address",)),
)
_RANKS = {kind: rank for rank, (_, kinds) in enumerate(_DETECTORS) for kind in kinds}
# A replacement may complete a label for its neighbour (a name in a list, say); each round
# replaces what the one before uncovered. Real documents take two.
_MAX_ROUNDS = 16


@dataclass(frozen=True, slots=True)
class Finding:
    """A passage that is replaced: characters ``start`` to ``end`` of the document's text."""

    kind: str
    start: int
    end: int
    masked: str
    """The passage with at most its first three characters legible: all a report may show."""
    value: str
    """What is replaced, without separators. Never to be written anywhere."""


class Redactor:
    """Replaces personal and confidential data.

    Redacting a second time changes nothing. The time is linear in the length of the text.

    Args:
        settings: The settings.

    Raises:
        ConfigError: If the key or the file of patterns is missing or wrong, or the extra
            ``corpus`` is not installed.
    """

    def __init__(self, settings: RedactConfig) -> None:
        if find_spec("stdnum") is None:
            raise ConfigError(
                "redact.enabled: True; python-stdnum is missing, which verifies checksums. "
                "Install the extra: pip install 'megatron-cgn[corpus]'."
            )
        self._patterns: tuple[UserPattern, ...] = ()
        if settings.patterns_file is not None:
            self._patterns = load_patterns(settings.patterns_file)
        custom = {pattern.name: pattern.replacement for pattern in self._patterns}
        self._replace = Replacer(settings, custom=custom)
        self._kinds = frozenset(settings.kinds)
        self._detectors = [
            detector for detector, kinds in _DETECTORS if not self._kinds.isdisjoint(kinds)
        ]
        self._ignored = frozenset(_folded(value) for value in settings.ignore)
        self._max_findings = settings.max_findings

    def __call__(self, document: Document) -> Outcome:
        """Redact a document.

        Args:
            document: The document.

        Returns:
            The redacted text, and the number of replacements of each kind as ``redact/<kind>``.
            Dropped with the reason ``redact/too_many`` if ``max_findings`` says so.
        """
        text, counts = document.text, Counter[str]()
        for _ in range(_MAX_ROUNDS):
            spans = self._spans(text)
            if not spans:
                break
            counts.update(f"redact/{span.kind}" for span in spans)
            text = self._apply(text, spans)
        total = counts.total()
        if self._max_findings is not None and total > self._max_findings:
            return Outcome(
                text=None,
                reason="redact/too_many",
                evidence=f"{total} findings; at most redact.max_findings={self._max_findings}",
                changes=dict(counts),
            )
        return Outcome(text=text, changes=dict(counts))

    def find(self, text: str) -> list[Finding]:
        """Find what would be replaced first, without replacing it.

        Args:
            text: The text.

        Returns:
            The findings from left to right; they do not overlap.
        """
        return [
            Finding(span.kind, span.start, span.end, mask(text[span.start : span.end]), span.value)
            for span in self._spans(text)
        ]

    def _spans(self, text: str) -> list[Span]:
        view = View(text, placeholders=self._replace.pattern)
        kept = [span for pattern in self._patterns for span in pattern.find(view)]
        found = [
            span
            for detector in self._detectors
            for span in detector(view)
            if span.kind in self._kinds
        ]
        keep_out = {pattern.name for pattern in self._patterns if pattern.keep}
        # The user's own patterns come first; then the longer, then the more specific.
        found.sort(key=lambda span: (span.start - span.end, _RANKS[span.kind], span.start))
        chosen = _without_overlaps([*kept, *found], len(text))
        # What is to stay has had its say in the choice: no part of it is anything else.
        return [
            span
            for span in chosen
            if span.kind not in keep_out and _folded(span.value) not in self._ignored
        ]

    def _apply(self, text: str, spans: list[Span]) -> str:
        pieces, end = [], 0
        for span in spans:
            pieces += [text[end : span.start], self._replace(span.kind, span.value)]
            end = span.end
        return "".join([*pieces, text[end:]])


def mask(text: str) -> str:
    """A passage as a report may show it: a quarter of it, at most three characters, legible.

    Args:
        text: The passage.

    Returns:
        As many characters, the others as asterisks.
    """
    shown = min(3, len(text) // 4)
    return text[:shown] + "*" * (len(text) - shown)


def _without_overlaps(spans: list[Span], length: int) -> list[Span]:
    """Take spans in order of preference, leave those that overlap one taken before."""
    taken = bytearray(length)
    chosen = []
    for span in spans:
        if taken.find(1, span.start, span.end) < 0:
            taken[span.start : span.end] = b"\1" * (span.end - span.start)
            chosen.append(span)
    return sorted(chosen, key=lambda span: span.start)


def _folded(value: str) -> str:
    return "".join(character for character in value.casefold() if character.isalnum())
