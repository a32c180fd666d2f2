"""Telephones, and the addresses of buildings."""

import re
from collections.abc import Iterator
from functools import cache

from megatron_cgn.corpus.redact.identity import compact
from megatron_cgn.corpus.redact.view import Span, View, last_end

_TELEPHONE = re.compile(
    r"电 {0,6}话|手 {0,6}机|传 {0,6}真|移动|座机|固话|热线|传真|联系方式|联系人|联络|致电|来电|"
    r"拨打|拨|呼叫|微信|短信|"
    r"客服|总机|内线|短号|分机|"
    r"值班室|号码(?<!编号码)|"
    r"(?<![a-z0-9])(?:tel|telephone|phone|mobile|mob|cell|fax|call|hotline|contact|whatsapp|wechat|vx|"
    r"ph|[mtf](?=[ ]?:))(?![a-z])",
    re.IGNORECASE,
)
_S = r"(?:[ .-]|[ ]?\r?\n[ ]{0,4})?"
_MOBILE_START = r"1(?:3[0-9]|4[014-9]|5[0-35-9]|6[2567]|7[0-8]|8[0-9]|9[0-35-9])"
# Digits of a mobile number, broken where people break them: 3-4-4, 3-8, 7-4, 4-4-3, 3-3-5, 5-6.
_MOBILE_BODY = (
    rf"{_MOBILE_START}(?:{_S}[0-9]{{4}}{_S}[0-9]{{4}}|[0-9]{_S}[0-9]{{4}}{_S}[0-9]{{3}}"
    rf"|{_S}[0-9]{{3}}{_S}[0-9]{{5}}|[0-9]{{2}}{_S}[0-9]{{3}}{_S}[0-9]{{3}})(?![0-9A-Za-z])"
)
_MOBILE = re.compile(r"1(?<![0-9.].)" + _MOBILE_BODY.replace("1", "", 1), re.S)
_MOBILE_ABROAD = re.compile(
    r"[+0(8](?<![0-9A-Za-z.].)(?:(?<=\+) ?86|(?<=0)086|(?<=\()(?:\+ ?|00)?86\)|(?<=8)6)[ -]?"
    + _MOBILE_BODY,
    re.S,
)
_AREA = r"(?:10|2[0-57-9]|[3-9][0-9]{2})"
_LOCAL = r"[2-8][0-9]{2}(?:[ -]?[0-9]{4}|[0-9][ -]?[0-9]{3,4})"
_EXTENSION = (
    r"(?:[ ]?(?:[(]?(?:转|分机号?:?|[Ee]xt\.?:?|x)[ ]?|[-*#])[0-9]{1,6}\)?(?![0-9A-Za-z-]))?"
)
_FIXED = re.compile(
    r"[(+0](?<![0-9A-Za-z.].)(?:"
    rf"(?<=0){_AREA}(?:[ ]?[-)/][ ]?|[ ])?"
    rf"|(?<=\()(?:0{_AREA}|\+?86[ -]?0?{_AREA})\)[ -]?"
    rf"|(?<=\+)[ ]?86[ -]?(?:\(0?{_AREA}\)|0?{_AREA})[ -]?"
    rf"|(?<=0)086[ -]?0?{_AREA}[ -]?"
    rf"){_LOCAL}(?![0-9a-dfA-DF]){_EXTENSION}",
    re.S,
)
_SERVICE = re.compile(
    rf"[48](?<![0-9A-Za-z.].)00[ -]?(?:[0-9]{{3}}[ -]?[0-9]{{4}}|[0-9]{{4}}[ -]?[0-9]{{3}})"
    rf"(?![0-9A-Za-z]){_EXTENSION}",
    re.S,
)
_BARE = re.compile(rf"(?=[2-8](?<![0-9A-Za-z.-].)){_LOCAL}(?![0-9A-Za-z]){_EXTENSION}", re.S)
# Between label and number: a few words, or another number of the kind.
_BARE_GAP = re.compile(r"[^0-9\n]{0,8}|[0-9 /、,;:()+-]{0,28}")
_ABROAD = re.compile(
    r"[+0](?<![0-9A-Za-z.].)(?!2147483647)(?:(?<=0)0)?[ ]?(?!86)[1-9][0-9]{0,2}[ .-]?"
    r"(?:\(0?[0-9]{0,4}\)[ .-]?)?"
    r"[0-9]{1,5}(?:[ .-]?[0-9]{2,5}){1,5}(?![0-9])(?:[ ]?(?:x|ext\.?)[ ]?[0-9]{1,6})?",
    re.S,
)
_AMERICAN = re.compile(
    r"[(1-9](?<![0-9A-Za-z.].)(?:(?<=1)[-. ](?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[-. ])"
    r"|(?<=\()[2-9][0-9]{2}\)[ -]?|(?<=[2-9])[0-9]{2}[-.])[2-9][0-9]{2}[-. ][0-9]{4}"
    r"(?![0-9A-Za-wyz])(?:[ ]?(?:x|ext\.?)[ ]?[0-9]{1,6})?",
    re.S,
)
# 13812345678 kWh is no telephone.
_UNIT = re.compile(
    r" ?(?:[kMG]?(?:Wh|W|V|VA|Pa|Bq|Sv|J|B|iB)|bytes?|bits?|rpm|ppm|kg|mm?|km|m[23]|t|s|ms|Hz)"
    r"(?![A-Za-z])| ?(?:千瓦|兆瓦|[度次](?![\u4e00-\u9fff])|元|万元|吨|公斤|千克|字节|%)"
)

_STREET = re.compile(r"(?:路|街|大道|道|巷|弄|胡同|村|镇)[0-9]{1,5}(?:-[0-9]{1,4})?[号弄栋]")
_PLACE = re.compile(r"[\u4e00-\u9fff]{1,24}\Z")
_ROOM = re.compile(r"(?:[\u4e00-\u9fffA-Z]{0,8}[0-9]{1,5}(?:号|栋|座|幢|楼|层|单元|室|房)){0,4}")


def telephones(view: View) -> Iterator[Span]:
    """Mobile numbers (kind ``mobile``) and all other telephones (kind ``phone``)."""

    def mobile(match: re.Match[str]) -> Span | None:
        if not _may_be_telephone(view, match):
            return None
        number = compact(match[0])[-11:]
        return Span("mobile", match.start(), match.end(), number)

    @cache
    def any_label() -> bool:
        return _TELEPHONE.search(view.text) is not None

    def labelled(match: re.Match[str]) -> Span | None:
        if not any_label() or view.label(match.start(), _TELEPHONE) is not True:
            return None
        return Span("phone", match.start(), match.end(), compact(match[0]))

    def bare(match: re.Match[str]) -> Span | None:
        if not any_label():
            return None
        before = view.before(match.start())
        label = last_end(_TELEPHONE, before)
        if label >= 0 and not _BARE_GAP.fullmatch(before, label):
            return None
        return labelled(match)

    def fixed(match: re.Match[str]) -> Span | None:
        # Ten digits in one run may be anything.
        return (labelled if match[0].isdigit() else unlabelled)(match)

    def unlabelled(match: re.Match[str]) -> Span | None:
        if not _may_be_telephone(view, match):
            return None
        return Span("phone", match.start(), match.end(), compact(match[0]))

    def abroad(match: re.Match[str]) -> Span | None:
        num_digits = sum(character.isdigit() for character in match[0])
        if (
            not 9 <= num_digits <= 16
            or re.search(r"\.[0-9]+\.?[0-9]*\Z", match[0])
            and (match[0].count(".") == 1)
        ):
            return None
        return (fixed if match[0][0] == "+" else labelled)(match)

    def american(match: re.Match[str]) -> Span | None:
        return (fixed if match[0][0] == "(" else labelled)(match)

    if not view.has_long_number:
        return
    for pattern in (_MOBILE, _MOBILE_ABROAD):
        yield from view.matches(pattern, mobile)
    yield from view.matches(_FIXED, fixed)
    yield from view.matches(_SERVICE, fixed)
    yield from view.matches(_ABROAD, abroad)
    yield from view.matches(_AMERICAN, american)
    yield from view.matches(_BARE, bare)


def addresses(view: View) -> Iterator[Span]:
    """Postal addresses that end in a house number: 深圳市福田区深南大道2002号12层."""
    for match in _STREET.finditer(view.text):
        place = _PLACE.search(view.before(match.start()))
        start = match.start() - (len(place[0]) if place else 0)
        room = _ROOM.match(view.text, match.end())
        end = room.end() if room else match.end()
        yield Span("address", start, end, view.text[start:end])


def _may_be_telephone(view: View, match: re.Match[str]) -> bool:
    """Refuse what belongs to a longer identifier, a row of figures, or has another label."""
    label = view.label(match.start(), _TELEPHONE)
    if label is not None:
        return label
    before = view.before(match.start(), characters=3)
    after = view.text[match.end() : match.end() + 8]
    if re.fullmatch(r"[0-9]+\.[0-9]+", match[0]):
        return False
    if _UNIT.match(after) and match[0].isdigit():
        return False
    if re.search(r"[A-Za-z_=]\Z|[0-9A-Za-z]-\Z", before):
        return False
    if re.match(r"\.[0-9a-z]|_|-[A-Za-z]|-[0-9]{1,3}(?![0-9])", after):
        return False
    if match[0][0] in "+(":
        return True
    return " " not in match[0] or not (
        re.search(r"[0-9] {1,2}\Z", before) or re.match(r" {1,2}[0-9]", after)
    )
