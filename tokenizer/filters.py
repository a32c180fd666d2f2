"""What a new token of the corpus must be: a word or a part of one, not what texts are set with.

Knows texts only, not how a vocabulary spells them. Terms of the user are not judged here.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_cgn.errors import ConfigError, DataError

PARTIAL = "is no whole character"
TOO_LONG = "is too long"
DENIED = "is on the deny list"
SPACE = "is white space"
CONTROL = "has control or private characters"
NUMBER = "is a number"
RULING = "is ruling or a run of one character"
MARKUP = "is markup or a part of an address"
PUNCTUATION = "has punctuation"
MIXED = "mixes scripts"
PARTICLE = "begins or ends with a particle"

_HAN = "Han"
_JOINERS = frozenset("-·'’")
"""Marks that may join letters or digits inside a word, as in U-235."""
_MOST_MARKS = 3

# Chinese is written without spaces, so frequent cuts through phrases look like words. What leans on
# the word before it begins none (的反应), what leans on the word after it ends none (系统在).
# Excepted are the words that do so by nature.
_LEANS_BACK = frozenset("的了着们吗呢吧啊等之")
_BEGINS = re.compile(
    "的确|了解|了然|着火|着色|着陆|着手|着重|着力|着眼|等级|等效|等于|等待|等离子|等同|等价|等温|等压"
    "|等值|等分|等候|等号|等比|之间|之前|之后|之一|之内|之外|之下|之上|之类|之际|之所以"
)
_LEANS_FORWARD = frozenset("在和与及或把被将从向对以而且但也都就还又很其这那该所并")
_ENDS = re.compile(
    "(?:[存现正所内外潜]在|[饱缓中总温柔共]和|参与|[以普涉波触]及|即将|[方轴径横纵双单反正定导流转倾趋面"
    "走朝取]向|[相绝针核校比应面配成不]对|[可足难予加所用得给]以|[然因从进反]而|[而并]且|首都|成就|造就"
    "|[归返偿]还|[极尤与]其|[场处厕]所|研究所|应该|[合一归]并)$"
)

_MARKUP = re.compile(
    r"https?|www\.|://|\.(?:com|org|net|cn|gov|edu|html?|php|aspx?)\b|&#|&[a-z]{2,6}|</?[a-z]"
    r"|\\|^(?:nbsp|quot|[lr][sd]quo|[mn]dash|hellip|ensp|emsp|colspan|rowspan|href|tbody|thead)$"
    r"|^\.(?-i:[A-Z][A-Za-z])$",  # the last are requests of man pages, whose fonts are \fB
    re.I,
)
_HEXADECIMAL = re.compile(r" ?(?:0x)?(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f])[0-9a-f]{4,}$", re.I)
# Digits and Roman numerals repeat by nature: AP1000, VIII.
_RUN = re.compile(r"([^\dI])\1\1|^(\D{1,3})\2{2,}$", re.S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What is asked of a token of the corpus."""

    min_frequency: int = 5
    """Least number of times it is met when it is made."""
    min_spread: int = 3
    """Least number of documents, about, that it is in; more than 260 cannot be told apart."""
    max_characters: int = 20
    """Most characters, a space in front not counted."""
    max_han_characters: int = 8
    """Most characters of a token with ideographs."""
    marks: bool = True
    """Whether a token may be a word with one punctuation mark in front (，如果), or a few marks of
    punctuation (」，). The pre-tokenisers of most vocabularies join these."""
    particles: bool = True
    """Whether Chinese tokens may begin or end with a particle (的反应)."""
    deny: frozenset[str] = frozenset()
    """Texts that shall be no tokens, with or without a space in front."""
    deny_patterns: tuple[str, ...] = ()
    """Regular expressions of Python; a token in which one is found is not made."""

    def __post_init__(self) -> None:
        faults = [
            f"{name}: {value}, but at least {least} is needed."
            for name, least in _LEAST.items()
            if (value := getattr(self, name)) < least
        ]
        if self.min_spread > MAX_SPREAD:
            faults.append(
                f"min_spread: {self.min_spread}, but documents are told apart up to {MAX_SPREAD}."
            )
        for pattern in self.deny_patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                faults.append(f"deny_patterns: {pattern!r} is no regular expression ({error}).")
        if faults:
            raise ConfigError("\n".join(faults))

    def to_json(self) -> dict[str, Any]:
        """Give plain values for `json.dumps`."""
        return asdict(self) | {"deny": sorted(self.deny)}


MAX_SPREAD = 260
"""Documents up to which a spread can be estimated."""
_LEAST: Mapping[str, int] = {
    "min_frequency": 1,
    "min_spread": 1,
    "max_characters": 2,
    "max_han_characters": 2,
}


class Judge:
    """Says of a text why it shall be no token."""

    def __init__(self, rules: Rules) -> None:
        """Prepare.

        Args:
            rules: What is asked; frequency and spread are not looked at here.
        """
        self._rules = rules
        self._denied = [re.compile(pattern) for pattern in rules.deny_patterns]

    def spelling(self, utf8: bytes) -> str | None:
        """Judge a token by its bytes.

        Args:
            utf8: What it stands for.

        Returns:
            The reason against it, or None.
        """
        try:
            return self.text(utf8.decode())
        except UnicodeDecodeError:
            return PARTIAL

    def text(self, text: str) -> str | None:
        """Judge a token by its text.

        Args:
            text: What it stands for; may have one space in front, as most vocabularies do.

        Returns:
            The reason against it, or None.
        """
        body = text[1:] if text[:1] == " " else text
        if not body.strip():
            return SPACE
        if body in self._rules.deny or any(p.search(text) for p in self._denied):
            return DENIED
        return self._length(body) or self._content(body)

    def _content(self, body: str) -> str | None:
        categories = [unicodedata.category(character) for character in body]
        kinds = [category[0] for category in categories]
        if "C" in kinds or "\ufffd" in body:
            return CONTROL
        if len(body) == 1:
            return RULING if _is_ruling(body) else None
        if "Z" in kinds:
            return SPACE
        if _RUN.search(body) or any(map(_is_ruling, body)):
            return RULING
        if _MARKUP.search(body):
            return MARKUP
        particles = self._rules.particles
        if not self._rules.marks or kinds[0] != "P":
            return _as_word(body, kinds, particles=particles)
        if len(body) <= _MOST_MARKS and all(map(_is_mark_of_prose, body)):
            return None
        return _as_word(body[1:], kinds[1:], particles=particles)

    def _length(self, body: str) -> str | None:
        has_han = any(_script(character) == _HAN for character in body)
        limit = self._rules.max_han_characters if has_han else self._rules.max_characters
        return TOO_LONG if len(body) > limit else None


def _as_word(body: str, kinds: Sequence[str], *, particles: bool) -> str | None:
    """Judge a text as a word, or a part of one."""
    if not any(kind in "LM" for kind in kinds):
        return NUMBER if "N" in kinds else PUNCTUATION
    if _HEXADECIMAL.match(body):
        return NUMBER
    if kinds[0] not in "LN" or kinds[-1] not in "LMN":
        return PUNCTUATION
    for character, kind in zip(body, kinds, strict=True):
        if kind not in "LMN" and character not in _JOINERS:
            return PUNCTUATION
    scripts = {script for character in body if (script := _script(character))}
    if len(scripts) > 1:
        return MIXED
    return PARTICLE if not particles and scripts == {_HAN} and _is_cut(body) else None


def _is_cut(body: str) -> bool:
    """Whether Chinese begins or ends with a particle that is no part of a word there."""
    if len(body) > 1 and body[0] in _LEANS_BACK and _BEGINS.match(body) is None:
        return True
    return len(body) > 1 and body[-1] in _LEANS_FORWARD and _ENDS.search(body) is None


def _is_mark_of_prose(character: str) -> bool:
    """Whether it is a mark that sentences are set with, not only markup and code."""
    if character.isascii():
        return character in ".,;:!?()\"'"
    return unicodedata.category(character)[0] == "P"


def _is_ruling(character: str) -> bool:
    return "\u2500" <= character <= "\u25ff" or "\u2800" <= character <= "\u28ff"


@cache
def _script(character: str) -> str | None:
    """Class of scripts that are written in one word; None for what goes with all of them."""
    if unicodedata.category(character)[0] != "L":
        return None
    name = unicodedata.name(character, "").split(" ", 1)[0].split("-", 1)[0]
    if name in ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"):
        return _HAN
    # Δp and μm are words of physics.
    return "Latin" if name in ("LATIN", "GREEK", "MICRO", "OHM", "KELVIN", "ANGSTROM") else name


def read_deny_list(path: str | Path) -> tuple[frozenset[str], tuple[str, ...]]:
    """Read what shall be no tokens.

    Args:
        path: UTF-8, an entry a line: a text, or a regular expression between slashes
            (``/^Fig/``). Empty lines and lines that begin with ``#`` are passed over.

    Returns:
        Texts and patterns, for `Rules`.

    Raises:
        DataError: If the file cannot be read, or expressions are wrong; names all of them.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Give a UTF-8 text file.") from error
    texts, patterns, faults = set(), [], []
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        if len(entry) < 3 or entry[0] != "/" or entry[-1] != "/":
            texts.add(entry)
            continue
        try:
            re.compile(entry[1:-1])
            patterns.append(entry[1:-1])
        except re.error as error:
            faults.append(f"line {number}: {entry!r} is no regular expression ({error})")
    if faults:
        raise DataError(f"{path}: " + "; ".join(faults) + ". Correct these lines.")
    return frozenset(texts), tuple(patterns)
