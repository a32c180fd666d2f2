"""Whether a text is worth training on: figures, and the rules that hold them against limits.

The rules come from Gopher (Rae et al., 2021, appendix A), C4 (Raffel et al., 2020), RefinedWeb
(Penedo et al., 2023) and, for Chinese, WuDao (Yuan et al., 2021) and SkyPile (Wei et al., 2023).
Each was fitted to Chinese, where characters count instead of words, and to technical text, where
tables, lists and numbers are what one wants. docs/corpus-cleaning.md has the source and the
measured effect of each, and which were left out.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_cgn.config.corpus import CleanConfig
from megatron_cgn.corpus import characters, everyday, ngrams

SAMPLE_CHARACTERS = 1 << 20
"""Figures are of the first so many characters: more than a book of 500 pages, in bounded memory."""

_FEW_HAN = 50  # below this shares of characters mean little
_FEW_LATIN = 100
_FEW_LINES = 5
_FEW_TOKENS = 50
_FEW_REPEATS = 5
_REPEATED_NGRAM = 10
_TOP_NGRAM = 4

# Bytes that were decoded wrongly, or never were anything: GBK and UTF-8 confused both ways, memory
# that a debugger filled, UTF-8 read as Windows-1252 (once or twice), byte-order marks.
# What the bytes 0x80–0xBF look like in Windows-1252.
_TRAIL = "\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_MOJIBAKE = re.compile(
    "锟斤拷|(?:锟|斤拷){2,}|(?:烫烫)+|(?:屯屯)+|(?:葺葺)+|\ufffd+|ï»¿|ï¿½|â€[™œ“”˜¦¢–—]?|Ã¢â‚¬"
    f"|(?:[À-ÿ][¡-ÿ]){{3,}}|Ã[{_TRAIL}]|Â[\u00a0-\u00bf]|[åäæçèéãïð][{_TRAIL}]{{2}}"
)
_MOJIBAKE_SIGN = re.compile("[锟烫屯葺\ufffdÀ-ÿ]")
_ELLIPSIS = ("...", "…")

# Bytes in hexadecimal, eight groups or more in a row. A table of numbers has no letters.
_DUMP = re.compile(r"(?<![0-9A-Za-z])(?:(?:[0-9A-Fa-f]{2}){1,4}(?:[\s:,]{1,4}|\Z)){8,}")
_DUMP_LETTERS = re.compile("[A-Fa-f]")
_FEWEST_DUMPED = 1000  # a message of some protocol, in a text that explains it, is shorter
_LEAST_LETTERS = 0.05  # of the dumped digits


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured on a text. Shares are between 0 and 1."""

    characters: int
    """Characters that are not blank."""
    letter_fraction: float
    """Letters and ideographs among them."""
    symbol_fraction: float
    """Punctuation and symbols among them; a row of equal ones counts once."""
    garbled_fraction: float
    """Characters of mojibake among them."""
    mojibake: str
    """The first mojibake found."""
    common_han_fraction: float
    """Ideographs of everyday use among ideographs; 1 where there are few."""
    common_bigram_fraction: float
    """Pairs of letters common in English among pairs of Latin letters; 1 where there are few."""
    mean_word_length: float
    """Characters in a word of Latin letters; 5 where there are few."""
    ellipsis_line_fraction: float
    """Lines that end in an ellipsis."""
    duplicate_line_fraction: float
    """Characters in lines that have occurred before."""
    top_ngram_fraction: float
    """Tokens in the most frequent run of 4 tokens."""
    duplicate_ngram_fraction: float
    """Runs of 10 tokens that have occurred before."""
    dump_fraction: float
    """Digits of hexadecimal dumps among the characters; 0 where there are few."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit on a figure."""

    reason: str
    setting: str
    fails: Callable[[Figures, float], bool]
    evidence: Callable[[Figures], str]


def _at_least(reason: str, setting: str, name: str, text: str) -> Rule:
    return Rule(
        reason,
        setting,
        lambda figures, limit: getattr(figures, name) < limit,
        lambda figures: text.format(getattr(figures, name)),
    )


def _at_most(reason: str, setting: str, name: str, text: str) -> Rule:
    return Rule(
        reason,
        setting,
        lambda figures, limit: getattr(figures, name) > limit,
        lambda figures: text.format(getattr(figures, name)),
    )


RULES = (
    _at_least("too_short", "min_characters", "characters", "{} characters"),
    _at_most("garbled", "max_garbled_fraction", "garbled_fraction", "{:.3f} of it is mojibake"),
    _at_least("few_letters", "min_letter_fraction", "letter_fraction", "{:.3f} of it are letters"),
    _at_most("symbols", "max_symbol_fraction", "symbol_fraction", "{:.3f} of it are symbols"),
    _at_least(
        "rare_characters",
        "min_common_han_fraction",
        "common_han_fraction",
        "{:.3f} of the ideographs are in everyday use",
    ),
    _at_least(
        "random_letters",
        "min_common_bigram_fraction",
        "common_bigram_fraction",
        "{:.3f} of the pairs of letters are common ones",
    ),
    _at_most("long_words", "max_mean_word_length", "mean_word_length", "{:.1f} letters a word"),
    _at_most(
        "truncated_lines",
        "max_ellipsis_line_fraction",
        "ellipsis_line_fraction",
        "{:.3f} of the lines end in an ellipsis",
    ),
    _at_most(
        "repeated_lines",
        "max_duplicate_line_fraction",
        "duplicate_line_fraction",
        "{:.3f} of it are repeated lines",
    ),
    _at_most(
        "repeated_phrase",
        "max_top_ngram_fraction",
        "top_ngram_fraction",
        "{:.3f} of it is one phrase of 4 tokens",
    ),
    _at_most(
        "repeated_text",
        "max_duplicate_ngram_fraction",
        "duplicate_ngram_fraction",
        "{:.3f} of its runs of 10 tokens are repeated",
    ),
    _at_most("dump", "max_dump_fraction", "dump_fraction", "{:.3f} of it is a hexadecimal dump"),
)


def fault(figures: Figures, settings: CleanConfig) -> tuple[str, str] | None:
    """Find the first rule a text breaks.

    Args:
        figures: What was measured on it.
        settings: The limits.

    Returns:
        The reason and the figure with its limit; None if it keeps all.
    """
    for rule in RULES:
        limit = getattr(settings, rule.setting)
        if rule.fails(figures, limit):
            evidence = f"{rule.evidence(figures)}; clean.{rule.setting} is {limit}"
            if rule.reason == "garbled":
                evidence += f"; first: {figures.mojibake!r}"
            return rule.reason, evidence
    return None


def measure(text: str) -> tuple[Figures, npt.NDArray[np.int64]]:
    """Measure a text.

    Args:
        text: Cleaned text; only its first `SAMPLE_CHARACTERS` are looked at.

    Returns:
        The figures, and the characters by class.
    """
    text = text[:SAMPLE_CHARACTERS]
    points = characters.code_points(text)
    kinds = characters.classes(points)
    counts = characters.counts(kinds)
    total = len(points) - int(counts[characters.SPACE] + counts[characters.NEWLINE])
    letters = sum(
        int(counts[kind])
        for kind in (characters.HAN, characters.KANA, characters.LATIN, characters.LETTER)
    )
    garbled, first = _mojibake(text)
    ellipses, duplicates = _lines(text)
    common, word_length = _latin(points, kinds)
    top, repeated = _repetition(text, points)
    return Figures(
        characters=total,
        letter_fraction=letters / max(total, 1),
        symbol_fraction=_symbols(points, kinds) / max(total, 1),
        garbled_fraction=garbled / max(total, 1),
        mojibake=first,
        common_han_fraction=_common_han(points, kinds),
        common_bigram_fraction=common,
        mean_word_length=word_length,
        ellipsis_line_fraction=ellipses,
        duplicate_line_fraction=duplicates,
        top_ngram_fraction=top,
        duplicate_ngram_fraction=repeated,
        # Such dumps are mostly digits; and few other texts are.
        dump_fraction=_dumped(text) / total if counts[characters.DIGIT] > total / 5 else 0.0,
    ), counts


def _mojibake(text: str) -> tuple[int, str]:
    if text.isascii() or not _MOJIBAKE_SIGN.search(text):
        return 0, ""
    found = [match[0] for match in _MOJIBAKE.finditer(text)]
    return sum(map(len, found)), found[0][:20] if found else ""


def _dumped(text: str) -> int:
    """Count the digits of hexadecimal dumps."""
    dumped = "".join(match[0] for match in _DUMP.finditer(text))
    letters = len(_DUMP_LETTERS.findall(dumped))
    digits = letters + sum(map(str.isdigit, dumped))
    return digits if digits >= _FEWEST_DUMPED and letters >= _LEAST_LETTERS * digits else 0


def _symbols(points: npt.NDArray[np.uint32], kinds: npt.NDArray[np.uint8]) -> int:
    """Count symbols; rules of tables and headings, rows of one symbol, count once."""
    symbols = kinds == characters.SYMBOL
    again = symbols[1:] & (points[1:] == points[:-1])
    return int(symbols.sum() - again.sum())


def _common_han(points: npt.NDArray[np.uint32], kinds: npt.NDArray[np.uint8]) -> float:
    han = points[kinds == characters.HAN]
    return float(everyday.han_table()[han].mean()) if len(han) >= _FEW_HAN else 1.0


def _latin(points: npt.NDArray[np.uint32], kinds: npt.NDArray[np.uint8]) -> tuple[float, float]:
    """Give the share of common pairs among the pairs of letters, and the mean length of a word."""
    latin = kinds == characters.LATIN
    num_latin = int(latin.sum())
    if num_latin < _FEW_LATIN:
        return 1.0, 5.0
    words = num_latin - int((latin[1:] & latin[:-1]).sum())
    index = (points | np.uint32(0x20)) - np.uint32(ord("a"))  # beyond 25 if no ASCII letter
    # Tags and acronyms are no words: 1RCP001PO. So the second letter has to be a small one.
    pairs = (index[1:] < 26) & (index[:-1] < 26) & (points[1:] >= ord("a"))
    keys = (index[:-1] * np.uint32(26) + index[1:])[pairs]
    # Among ideographs Latin letters are units: mm/s, kPa.
    is_latin = num_latin > int((kinds == characters.HAN).sum())
    judged = is_latin and len(keys) >= _FEW_LATIN
    common = float(everyday.bigram_table()[keys].mean()) if judged else 1.0
    return common, num_latin / words


def _lines(text: str) -> tuple[float, float]:
    """Give the share of lines that end in an ellipsis, and of characters in repeated lines."""
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    if len(lines) < _FEW_LINES:
        return 0.0, 0.0
    # Rows of tables and short entries repeat for good reasons: "合格", "| --- |", "}".
    long = [line for line in lines if len(line) >= 8 and "|" not in line]
    again = sum(map(len, long)) - sum(map(len, set(long)))
    ellipses = sum(line.endswith(_ELLIPSIS) for line in lines)
    return ellipses / len(lines), again / max(sum(map(len, lines)), 1)


def _repetition(text: str, points: npt.NDArray[np.uint32]) -> tuple[float, float]:
    """Give the share of the most frequent phrase, and of runs that occurred before."""
    if "|" in text:
        points = characters.code_points("\n".join(x for x in text.split("\n") if "|" not in x))
    tokens = ngrams.tokens(points)
    if len(tokens) < _FEW_TOKENS:
        return 0.0, 0.0
    _, times = np.unique(ngrams.ngrams(tokens, _TOP_NGRAM), return_counts=True)
    top = int(times.max())
    runs = ngrams.ngrams(tokens, _REPEATED_NGRAM)
    repeated = 1 - len(np.unique(runs)) / len(runs)
    share = min(1.0, top * _TOP_NGRAM / len(tokens)) if top > _FEW_REPEATS else 0.0
    return share, repeated
