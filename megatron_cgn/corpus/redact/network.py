"""E-mail, and the addresses of machines."""

import ipaddress
import re
from collections.abc import Iterator

from megatron_cgn.corpus.redact.identity import compact
from megatron_cgn.corpus.redact.view import Span, View

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
    r"ip|地址|网关|子网|服务器|主机|网段|交换机|路由|防火墙|端口|摄像机|工控机|采集器|交换器|登录|访问|内网|外网|网络|"
    r"(?<![a-z])(?:dns|ping|ssh|ftp|gateway|host|server|address|addr|from|client|remote|proxy|"
    r"telnet|subnet|dhcp|lease|listen|login|node|https?://)|@\Z",
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
_HEX_BEFORE = re.compile(r"(?<![0-9A-Za-z])(?:[0-9A-Fa-f]{1,4}|:)[:-]\Z")
_HEX_PAIRS = re.compile(r"[:-][0-9A-Fa-f]{2}(?=[:-])")
_MAC = re.compile(
    r"[0-9A-Fa-f](?<![0-9A-Za-z].)[0-9A-Fa-f](?:([:-])[0-9A-Fa-f]{2})(?:\1[0-9A-Fa-f]{2}){4}(?![0-9A-Za-z]|[:-][0-9A-Fa-f])",
    re.S,
)
_MAC_DOTS = re.compile(
    r"[0-9A-Fa-f](?<![0-9A-Za-z.].)[0-9A-Fa-f]{3}(?:[.-][0-9A-Fa-f]{4}){2}(?![0-9A-Za-z.])", re.S
)
# Null, broadcast, and the groups of IP multicast and bridges.
_NOBODYS_MAC = re.compile("0{12}|F{12}|01005E|3333|0180C2")
_LABELLED_MAC = re.compile(r"mac|物理地址|以太网|ethernet|硬件地址|网卡", re.IGNORECASE)


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
        # Eight pairs are a serial number; short ones may be anything, such as hours or slices.
        if max(map(len, groups)) < 3 or len(groups) < 8 and len(groups[0]) < 3:
            return None
        return Span("ip", match.start(), match.end(), str(address))

    def mac(match: re.Match[str]) -> Span | None:
        if _HEX_BEFORE.search(view.before(match.start(), characters=6)):
            return None
        if _NOBODYS_MAC.match(compact(match[0])):
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


def _is_domain(top: str) -> bool:
    return len(top) == 2 or top.lower() in _LONG_DOMAINS


def _is_host(text: str) -> bool:
    """Whether it is the address of one machine, neither a mask nor everybody's own."""
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return False
    nobody = address.is_loopback or address.is_multicast
    return not nobody and not text.startswith(("0.", "255.")) and not text.endswith(".0.0")


def _labelled_host(view: View, match: re.Match[str]) -> bool:
    """Whether dotted numbers are an address rather than a section or a version."""
    before = view.before(match.start(), characters=20)
    if _SECTION.search(before):
        return False
    label = view.label(match.start(), _MACHINE)
    if label is not None:
        return label
    if re.search(r"[0-9][ ,]{1,2}\Z", before):
        return False
    octets = [int(octet) for octet in match[0].split(".")]
    if octets[:2] == [192, 168] or octets[0] == 172 and 16 <= octets[1] < 32:
        return True
    return max(octets) >= 64
