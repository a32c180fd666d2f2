"""Lines that belong to a page or a web site and not to the text; blanks at ends, blank lines.

Tables and fenced code are left as they are: which lines those are is decided first. Everything else
that goes is named in docs/corpus-cleaning.md. Cleaning twice changes nothing: the rules run until
they find nothing more.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Literal, get_args

LineKind = Literal["page_numbers", "contents", "navigation", "copyright"]
LINE_KINDS: tuple[LineKind, ...] = get_args(LineKind)

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_PIPES = re.compile(r"\s*\|.*\||\s*\+[-=+]+\+\s*$|.*\|.*\|.*\|")
_LONGEST = 200  # characters of a line that may be furniture

_NUMBER = "(?:[0-9]{1,5}|[ivxlc]{1,7}|[一二三四五六七八九十百零〇]{1,6})"
_OF = rf"\s*[,，/|]?\s*[(（]?\s*共\s*{_NUMBER}\s*页\s*[)）]?"
_PAGE_MARK = re.compile(
    rf"(?:[-—–·]\s*)?第\s*{_NUMBER}\s*页(?:{_OF})?(?:\s*[-—–·])?"
    rf"|共\s*{_NUMBER}\s*页\s*[,，/|]?\s*第\s*{_NUMBER}\s*页"
    rf"|{_NUMBER}\s*页?\s*/\s*共?\s*{_NUMBER}\s*页"
    rf"|页[码次]\s*[:：]?\s*{_NUMBER}(?:\s*/\s*{_NUMBER})?"
    rf"|(?:[-—–]\s*)?(?:page|pg\.)\s*[:.]?\s*{_NUMBER}(?:\s*(?:of|/)\s*{_NUMBER})?(?:\s*[-—–])?"
    r"|[-—–]{1,2}\s*[0-9]{1,4}\s*[-—–]{1,2}",
    re.IGNORECASE,
)
_PAGE_WITHIN = re.compile(
    rf"第\s*([0-9]+)\s*页(?:{_OF})?|\bpage\s*:?\s*([0-9]+)(?:\s*(?:of|/)\s*[0-9]+)?", re.IGNORECASE
)
_FORM_FEED = "\f"
_WINDOW_LINES = 3  # non-blank lines before and after a page break that may be header or footer
_FEWEST = 3  # occurrences that make a line a running one, and entries that make a table of contents

_ENTRY = re.compile(
    r"(?P<title>.{1,150}?)\s*(?:[.．·•…‥]\s?){4,}\s*(?P<page>[0-9]{1,4}|[ivxlc]{1,6})",
    re.IGNORECASE,
)
_CONTENTS_HEADING = re.compile(
    r"#*\s*(?:目\s*[录錄次]|(?:table\s+of\s+)?contents)\s*", re.IGNORECASE
)

_ALONE = frozenset(
    "返回顶部 返回首页 回到顶部 回到首页 加入收藏 设为首页 网站地图 网站首页 分享到 分享到： "
    "打印本页 关闭窗口 阅读全文 相关阅读 相关文章 上一篇 下一篇 上一页 下一页 点击查看更多 "
    "免责声明".split()
) | {
    "skip to content", "skip to main content", "skip to navigation", "back to top", "go to top",
    "privacy policy", "cookie policy", "cookie settings", "terms of use", "terms of service",
    "terms and conditions", "accept all cookies", "accept cookies", "all rights reserved",
    "toggle navigation", "share this page", "print this page", "edit this page", "edit on github",
    "previous page", "next page", "click here", "read more", "site map", "sitemap",
}  # fmt: skip
_AMONG_OTHERS = frozenset(
    "首页 新闻 新闻中心 产品 产品中心 公司简介 关于我们 联系我们 联系方式 帮助 帮助中心 登录 "
    "注册 搜索 论坛 下载 招聘 人才招聘 友情链接 更多 english 中文 简体中文 繁體中文 打印 关闭 "
    "收藏 分享 微信 微博 视频 图片 专题 客户端 手机版 投资者关系 企业文化 社会责任 "
    "法律声明".split()
) | {
    "home", "about", "about us", "contact", "contact us", "news", "products", "services", "help",
    "login", "log in", "sign in", "sign up", "register", "search", "menu", "faq", "blog", "careers",
    "support", "download", "downloads", "more", "previous", "prev", "next", "up", "index", "share",
    "print", "facebook", "twitter", "linkedin", "youtube", "instagram", "subscribe", "rss",
}  # fmt: skip
_SEPARATORS = re.compile(r"\s*[|｜·•>»›«<]+\s*|\s{2,}")
_NAVIGATION = re.compile(
    r"(?:we|this (?:web ?)?site) uses? cookies|(?:enable|turn on) javascript"
    r"|javascript (?:is|must be|has been) (?:disabled|enabled|required)"
    r"|subscribe to (?:our|the) newsletter|本(?:网)?站使用.{0,10}cookie"
    r"|请(?:启用|开启|打开).{0,6}javascript|ICP\s*[备證证]\s*\d|公网安备\s*\d"
    r"|扫(?:一扫|描).{0,10}(?:二维码|关注)|^(?:当前|您(?:现在|当前)?(?:所在)?的?)位置\s*[:：]"
    r"|^(?:上|下)一(?:篇|页|章)\s*[:：]|^责任编辑\s*[:：].{0,12}$",
    re.IGNORECASE,
)
_NAVIGATION_HINTS = (
    "cookie",
    "javascript",
    "newsletter",
    "icp",
    "安备",
    "扫",
    "位置",
    "一",
    "编辑",
)
_COPYRIGHT = re.compile(
    r"(?:copyright\b|©|版权所有)(?=.*(?:(?:19|20)\d\d|reserved|保留|所有)).{0,150}"
    r"|.{0,100}(?:all rights reserved|保留所有权利|保留一切权利|版权所有)[.。]?",
    re.IGNORECASE,
)


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
    kinds = [kind for kind in remove if kind in _hinted(lowered)]
    removed: Counter[str] = Counter()
    navigation = 0
    while kinds or _FORM_FEED in lines:
        verbatim = _verbatim(lines)
        gone = _furniture(lines, verbatim, kinds)
        for kind in gone.values():
            removed[kind] += kind != ""
        navigation += sum(len(lines[i].strip()) for i, kind in gone.items() if kind == "navigation")
        lines = [line for i, line in enumerate(lines) if i not in gone]
        if not gone:
            break
    return _blanks(lines), removed, navigation


def _hinted(lowered: str) -> set[LineKind]:
    """Name the kinds there may be, by cheap searches: most texts have few."""
    kinds: set[LineKind] = {"navigation"}
    if "页" in lowered or "pag" in lowered or "\f" in lowered or "-\n" in lowered + "\n":
        kinds.add("page_numbers")
    if "—\n" in lowered + "\n" or "–\n" in lowered + "\n" or "pg." in lowered:
        kinds.add("page_numbers")
    if any(leader in lowered for leader in ("....", "……", "····", ". . .", "．．", "••••", "‥‥")):
        kinds.add("contents")
    if any(word in lowered for word in ("copyright", "©", "版权所有", "reserved", "保留")):
        kinds.add("copyright")
    return kinds


def _verbatim(lines: Sequence[str]) -> list[bool]:
    """Tell which lines are fenced code or rows of tables."""
    marks = [False] * len(lines)
    fence = ""
    for i, line in enumerate(lines):
        if fence:
            marks[i] = True
            if line.strip().startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif line.lstrip()[:3] in ("```", "~~~") and (match := _FENCE.match(line)):
            fence, marks[i] = match[1], True
        elif ("|" in line or "+" in line) and _PIPES.match(line):
            marks[i] = True
    return marks


def _furniture(
    lines: Sequence[str], verbatim: Sequence[bool], kinds: Sequence[LineKind]
) -> dict[int, str]:
    """Find the lines to remove: index to kind; form feeds have no kind."""
    gone: dict[int, str] = {i: "" for i, line in enumerate(lines) if line == _FORM_FEED}
    short = {
        i: stripped
        for i, line in enumerate(lines)
        if not verbatim[i] and (stripped := line.strip()) and len(stripped) <= _LONGEST
    }
    if "page_numbers" in kinds:
        marks = _page_marks(short)
        gone |= dict.fromkeys(marks, "page_numbers")
        pages = sorted(gone)
        gone |= dict.fromkeys(_running(short, lines, pages), "running_lines")
    if "contents" in kinds:
        gone |= dict.fromkeys(_contents(short, lines), "contents")
    for i, line in short.items():
        if "copyright" in kinds and _COPYRIGHT.fullmatch(line):
            gone.setdefault(i, "copyright")
        elif "navigation" in kinds and not lines[i].startswith(("    ", "\t")):
            if _is_navigation(line):
                gone.setdefault(i, "navigation")
    if "navigation" in kinds:
        for i, line in enumerate(lines):
            if verbatim[i] and "|" in line and len(line) <= _LONGEST and _is_menu(line.strip()):
                gone.setdefault(i, "navigation")
    return gone


def _page_marks(short: dict[int, str]) -> list[int]:
    """Find page numbers, alone or within a line that comes back with rising numbers."""
    marks = []
    within: dict[str, list[tuple[int, int]]] = {}
    for i, line in short.items():
        if (
            "页" in line
            or line[-1] in "-—–"
            or "pag" in (lowered := line.lower())
            or "pg" in lowered
        ):
            if _PAGE_MARK.fullmatch(line):
                marks.append(i)
            elif match := _PAGE_WITHIN.search(line):
                rest = f"{line[: match.start()]}\0{line[match.end() :]}"
                within.setdefault(rest, []).append((i, int(match[1] or match[2])))
    for places in within.values():
        numbers = [number for _, number in places]
        if len(numbers) >= _FEWEST and all(a < b for a, b in pairwise(numbers)):
            marks += [i for i, _ in places]
    return marks


def _running(short: dict[int, str], lines: Sequence[str], pages: Sequence[int]) -> list[int]:
    """Find headers and footers: lines that are the same around most page breaks."""
    if len(pages) < _FEWEST:
        return []
    places: dict[str, set[int]] = {}
    breaks: Counter[str] = Counter()
    for page in pages:
        around = {i for step in (-1, 1) for i in _nearby(lines, page, step) if i in short}
        breaks.update({short[i] for i in around})
        for i in around:
            places.setdefault(short[i], set()).add(i)
    needed = max(_FEWEST, len(pages) / 2)
    found = (line for line, times in breaks.items() if times >= needed)
    return [i for line in found if len(places[line]) >= _FEWEST for i in places[line]]


def _nearby(lines: Sequence[str], start: int, step: int) -> list[int]:
    found: list[int] = []
    i = start + step
    while 0 <= i < len(lines) and len(found) < _WINDOW_LINES and abs(i - start) < 4 * _WINDOW_LINES:
        if lines[i].strip():
            found.append(i)
        i += step
    return found


def _contents(short: dict[int, str], lines: Sequence[str]) -> list[int]:
    """Find tables of contents: entries in a row with a leader and page numbers that do not fall."""
    gone: list[int] = []
    run: list[int] = []
    last = 0

    def close() -> None:
        if len(run) >= _FEWEST:
            gone.extend(run)
            above = [i for i in _nearby(lines, run[0], -1)[:1] if i in short]
            gone.extend(i for i in above if _CONTENTS_HEADING.fullmatch(short[i]))
        run.clear()

    for i, line in enumerate(lines):
        match = _ENTRY.fullmatch(short[i]) if i in short and short[i][-1].isalnum() else None
        if match:
            page = int(match["page"]) if match["page"].isdecimal() else last
            if page < last:
                close()
            run.append(i)
            last = page
        elif line.strip() and line != _FORM_FEED:
            close()
            last = 0
    close()
    return gone


def _is_navigation(line: str) -> bool:
    lowered = line.lower()
    if (
        lowered in _ALONE
        or any(h in lowered for h in _NAVIGATION_HINTS)
        and _NAVIGATION.search(line)
    ):
        return True
    return _is_menu(line)


def _is_menu(line: str) -> bool:
    """Tell whether a line lists links of a web site and nothing else."""
    items = [
        item.strip("[]()（）【】 ").lower() for item in _SEPARATORS.split(line) if item.strip()
    ]
    if len(items) < 3 and " " in line:
        items = line.lower().split()
    return len(items) >= 3 and all(item in _AMONG_OTHERS or item in _ALONE for item in items)


def _blanks(lines: Sequence[str]) -> str:
    """Join the lines without blanks at their ends and with one blank line at most, but for code."""
    if not any(line.lstrip()[:3] in ("```", "~~~") for line in lines):
        text = "\n".join([line.rstrip() for line in lines])
        return re.sub("\n{3,}", "\n\n", text).strip("\n")
    kept: list[str] = []
    for line, verbatim in zip(lines, _verbatim(lines), strict=True):
        line = line if verbatim else line.rstrip()
        if line or verbatim or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).strip("\n")
