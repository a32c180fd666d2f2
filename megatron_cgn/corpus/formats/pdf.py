"""PDF to text: pages joined, repeated headers and footers left out, broken lines mended.

The order of the text is the file's own. Tables come out as lines; scanned pages have no text.
"""

import itertools
import re
from collections import Counter, defaultdict
from math import ceil
from statistics import quantiles

from megatron_cgn.corpus.formats.unreadable import Unreadable
from megatron_cgn.errors import ConfigError

# Lines at the top and at the bottom of a page that may be a header or footer: a quarter, at most 3.
_EDGE_LINES = 3
_EDGE_SHARE = 0.25
# Columns of the narrowest text that is taken to be broken into lines, rather than listed.
_MIN_WIDTH = 40
_REPEATED_SHARE = 0.5
_MIN_PAGES = 3
# Roman numerals number the pages before the first chapter; as words of their own and in one case.
_NUMBER = re.compile(r"\d+|(?<![A-Za-z\d])(?:[ivxlc]{1,9}|[IVXLC]{1,9})(?![A-Za-z\d])")
_ROMAN = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100}
# Ends an entry of a table of contents, however wide it is.
_LEADER = re.compile(r"(?:[.·…．] ?){4,}\s*[\dIVXLCivxlc]+$")
_NUMERAL = re.compile(
    r"[\divxlcIVXLC第页共一二三四五六七八九十百/ .·—–-]+|page \d+( of \d+)?", re.I
)
_CJK = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_CJK_LINE = re.compile(f"[{_CJK}，、；：（《“]$")
_CJK_START = re.compile(f"^[{_CJK}，、；：）》”。！？]")
_HYPHENATED = re.compile(r"[A-Za-z]{2,}-$")
_LOWER = re.compile(r"^[a-z]")
_ITEM = re.compile(
    r"^(?:[-•·●▪*]|\(?\d+[.)、）]|第[一二三四五六七八九十百\d]+[章节条]|\d+(?:\.\d+)+\s)"
)


def read_pdf(path: str) -> str:
    """Take the text out of a PDF.

    Args:
        path: The file.

    Returns:
        The text of all pages.

    Raises:
        Unreadable: If it is damaged, encrypted, or has no text (a scan).
        OSError: If it cannot be read.
        ConfigError: If the library is not installed.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise ConfigError(
            "PDF needs the package pypdfium2: install 'megatron-cgn[corpus]'."
        ) from error
    with open(path, "rb") as file:  # the library says "file access error" whatever the reason
        # Nor does it open a file whose name is no valid text.
        source = path if _is_text(path) else file.read()
    try:
        with pypdfium2.PdfDocument(source) as document:
            pages = [_page_text(document, number) for number in range(len(document))]
    except pypdfium2.PdfiumError as error:
        if "assword" in str(error) or "ecurity" in str(error):
            raise Unreadable("encrypted", "encrypted with a password") from error
        raise Unreadable("damaged", f"no PDF that can be opened ({error})") from error
    text = join_pages(pages)
    if not text:
        raise Unreadable(
            "no_text", f"no text in any of its {len(pages)} pages: a scan. Recognise its text first"
        )
    return text


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _page_text(document: "object", number: int) -> str:
    from pypdfium2 import PdfDocument

    assert isinstance(document, PdfDocument)
    page = document[number]
    text_page = page.get_textpage()
    text: str = text_page.get_text_range()
    text_page.close()
    page.close()  # else a long document is held in memory whole
    # The library's sign for a hyphen at the end of a line is U+FFFE or U+0002.
    return re.sub("[\ufffe\x02](?:\r\n)?", "", text).replace("\r\n", "\n").replace("\r", "\n")


def join_pages(pages: list[str]) -> str:
    """Join the texts of pages into one.

    Args:
        pages: Texts, lines ended by line feeds.

    Returns:
        Paragraphs without what is repeated on most pages and without page numbers.
    """
    lines = [[line.strip() for line in page.split("\n") if line.strip()] for page in pages]
    repeated = _repeated(lines)
    kept = [
        line for number, page in enumerate(lines) for line in _without_edges(page, number, repeated)
    ]
    return _join_lines(kept)


def _keys(line: str, number: int) -> set[str]:
    """A line as it is, and with its first or last number counted from that of the page.

    So ``Revision 2, page 7 of 20`` is the same on every page, and a record that has other values
    on every page is not.
    """
    line = " ".join(line.split())
    keys = {line}
    if numbers := list(_NUMBER.finditer(line)):
        for match in (numbers[0], numbers[-1], numbers[-2 if len(numbers) > 1 else -1]):
            relative = _value(match[0]) - number
            keys.add(f"{line[: match.start()]}\0{relative}\0{line[match.end() :]}")
    return keys


def _value(numeral: str) -> int:
    """Value of a number in digits, or of a Roman numeral."""
    if numeral.isdigit():
        return int(numeral[:9])
    values = [_ROMAN[letter] for letter in numeral.lower()]
    following = [*values[1:], 0]
    return sum(-v if v < after else v for v, after in zip(values, following, strict=True))


def _repeated(pages: list[list[str]]) -> set[str]:
    """Keys of lines at the top or bottom: of most pages, or outermost on some in a row."""
    filled = [(number, page) for number, page in enumerate(pages) if page]
    if len(filled) < _MIN_PAGES:
        return set()
    counts: Counter[str] = Counter()
    outermost: defaultdict[str, list[int]] = defaultdict(list)
    for number, page in filled:
        size = _edge_lines(page)
        edges = page[:size] + page[len(page) - size :]
        counts.update(set().union(*(_keys(line, number) for line in edges)))
        for key in _keys(page[0], number) | _keys(page[-1], number) if size else ():
            outermost[key].append(number)
    most = {key for key, count in counts.items() if count >= _REPEATED_SHARE * len(filled)}
    return most | {key for key, numbers in outermost.items() if _in_a_row(numbers)}


def _in_a_row(numbers: list[int]) -> bool:
    """Whether enough pages follow one another, or are every second: left and right may differ."""
    run = 1
    for before, number in itertools.pairwise(numbers):
        run = run + 1 if number - before <= 2 else 1
        if run >= _MIN_PAGES:
            return True
    return False


def _without_edges(page: list[str], number: int, repeated: set[str]) -> list[str]:
    size = _edge_lines(page)
    start, end = 0, len(page)
    while start < size and _is_edge(page[start], number, repeated):
        start += 1
    while end > len(page) - size and _is_edge(page[end - 1], number, repeated):
        end -= 1
    return page[start:end]


def _edge_lines(page: list[str]) -> int:
    return min(_EDGE_LINES, ceil(_EDGE_SHARE * len(page))) if len(page) > 1 else 0


def _is_edge(line: str, number: int, repeated: set[str]) -> bool:
    numeral = len(line) <= 16 and _NUMERAL.fullmatch(line) is not None
    return numeral or not repeated.isdisjoint(_keys(line, number))


def _join_lines(lines: list[str]) -> str:
    """Lines to paragraphs: a line that fills the page's width goes on in the next."""
    full = max(_MIN_WIDTH, 0.8 * _usual_width(lines))
    joined: list[str] = []
    goes_on = False
    for line in lines:
        if joined and goes_on and not _ITEM.match(line):
            joined[-1] = _join(joined[-1], line)
        elif joined and _HYPHENATED.search(joined[-1]) and _LOWER.match(line):
            joined[-1] = _join(joined[-1], line)
        else:
            joined.append(line)
        ended = re.search(r"[。！？；：.!?;:]$", line) or _LEADER.search(line)
        goes_on = _width(line) >= full and not ended
    return "\n".join(joined)


def _join(before: str, after: str) -> str:
    if _HYPHENATED.search(before) and _LOWER.match(after):
        return before[:-1] + after
    if _CJK_LINE.search(before) or _CJK_START.search(after):
        return before + after
    return f"{before} {after}"


def _width(line: str) -> int:
    return sum(2 if char > "\u2e7f" else 1 for char in line)


def _usual_width(lines: list[str]) -> float:
    """Width of a full line: nine of ten lines are no wider."""
    widths = [_width(line) for line in lines]
    return quantiles(widths, n=10)[-1] if len(widths) > 1 else float("inf")
