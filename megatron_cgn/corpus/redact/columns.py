"""Columns of persons: in tables with bars or tabulators, in CSV, and in words set apart by spaces.

The loose kinds are sought only below a line that says 姓名, name or another label of a person, so
that other texts cost nothing.
"""

import re
from collections.abc import Iterator

from megatron_cgn.corpus.redact.lexicon import ENGLISH_LABELS
from megatron_cgn.corpus.redact.view import View

# In English any column may be called Name; one of these beside it makes it a person's.
_OF_PERSONS = re.compile(
    r"[* ]*(?:.*\b(?:phone|tel|telephone|mobile|cell|e-?mail|passport|badge|dose|birth|gender|sex|"
    r"nationality|employee|department|position|job title|id card|company|signature)\b.*|"
    r".*(?:电话|手机|邮箱|护照|身份证|证件|性别|部门|岗位|职务|工号).*)",
    re.I,
)
_NAME = re.compile(r"[* ]*(?:full |first |last |sur|employee )?name[* ]*", re.I)
_AMBIGUOUS = frozenset("name contact host guest present chair holder responsible person".split())
_WORD = re.compile(r"[^ \t]+")
_CELL = re.compile(r"[^,]+")
_MAX_HEADING = 16
_MAX_LINES = 100_000


def cells_of_persons(view: View, heading: re.Pattern[str]) -> Iterator[int]:
    """Find the cells of columns that hold persons.

    Args:
        view: The text.
        heading: Matches a Chinese heading, or one that ends in ``by``, of such a column.

    Yields:
        Where the content of each such cell begins.
    """
    for table in view.tables:
        columns = _columns(table.headings, heading)
        if not columns:
            continue
        ends = [start - 1 for start in table.starts[1:]] + [table.end]
        for start, end in list(zip(table.starts, ends, strict=True))[1:]:
            offset = start
            for column, cell in enumerate(view.text[start:end].split(table.separator)):
                if column in columns and cell.strip():
                    yield offset + len(cell) - len(cell.lstrip())
                offset += len(cell) + 1
    yield from _loose(view.text, heading)


def _columns(headings: tuple[str, ...], heading: re.Pattern[str]) -> set[int]:
    of_persons = any(map(_OF_PERSONS.fullmatch, headings))
    return {
        index
        for index, text in enumerate(headings)
        if heading.fullmatch(text)
        or _english(text)
        or of_persons
        and _NAME.fullmatch(text) is not None
    }


def _english(text: str) -> bool:
    word = text.strip("* ").rpartition(" ")[2].lower()
    return word in ENGLISH_LABELS and word not in _AMBIGUOUS


def _loose(text: str, heading: re.Pattern[str]) -> Iterator[int]:
    """Rows of as many cells as the headings above them, between commas or spaces."""
    reached = 0
    for label in re.finditer("姓名|name|Name|司机|驾驶员|负责人|联系人|成员|人员", text):
        if label.start() < reached:
            continue
        start = text.rfind("\n", max(0, label.start() - 200), label.start()) + 1
        end = _line_end(text, start)
        reached = end
        if "|" in text[start:end] or "\t" in text[start:end] or end - start > 200:
            continue
        cell = _CELL if text.count(",", start, end) > 1 else _WORD
        headings = tuple(match[0].strip() for match in cell.finditer(text, start, end))
        plain = len(headings) > 2 and max(map(len, headings)) <= _MAX_HEADING
        columns = _columns(headings, heading) if plain and ":" not in text[start:end] else set()
        for _ in range(_MAX_LINES if columns else 0):
            start, end = end + 1, _line_end(text, end + 1)
            row = list(cell.finditer(text, start, end)) if start < end <= start + 400 else []
            if len(row) != len(headings):
                break
            for index in sorted(columns):
                yield row[index].end() - len(row[index][0].lstrip())
            reached = end


def _line_end(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end
