"""A text as the detectors see it: one width, one kind of dash, and nothing already redacted.

The view has as many characters as the text, so that a position in one is a position in the other.
What the characters around a number say of it (its label, the heading of its column) is found here;
what a number is, is decided by the detectors.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

MASKED = "\ue000"
"""Stands for every character of a replacement made earlier: matched by no detector."""

_WIDTHS = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_SPACES: dict[int, str] = dict.fromkeys(
    (0x3000, 0xA0, *range(0x2000, 0x2010), 0x202F, 0x205F, 0x2060, 0xFEFF), " "
)
_DASHES = dict.fromkeys((*range(0x2010, 0x2016), 0x2212, 0xFE63), "-")
_ONE_WIDTH = {chr(code): char for code, char in {**_WIDTHS, **_SPACES, **_DASHES}.items()}

# Digits read out: 一三八…; as long as a telephone number, so no year or quantity is among them.
_NUMERALS = re.compile("[〇零○一二三四五六七八九幺]{11,}")
_NUMERAL_DIGITS = str.maketrans("〇零○一二三四五六七八九幺", "0001234567891")

_LONG_NUMBER = re.compile(r"[0-9](?:[ .()/\r\n-]{0,6}[0-9]){6}")
_RULE = re.compile(r"[ |:-]*-[ |:-]*")
_LABEL_CHARACTERS = 28
# Between a label and its number: no second number and no end of a clause.
_REFUSAL_GAP = re.compile(r"[^0-9,;。\n]{0,6}")


@dataclass(frozen=True, slots=True)
class Span:
    """A passage to be replaced: characters ``start`` to ``end`` of the text."""

    kind: str
    start: int
    end: int
    value: str
    """What it says, free of separators and case: equal for two spellings of one number."""


@dataclass(frozen=True, slots=True)
class Table:
    """Consecutive lines of cells between bars or tabulators."""

    separator: str
    starts: tuple[int, ...]
    """Where each line begins."""
    end: int
    headings: tuple[str, ...]


class View:
    """A text in one width, and what surrounds its passages.

    Args:
        text: The text.
        placeholders: Matches every replacement that a redaction may have made earlier.
    """

    def __init__(self, text: str, *, placeholders: re.Pattern[str] | None = None) -> None:
        view = text
        if not text.isascii():
            # Several times faster than `str.translate`, which raises and catches an exception
            # for every character it has nothing for.
            for character in _ONE_WIDTH.keys() & set(text):
                view = view.replace(character, _ONE_WIDTH[character])
            view = _NUMERALS.sub(lambda match: match[0].translate(_NUMERAL_DIGITS), view)
        if placeholders is not None:
            # Sought in the text itself: a placeholder is only what was written as one.
            pieces, end = [], 0
            for match in placeholders.finditer(text):
                pieces += [view[end : match.start()], MASKED * len(match[0])]
                end = match.end()
            view = "".join([*pieces, view[end:]])
        self.text = view

    def matches(
        self, pattern: re.Pattern[str], accept: Callable[[re.Match[str]], Span | None]
    ) -> Iterator[Span]:
        """Find what a pattern matches and a rule accepts.

        After a refusal the search goes on one character later, not behind the refused match:
        a number may begin inside it. As patterns are bounded, the time stays linear.

        Args:
            pattern: The shape; matches at most some dozens of characters.
            accept: The rule; returns what to replace, or None.

        Yields:
            What was accepted, from left to right.
        """
        position = 0
        while match := pattern.search(self.text, position):
            span = accept(match)
            if span is None:
                position = match.start() + 1
            else:
                yield span
                position = max(span.end, match.start() + 1)

    def before(self, position: int, *, characters: int = _LABEL_CHARACTERS) -> str:
        """The characters before a position."""
        return self.text[max(0, position - characters) : position]

    def label(self, position: int, wanted: re.Pattern[str]) -> bool | None:
        """Whether what stands before a number says what it is.

        Args:
            position: Where the number begins.
            wanted: Labels of the kind in question.

        Returns:
            True if the nearest label is a wanted one; False if it is that of another kind of
            number, such as an order number; None without a label.
        """
        before = self.before(position)
        good = last_end(wanted, before)
        bad = last_end(OTHER_NUMBERS, before)
        # 信用代码 is one, although 代码 is the label of any other number.
        if good >= bad and good >= 0:
            return True
        if bad >= 0 and _REFUSAL_GAP.fullmatch(before, bad):
            return False
        heading = self.heading(position)
        if heading:
            if wanted.search(heading):
                return True
            if OTHER_NUMBERS.search(heading):
                return False
        return None

    def heading(self, position: int) -> str:
        """The heading of the table column a position is in, or an empty string."""
        index = bisect_right(self._table_starts, position) - 1
        if index < 0 or position >= self.tables[index].end:
            return ""
        table = self.tables[index]
        line = table.starts[bisect_right(table.starts, position) - 1]
        column = self.text.count(table.separator, line, position)
        return table.headings[column] if column < len(table.headings) else ""

    def mentions(self, *words: str) -> bool:
        """Whether the text has one of some words, in small letters, in whatever case."""
        return any(word in self._lower for word in words)

    @cached_property
    def has_long_number(self) -> bool:
        """Whether seven digits stand together anywhere; most texts need no closer look."""
        return _LONG_NUMBER.search(self.text) is not None

    @cached_property
    def _lower(self) -> str:
        return self.text.lower()

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """Tables of the text, in order: Markdown with bars, or lines with tabulators."""
        return tuple(_tables(self.text))

    @cached_property
    def _table_starts(self) -> list[int]:
        return [table.starts[0] for table in self.tables]


OTHER_NUMBERS = re.compile(
    r"订单|单号|编号|编码|序号|流水|批号|批次|(?<!证)件号|图号|物料|料号|零件|部件|合同号|序列|发票|"
    r"条码|条形码|"
    r"运单|快递|工单|资产|版本|文号|档案|标准|账期|凭证|税号|型号|代码|图纸|交易号|票号|"
    r"(?<![a-z])(?:s/?n|p/?n|order|invoice|part|serial|batch|lot|isbn|issn|doi|item|asset|ticket|"
    r"version|std|standard|build|document|doc|tracking|reference|ref|code|drawing|dwg|barcode|"
    r"timestamp|hash|"
    r"job|transaction|[a-z]*_?id)(?![a-z])",
    re.IGNORECASE,
)
"""Labels of numbers that are about things, not persons."""


def last_end(pattern: re.Pattern[str], text: str) -> int:
    """Where the last match ends, or -1."""
    end = -1
    for match in pattern.finditer(text):
        end = match.end()
    return end


def _tables(text: str) -> Iterator[Table]:
    """Runs of lines with equally many separators; in Markdown, a rule follows the headings."""
    if "|" not in text and "\t" not in text:
        return
    starts: list[int] = []
    lines: list[str] = []
    position = 0
    for line in [*text.split("\n"), ""]:
        separator = _separator(line)
        number = line.count(separator)
        if lines and (separator, number) != (_separator(lines[0]), lines[0].count(separator)):
            yield from _table(starts, lines)
            starts, lines = [], []
        elif len(lines) > 1 and _RULE.fullmatch(line):
            yield from _table(starts[:-1], lines[:-1])
            starts, lines = starts[-1:], lines[-1:]
        if number:
            starts.append(position)
            lines.append(line)
        position += len(line) + 1


def _table(starts: list[int], lines: list[str]) -> Iterator[Table]:
    if len(lines) > 1:
        separator = _separator(lines[0])
        end = starts[-1] + len(lines[-1])
        headings = tuple(heading.strip() for heading in lines[0].split(separator))
        yield Table(separator, tuple(starts), end, headings)


def _separator(line: str) -> str:
    return "|" if line.count("|") > 1 else "\t"
