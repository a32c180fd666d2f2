"""Pages that nobody wants to train on, drawn from a seed: see clean.py."""

import base64
import random
import string
from collections.abc import Callable, Iterator

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_MENU_ZH = (
    "首页 新闻中心 产品中心 关于我们 联系我们 企业文化 社会责任 投资者关系 人才招聘 友情链接 "
    "网站地图 登录 注册 搜索 帮助中心 设为首页 加入收藏 返回顶部 上一页 下一页"
).split()
_MENU_EN = (
    "Home;About us;Contact us;News;Products;Services;Careers;Support;Downloads;Sign in;Register;"
    "Search;FAQ;Privacy policy;Terms of use;Sitemap;Back to top;Share;Print;Blog"
).split(";")
_SECTIONS = (
    "国内 国际 体育 财经 娱乐 军事 科技 汽车 房产 教育 健康 旅游 时尚 女性 游戏 彩票".split()
)
_SPAM = "办理证件 低价代开发票 加微信咨询 免费领取 点击进入 信用贷款 无需抵押 当天到账".split()

Draw = Callable[[random.Random, str], str]


def pages(
    texts_zh: list[str], texts_en: list[str], *, seed: int, each: int
) -> Iterator[tuple[str, str]]:
    """Draw pages of junk.

    Args:
        texts_zh: Good Chinese texts, to be spoilt.
        texts_en: Good English texts.
        seed: Of everything drawn.
        each: How many of every kind.

    Yields:
        Kind and text.
    """
    for kind, (language, draw) in KINDS.items():
        rng = random.Random(f"{kind} {seed}")
        texts = texts_zh if language == "zh" else texts_en
        for _ in range(each):
            text = rng.choice(texts)
            start = rng.randrange(max(1, len(text) - 2000))
            yield kind, draw(rng, text[start : start + rng.randrange(400, 2000)])


def _wrongly_decoded(encoding: str, decoding: str) -> Draw:
    def draw(_: random.Random, text: str) -> str:
        return text.encode(encoding, "ignore").decode(decoding, "replace")

    return draw


def _twice(_: random.Random, text: str) -> str:
    """Read UTF-8 as GBK and GBK's replacement characters as UTF-8: 锟斤拷."""
    once = text.encode("gbk", "ignore").decode("utf-8", "replace")
    return once.encode("utf-8").decode("gbk", "replace")


def _characters(alphabet: str, words: bool) -> Draw:
    def draw(rng: random.Random, _: str) -> str:
        text = "".join(rng.choices(alphabet, k=800))
        return " ".join(text[i : i + 6] for i in range(0, 800, 6)) if words else text

    return draw


def _level_one() -> str:
    codes = (bytes((a, b)) for a in range(0xB0, 0xD7) for b in range(0xA1, 0xFF))
    return "".join(code.decode("gb2312") for code in codes)


def _keyboard(rng: random.Random, _: str) -> str:
    words = []
    for _word in range(150):
        row, length = rng.choice(_ROWS), rng.randrange(3, 9)
        start = rng.randrange(len(row))
        words.append(
            "".join(row[(start + i + rng.randrange(-1, 2)) % len(row)] for i in range(length))
        )
    return " ".join(words)


def _scanned(share: float) -> Draw:
    """Spoil characters as a bad scan does: look-alikes, strokes, boxes, lost and split words."""
    strokes = "丨丿亅匚凵冂卩囗彳攵艹灬冫氵忄疒钅饣纟衤乛巳亠勹口曰日目l|1I!:;.,'`~^*_-=<>{}[]\\/■□"

    def draw(rng: random.Random, text: str) -> str:
        return "".join(
            rng.choice(strokes) if character.strip() and rng.random() < share else character
            for character in text
        )

    return draw


def _repeated(unit: Callable[[random.Random, str], str], end: str) -> Draw:
    def draw(rng: random.Random, text: str) -> str:
        return end.join([unit(rng, text)] * rng.randrange(20, 60))

    return draw


def _line(rng: random.Random, text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 12]
    return rng.choice(lines) if lines else text[:40].replace("\n", " ")


def _paragraphs(rng: random.Random, text: str) -> str:
    return "\n\n".join([text[:300]] * rng.randrange(8, 12))


def _menu(items: list[str], end: str) -> Draw:
    def draw(rng: random.Random, _: str) -> str:
        return end.join(rng.choices(items, k=rng.randrange(20, 50)))

    return draw


def _truncated(rng: random.Random, text: str) -> str:
    return "\n".join(
        text[i : i + 30].replace("\n", " ") + "……" for i in range(0, len(text) - 30, 30)
    )


def _spam(rng: random.Random, _: str) -> str:
    return "，".join(rng.choices(_SPAM, k=3)) + "！" + "".join(rng.choices(_SPAM, k=120))


def _hex(rng: random.Random, _: str) -> str:
    return "\n".join(rng.randbytes(24).hex(" ") for _ in range(40))


def _base64(rng: random.Random, _: str) -> str:
    return base64.encodebytes(rng.randbytes(900)).decode()


def _numbers(rng: random.Random, _: str) -> str:
    return "\n".join(" ".join(f"{rng.random():.4f}" for _ in range(6)) for _ in range(40))


def _cookies(rng: random.Random, _: str) -> str:
    notices = (
        "We use cookies to improve your experience on this page.",
        "This website uses cookies. Accept all cookies or change your settings.",
        "Please enable JavaScript to view this page.",
        "Subscribe to our newsletter for the latest updates.",
        "Copyright © 2019 Example Ltd. All rights reserved.",
        "Privacy policy",
    )
    return "\n".join(rng.choices(notices, k=12))


KINDS: dict[str, tuple[str, Draw]] = {
    "UTF-8 read as GBK": ("zh", _wrongly_decoded("utf-8", "gbk")),
    "UTF-8 read as Latin-1": ("zh", _wrongly_decoded("utf-8", "latin-1")),
    "GBK read as UTF-8": ("zh", _wrongly_decoded("gbk", "utf-8")),
    "GBK read as Latin-1": ("zh", _wrongly_decoded("gbk", "latin-1")),
    "GBK read as Big5": ("zh", _wrongly_decoded("gbk", "big5")),
    "GBK, UTF-8, GBK (锟斤拷)": ("zh", _twice),
    "random printable ASCII": ("en", _characters(string.printable[:94], words=False)),
    "random letters, as words": ("en", _characters(string.ascii_lowercase, words=True)),
    "random ideographs": ("zh", _characters("".join(map(chr, range(0x4E00, 0x9FA6))), words=False)),
    "random common ideographs": ("zh", _characters(_level_one(), words=False)),
    "keyboard mash": ("en", _keyboard),
    "bad scan, Chinese, 40 %": ("zh", _scanned(0.4)),
    "bad scan, English, 40 %": ("en", _scanned(0.4)),
    "bad scan, Chinese, 15 %": ("zh", _scanned(0.15)),
    "bad scan, English, 15 %": ("en", _scanned(0.15)),
    "one line repeated, Chinese": ("zh", _repeated(_line, "\n")),
    "one line repeated, English": ("en", _repeated(_line, "\n")),
    "one phrase repeated": ("zh", _repeated(_line, "")),
    "paragraph repeated": ("zh", _paragraphs),
    "menu, Chinese": ("zh", _menu(_MENU_ZH, "\n")),
    "menu in one line, Chinese": ("zh", _menu(_MENU_ZH, " | ")),
    "menu, English": ("en", _menu(_MENU_EN, "\n")),
    "list of links, unknown words": ("zh", _menu(_SECTIONS, " ")),
    "cookie notices": ("en", _cookies),
    "truncated lines": ("zh", _truncated),
    "advertising": ("zh", _spam),
    "hexadecimal dump": ("en", _hex),
    "Base64": ("en", _base64),
    "numbers only": ("en", _numbers),
}
"""Kinds: the language of the text that is spoilt, and how."""
