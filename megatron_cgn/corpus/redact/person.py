"""The shapes of names: Chinese, of minorities, English; and what only looks like one."""

import re

from megatron_cgn.corpus.redact.lexicon import (
    COMMON,
    COMPOUND,
    ENGLISH_LABELS,
    NOT_GIVEN,
    NOT_PERSONS,
    OTHER,
    TITLES,
    WORDS,
)
from megatron_cgn.corpus.redact.view import Span

# A label is no name: Custom Driver, Project Manager.
_NOT_PERSONS = NOT_PERSONS | ENGLISH_LABELS

HAN = "\u3400-\u4dbf\u4e00-\u9fff"

# What may follow a name without a space.
_AFTER = (
    rf"(?=[^{HAN}]|$|{TITLES}|电话|手机|邮箱|联系|身份证|性别|部门|职务|职称|工号|日期|编制|校核|"
    r"校对|审核|审定|批准|会签|负责|提出|汇报|介绍|表示|指出|认为|说|主持|和|与|及|等|的|在|于|"
    r"已|将|以及|发现|反映|下令|签收|擅自|"
    r"男|女|签)"
)
_GIVEN = rf"[{HAN}](?<![{NOT_GIVEN}])"
_SURNAME = rf"(?:{'|'.join(COMPOUND)}|[{''.join(sorted(set(COMMON + OTHER)))}])"
FULL_NAME = rf"{_SURNAME}(?:{_GIVEN}{_GIVEN}|{_GIVEN})"
"""A Chinese name without spaces, as a regular expression."""
_CHINESE = re.compile(
    rf"(?:{FULL_NAME}|{_SURNAME}(?:[ ]{{1,4}}{_GIVEN}|[ ]{_GIVEN}[ ]{_GIVEN})){_AFTER}"
)
_MINORITY = re.compile(rf"[{HAN}]{{2,10}}[·•・][{HAN}]{{2,10}}(?:[·•・][{HAN}]{{2,10}})?{_AFTER}")

# Letters of Western and Central Europe.
UPPER = "A-ZÀ-ÖØ-ÞĀĂĄĆČĎĐĒĖĘĚĞĢĪİĶĹĽŁŃŅŇŐŒŔŘŚŞŠŢŤŪŮŰŲŸŹŻŽȘȚ"
_LOWER = "a-zß-öø-ÿāăąćčďđēėęěğģīıķĺľłńņňőœŕřśşšţťūůűųźżžșț"
ENGLISH_WORD = (
    rf"(?:[{UPPER}](?:\.|[{_LOWER}]+(?:[-'][{UPPER}]?[{_LOWER}]+)*)"
    rf"|[{UPPER}][{_LOWER}]?['][{UPPER}][{_LOWER}]+|Mc[{UPPER}][{_LOWER}]+)"
)
"""A word of an English name, or an initial, as a regular expression."""
ENGLISH_NAME = (
    rf"(?:{ENGLISH_WORD}|[A-Z]{{2,12}}(?= [A-Z][a-z]))"
    rf"(?: {ENGLISH_WORD}|(?<=\.)-?{ENGLISH_WORD}| [A-Z]{{2,15}}(?![A-Za-z])"
    rf"| (?:de|van|von|der|la|le|bin|al)(?= )){{1,3}}(?![{UPPER}{_LOWER}])"
)
"""An English name of two words or more, as a regular expression."""
_ENGLISH = re.compile(ENGLISH_NAME)


def name_end(text: str, position: int) -> int | None:
    """Where the name that begins at a position ends, or None.

    Args:
        text: The text, in one width.
        position: Where a name is expected.

    Returns:
        The end of the name, or None if there is none.
    """
    for pattern in (_MINORITY, _CHINESE, _ENGLISH):
        match = pattern.match(text, position)
        if match and (pattern is _MINORITY or is_person(match[0])):
            return match.end()
    return None


def is_latin(name: str) -> bool:
    """Whether a name is written in Latin letters.

    Args:
        name: A name.

    Returns:
        False if it begins with a Chinese character.
    """
    return re.match(f"[{HAN}]", name) is None


def is_person(name: str) -> bool:
    """Whether what has the shape of a name is no other word.

    Args:
        name: Of the shape of a name.

    Returns:
        False for ``安全`` or ``Quality Department``.
    """
    if is_latin(name):
        return not any(word.lower() in _NOT_PERSONS for word in re.split(r"[ .-]+", name))
    return name.replace(" ", "")[:2] not in WORDS


def name_span(text: str, start: int, end: int) -> Span:
    """A name as a finding; its value is free of spaces or, in English, of case.

    Args:
        text: The text.
        start: First character.
        end: End.

    Returns:
        The finding.
    """
    name = text[start:end]
    value = " ".join(name.split()).lower() if is_latin(name) else re.sub(r"\s", "", name)
    return Span("name", start, end, value)
