"""Cuts text into words where a SentencePiece vocabulary cannot join what is on both sides.

SentencePiece itself knows no words: it joins whatever is a piece, over spaces and scripts too. But
two neighbours are joined only if a piece has them side by side. So text can be cut, without any
effect on its encoding, between characters of two classes that no piece has side by side: in models
trained as usual, before a space, between scripts, at digits and at punctuation.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise

from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from tokenizer.any_text import any_text
from tokenizer.sentencepiece_model import SPACE

_HAN = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")
_FIRST_LETTER = 0x4E00  # of those that classes are written with


def character_class(character: str) -> str:
    """Name what goes together in words: a script, digits, marks, spaces or all else."""
    if character == SPACE:
        return "space"
    kind = unicodedata.category(character)[0]
    if kind == "L":
        name = unicodedata.name(character, "?").split(" ", 1)[0]
        return "Han" if name in _HAN else name
    return {"M": "mark", "N": "number"}.get(kind, "other")


def is_number(character: str) -> bool:
    """Whether it is a digit or the like. Ideographs such as 一 and 万, parts of words, are none."""
    return character_class(character) == "number"


class Cutter:
    """Cuts normalised text between classes that no piece has side by side."""

    def __init__(self, pieces: Iterable[str]) -> None:
        """Look at a vocabulary.

        Args:
            pieces: All that text can become, user-defined ones included.
        """
        pairs = {pair for piece in pieces for pair in pairwise(piece)}
        joined = {(character_class(a), character_class(b)) for a, b in pairs}
        self._joined = {(a, b) for a, b in joined if a != b}
        names = sorted({name for pair in self._joined for name in pair})
        self._letters = _Letters(names)
        follow = (
            f"{letter}(?=[{letter}{''.join(self._followers(name))}])"
            for name, letter in self._letters.of_class.items()
        )
        alone = f"{_Letters.ALONE}(?={_Letters.ALONE})"
        self._word = re.compile(f"(?:{'|'.join([*follow, alone])})*.")

    def _followers(self, name: str) -> list[str]:
        return [self._letters.of_class[b] for a, b in sorted(self._joined) if a == name]

    def cut(self, text: str) -> Iterator[str]:
        """Cut normalised text.

        Args:
            text: With U+2581 for spaces.

        Yields:
            Words, which together are the text.
        """
        for match in self._word.finditer(text.translate(self._letters)):
            yield text[match.start() : match.end()]

    def is_word(self, text: str) -> bool:
        """Whether text is not cut."""
        return self._word.fullmatch(text.translate(self._letters)) is not None


class _Letters(dict[int, str]):
    """Table for `str.translate`: characters to one letter a class."""

    ALONE = "\N{REPLACEMENT CHARACTER}"
    """Written for all classes that are side by side with no other in any piece."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.of_class = {name: chr(_FIRST_LETTER + i) for i, name in enumerate(names)}

    def __missing__(self, codepoint: int) -> str:
        letter = self.of_class.get(character_class(chr(codepoint)), self.ALONE)
        self[codepoint] = letter
        return letter


class PieceSplitter:
    """Turns a text into its normalised words; picklable."""

    def __init__(
        self,
        *,
        normalizer: Normalizer | None,
        pre_tokenizer: PreTokenizer | None,
        cutter: Cutter,
        added_tokens: Collection[str] = (),
        terms: Collection[str] = (),
    ) -> None:
        """Prepare.

        Args:
            normalizer: Of the fast tokenizer.
            pre_tokenizer: Of the fast tokenizer.
            cutter: For its vocabulary.
            added_tokens: Texts that become tokens before all else; they are in no word.
            terms: Normalised texts that the cutter would cut, each to be a word of its own.
        """
        self._normalizer = normalizer
        self._pre_tokenizer = pre_tokenizer
        self._cutter = cutter
        self._added = _one_of(added_tokens)
        self._terms = _one_of(terms)

    def __call__(self, text: str) -> Iterator[str]:
        """Cut a text.

        Args:
            text: A document.

        Yields:
            Words; together they are the normalised text, but for added tokens.
        """
        for piece in self.normalized(text):
            yield from self._words(piece)

    def normalized(self, text: str) -> Iterator[str]:
        """Do what the fast tokenizer does before its model.

        Args:
            text: A document.

        Yields:
            What the model encodes, piece by piece.
        """
        for part in self._added.split(text) if self._added else (text,):
            if self._normalizer is not None:
                part = self._normalizer.normalize_str(part)
            if self._pre_tokenizer is None:
                yield part
            else:
                yield from (piece for piece, _ in self._pre_tokenizer.pre_tokenize_str(part))

    def _words(self, piece: str) -> Iterator[str]:
        if self._terms is None:
            yield from self._cutter.cut(piece)
            return
        end = 0
        for match in self._terms.finditer(piece):
            yield from self._cutter.cut(piece[end : match.start()])
            yield match.group()
            end = match.end()
        yield from self._cutter.cut(piece[end:])


def _one_of(texts: Collection[str]) -> re.Pattern[str] | None:
    """Match any of the texts, of several the longest."""
    if not texts:
        return None
    return re.compile(any_text(texts))
