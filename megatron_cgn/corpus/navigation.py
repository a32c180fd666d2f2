"""Menus and notices of web sites, line by line.

Words that a technical text may well use as a heading (Search, Index, 下载) count only among others.
"""

import re
from collections.abc import Iterable, Mapping

_LONGEST_MENU = 1000  # characters
_LONGEST_NOTICE = 200  # what is longer is a paragraph that speaks of such things
_FEWEST_ITEMS = 3  # in one line, or of lines in a row with an item each
_ALONE = frozenset(
    "返回顶部 返回首页 回到顶部 回到首页 加入收藏 设为首页 网站地图 网站首页 分享到 分享到： "
    "打印本页 阅读全文 相关阅读 相关文章 点击查看更多".split()
) | {
    "skip to content", "skip to main content", "skip to navigation", "back to top", "go to top",
    "cookie settings", "accept all cookies", "accept cookies", "all rights reserved",
    "toggle navigation", "share this page", "print this page", "edit this page", "edit on github",
    "click here", "read more", "site map", "sitemap",
}  # fmt: skip
_AMONG_OTHERS = frozenset(
    "首页 新闻 新闻中心 产品 产品中心 公司简介 关于我们 联系我们 联系方式 帮助 帮助中心 登录 "
    "注册 搜索 论坛 下载 招聘 人才招聘 友情链接 更多 english 中文 简体中文 繁體中文 打印 关闭 "
    "收藏 分享 微信 微博 视频 图片 专题 客户端 手机版 投资者关系 企业文化 社会责任 "
    "法律声明 免责声明 上一篇 下一篇 上一页 下一页 关闭窗口".split()
) | {
    "home", "about", "about us", "contact", "contact us", "news", "products", "services", "help",
    "login", "log in", "sign in", "sign up", "register", "search", "menu", "faq", "blog", "careers",
    "support", "download", "downloads", "more", "previous", "prev", "next", "up", "index", "share",
    "print", "facebook", "twitter", "linkedin", "youtube", "instagram", "subscribe", "rss",
    "privacy policy", "cookie policy", "terms of use", "terms of service", "terms and conditions",
    "previous page", "next page",
}  # fmt: skip
_SEPARATORS = re.compile(r"\s*[|｜·•>»›«<]+\s*|\s{2,}")
_NAVIGATION = re.compile(
    r"(?:we|this (?:web ?)?site) uses? cookies|(?:enable|turn on) javascript"
    r"|javascript (?:is|must be|has been) (?:disabled|enabled|required)"
    r"|subscribe to (?:our|the) newsletter|本(?:网)?站使用.{0,10}cookie"
    r"|请(?:启用|开启|打开).{0,6}javascript|ICP\s*[备證证]\s*\d|公网安备\s*\d"
    r"|扫(?:一扫|描|码).{0,12}(?:关注|公众号|微信)|^(?:上|下)一篇\s*[:：]"
    # A path of pages; the position of a rod or a valve is none.
    r"|^(?:当前|您(?:现在|当前)?(?:所在)?的?)位置\s*[:：].*(?:首页|主页|[>»›].*[>»›])|^责任编辑\s*[:：].{0,12}$",
    re.IGNORECASE,
)
_NAVIGATION_HINTS = tuple(
    "cookie javascript newsletter icp 安备 扫一扫 扫描 扫码 位置 上一篇 下一篇 责任编辑".split()
)
_FIRST_WORD = re.compile(r"[^\s|｜·•>»›«<\[\]()（）【】]+")
_VOCABULARY = _ALONE | _AMONG_OTHERS
_FIRST_WORDS = frozenset(item.split()[0] for item in _VOCABULARY)


def hinted(lowered: str) -> bool:
    """Tell whether there may be menus or notices, cheaply: most texts have none.

    Args:
        lowered: The text in small letters.
    """
    if any(hint in lowered for hint in _NAVIGATION_HINTS):
        return True
    firsts = {match[0] for line in lowered.split("\n") if (match := _FIRST_WORD.search(line))}
    return not firsts.isdisjoint(_FIRST_WORDS)


def find(lines: Mapping[int, str]) -> set[int]:
    """Find menus and notices.

    Args:
        lines: Lines by number, code left out.

    Returns:
        Numbers of the lines that are such.
    """
    found: set[int] = set()
    run: list[int] = []
    for i, line in lines.items():
        stripped = line.strip().lower()
        if not stripped:
            continue
        if stripped in _AMONG_OTHERS or stripped in _ALONE:
            run.append(i)
            if stripped in _ALONE:
                found.add(i)
            continue
        if len(run) > _FEWEST_ITEMS:
            found.update(run)
        run = []
        if not line.startswith(("    ", "\t", "|")) and len(stripped) <= _LONGEST_MENU:
            is_short = len(stripped) <= _LONGEST_NOTICE
            if is_short and _is_notice(stripped) or _is_menu(stripped):
                found.add(i)
    return found.union(run) if len(run) > _FEWEST_ITEMS else found


def _is_notice(line: str) -> bool:
    return any(hint in line for hint in _NAVIGATION_HINTS) and _NAVIGATION.search(line) is not None


def _is_menu(line: str) -> bool:
    """Tell whether a line, in small letters, lists links and nothing else."""
    first = _FIRST_WORD.search(line)
    if not first or first[0] not in _FIRST_WORDS:
        return False
    return any(
        len(items) >= _FEWEST_ITEMS and _VOCABULARY.issuperset(items)
        for items in (_items(_SEPARATORS.split(line)), _items(line.split()))
    )


def _items(parts: Iterable[str]) -> list[str]:
    return [item for part in parts if (item := part.strip("[]()（）【】 "))]
