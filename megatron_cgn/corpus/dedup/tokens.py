"""Text to tokens, many documents at a time, in numpy.

What two layouts of one text have in common: width and composition of characters (NFKC), case,
punctuation, white space and, for Chinese, the script (traditional characters count as their
simplified ones) make no difference. What may change a meaning stays: signs, decimal points and
mathematical symbols.

A token is a Han, kana or other character of a script written without spaces, a symbol, or a word
or number of any other script; so one rule fits Chinese, English and both in one sentence. A number
keeps the punctuation inside it: ``15.32``, ``2026-05-01``, ``2026年5月1``, ``1RCV-001PO`` and
``-5`` are one token each.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from megatron_cgn.errors import ConfigError

Codes = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]

# A lone surrogate, which no document may hold, between two documents.
_BARRIER: Final = "\ud800"
# What is left after planes 0 to 3 are tags, variation selectors and private use.
_NUM_CODES: Final = 0x40000
# Temporary arrays take about 80 bytes a character.
PIECE_CHARACTERS: Final = 1 << 20

# Classes of characters. `_LETTER` and `_DIGIT` make words.
_SPACE, _LETTER, _DIGIT, _SINGLE, _IGNORED = range(5)
# Punctuation that joins what is on both sides of it, if that has a digit, digits only (with a Han
# character, which is a token otherwise), a sign before a digit, and one after a digit.
_JOINER, _DIGIT_JOINER, _HAN_JOINER, _MINUS, _PERCENT = range(5, 10)
_SPECIAL: Final = {
    _JOINER: "./:_~",
    _DIGIT_JOINER: ",",
    _HAN_JOINER: "年月日时分",
    _MINUS: "-\u2212",
    _PERCENT: "%\u2030",
    # Drawn tables and markup.
    _SPACE: "|`^" + "".join(map(chr, range(0x2500, 0x2580))),
}
# Scripts written without spaces: Thai to Tibetan, Myanmar, Khmer, kana to Bopomofo, and Han.
_UNSPACED: Final = (
    (0x0E00, 0x1000),
    (0x1000, 0x10A0),
    (0x1780, 0x1800),
    (0x3005, 0x3008),
    (0x3040, 0x3130),
    (0x31A0, 0x3200),
    (0x3400, 0x4DC0),
    (0x4E00, 0xA000),
    (0xF900, 0xFB00),
    (0x1B000, 0x1B170),
    (0x20000, 0x40000),
)

_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)
_POWER_BASE: Final = 0xD6E8FEB86659FD93
_NUM_POWERS: Final = 1024


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of consecutive documents. Legend: C characters kept, T tokens, D documents."""

    codes: Codes
    """`[C]`: code points of the characters in tokens, normalised."""
    starts: npt.NDArray[np.int64]
    """`[T]`: where each token starts in `codes`."""
    words: npt.NDArray[np.bool_]
    """`[T]`: whether it is a word or number, which a space parts from its neighbours."""
    numbers: npt.NDArray[np.bool_]
    """`[T]`: whether it has a digit: a number, date or tag."""
    offsets: npt.NDArray[np.int64]
    """`[D + 1]`: where each document starts in `starts`."""


@lru_cache(maxsize=1)
def _tables() -> tuple[npt.NDArray[np.uint8], Codes]:
    """Class of each code point, and the code point that stands for it."""
    try:
        import opencc
    except ImportError:
        raise ConfigError(
            "deduplicate: opencc is not installed; install it with pip install "
            "'megatron-cgn[corpus]'."
        ) from None
    unspaced = np.zeros(_NUM_CODES, dtype=np.bool_)
    for first, end in _UNSPACED:
        unspaced[first:end] = True
    classes = np.array(
        [_class_of(unicodedata.category(chr(code))) for code in range(_NUM_CODES)], dtype=np.uint8
    )
    classes[unspaced & (classes == _LETTER)] = _SINGLE
    classes[0xFE00:0xFE10] = _IGNORED
    for kind, characters in _SPECIAL.items():
        classes[[ord(character) for character in characters]] = kind
    classes[0] = _SPACE
    folded = np.arange(_NUM_CODES, dtype=np.uint32)
    han = [code for first, end in _UNSPACED[-5:] for code in range(first, end)]
    simplified = opencc.OpenCC("t2s").convert("\n".join(map(chr, han))).split("\n")
    for code, character in zip(han, simplified, strict=True):
        if len(character) == 1 and ord(character) < _NUM_CODES:
            folded[code] = ord(character)
    return classes, folded


def folding_table() -> Codes:
    """Class and stand-in of each code point, one after the other: what hashes depend on."""
    classes, folded = _tables()
    return np.concatenate((classes.astype(np.uint32), folded))


def _class_of(category: str) -> int:
    """Class of a Unicode general category."""
    if category[0] in "LM":
        return _LETTER
    if category[0] == "N":
        return _DIGIT
    if category in ("Sm", "Sc", "So", "Co", "Cn"):
        return _SINGLE
    return _IGNORED if category in ("Cf", "Cs") else _SPACE


def tokenize(texts: Sequence[str]) -> Tokens:
    """Cut documents into tokens.

    Args:
        texts: One document or more, without lone surrogates, about `PIECE_CHARACTERS` in all.

    Returns:
        Their tokens.
    """
    classes, folded = _tables()
    text = unicodedata.normalize("NFKC", _BARRIER.join(texts)).casefold()
    # NFKC may leave what casefold makes of a character in another composition; all the same for
    # equal texts, which is what counts.
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    barrier = codes == ord(_BARRIER)
    codes = np.where(codes < _NUM_CODES, codes, np.uint32(0))
    kinds = classes[codes]
    kinds[barrier] = _SPACE
    ignored = kinds == _IGNORED
    if ignored.any():
        codes, kinds, barrier = codes[~ignored], kinds[~ignored], barrier[~ignored]
    _resolve(kinds)
    word = (kinds == _LETTER) | (kinds == _DIGIT)
    start = word.copy()
    start[1:] &= ~word[:-1]
    start |= kinds == _SINGLE
    kept = np.flatnonzero(word | (kinds == _SINGLE))
    starts = np.flatnonzero(start[kept])
    positions = kept[starts]
    inner = np.searchsorted(positions, np.flatnonzero(barrier))
    offsets = np.concatenate(([0], inner, [len(starts)])).astype(np.int64)
    assert len(offsets) == len(texts) + 1, "a document holds a lone surrogate"
    digits = (kinds == _DIGIT)[kept]
    numbers = np.logical_or.reduceat(digits, starts) if len(starts) else np.zeros(0, np.bool_)
    return Tokens(
        codes=folded[codes[kept]],
        starts=starts,
        words=word[positions],
        numbers=numbers,
        offsets=offsets,
    )


def _resolve(kinds: npt.NDArray[np.uint8]) -> None:
    """Replace the classes that depend on their neighbours by plain ones, in place."""
    special = np.flatnonzero(kinds >= _JOINER)
    if not len(special):
        return
    padded = np.concatenate(([_SPACE], kinds, [_SPACE])).astype(np.uint8)
    left, kind, right = padded[special], padded[special + 1], padded[special + 2]
    digit_left, digit_right = left == _DIGIT, right == _DIGIT
    word_left, word_right = digit_left | (left == _LETTER), digit_right | (right == _LETTER)
    joins = word_left & word_right & (digit_left | digit_right)
    in_word = np.select(
        [(kind == _JOINER), (kind == _MINUS), (kind == _PERCENT)],
        [joins, joins | (digit_right & ~word_left), digit_left],
        digit_left & digit_right,
    )
    otherwise = np.where(kind == _HAN_JOINER, _SINGLE, _SPACE)
    kinds[special] = np.where(in_word, _LETTER, otherwise)


def token_hashes(tokens: Tokens) -> Hashes:
    """Hash each token to 64 bits, stable over platforms and versions.

    Args:
        tokens: T tokens.

    Returns:
        `[T]`.
    """
    if not len(tokens.starts):
        return np.zeros(0, dtype=np.uint64)
    lengths = np.diff(tokens.starts, append=len(tokens.codes))
    place = np.arange(len(tokens.codes)) - np.repeat(tokens.starts, lengths)
    terms = (tokens.codes.astype(np.uint64) + np.uint64(1)) * _powers()[place % _NUM_POWERS]
    return mix(np.add.reduceat(terms, tokens.starts))


def mix(values: Hashes) -> Hashes:
    """Spread 64-bit values evenly; a bijection (the finaliser of SplitMix64, Steele 2014)."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@lru_cache(maxsize=1)
def _powers() -> Hashes:
    """Weights of the places in a token: powers of an odd number, mixed."""
    powers = np.array(
        [pow(_POWER_BASE, exponent, 2**64) for exponent in range(1, _NUM_POWERS + 1)],
        dtype=np.uint64,
    )
    return mix(powers) | np.uint64(1)


def canonical_bytes(tokens: Tokens) -> Iterator[bytes]:
    """Write what equal documents have in common.

    Args:
        tokens: Of D documents.

    Yields:
        A document's characters in UTF-32, with a zero before each word, so that spaces between
        words count and their number, and spaces beside Chinese characters, do not.
    """
    shift = np.zeros(len(tokens.codes) + 1, dtype=np.int64)
    shift[tokens.starts[tokens.words]] = 1
    shift = np.cumsum(shift[:-1])
    spaced = np.zeros(len(tokens.codes) + (int(shift[-1]) if len(shift) else 0), dtype="<u4")
    spaced[np.arange(len(tokens.codes)) + shift] = tokens.codes
    # A document's bytes start at its first token's zero, or at the token if it is no word.
    first = np.append(tokens.starts, len(tokens.codes))[tokens.offsets]
    before = np.concatenate(([0], shift))[first]
    for begin, end in zip((first + before)[:-1], (first + before)[1:], strict=True):
        yield spaced[begin:end].tobytes()
