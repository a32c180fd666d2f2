"""Identity cards, credit codes, bank cards, passports and licence plates.

Checksums come from python-stdnum. Its own validation is not used as it is: it refuses identity
numbers whose county was founded after the holder's birth, and credit codes that begin with a
letter.
"""

import datetime
import re
from collections.abc import Iterator

from megatron_cgn.corpus.redact.view import Span, View, last_end

# One separator between two digits: a space, a hyphen, or the end of a line.
_S = r"(?:[ -]|[ ]?\r?\n[ ]{0,4})?"
_SEPARATORS = re.compile(r"[^0-9A-Za-z]+")
_BESIDE_ID = re.compile(r"(?:身份证|身份号|公民身份)[^0-9\n]{0,8}\Z")
_LABELLED_ID = re.compile(r"身份证|身份号|证件|公民身份|居民身份|(?<![a-z])id(?![a-z])", re.I)

# Patterns begin with a set of characters and look behind it: `re` then skips quickly to the next
# candidate, where a leading lookbehind would be tried at every character.
_ID_18 = re.compile(
    # The century soon ends the search in rows of figures.
    rf"[1-9](?<![0-9].)(?:{_S}[0-9]){{5}}{_S}(?:1{_S}[89]|2{_S}[01])(?:{_S}[0-9]){{9}}"
    rf"{_S}[0-9Xx](?![0-9])",
    re.S,
)
_ID_15 = re.compile(r"[1-9](?<![0-9A-Za-z.].)[0-9]{14}(?![0-9A-Za-z])", re.S)
_PROVINCES = frozenset(
    "11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 54 61 62 63 64 65 "
    "71 81 82 83".split()
)

_CREDIT_CODE, _CREDIT_CODE_IN_GROUPS = (
    re.compile(
        rf"[1-9ANYany](?<![0-9A-Za-z].){s}[1-9A-GYa-gy](?:{s}[0-9]){{6}}(?:{s}[0-9A-HJ-NP-RTUW-Y"
        r"a-hj-np-rtuw-y]){10}(?![0-9A-Za-z])",
        re.S,
    )
    for s in ("", "[ -]?")
)
# Authority and category, table 1 of GB 32100.
_AUTHORITIES = frozenset(
    "11 12 13 19 21 29 31 32 33 34 35 39 41 49 51 52 53 54 59 61 62 69 71 72 79 81 89 91 92 93 "
    "A1 A9 N1 N2 N3 N9 Y1".split()
)
_LABELLED_CODE = re.compile("信用代码|税号|识别号|机构代码")
_LABELLED_TAX = re.compile(r"(?:税号|识别号|信用代码)[^0-9A-Za-z\n]{0,8}\Z")
_TAX_NUMBER = re.compile(r"[0-9](?<![0-9A-Za-z].)[0-9A-Z]{14,19}(?![0-9A-Za-z])", re.S)

_CARD = re.compile(r"[2-69](?<![0-9A-Za-z.].)(?:[ -]?[0-9]){12,18}(?![0-9A-Za-z])(?!\.[0-9])", re.S)
_ISSUERS = re.compile(
    r"62[0-9]{14,17}|9558[0-9]{15}|4[0-9]{12}|4[0-9]{15}|4[0-9]{18}|5[1-5][0-9]{14}|"
    r"2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|7[01][0-9]|720)[0-9]{12}|3[47][0-9]{13}|35[0-9]{14}|"
    r"3(?:0[0-5]|[68][0-9])[0-9]{11}|6(?:011|4[4-9][0-9]|5[0-9]{2})[0-9]{12}|"
    r"(?:5018|5020|5038|56[0-9]{2}|6304|67[0-9]{2}|603[0-9]|6858|6907)[0-9]{8,15}"
)
_CARD_GROUPS = re.compile(
    r"[0-9]{13,19}|[0-9]{4}(?:(?P<s>[ -])[0-9]{4}){2,3}(?:(?P=s)[0-9]{1,4})?|"
    r"[0-9]{4}[ -][0-9]{6}[ -][0-9]{4,5}|[0-9]{6}[ -][0-9]{10,13}"
)
_LABELLED_CARD = re.compile(
    r"卡 {0,6}号|账 {0,6}号|银行卡|借记卡|信用卡|储蓄卡|工资卡|账号|帐号|账户|帐户|card|account|"
    r"a/c|debit|credit",
    re.I,
)
_ACCOUNT = re.compile(r"[0-9](?<![0-9A-Za-z].)(?:[ -]?[0-9]){11,22}(?![0-9A-Za-z])", re.S)
_LABELLED_ACCOUNT = re.compile(
    r"(?:账 {0,6}号|帐 {0,6}号|账户|帐户|卡 {0,6}号|[Aa]ccount (?:[Nn]o\.?|[Nn]umber))[: |]{1,6}\Z"
)
_IBAN = re.compile(r"[A-Z](?<![0-9A-Za-z].)[A-Z][0-9]{2}(?: ?[0-9A-Z]){11,30}(?![0-9A-Za-z])", re.S)

_PASSPORT_LABEL = re.compile(r"护照|通行证|台胞证|旅行证|passport", re.I)
# Right behind its label or in its column, a passport of any country: 14AB37659, C01X00T47.
_PASSPORT_ABROAD = re.compile(
    r"[A-Z0-9](?<![0-9A-Za-z-].)(?=[A-Z0-9]{0,7}[A-Z])(?=(?:[A-Z]{0,4}[0-9]){4})[A-Z0-9]{6,9}"
    r"(?![0-9A-Za-z-])",
    re.S,
)
_BESIDE_PASSPORT = re.compile(r"(?:护照|passport)(?: ?(?:号码?|number|no\.?))?[ :|]{0,4}\Z", re.I)
_PASSPORT = re.compile(
    r"(?:[A-Za-z](?<![0-9A-Za-z].)[A-Za-z]?|[0-9](?<![0-9A-Za-z].))[ ]?[0-9]{6,9}(?![0-9A-Za-z])",
    re.S,
)

_PLATE = re.compile(
    r"[京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼][ ]?([A-Za-z])"
    r"[ ]?[·•・.-]?[ ]?"
    r"((?:[DFdf][A-HJ-NP-Za-hj-np-z0-9][0-9]{4}|[0-9]{5}[DFdf]|[A-HJ-NP-Za-hj-np-z0-9]{5}"
    r"|[A-HJ-NP-Za-hj-np-z0-9]{4}[挂学警港澳领使]))(?![0-9A-Za-z])(?!-[0-9A-Za-z])"
)
_PLATE_LABEL = re.compile(r"车牌|牌照|号牌|车号|车辆|驾驶|司机|轿车|货车|客车|车$")
# 更新, 最新 … and 新 begin no plate; nor do 浙江, 川藏 … in front of the letter of something else.
_NO_PLATE = re.compile(r"[更最全创重刷革翻崭]\Z")


def compact(text: str) -> str:
    """Remove whatever separates the characters of a number, and the difference of case."""
    return _SEPARATORS.sub("", text).upper()


def identity_cards(view: View) -> Iterator[Span]:
    """Resident identity numbers: 18 characters by checksum (GB 11643) or label, 15 by label."""
    from stdnum.cn import ric

    def accept(match: re.Match[str]) -> Span | None:
        number = compact(match[0])
        if not _region(number) or not _date(number[6:14]):
            return None
        # Labels excuse a wrong check digit: a slip of the pen reveals no less.
        checked = ric.calc_check_digit(number) == number[-1]
        # In groups it may be another number, whose label says so: 文件编号 440301-19900101-1234.
        if len(match[0]) > len(number) and view.label(match.start(), _LABELLED_ID) is False:
            return None
        if not checked and not _BESIDE_ID.search(view.before(match.start())):
            return None
        return Span("id_card", match.start(), match.end(), number)

    def accept_old(match: re.Match[str]) -> Span | None:
        number = match[0]
        if not _region(number) or not _date("19" + number[6:12]):
            return None
        if not view.label(match.start(), _LABELLED_ID):
            return None
        return Span("id_card", match.start(), match.end(), number)

    if not view.has_long_number:
        return
    yield from view.matches(_ID_18, accept)
    yield from view.matches(_ID_15, accept_old)


def credit_codes(view: View) -> Iterator[Span]:
    """Unified social credit codes by checksum (GB 32100), older tax numbers by label."""
    from stdnum.cn import uscc

    def accept(match: re.Match[str]) -> Span | None:
        code = compact(match[0])
        if code[:2] not in _AUTHORITIES or uscc.calc_check_digit(code) != code[-1]:
            return None
        # A code in groups, or of digits that may be an identity number's, needs a label.
        doubtful = len(match[0]) > len(code) or code.isdigit() and _date(code[6:14])
        if doubtful and not view.label(match.start(), _LABELLED_CODE):
            return None
        return Span("credit_code", match.start(), match.end(), code)

    def accept_tax(match: re.Match[str]) -> Span | None:
        if not _LABELLED_TAX.search(view.before(match.start())):
            return None
        return Span("credit_code", match.start(), match.end(), match[0])

    # Groups need a label; rows of figures, which look like groups, are long, labels rare.
    labelled = _LABELLED_CODE.search(view.text) is not None
    yield from view.matches(_CREDIT_CODE_IN_GROUPS if labelled else _CREDIT_CODE, accept)
    if "税" in view.text or "识别号" in view.text:
        yield from view.matches(_TAX_NUMBER, accept_tax)


def bank_cards(view: View) -> Iterator[Span]:
    """Bank cards by issuer and Luhn checksum, accounts by label, IBANs by checksum."""
    from stdnum import iban, luhn

    def accept(match: re.Match[str]) -> Span | None:
        number = compact(match[0])
        if not _ISSUERS.fullmatch(number) or not luhn.is_valid(number):
            return None
        label = view.label(match.start(), _LABELLED_CARD)
        if label is False:
            return None
        if label is None and (
            not _CARD_GROUPS.fullmatch(match[0]) or " " in match[0] and _in_columns(view, match)
        ):
            return None
        return Span("bank_card", match.start(), match.end(), number)

    def accept_account(match: re.Match[str]) -> Span | None:
        if not _LABELLED_ACCOUNT.search(view.before(match.start())):
            return None
        return Span("bank_card", match.start(), match.end(), compact(match[0]))

    def accept_iban(match: re.Match[str]) -> Span | None:
        for end in _word_ends(match[0]):
            if iban.is_valid(match[0][:end]):
                code = compact(match[0][:end])
                return Span("bank_card", match.start(), match.start() + end, code)
        return None

    if not view.has_long_number:
        return
    yield from view.matches(_CARD, accept)
    yield from view.matches(_IBAN, accept_iban)
    yield from view.matches(_ACCOUNT, accept_account)


def passports(view: View) -> Iterator[Span]:
    """Passports and travel permits, by label: nothing in the number itself tells them."""
    if not view.mentions("护照", "通行证", "台胞证", "旅行证", "passport"):
        return

    def accept(match: re.Match[str]) -> Span | None:
        if not view.label(match.start(), _PASSPORT_LABEL):
            return None
        before = view.before(match.start())
        between = before[max(0, last_end(_PASSPORT_LABEL, before)) :]
        # Digits alone are a passport only as the first number after the label.
        if match[0].isdigit() and re.search("[0-9]", between):
            return None
        return Span("passport", match.start(), match.end(), compact(match[0]))

    def accept_abroad(match: re.Match[str]) -> Span | None:
        beside = _BESIDE_PASSPORT.search(view.before(match.start()))
        if not beside and not _PASSPORT_LABEL.search(view.heading(match.start())):
            return None
        return Span("passport", match.start(), match.end(), compact(match[0]))

    yield from view.matches(_PASSPORT, accept)
    yield from view.matches(_PASSPORT_ABROAD, accept_abroad)


def licence_plates(view: View) -> Iterator[Span]:
    """Licence plates of motor vehicles, also of new-energy vehicles and trailers."""

    def accept(match: re.Match[str]) -> Span | None:
        before = view.before(match.start(), characters=8)
        if sum(character.isdigit() for character in match[2]) < 2:
            return None
        labelled = _PLATE_LABEL.search(before) is not None
        if not labelled and (match[1] + match[2] != (match[1] + match[2]).upper()):
            return None
        if not labelled and _NO_PLATE.search(before):
            return None
        value = re.sub(r"[ ·•・.-]", "", match[0]).upper()
        return Span("licence_plate", match.start(), match.end(), value)

    yield from view.matches(_PLATE, accept)


def _region(number: str) -> bool:
    return number[:2] in _PROVINCES


def _date(digits: str) -> bool:
    # Exceptions are slow, and most figures are no date.
    if not "1880" <= digits[:4] <= "2100" or not "01" <= digits[4:6] <= "12":
        return False
    try:
        datetime.date(int(digits[:4]), int(digits[4:6]), int(digits[6:8]))
    except ValueError:
        return False
    return True


def _in_columns(view: View, match: re.Match[str]) -> bool:
    """Whether groups of digits are more likely cells of a row of figures."""
    before, after = (
        view.before(match.start(), characters=3),
        view.text[match.end() : match.end() + 3],
    )
    return (
        re.search(r"[0-9] {1,2}\Z", before) is not None
        or re.match(r" {1,2}[0-9]", after) is not None
    )


def _word_ends(text: str) -> list[int]:
    return [len(text), *reversed([match.start() for match in re.finditer(" ", text)])]
