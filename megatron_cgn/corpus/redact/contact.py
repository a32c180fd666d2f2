"""Telephones, e-mail, and addresses of machines and buildings."""

import ipaddress
import re
from collections.abc import Iterator

from megatron_cgn.corpus.redact.identity import compact
from megatron_cgn.corpus.redact.view import Span, View, last_end

_TELEPHONE = re.compile(
    r"电话|手机|移动|座机|固话|热线|传真|联系方式|联系人|联络|致电|来电|拨打|拨|呼叫|微信|短信|"
    r"客服|总机|分机|"
    r"值班室|号码(?<!编号码)|"
    r"(?<![a-z])(?:tel|telephone|phone|mobile|mob|cell|fax|call|hotline|contact|whatsapp|wechat|vx|"
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
    rf"){_LOCAL}(?![0-9]){_EXTENSION}",
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
    r"[+0](?<![0-9A-Za-z.].)(?:(?<=0)0)?[ ]?(?!86)[1-9][0-9]{0,2}[ .-]?(?:\(0?[0-9]{0,4}\)[ .-]?)?"
    r"[0-9]{1,5}(?:[ .-]?[0-9]{2,5}){1,5}(?![0-9])(?:[ ]?(?:x|ext\.?)[ ]?[0-9]{1,6})?",
    re.S,
)
_AMERICAN = re.compile(
    r"[(1-9](?<![0-9A-Za-z.].)(?:(?<=1)[-. ](?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[-. ])"
    r"|(?<=\()[2-9][0-9]{2}\)[ -]?|(?<=[2-9])[0-9]{2}[-.])[2-9][0-9]{2}[-. ][0-9]{4}"
    r"(?![0-9A-Za-wyz])(?:[ ]?(?:x|ext\.?)[ ]?[0-9]{1,6})?",
    re.S,
)

_LOCAL_PART = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._%+-"
_DOMAIN = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,6}([A-Za-z]{2,24})(?![A-Za-z0-9-])"
)
# Any country's domain has two letters; of the longer ones those in common use, so that
# `matrix@other.shape` in code is no address.
_LONG_DOMAINS = frozenset(
    "com net org edu gov mil int info biz name pro coop mobi asia tech dev app xyz top site online "
    "shop club vip cloud ltd group store link wang ren email work company engineering energy "
    "international global systems consulting example test local corp intra internal".split()
)
# The sign in `name [at] domain [dot] com`, `name at domain dot com` and `name#domain.com`.
_SPELT_AT = re.compile(r" ?[\[({<](?:at|AT|@)[\])}>] ?| (?:at|AT) (?=[A-Za-z0-9-]{1,40} dot )")
_SPELT_SIGNS = (
    *(f"{a}{b}{c}" for a, c in ("[]", "()", "{}", "<>") for b in ("at", "AT", "@")),
    " dot ",
)
# Literal first, so that `re` seeks it fast.
_HASH = re.compile("#(?<=[A-Za-z0-9]#)(?=[A-Za-z0-9])")
_SPELT_DOMAIN = re.compile(
    r"(?:[A-Za-z0-9-]{1,40}(?: ?[\[({<](?:dot|DOT|\.)[\])}>] ?| (?:dot|DOT) |\.)){1,4}"
    r"(?:com|cn|net|org|edu|gov|fr|de|uk|jp|ru)(?![A-Za-z0-9])"
)

_MACHINE = re.compile(
    r"ip|地址|网关|子网|服务器|主机|网段|交换机|路由|防火墙|端口|登录|访问|内网|外网|网络|"
    r"(?<![a-z])(?:dns|ping|ssh|ftp|gateway|host|server|address|addr|from|client|remote|proxy|"
    r"telnet|subnet|listen|login|node|https?://)|@\Z",
    re.IGNORECASE,
)
_IPV4 = re.compile(
    r"[0-9](?<![0-9A-Za-z._-].)(?:[0-9]{0,2}\.)(?:[0-9]{1,3}\.){2}[0-9]{1,3}(?![0-9A-Za-z_])(?!\.[0-9])(?!-[A-Za-z])",
    re.S,
)
_SECTION = re.compile(
    r"(?:第|节|章|条|款|附录|见|版本|版|固件|软件|§|[vV](?:er)?\.?|[Ss]ection|[Cc]hapter|"
    r"[Rr]elease|[Vv]ersion|"
    r"[Cc]lause|[Aa]ppendix|[Tt]able|[Ff]ig(?:ure)?\.?|[Ff]irmware|[Dd]river)[ :]{0,2}\Z"
)
_IPV6 = re.compile(
    r"[0-9A-Fa-f](?<![0-9A-Za-z.].)(?:[0-9A-Fa-f]{0,3}:)(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![0-9A-Za-z:.])",
    re.S,
)
# A longer chain of such groups, such as a fingerprint, is no address.
_HEX_BEFORE = re.compile(r"(?<![0-9A-Za-z])[0-9A-Fa-f]{0,4}[:-]\Z")
_HEX_PAIRS = re.compile(r"[:-][0-9A-Fa-f]{2}(?=[:-])")
_MAC = re.compile(
    r"[0-9A-Fa-f](?<![0-9A-Za-z].)[0-9A-Fa-f](?:([:-])[0-9A-Fa-f]{2})(?:\1[0-9A-Fa-f]{2}){4}(?![0-9A-Za-z]|[:-][0-9A-Fa-f])",
    re.S,
)
_MAC_DOTS = re.compile(
    r"[0-9A-Fa-f](?<![0-9A-Za-z.].)[0-9A-Fa-f]{3}(?:[.-][0-9A-Fa-f]{4}){2}(?![0-9A-Za-z.])", re.S
)
_LABELLED_MAC = re.compile(r"mac|物理地址|以太网|ethernet|硬件地址|网卡", re.IGNORECASE)

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

    def labelled(match: re.Match[str]) -> Span | None:
        if view.label(match.start(), _TELEPHONE) is not True:
            return None
        return Span("phone", match.start(), match.end(), compact(match[0]))

    def bare(match: re.Match[str]) -> Span | None:
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


def emails(view: View) -> Iterator[Span]:
    """Addresses with ``@``, and those spelt ``name [at] domain [dot] com`` or with ``#``."""
    text, end = view.text, 0
    position = text.find("@")
    while position >= 0:
        local = _local_part(text, end, position)
        domain = _DOMAIN.match(text, position + 1)
        if local and domain and local != "git" and _is_domain(domain[1]):
            end = domain.end()
            start = position - len(local)
            yield Span("email", start, end, text[start:end].lower())
        position = text.find("@", position + 1)
    signs = [*_HASH.finditer(text)]
    if any(sign in text for sign in _SPELT_SIGNS):
        signs += _SPELT_AT.finditer(text)
    for sign in signs:
        domain = _SPELT_DOMAIN.match(text, sign.end())
        local = _local_part(text, 0, sign.start())
        if domain and len(local) > 1:
            spelt = re.sub(r" ?[\[({<]?(?:dot|DOT|\.)[\])}>]? ?", ".", domain[0])
            start = sign.start() - len(local)
            yield Span("email", start, domain.end(), f"{local}@{spelt}".lower())


def _local_part(text: str, begin: int, position: int) -> str:
    """What could stand before the ``@`` at a position."""
    before = text[max(begin, position - 64) : position]
    return before[len(before.rstrip(_LOCAL_PART)) :].lstrip(".-%+")


def machines(view: View) -> Iterator[Span]:
    """Internet addresses (kind ``ip``) and hardware addresses (kind ``mac``)."""

    def ipv4(match: re.Match[str]) -> Span | None:
        if not _is_host(match[0]) or not _labelled_host(view, match):
            return None
        return Span("ip", match.start(), match.end(), match[0])

    def ipv6(match: re.Match[str]) -> Span | None:
        if _HEX_BEFORE.search(view.before(match.start(), characters=6)):
            return None
        groups = [group for group in match[0].split(":") if group]
        if len(groups) < 2 or not any(c.isdigit() for c in match[0]):
            return None
        try:
            address = ipaddress.IPv6Address(match[0])
        except ValueError:
            return None
        if len(groups) < 8 and len(groups[0]) < 3:
            return None
        return Span("ip", match.start(), match.end(), str(address))

    def mac(match: re.Match[str]) -> Span | None:
        if _HEX_BEFORE.search(view.before(match.start(), characters=6)):
            return None
        letters = any(character.isalpha() for character in match[0])
        if not letters and not view.label(match.start(), _LABELLED_MAC):
            return None
        return Span("mac", match.start(), match.end(), compact(match[0]))

    def mac_dots(match: re.Match[str]) -> Span | None:
        if not view.label(match.start(), _LABELLED_MAC):
            return None
        return Span("mac", match.start(), match.end(), compact(match[0]))

    if "." in view.text:
        yield from view.matches(_IPV4, ipv4)
        if view.mentions("mac", "物理地址", "硬件地址", "以太网", "网卡", "ethernet"):
            yield from view.matches(_MAC_DOTS, mac_dots)
    if view.text.count(":") > 1:
        yield from view.matches(_IPV6, ipv6)
    if _HEX_PAIRS.search(view.text):
        yield from view.matches(_MAC, mac)


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
    after = view.text[match.end() : match.end() + 4]
    if re.search(r"[A-Za-z_=]\Z|[0-9A-Za-z]-\Z", before):
        return False
    if re.match(r"\.[0-9]|_|-[A-Za-z]|-[0-9]{1,3}(?![0-9])", after):
        return False
    if match[0][0] in "+(":
        return True
    return " " not in match[0] or not (
        re.search(r"[0-9] {1,2}\Z", before) or re.match(r" {1,2}[0-9]", after)
    )


def _is_domain(top: str) -> bool:
    return len(top) == 2 or top.lower() in _LONG_DOMAINS


def _is_host(text: str) -> bool:
    """Whether it is the address of one machine, neither a mask nor everybody's own."""
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or text.startswith("255."))


def _labelled_host(view: View, match: re.Match[str]) -> bool:
    """Whether dotted numbers are an address rather than a section or a version."""
    before = view.before(match.start(), characters=20)
    if _SECTION.search(before):
        return False
    label = view.label(match.start(), _MACHINE)
    if label is not None:
        return label
    octets = [int(octet) for octet in match[0].split(".")]
    if octets[:2] == [192, 168] or octets[0] == 172 and 16 <= octets[1] < 32:
        return True
    return max(octets) >= 64
