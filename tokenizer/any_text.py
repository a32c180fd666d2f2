"""An expression that matches any of many texts, about as fast as one that matches any of few."""

import math
import re
from collections.abc import Iterable

_MOST_CHOICES = 16
"""Alternatives at one place that are tried one by one."""


def any_text(texts: Iterable[str]) -> str:
    """Write an expression that matches the longest of some texts that begin at a place.

    Texts share what they begin with, so at most places the first character rules all of them out.
    A plain list of alternatives is tried one by one at every place instead.

    Args:
        texts: Not empty strings.

    Returns:
        An expression for `re` and `regex`, without groups that count; it may be quantified.
    """
    return _group(sorted(set(texts)), 0, len(set(texts)), 0)


def _group(texts: list[str], start: int, end: int, depth: int) -> str:
    """An expression for the rest, from `depth` on, of sorted texts that are alike up to there."""
    is_text = len(texts[start]) == depth  # the shortest is the first
    choices: list[tuple[str, str]] = []  # with the character that each begins with
    start += is_text
    while start < end:
        first, last = texts[start], _last_alike(texts, start, end, depth)
        common = _common(first, texts[last - 1])
        rest = _group(texts, start, last, common)
        choices.append((first[depth], re.escape(first[depth:common]) + rest))
        start = last
    if not choices:
        return ""
    return f"(?:{_one_of(choices)})" + ("?" if is_text else "")


def _one_of(choices: list[tuple[str, str]]) -> str:
    """Alternatives; many of them in parts, which a look at the next character rules out."""
    if len(choices) <= _MOST_CHOICES:
        return "|".join(choice for _, choice in choices)
    size = math.isqrt(len(choices))
    parts = [choices[start : start + size] for start in range(0, len(choices), size)]
    return "|".join(
        f"(?=[{re.escape(part[0][0])}-{re.escape(part[-1][0])}])(?:{_one_of(part)})"
        for part in parts
    )


def _last_alike(texts: list[str], start: int, end: int, depth: int) -> int:
    """Where those end that have the first one's character at `depth`."""
    letter, place = texts[start][depth], start + 1
    while place < end and texts[place][depth] == letter:
        place += 1
    return place


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    number = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        number += 1
    return number
