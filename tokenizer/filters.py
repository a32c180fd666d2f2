"""What a new token of the corpus must be: a word or a part of one, not what texts are set with.

Knows texts only, not how a vocabulary spells them. Terms of the user are not judged here.
"""

import re
import unicodedata
from collections.abc import Mapping
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

_HAN_CLASS = "Han"
_LETTERS_WITH = "-·'’"
"""Marks that may join letters or digits inside a word, as in U-235."""

# Grammar rather than subject: a Chinese token that begins or ends with one is a cut through a
# phrase (「的反应」), whatever its frequency. Words that do so by nature are excepted below.
_PARTICLES = frozenset(
    "的了着是在和与及或等把被将从向对于以而且但也都就还又很其这那此该之所吗呢吧啊们"
)
_WORDS_WITH_PARTICLES = re.compile(
    "(?:目的|标的|的确|对于|关于|由于|基于|位于|用于|大于|小于|等于|高于|低于|属于|处于|适用于"
    "|为了|除了|了解|随着|意味着|着火|着色|但是|还是|就是|于是|或是|是否|存在|在线|在役|现在|正在"
    "|所在|和谐|饱和|缓和|中和|总和|参与|与否|普及|涉及|以及|及时|及其|或者|等级|等效|等离子体?"
    "|高等|中等|相等|平等|均等|把手|把握|被动|被覆|将来|即将|从而|从事|从动|向量|方向|轴向|径向"
    "|横向|纵向|双向|单向|反向|正向|定向|导向|流向|转向|倾向|趋向|面向|对象|对流|对比|对应|对称"
    "|对接|对话|对齐|相对|绝对|应对|针对|核对|校对|以上|以下|以内|以外|以前|以后|以太网?|可以|所以"
    "|足以|难以|予以|加以|而且|然而|因而|进而|反而|并且|也许|首都|就地|就位|就绪|成就|还原|归还"
    "|返还|极其|尤其|其他|其它|其中|其次|其余|这些|这个|这样|那么|那些|因此|彼此|从此|如此|此外"
    "|此时|应该|之间|之前|之后|总之|所有|所以|所需|场所|研究所|厕所|我们|他们|它们|你们|人们)"
)

_MARKUP = re.compile(
    r"https?|www\.|://|\.(?:com|org|net|cn|gov|edu|html?|php|aspx?)\b|&[a-z]{2,6};?|</?[a-z]"
    r"|^ ?(?:nbsp|quot|[lr][sd]quo|[mn]dash|hellip|ensp|emsp|colspan|rowspan|href|tbody|thead)$"
)
_HEXADECIMAL = re.compile(r" ?(?:0x)?(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f])[0-9a-f]{4,}$", re.I)
_RUN = re.compile(r"(.)\1\1|^ ?(.{1,3})\2{2,}$", re.S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What is asked of a token of the corpus."""

    min_frequency: int = 10
    """Least number of times it is met when it is made."""
    min_spread: int = 3
    """Least number of documents, about, that it is in; more than 260 cannot be told apart."""
    max_characters: int = 20
    """Most characters, a space in front not counted."""
    max_han_characters: int = 8
    """Most characters of a token with ideographs."""
    particles: bool = False
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
        return self._length(body) or _content(body, particles=self._rules.particles)

    def _length(self, body: str) -> str | None:
        has_han = any(_script(character) == _HAN_CLASS for character in body)
        limit = self._rules.max_han_characters if has_han else self._rules.max_characters
        return TOO_LONG if len(body) > limit else None


def _content(body: str, *, particles: bool) -> str | None:
    kinds = [unicodedata.category(character) for character in body]
    if any(kind[0] == "C" for kind in kinds) or "\ufffd" in body:
        return CONTROL
    if len(body) == 1:
        return RULING if _is_ruling(body) else None
    if _RUN.search(body) or any(map(_is_ruling, body)):
        return RULING
    if _MARKUP.search(body.lower()):
        return MARKUP
    if not any(kind[0] in "LM" for kind in kinds):
        return NUMBER if any(kind[0] == "N" for kind in kinds) else PUNCTUATION
    if _HEXADECIMAL.match(body):
        return NUMBER
    if kinds[0][0] not in "LN" or kinds[-1][0] not in "LMN":
        return PUNCTUATION
    inner = zip(body, kinds, strict=True)
    if any(kind[0] not in "LMN" and character not in _LETTERS_WITH for character, kind in inner):
        return PUNCTUATION
    scripts = {script for character in body if (script := _script(character))}
    if len(scripts) > 1:
        return MIXED
    return PARTICLE if not particles and scripts == {_HAN_CLASS} and _is_cut(body) else None


def _is_cut(body: str) -> bool:
    """Whether Chinese begins or ends with a particle that is no part of a word there."""
    first = body[0] in _PARTICLES and _WORDS_WITH_PARTICLES.match(body) is None
    if first or body[-1] not in _PARTICLES:
        return first
    return not any(m.end() == len(body) for m in _WORDS_WITH_PARTICLES.finditer(body))


def _is_ruling(character: str) -> bool:
    return "\u2500" <= character <= "\u25ff" or "\u2800" <= character <= "\u28ff"


@cache
def _script(character: str) -> str | None:
    """Class of scripts that are written in one word; None for what goes with all of them."""
    if unicodedata.category(character)[0] != "L":
        return None
    name = unicodedata.name(character, "").split(" ", 1)[0].split("-", 1)[0]
    if name in ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"):
        return _HAN_CLASS
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
