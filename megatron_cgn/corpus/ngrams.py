"""Tokens and n-grams of a text as 64-bit hashes, in a few passes over arrays.

A token is one ideograph or syllable, or one run of letters and digits of any other script: so an
n-gram is n characters of Chinese, n words of English, and both at once where a text mixes them.
Punctuation, symbols and blanks separate words and otherwise do not count.

A run of symbols hashes to Σ aᵢ·Pⁱ modulo 2⁶⁴, shifted to start at the power 0 (Karp and Rabin,
1987), with the symbols' values and the result mixed by the finaliser of SplitMix64. With 10⁷
n-grams in an index and 10¹⁰ in a corpus about 0.005 pairs of different ones share a hash.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from megatron_cgn.corpus import characters

Hashes = npt.NDArray[np.uint64]

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_INVERSE = pow(_BASE, -1, 1 << 64)
_POWERS_KEPT = 1 << 20


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a text, in order."""

    hashes: Hashes
    """What each token is."""
    starts: npt.NDArray[np.int64]
    """Where in the text each begins, in code points."""
    ends: npt.NDArray[np.int64]
    """Where each ends."""

    def __len__(self) -> int:
        return len(self.hashes)


def tokens(points: npt.NDArray[np.uint32]) -> Tokens:
    """Split code points into tokens.

    Args:
        points: Code points; equal tokens are those with equal code points, so fold case and width
            before.

    Returns:
        The tokens.
    """
    kinds = characters.classes(points)
    syllable = (kinds == characters.HAN) | (kinds == characters.KANA)
    letter = (
        (kinds == characters.LATIN) | (kinds == characters.LETTER) | (kinds == characters.DIGIT)
    )
    inside = np.zeros(len(points) + 1, np.bool_)
    inside[1:] = letter
    starts = np.flatnonzero(syllable | (letter & ~inside[:-1]))
    follows = np.zeros(len(points), np.bool_)
    follows[:-1] = letter[1:]
    ends = np.flatnonzero(syllable | (letter & ~follows)) + 1
    return Tokens(_run_hashes(_character_hashes()[points], starts, ends), starts, ends)


def ngrams(of_tokens: Tokens, n: int) -> Hashes:
    """Hash every run of `n` tokens: as many as there are tokens, less n - 1."""
    count = len(of_tokens) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    starts = np.arange(count)
    return _run_hashes(of_tokens.hashes, starts, starts + n)


def _run_hashes(
    values: Hashes, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> Hashes:
    """Hash runs of values, each from its start up to its end."""
    powers, inverses = _powers(len(values))
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * powers[: len(values)], out=sums[1:])
    return _mix((sums[ends] - sums[starts]) * inverses[starts])


def _mix(values: Hashes) -> Hashes:
    """Spread every bit over all bits: the finaliser of SplitMix64 (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@cache
def _character_hashes() -> Hashes:
    table = _mix(np.arange(1, 0x110001, dtype=np.uint64))
    table.setflags(write=False)
    return table


def _powers(count: int) -> tuple[Hashes, Hashes]:
    """Give the powers of the base and of its inverse, at least `count` of each."""
    size = max(_POWERS_KEPT, 1 << max(count, 1).bit_length())
    return _powers_of(_BASE, size), _powers_of(_INVERSE, size)


@cache
def _powers_of(base: int, count: int) -> Hashes:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    powers = np.cumprod(factors, dtype=np.uint64)
    powers.setflags(write=False)
    return powers
