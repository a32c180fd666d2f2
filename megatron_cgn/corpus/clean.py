"""The step *clean*: characters, lines, quality and language of a document.

The parts are in ``unicode.py``, ``lines.py``, ``quality.py`` and ``language.py``; here they are put
in order. Cleaning a cleaned text changes nothing.
"""

from collections import Counter

from megatron_cgn.config.corpus import CleanConfig
from megatron_cgn.corpus import characters, chinese, lines, quality, unicode
from megatron_cgn.corpus.document import Document, Outcome
from megatron_cgn.corpus.language import LanguageIdentifier

_KANA_SHARE = 0.08
_MOST_CONVERSIONS = 4


class Cleaner:
    """Cleans documents, one after another; the same one always alike."""

    def __init__(self, settings: CleanConfig) -> None:
        """Load what the settings ask for.

        Args:
            settings: Checked settings.

        Raises:
            ConfigError: If a package of the extra `corpus` is missing.
        """
        self._settings = settings
        self._remove = [kind for kind in lines.LINE_KINDS if kind in settings.remove_lines]
        self._simplify = None
        if settings.simplify_chinese:
            self._simplify = chinese.simplifier(setting="clean.simplify_chinese")
        self._identify = None
        if settings.identify_language:
            self._identify = LanguageIdentifier(min_confidence=settings.min_language_confidence)

    def __call__(self, document: Document) -> Outcome:
        """Clean a document.

        Args:
            document: The document.

        Returns:
            Its text, its language and what was changed; or the reason to drop it, with the figure
            and the limit as evidence.
        """
        text, changes, navigation = self._tidy(document.text)
        figures, counts = quality.measure(text)
        language = self._identify(text, counts) if self._identify else document.language
        fault = self._navigation_fault(navigation, figures.characters)
        fault = fault or quality.fault(figures, self._settings)
        fault = fault or self._language_fault(language)
        if fault:
            reason, evidence = fault
            return Outcome(
                text=None,
                reason=f"clean/{reason}",
                evidence=evidence,
                language=language,
                changes=changes,
            )
        return Outcome(text=text, language=language, changes=changes)

    def _tidy(self, text: str) -> tuple[str, Counter[str], int]:
        """Give the text in one spelling and without furniture, what changed, and what navigated."""
        changes: Counter[str] = Counter()
        text, changed = unicode.normalise(text)
        changes["clean/characters"] = changed
        if self._simplify:
            simplified = self._simplified(text)
            changes["clean/simplified"] = simplified != text
            text = simplified
        text, removed, navigation = lines.tidy(text, remove=self._remove)
        changes.update({f"clean/{kind}": times for kind, times in removed.items()})
        return text, +changes, navigation

    def _simplified(self, text: str) -> str:
        """Make traditional Chinese simplified, but leave Japanese alone."""
        assert self._simplify is not None
        kinds = characters.counts(characters.classes(characters.code_points(text)))
        east_asian = kinds[characters.HAN] + kinds[characters.KANA]
        if not kinds[characters.HAN] or kinds[characters.KANA] > _KANA_SHARE * east_asian:
            return text
        # A conversion can make a phrase that OpenCC converts again: go on until it does not.
        for _ in range(_MOST_CONVERSIONS):
            before, text = text, self._simplify(text)
            if text == before:
                break
        return text

    def _navigation_fault(self, navigation: int, rest: int) -> tuple[str, str] | None:
        limit = self._settings.max_navigation_fraction
        share = navigation / max(navigation + rest, 1)
        if share <= limit:
            return None
        return "navigation", (
            f"{share:.3f} of it are menus and notices; clean.max_navigation_fraction is {limit}"
        )

    def _language_fault(self, language: str | None) -> tuple[str, str] | None:
        wanted = self._settings.languages
        if not wanted or language in wanted:
            return None
        return "language", f"is {language}; clean.languages is {', '.join(wanted)}"
