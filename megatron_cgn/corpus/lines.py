"""Lines that belong to a page or a web site and not to the text; blanks at ends, blank lines.

Tables and fenced code are left as they are: which lines those are is decided first. Everything else
that goes is named in docs/corpus-cleaning.md. Cleaning twice changes nothing: the rules run until
they find nothing more.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence, Set
from itertools import pairwise, takewhile
from typing import Literal, get_args

from megatron_cgn.corpus import navigation

LineKind = Literal["page_numbers", "contents", "navigation", "copyright"]
LINE_KINDS: tuple[LineKind, ...] = get_args(LineKind)

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_TABLE_ROW = re.compile(r"\s*\|.*\||\s*\+[-=+]+\+\s*$|.*\|.*\|.*\|")
_LONGEST = 200  # characters of a line that may be furniture

_NUMBER = "(?:[0-9]{1,5}|[ivxlc]{1,7}|[一二三四五六七八九十百零〇]{1,6})"
_OF = rf"\s*[,，/|]?\s*[(（]?\s*共\s*{_NUMBER}\s*页\s*[)）]?"
_PAGE_MARK = re.compile(
    rf"(?:[-—–·]\s*)?第\s*{_NUMBER}\s*页(?:{_OF})?(?:\s*[-—–·])?"
    rf"|共\s*{_NUMBER}\s*页\s*[,，/|]?\s*第\s*{_NUMBER}\s*页"
    rf"|{_NUMBER}\s*页?\s*/\s*共?\s*{_NUMBER}\s*页"
    rf"|页[码次]\s*[:：]?\s*{_NUMBER}(?:\s*/\s*{_NUMBER})?"
    rf"|(?:[-—–]\s*)?(?:page|pg\.)\s*[:.]?\s*{_NUMBER}(?:\s*(?:of|/)\s*{_NUMBER})?(?:\s*[-—–])?",
    re.IGNORECASE,
)
_PAGE_WITHIN = re.compile(
    rf"第\s*([0-9]+)\s*页(?:{_OF})?|\bpage\s*:?\s*([0-9]+)(?:\s*(?:of|/)\s*[0-9]+)?", re.IGNORECASE
)
_DASHED = re.compile(r"[-—–]{1,2}\s*([0-9]{1,4})\s*[-—–]{1,2}")
_ENDS_IN_DASH = re.compile(r"[-—–][^\S\n]*(?:\n|\Z)")
_FEWEST_LINES = 8  # of a page: numbers in dashes that are closer may be steps
_FORM_FEED = "\f"
_WINDOW_LINES = 3  # non-blank lines before and after a page break that may be header or footer
_FEWEST = 3  # occurrences that make a line a running one, and entries that make a table of contents

_ENTRY_PAGE = re.compile(r"(?:(?<![0-9])[0-9]{1,4}|(?<![a-z])[ivxlc]{1,6})$", re.IGNORECASE)
_LEADERS = ".．·•…‥"
_CONTENTS_HEADING = re.compile(
    r"#*\s*(?:目\s*[录錄次]|(?:table\s+of\s+)?contents)\s*", re.IGNORECASE
)

# What begins an entry where no heading tells that there is a table of contents.
_NUMBERED = re.compile(
    rf"第\s*{_NUMBER}\s*[章节節篇部]|附\s*[录錄件表图]|[表图圖]\s*[0-9A-Z]|[0-9]+(?:\.[0-9]+)*[.、\s]"
    r"|[一二三四五六七八九十]+\s*[、．.]|(?:chapter|part|section|appendix|figure|table|annex)\b"
    r"|[A-Z](?:\.[0-9]+)+",
    re.IGNORECASE,
)
_MOST_PAGES = 10  # of an entry on average: set values rise faster

_COPYRIGHT = re.compile(
    r"(?:(?:copyright|版权所有)\s*[:：]?\s*(?:©|\(c\)|（c）)?|©)\s*[:：]?\s*(?:19|20)[0-9]{2}\b.*",
    re.IGNORECASE,
)
_LONGEST_NOTICE = 100  # a clause of a contract may end in such words too
_RESERVED = ("all rights reserved", "保留所有权利", "保留一切权利", "版权所有")


def tidy(text: str, *, remove: Collection[LineKind]) -> tuple[str, Counter[str], int]:
    """Remove furniture, blanks at the ends of lines, and blank lines after the first of a run.

    Args:
        text: Normalised text; form feeds mark pages.
        remove: Kinds of lines that go.

    Returns:
        The text; the lines removed, by kind; and how many characters these lines of navigation had.
    """
    lines = text.replace("\f", "\n\f\n").split("\n")
    lowered = text.lower()
    removed: Counter[str] = Counter()
    menus = 0
    hinted = _hinted(lowered)
    kinds = [kind for kind in remove if kind in hinted]
    while kinds or _FORM_FEED in lines:
        gone = _furniture(lines, _kept_as(lines), kinds)
        if not gone:
            break
        removed.update(kind for kind in gone.values() if kind)
        menus += sum(len(lines[i].strip()) for i, kind in gone.items() if kind == "navigation")
        lines = [line for i, line in enumerate(lines) if i not in gone]
    return _blanks(lines), removed, menus


def _hinted(lowered: str) -> set[LineKind]:
    """Name the kinds there may be, by cheap searches: most texts have few."""
    kinds: set[LineKind] = set()
    if navigation.hinted(lowered):
        kinds.add("navigation")
    if any(word in lowered for word in ("页", "pag", "pg.", "\f")) or _ENDS_IN_DASH.search(lowered):
        kinds.add("page_numbers")
    if any(leader in lowered for leader in ("....", "……", "····", ". . .", "．．", "••••", "‥‥")):
        kinds.add("contents")
    if any(word in lowered for word in ("copyright", "©", "版权所有", "reserved", "保留")):
        kinds.add("copyright")
    return kinds


def _kept_as(lines: Sequence[str]) -> list[str]:
    """Tell which lines are fenced `code` or rows of a `table`; the others are empty."""
    kinds = [""] * len(lines)
    fence = ""
    for i, line in enumerate(lines):
        if fence:
            kinds[i] = "code"
            if line.strip().startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif line.lstrip()[:3] in ("```", "~~~") and (match := _FENCE.match(line)):
            fence, kinds[i] = match[1], "code"
        elif ("|" in line or "+" in line) and _TABLE_ROW.match(line):
            kinds[i] = "table"
    return kinds


def _furniture(
    lines: Sequence[str], kept_as: Sequence[str], kinds: Sequence[LineKind]
) -> dict[int, str]:
    """Find the lines to remove: index to kind; form feeds have no kind."""
    gone: dict[int, str] = {i: "" for i, line in enumerate(lines) if line == _FORM_FEED}
    short = {
        i: stripped
        for i, line in enumerate(lines)
        if not kept_as[i] and (stripped := line.strip()) and len(stripped) <= _LONGEST
    }
    if "page_numbers" in kinds:
        marks = [*_page_marks(short), *_dashed(short, lines)]
        gone |= dict.fromkeys(marks, "page_numbers")
        pages = sorted(gone)
        gone |= dict.fromkeys(_running(short, lines, pages), "running_lines")
    if "contents" in kinds:
        gone |= dict.fromkeys(_contents(short, lines), "contents")
    if "copyright" in kinds:
        # An indented notice is part of a text that was laid out, and may go on in the next line.
        outer = (i for i in short if not lines[i].startswith(("    ", "\t")) and i not in gone)
        gone |= {i: "copyright" for i in outer if _is_copyright(short[i])}
    if "navigation" in kinds:
        candidates = {i: line for i, line in enumerate(lines) if kept_as[i] != "code"}
        found = navigation.find(candidates)
        gone |= {i: "navigation" for i in found if i not in gone}
    return gone


def _is_copyright(line: str) -> bool:
    is_notice = len(line) <= _LONGEST_NOTICE and line.rstrip(".。").lower().endswith(_RESERVED)
    return is_notice or _COPYRIGHT.match(line) is not None


def _page_marks(short: dict[int, str]) -> list[int]:
    """Find page numbers, alone or within a line that comes back with rising numbers."""
    marks = []
    within: dict[str, list[tuple[int, int]]] = {}
    for i, line in short.items():
        if "页" in line or "pag" in (lowered := line.lower()) or "pg" in lowered:
            if _PAGE_MARK.fullmatch(line):
                marks.append(i)
            elif match := _PAGE_WITHIN.search(line):
                rest = f"{line[: match.start()]}\0{line[match.end() :]}"
                within.setdefault(rest, []).append((i, int(match[1] or match[2])))
    for places in within.values():
        numbers = [number for _, number in places]
        if len(numbers) >= _FEWEST and all(a + 1 == b for a, b in pairwise(numbers)):
            marks += [i for i, _ in places]
    return marks


def _dashed(short: dict[int, str], lines: Sequence[str]) -> list[int]:
    """Find page numbers in dashes: beside page breaks, or rising by one from page to page."""
    found = {i: int(m[1]) for i, line in short.items() if (m := _DASHED.fullmatch(line))}
    places = list(found)
    if len(found) >= _FEWEST and all(b - a >= _FEWEST_LINES for a, b in pairwise(places)):
        if all(a + 1 == b for a, b in pairwise(found.values())):
            return places
    return [i for i in found if _FORM_FEED in _neighbours(lines, i)]


def _neighbours(lines: Sequence[str], place: int) -> list[str]:
    """Give the nearest lines before and after that are not blank, within a few."""
    sides = (lines[max(0, place - 4) : place][::-1], lines[place + 1 : place + 5])
    # `strip` would take a form feed for a blank.
    return [line for side in sides for line in [x for x in side if x.strip(" \t")][:1]]


def _running(short: dict[int, str], lines: Sequence[str], marks: Sequence[int]) -> list[int]:
    """Find headers and footers: lines that are the same beside most page breaks."""
    form_feeds = sum(lines[mark] == _FORM_FEED for mark in marks)
    num_pages = max(form_feeds, len(marks) - form_feeds)
    if num_pages < _FEWEST:
        return []
    breaks = set(marks)
    sides = [_beside(short, lines, mark, step, breaks) for mark in marks for step in (-1, 1)]
    times = Counter(short[i] for i in {i for side in sides for i in side})
    running = {line for line, n in times.items() if n >= max(_FEWEST, num_pages / 2)}
    # Only up to the first other line: a sentence of the text may come back near every page break.
    return [i for side in sides for i in takewhile(lambda i: short[i] in running, side)]


def _beside(
    short: dict[int, str], lines: Sequence[str], mark: int, step: int, breaks: Set[int]
) -> list[int]:
    """Give the first lines before or after a page break, blank ones and other breaks left out."""
    found: list[int] = []
    for i in range(mark + step, mark + 4 * _WINDOW_LINES * step, step):
        if not 0 <= i < len(lines) or len(found) == _WINDOW_LINES:
            break
        if i not in breaks and lines[i].strip():
            if i not in short:
                break
            found.append(i)
    return found


def _contents(short: dict[int, str], lines: Sequence[str]) -> list[int]:
    """Find tables of contents: entries in a row with a leader and page numbers that do not fall."""
    gone: list[int] = []
    run: list[int] = []
    first = last = 0

    def close() -> None:
        if len(run) >= _FEWEST:
            above = _beside(short, lines, run[0], -1, set())[:1]
            heading = [i for i in above if _CONTENTS_HEADING.fullmatch(short[i])]
            numbered = sum(_NUMBERED.match(short[i]) is not None for i in run)
            # A list of parameters and their values has leaders too.
            if heading or (
                2 * numbered >= len(run) and last - first <= _MOST_PAGES * (len(run) - 1)
            ):
                gone.extend(run + heading)
        run.clear()

    for i, line in enumerate(lines):
        page = _entry_page(short[i], last) if i in short else None
        if page is not None:
            if page < last:
                close()
            first = first if run else page
            run.append(i)
            last = page
        elif line.strip() and line != _FORM_FEED:
            close()
            last = 0
    close()
    return gone


def _entry_page(line: str, last: int) -> int | None:
    """Give the page of an entry of a table of contents; of a Roman one, the last Arabic page."""
    match = line[-1].isalnum() and _ENTRY_PAGE.search(line, max(0, len(line) - 7))
    if not match:
        return None
    before = line[: match.start()]
    title = before.rstrip(_LEADERS + " ")
    leader = sum(before.count(each, len(title)) for each in _LEADERS)
    # An ellipsis of Chinese is two characters of three dots each.
    if not title or leader + 2 * before.count("…", len(title)) < 4:
        return None
    return int(match[0]) if match[0].isdecimal() else last


def _blanks(lines: Sequence[str]) -> str:
    """Join the lines without blanks at their ends and with one blank line at most, but for code."""
    if not any(line.lstrip()[:3] in ("```", "~~~") for line in lines):
        text = "\n".join([line.rstrip() for line in lines])
        return re.sub("\n{3,}", "\n\n", text).strip("\n")
    kept: list[str] = []
    for line, kept_as in zip(lines, _kept_as(lines), strict=True):
        line = line if kept_as == "code" else line.rstrip()
        if line or kept_as == "code" or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).strip("\n")
