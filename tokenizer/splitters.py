"""Cuts text into words just as a byte-level tokenizer does, by the same regular expressions.

The tokenizer's own pre-tokeniser gives each piece as an object with offsets and in the byte-level
alphabet. Here the same expressions are run by the ``regex`` package, whose dialect is close to that
of the tokenizer's engine, but not the same by definition: so both ways are compared before use, on
texts made to be hard, and again while a corpus is cut, on samples of it.
"""

import copy
import json
import logging
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import regex
from tokenizers import Tokenizer as Backend

from tokenizer.any_text import any_text
from tokenizer.hard_texts import hard_texts
from tokenizer.joined_pairs import byte_characters

log = logging.getLogger(__name__)

# Of the texts that are cut at once, how many characters are compared: costs a few per cent.
_SAMPLE_CHARACTERS = 20_000
# What the byte-level step itself splits by: GPT-2's expression, documented with its vocabulary.
_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_BYTE_OF = {letter: byte for byte, letter in enumerate(byte_characters())}

Cut = Callable[[str], list[str]]


class NotSupported(Exception):
    """The tokenizer cuts text in a way that is not imitated here."""


class NotEqual(Exception):
    """The fast way cut a text otherwise than the tokenizer's own pre-tokeniser."""


class ByteLevelSplitter:
    """Cuts text as the tokenizer of a definition does.

    Attributes:
        fast: Whether the text is cut here. If not, the tokenizer's own pre-tokeniser is asked,
            which takes about ten times as long.
    """

    def __init__(self, definition: Mapping[str, Any]) -> None:
        """Compare both ways of cutting, and choose.

        Args:
            definition: Content of ``tokenizer.json``.
        """
        model = {"type": "BPE", "vocab": {}, "merges": []}
        parts = {part: definition.get(part) for part in ("normalizer", "pre_tokenizer")}
        # Only what can be pickled is kept: the compiled expressions are made in `_prepare`.
        self._parts = json.dumps({"version": "1.0", "added_tokens": [], "model": model} | parts)
        added = definition.get("added_tokens") or []
        self._added = [token for token in added if not token["special"]]
        self.fast = True
        self._prepare()
        try:
            for text in hard_texts([token["content"] for token in added]):
                self._compare(text)
        except NotEqual as error:
            log.warning(
                "Cutting text the slow way, by the tokenizer's own pre-tokeniser: %s", error
            )
            self.fast = False
            self._prepare()

    def check(self, texts: Sequence[str]) -> None:
        """Compare both ways of cutting on some of these texts.

        Raises:
            NotEqual: If they differ; `slow` is right.
        """
        if not self.fast or not texts:
            return
        # Evenly from all, the beginnings of long ones.
        number = max(1, min(len(texts), _SAMPLE_CHARACTERS // 500))
        for index in range(0, len(texts), len(texts) // number):
            self._compare(texts[index][: _SAMPLE_CHARACTERS // number])

    def slow(self) -> Self:
        """Give the splitter that asks the tokenizer's own pre-tokeniser."""
        other = copy.copy(self)
        other.fast = False
        other._prepare()
        return other

    def __call__(self, text: str) -> list[str]:
        """Cut a text; pieces come in order, and added tokens are left out."""
        normal = self._normalize(text)
        # A quick look for what may begin an added token; the normaliser may make it, too.
        if not any(first in text or first in normal for first in self._firsts):
            return self._cut_plain(normal)
        words: list[str] = []
        for piece in self._without(self._added_raw, text):
            for rest in self._without(self._added_normalized, self._normalize(piece)):
                words += self._cut_plain(rest)
        return words

    def __getstate__(self) -> dict[str, Any]:
        return {"_parts": self._parts, "_added": self._added, "fast": self.fast}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def _prepare(self) -> None:
        parts = json.loads(self._parts)
        self._backend = Backend.from_str(self._parts)
        self._normalize = _normalizer(parts["normalizer"], self._backend)
        self._added_raw = _added_pattern([t for t in self._added if not t["normalized"]])
        self._added_normalized = _added_pattern([t for t in self._added if t["normalized"]])
        self._firsts = sorted({token["content"][0] for token in self._added})
        self._cut_plain: Cut = self._cut_by_backend
        if self.fast:
            try:
                self._cut_plain = _cutter(parts["pre_tokenizer"])
            except NotSupported as error:
                log.info("Cutting text by the tokenizer's own pre-tokeniser (%s).", error)
                self.fast = False

    def _compare(self, text: str) -> None:
        text = self._normalize(text)
        if self._cut_plain(text) != self._cut_by_backend(text):
            raise NotEqual(f"the fast way differs from it on {text[:60]!r}")

    def _cut_by_backend(self, text: str) -> list[str]:
        if self._backend.pre_tokenizer is None:
            return [text] if text else []
        pieces = self._backend.pre_tokenizer.pre_tokenize_str(text)
        return [bytes(map(_BYTE_OF.__getitem__, piece)).decode() for piece, _ in pieces]

    @staticmethod
    def _without(pattern: "regex.Pattern[str] | None", text: str) -> Iterator[str]:
        if pattern is None:
            yield text
            return
        end = 0
        for match in pattern.finditer(text):
            if match.start() > end:
                yield text[end : match.start()]
            end = match.end()
        if end < len(text):
            yield text[end:]


def _normalizer(part: Mapping[str, Any] | None, backend: Backend) -> Callable[[str], str]:
    if part is None:
        return lambda text: text
    if part["type"] == "NFC":
        return lambda text: unicodedata.normalize("NFC", text)
    return lambda text: str(backend.normalizer.normalize_str(text))


def _added_pattern(tokens: Sequence[Mapping[str, Any]]) -> "regex.Pattern[str] | None":
    """An expression for added tokens: of those that begin at one place, the longest."""
    if not tokens:
        return None
    plain = {t["content"] for t in tokens if not (t["single_word"] or t["lstrip"] or t["rstrip"])}
    if len(plain) == len(tokens):
        return regex.compile(any_text(plain))
    choices = []
    for token in sorted(tokens, key=lambda token: -len(token["content"])):
        choice = regex.escape(token["content"])
        if token["single_word"]:
            choice = rf"(?<!\w){choice}(?!\w)"
        choice = rf"\s*{choice}" if token["lstrip"] else choice
        choices.append(rf"{choice}\s*" if token["rstrip"] else choice)
    return regex.compile("|".join(choices))


def _cutter(part: Mapping[str, Any] | None) -> Cut:
    """Make the function that cuts normalised text.

    Raises:
        NotSupported: If there is a step of another kind.
    """
    if part is None:
        return lambda text: [text] if text else []
    steps = part["pretokenizers"] if part["type"] == "Sequence" else [part]
    cuts: list[Cut] = []
    for number, step in enumerate(steps):
        if step["type"] == "ByteLevel" and number < len(steps) - 1:
            raise NotSupported("it goes on cutting what is in the byte-level alphabet")
        cuts += _cuts_of_step(step)
    if len(cuts) == 1:
        return cuts[0]

    def cut_in_turn(text: str) -> list[str]:
        pieces = [text]
        for cut in cuts:
            pieces = [part for piece in pieces for part in cut(piece)]
        return pieces if text else []

    return cut_in_turn


def _cuts_of_step(step: Mapping[str, Any]) -> list[Cut]:
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        kind, value = next(iter(step["pattern"].items()))
        return [_isolate(value if kind == "Regex" else regex.escape(value))]
    if step["type"] == "Digits":
        return [_isolate(r"\p{Nd}|\p{Nl}|\p{No}" if step["individual_digits"] else r"\p{N}+")]
    if step["type"] == "ByteLevel":
        cuts: list[Cut] = []
        if step["add_prefix_space"]:
            cuts.append(lambda text: [text if text.startswith(" ") else " " + text])
        if step.get("use_regex", True):
            cuts.append(_isolate(_BYTE_LEVEL))
        return cuts
    raise NotSupported(f"it has a step {step['type']!r} that is not imitated")


def _isolate(expression: str) -> Cut:
    """Make each match a piece, and what is between matches too."""
    try:
        pattern = regex.compile(expression)
    except regex.error as error:
        raise NotSupported(f"{expression!r} is not understood: {error}") from error

    def cut_exactly(text: str) -> list[str]:
        pieces, end = [], 0
        for match in pattern.finditer(text):
            if match.start() > end:
                pieces.append(text[end : match.start()])
            if match.end() > match.start():
                pieces.append(match.group())
            end = match.end()
        if end < len(text):
            pieces.append(text[end:])
        return pieces

    if pattern.groups:
        return cut_exactly
    find = pattern.findall

    def cut(text: str) -> list[str]:
        pieces: list[str] = find(text)
        # Mostly the matches are the whole text.
        return pieces if sum(map(len, pieces)) == len(text) else cut_exactly(text)

    return cut
