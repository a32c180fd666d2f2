"""Code points and their classes, as numpy arrays: what quality rules and n-grams are made of."""

import unicodedata
from functools import cache

import numpy as np
import numpy.typing as npt

SPACE, NEWLINE, HAN, KANA, LATIN, LETTER, DIGIT, SYMBOL, LOST = range(9)
"""Classes: blanks, line ends, ideographs, Japanese syllables, Latin letters, letters of other
scripts (and their marks), digits, punctuation with all other symbols, and U+FFFD."""
NUM_CLASSES = 9

_BMP = 0x10000
_TOP = 0x110000
_HAN_RANGES = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x32400))
_KANA_RANGES = ((0x3041, 0x3097), (0x30A1, 0x30FB), (0x30FC, 0x3100), (0xFF66, 0xFFA0))


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """Give the code points of a text, one an element, without lone surrogates."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def classes(points: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """Give the class of each code point."""
    found: npt.NDArray[np.uint8] = class_table()[points]
    return found


def counts(of_points: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Count the members of each class: `[NUM_CLASSES]`."""
    return np.bincount(of_points, minlength=NUM_CLASSES)


@cache
def class_table() -> npt.NDArray[np.uint8]:
    """Give the class of every code point there is: `[0x110000]`."""
    table = np.full(_TOP, SYMBOL, np.uint8)
    # Beyond the basic plane only ideographs are told apart: the rest is emoji and rare scripts.
    table[:_BMP] = [_class_of(chr(point)) for point in range(_BMP)]
    for first, end in _HAN_RANGES:
        table[first:end] = HAN
    for first, end in _KANA_RANGES:
        table[first:end] = KANA
    table[[0x3005, 0x3007]] = HAN  # 々 and 〇
    table[ord("\n")] = NEWLINE
    table[0xFFFD] = LOST
    table.setflags(write=False)
    return table


def _class_of(character: str) -> int:
    category = unicodedata.category(character)
    if category[0] in "LM":
        return LATIN if "LATIN" in unicodedata.name(character, "") else LETTER
    if category[0] == "N":
        return DIGIT
    return SPACE if character.isspace() else SYMBOL
