"""Cuts text as an extended byte-level tokenizer will whose terms include added tokens."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizer.any_text import any_text
from tokenizer.splitters import ByteLevelSplitter


class TermSplitter(ByteLevelSplitter):
    """Cuts terms out of a text before all else, and gives each as a word."""

    def __init__(self, definition: Mapping[str, Any], *, terms: Sequence[str]) -> None:
        """Prepare.

        Args:
            definition: Content of ``tokenizer.json``, before the extension.
            terms: To be cut out; of those that begin at one place, the longest is.
        """
        self._terms = re.compile(any_text(terms))
        super().__init__(definition)

    def __call__(self, text: str) -> list[str]:
        """Cut a text."""
        words: list[str] = []
        end = 0
        for match in self._terms.finditer(text):
            words += super().__call__(text[end : match.start()])
            words.append(match.group())
            end = match.end()
        return words + super().__call__(text[end:])

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_terms": self._terms}
