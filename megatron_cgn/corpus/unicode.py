"""One spelling for each character, where that loses nothing.

NFKC (Unicode Standard Annex 15) as a whole would ruin technical text: 10²³ becomes 1023, m³ m3, ½
1⁄2, ① 1, and Chinese punctuation turns into ASCII. So the text becomes NFC, and of the
compatibility mappings only those are made which change a character's looks and not its meaning.
Which ones, and why, is in docs/corpus-cleaning.md. Normalising twice changes nothing.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import cache

_PIECE_CHARACTERS = 1 << 18
_SUBSCRIPTS_AND_THE_LIKE = ("super", "sub", "fraction", "circle")
# What Chinese shares with ASCII and keeps wide. 。、「」 have no such counterpart.
_WIDE_PUNCTUATION = "，：；！？（）"
_KEPT = frozenset(_WIDE_PUNCTUATION + "～")
_TO_ASCII = str.maketrans(_WIDE_PUNCTUATION, ",:;!?()")
_WIDE_IN_USE = re.compile(f"[{_WIDE_PUNCTUATION}]")
_EAST_ASIAN = re.compile(
    "[\u3005\u3007\u3041-\u30ff\u3400-\u9fff\uac00-\ud7a3\U00020000-\U000323af]"
)
# A clock time or a ratio, as in 12：30.
_COLON_OF_DIGITS = re.compile("(?<=[0-9])：(?=[0-9])")

_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_OVERSTRIKE = re.compile("[^\n]\x08")
# Form feeds stay: the line rules know by them where pages begin.
_UNCOMMON_ASCII = re.compile("[\x00-\x08\x0b\x0d-\x1f\x7f]")
# Invisible characters: format and bidirectional controls, joiners, fillers, tags, selectors of
# ideographic variants, noncharacters.
_INVISIBLE = (
    *((0x00, 0x08), (0x0E, 0x1F), (0x7F, 0x7F), (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C)),
    *((0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200F), (0x202A, 0x202E)),
    *((0x2060, 0x206F), (0x3164, 0x3164), (0xFDD0, 0xFDEF), (0xFE00, 0xFE0D), (0xFEFF, 0xFEFF)),
    *((0xFFA0, 0xFFA0), (0xFFF0, 0xFFFC), (0xFFFE, 0xFFFF), (0xE0000, 0xE0FFF)),
)
_JOINERS = "\u200c\u200d"
# But for scripts, and emoji, in which a joiner between two characters changes what is read.
_JOINER = re.compile(
    f"[{_JOINERS}](?<![\u0600-\u109f\u1780-\u18af\u2600-\u27bf\ufe0f\U0001f000-\U0001faff].)"
)

# The fonts Symbol and Wingdings as Word and PDF writers leave them in the private use area, at
# 0xF000 plus the code in the font. Where the two differ, what documents use more.
_GREEK = zip(
    "abgdezhqiklmnxoprstufcywGDQLXPSFYWjJvVABEZHIKMNOTUC",
    "αβγδεζηθικλμνξοπρστυφχψωΓΔΘΛΞΠΣΦΨΩϕϑϖςΑΒΕΖΗΙΚΜΝΟΤΥΧ",
    strict=True,
)
_SIGNS = zip(
    "-*@\"$'\\^~\xa2\xa3\xa5\xab\xac\xad\xae\xaf\xb0\xb1\xb2\xb3\xb4\xb5\xb6\xb7\xb8\xb9\xba\xbb\xbc"
    "\xc4\xc5\xc6\xc7\xc8\xce\xcf\xd0\xd1\xd5\xd6\xd7\xdb\xde\xe5\xf2"
    "o\xa7\xa8\xd8\xe0\xfb\xfc\xfd\xfeR",
    "−∗≅∀∃∋∴⊥∼′≤∞↔←↑→↓°±″≥×∝∂•÷≠≡≈…⊗⊕∅∩∪∈∉∠∇∏√⋅⇔⇒∑∫□▪□➢→✗✓☒☑☑",
    strict=True,
)
_SYMBOL_FONT = (
    {0xF000 + ord(same): same for same in " !#%&()+,./0123456789:;<=>?[]_{|}"}
    | {0xF000 + ord(latin): greek for latin, greek in _GREEK}
    | {0xF000 + ord(code): sign for code, sign in _SIGNS}
)
_PRIVATE = "\ue000-\uf8ff\U000f0000-\U0010ffff"
# What is replaced beyond the basic plane: italics of formulae, tags, private use.
_ASTRAL = re.compile(
    "[\U0001d434-\U0001d454\U0001d456-\U0001d467\U0001d6a4\U0001d6a5\U0001d6e2-\U0001d71b"
    "\U000e0000-\U000e0fff\U000f0000-\U0010ffff]"
)
_PRIVATE_USE = re.compile(f"[{_PRIVATE}]")
# Before an ideograph only those that Wingdings has for bullets: α射线 begins with a letter.
_PRIVATE_BULLET = re.compile(
    f"(?m)^([ \t]*)(?:[{_PRIVATE}](?=[ \t])"
    "|[\uf06c\uf06e\uf075\uf076\uf09f\uf0a7\uf0b2\uf0b7\uf0d8\uf0f0](?=[\u3400-\u9fff]))"
)
# A square to tick in Wingdings 2, and less or equal in Symbol, which has something on its left.
_BOX = re.compile(r"(?<![\w)）])\uf0a3(?=[ \t]?[\u3400-\u9fff])")

# Ideographs that PDF extraction gives as radicals: EquivalentUnifiedIdeograph.txt of the Unicode
# Character Database, those of simplified Chinese. NFKC knows only U+2F00–U+2FD5 and two more.
_RADICALS = dict(
    zip(
        "⺠⻅⻉⻋⻓⻔⻘⻙⻚⻛⻜⻝⻢⻣⻤⻥⻦⻨⻩⻬⻮⻰",
        "民见贝车长门青韦页风飞食马骨鬼鱼鸟麦黄齐齿龙",
        strict=True,
    )
)


def normalise(text: str) -> tuple[str, int]:
    """Give every character its one spelling.

    Args:
        text: Valid Unicode without lone surrogates.

    Returns:
        The text and how many characters were changed or removed, about.
    """
    if text.isascii() and not _UNCOMMON_ASCII.search(text):
        return text, 0
    text, changed = _strip_terminal(text)
    if _PRIVATE_USE.search(text):
        text, bullets = _PRIVATE_BULLET.subn(r"\1•", text)
        text, boxes = _BOX.subn("□", text)
        changed += bullets + boxes
    text, replaced = _replace(_replaced(), text)
    text, astral = _replace(_ASTRAL, text)
    text, joiners = _JOINER.subn("", text)
    changed += replaced + astral + joiners
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
        changed += 1
    return _punctuation(text), changed


def _strip_terminal(text: str) -> tuple[str, int]:
    """Take out what was meant for a terminal or printer, and unify the ends of lines."""
    changed = 0
    if "\x1b" in text:
        text, changed = _ESCAPES.subn("", text)
    if "\x08" in text:
        text, struck = _OVERSTRIKE.subn("", text)
        changed += struck
    if "\r" in text:
        changed += text.count("\r")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text, changed


def _punctuation(text: str) -> str:
    """Make wide punctuation ASCII where there is nothing Chinese, Japanese or Korean around."""
    if not _WIDE_IN_USE.search(text):
        return text
    if not _EAST_ASIAN.search(text):
        return text.translate(_TO_ASCII)
    return _COLON_OF_DIGITS.sub(":", text)


@cache
def _replaced() -> re.Pattern[str]:
    # Of the basic plane only: beyond it `re` looks through a set one by one, 20 times slower.
    basic = (character for character in _mapping() if character <= "\uffff")
    return re.compile(f"[{re.escape(''.join(basic))}\ue000-\uf8ff]")


def _replace(single: re.Pattern[str], text: str) -> tuple[str, int]:
    """Replace single characters, piece by piece: `re` keeps an object for each that it found."""
    pieces = [
        single.subn(_replacement, text[start : start + _PIECE_CHARACTERS])
        for start in range(0, len(text), _PIECE_CHARACTERS)
    ]
    return "".join(piece for piece, _ in pieces), sum(times for _, times in pieces)


def _replacement(match: re.Match[str]) -> str:
    character = match[0]
    replacement = _mapping().get(character)
    if replacement is None:
        # Lost is better than silently gone: 5 μm must not become 5 m.
        return _SYMBOL_FONT.get(ord(character), "\ufffd")
    return replacement


@cache
def _mapping() -> dict[str, str]:
    """Give what each character is replaced by."""
    table = {chr(point): "" for first, last in _INVISIBLE for point in range(first, last + 1)}
    # C1 controls are Windows-1252 that was read as Latin-1 (as in the WHATWG Encoding Standard).
    table |= {chr(byte): bytes((byte,)).decode("cp1252", "ignore") for byte in range(0x80, 0xA0)}
    table |= dict.fromkeys("\x0b\x85\u2028\u2029", "\n")
    table |= dict(_compatibility()) | _RADICALS
    table |= dict.fromkeys("\u00a0\u1680\u2000\u2001\u202f\u205f\u3000", " ")
    table |= {chr(point): " " for point in range(0x2002, 0x200B)}
    # ㏗ is PH in Unicode's table, which nobody writes.
    table |= {"\u2010": "-", "\u2011": "-", "\u00b5": "μ", "\u33d7": "pH"}
    vertical = "︐︑︒︓︔︕︖︵︶﹐﹑﹒﹔﹕﹖﹗﹙﹚"
    table |= dict(zip(vertical, "，、。：；！？（），、.；：？！（）", strict=True))
    return {character: table[character] for character in table if character not in _JOINERS}


def _compatibility() -> Iterator[tuple[str, str]]:
    for point in (*range(0x80, 0xE000), *range(0xF900, 0x10000), *range(0x1D400, 0x1D800)):
        character = chr(point)
        tag, _, decomposed = unicodedata.decomposition(character).partition("> ")
        if tag.startswith("<") and character not in _KEPT and _safe(point, tag[1:]):
            flat = "".join(map(_flatten, (chr(int(code, 16)) for code in decomposed.split())))
            if flat != character:
                yield character, flat


def _safe(point: int, tag: str) -> bool:
    match tag:
        case "wide" | "narrow" | "vertical" | "small":
            # The wide macron and the Hangul filler decompose into other oddities: left alone.
            return point not in (0xFFE3, 0xFFA0)
        case "square":
            return 0x3300 <= point < 0x3400  # ㎡ and ㎜, but not 🄰
        case "compat":
            is_ligature, is_radical = 0xFB00 <= point <= 0xFB17, 0x2F00 <= point <= 0x2FD5
            return is_ligature or is_radical or point in (0x2E9F, 0x2EF3)
        case "initial" | "medial" | "final" | "isolated":
            # U+FDFA and its like are whole phrases; U+FE70 and its like are marks on a blank.
            return 0xFB50 <= point <= 0xFDF1 or 0xFE80 <= point <= 0xFEFC
        case "font":
            # Italic is how plain variables look; bold, script and double-struck ones differ.
            name = unicodedata.name(chr(point), "")
            return point == 0x210E or name.startswith("MATHEMATICAL ITALIC")
    return False


def _flatten(character: str) -> str:
    """Decompose further, but keep ² in ㎡ and make the slash of ㎧ an ASCII one."""
    if character == "\u2215":
        return "/"
    tag, _, decomposed = unicodedata.decomposition(character).partition("> ")
    if not tag.startswith("<") or tag[1:] in _SUBSCRIPTS_AND_THE_LIKE:
        return character
    if character == "\u00b5":
        return "μ"
    if _safe(ord(character), tag[1:]):
        return "".join(_flatten(chr(int(code, 16))) for code in decomposed.split())
    return character
