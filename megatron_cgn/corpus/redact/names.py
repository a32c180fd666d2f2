"""Names of persons: after a label, in a column headed by one, beside a title, and repeated.

A name is a surname of the list and one or two characters, or capitalised words, in a place where a
name is expected. Names in running text that no label or title announces are not found, unless the
same document announces them elsewhere.
"""

import re
from collections.abc import Generator, Iterator

from megatron_cgn.corpus.redact.columns import cells_of_persons
from megatron_cgn.corpus.redact.lexicon import (
    COMMON,
    COMPOUND,
    ENGLISH_LABELS,
    ENGLISH_VERBS,
    NOT_SURNAMES,
    ROLES,
    SAFE,
    TITLES,
    WHOSE_NAME,
    WORDS,
)
from megatron_cgn.corpus.redact.person import (
    ENGLISH_NAME,
    ENGLISH_WORD,
    FULL_NAME,
    HAN,
    UPPER,
    is_latin,
    is_person,
    name_end,
    name_span,
)
from megatron_cgn.corpus.redact.view import MASKED, Span, View

# Forms spread short labels to the width of long ones.
_SPREAD = "姓 {1,8}名|编 {1,8}制|审 {1,8}核|校 {1,8}[核对]|批 {1,8}准|作 {1,8}者|联 ?系 ?人"
# Every branch begins with a letter, no set: else `re` could not skip to candidates.
# What most labels of persons end in, also those nobody thought of.
_ENDS = "成员|人员|姓名|指挥|代表|人|员|者|长|师|工"
_ROLE = (
    rf"(?:{TITLES}|{ROLES}|{_SPREAD}|{_ENDS})"
    "(?:人员?|员|者|签字|签名|签章|姓名|负责人|代表|工程师)?"
)
_LABEL = re.compile(
    # Asterisks: Markdown sets labels in bold type.
    # Quotation marks: so does JSON.
    rf"{_ROLE}(?:[ ]?\([^()\n]{{0,12}}\))?\*{{0,2}}[\"']?"
    r"(?P<gap>[ \t]{0,8}(?::|=|\|)[ \t|*\"']{0,6}(?:\r?\n[ \t|]{0,4})?|为[: ]?|是[: ]?|[ \t]{1,8}|"
    r"[ \t]{0,4}\r?\n[ \t|]{0,4}|)"
)
# Of the labels, those that are a person and no activity.
_PERSON = re.compile(
    r"(?:[人员者长师]|[员职焊]工|值班|指挥|车主|户主|代表|经理|主任|姓名|专责|司机|户名)\Z"
)
# What a person does right after the name, in running text.
_FOLLOWS = re.compile(
    "[在于因]|发现|反映|汇报|报告|下令|通知|签收|确认|执行|操作|立即|未|已(?!经常)|擅自|承认|"
    "(?<=为...)的|(?<=为..)的"
)
# In 个人简历, 机器人 or 工人 no person is announced.
_NO_LABEL = re.compile("[个工器本他众客老成别]人")
_GENERIC = re.compile("人员?|[员者长师]")
_SAFE = re.compile(SAFE)
_WORD_ENDS = re.compile(f"[^{HAN}]|$|{TITLES}")
_NEXT = re.compile(
    r"(?:[ ]?\([^()\n]{0,20}\))?(?:[ ]?(?:,? and |[、,;/&]|和|及|与)[ ]?(?:and )?|[ ]{1,4})?"
)
_SKIPPED = re.compile(rf"{MASKED}+|[^、,;:=。\n|]{{1,16}}(?=[、;])")
_TITLE = re.compile(rf"{TITLES}|工(?![{HAN}])|总(?![{HAN}])")
_FULL_NAME = re.compile(FULL_NAME)
# Any label, for surnames that are hardly anything else.
_ANY_LABEL = re.compile(
    rf":[ *]{{0,2}}(?={SAFE})(?P<name>{FULL_NAME})"
    r"(?=[ *]{0,3}[,;。、()\n]|[ *]{0,3}\Z| {2})"
)
_BY = re.compile(
    rf"(?:由|任命|聘任|指派|委派|已派|安排|通知)({FULL_NAME})(?=负责|编制|审核|批准|主持|担任|牵头|"
    r"汇报|提出|完成|组织|操作|监护|保管|为|任|前往|到场|参加|处理)"
)
_REGARDS = re.compile(
    r"(?:egards|incerely|espectfully|Yours),?[ ]?"
    r"\r?\n\s{0,4}(?=[A-Z])"
)
# What a name stands before: a verb, or its telephone in brackets.
_SAYS = re.compile(
    "身份证|护照|手机|联系电话|证件号|"
    "指出|表示|强调|认为|汇报|介绍|补充|发言|宣布|总结|传达|"
    r"\((?=\+?86|1[3-9][0-9]|0[0-9]{2,3}-|签[字名章])"
)
_HEADING = re.compile(
    rf"[* ]*(?:[{HAN}]{{0,6}}(?:{_ENDS})|{_ROLE})[* ]*|"
    r"[* ]*(?:[A-Z][a-z]+ )?(?:[Bb]y|[Aa]uthors?|[Cc]ontact)[* ]*"
)

_MANY_NAMES = 50
_ENGLISH_SIGN = re.compile(rf"[:|][ \t|*\"']{{0,6}}(?=[{UPPER}{HAN}])|[yY] (?=[{UPPER}])")
# The name beside an address of mail: Li Yang <li@example.cn>.
_MAIL = re.compile(rf"<(?=[^<> \n@{MASKED}]{{0,64}}[@{MASKED}])")
_ADDRESSEE = re.compile(
    rf"(?:(?<![{UPPER}a-z]){ENGLISH_NAME}|(?<![{HAN}]){FULL_NAME})(?=[\"']? ?\Z)"
)
# As papers of identity print it: 姓名 CHAN TAI MAN.
_CAPITALS = re.compile(r"[A-Z]{2,15}(?: [A-Z]{2,15}){1,3}(?![A-Za-z0-9])")
_ENGLISH_TITLE = re.compile(
    # Not the end of DIMMs.
    r"[MDPIE](?<![A-Za-z].)(?:(?<=M)(?:rs?|s|iss|me)|(?<=D)r|(?<=P)rof|(?<=I)ng|(?<=E)ngr)\.? "
    rf"({ENGLISH_WORD}(?: {ENGLISH_WORD}){{0,3}})",
    re.S,
)


def names(view: View) -> Iterator[Span]:
    """Names of persons."""
    found: dict[str, None] = {}
    for detect in (_labelled, _labelled_english, _titled, _acting, _in_tables):
        for span in detect(view):
            found[view.text[span.start : span.end]] = None
            yield span
    yield from _repeated(view, found)


def _labelled(view: View) -> Iterator[Span]:
    text, reached = view.text, 0
    for match in _LABEL.finditer(text):
        start = match.end()
        if any(sign in match["gap"] for sign in ":=|"):
            reached = yield from _list(text, start, single=start < reached)
        # Without a sign between, the label may be a verb or part of a word.
        elif match["gap"] or _PERSON.search(match[0]):
            yield from _after_label(text, match)


def _after_label(text: str, label: re.Match[str]) -> Iterator[Span]:
    """A Chinese name after a label without a sign between, and those enumerated with it."""
    start, gap = label.end(), label["gap"]
    end = name_end(text, start)
    if end is None or is_latin(text[start]):
        if label[0].startswith("姓名") and (capitals := _CAPITALS.match(text, start)):
            yield name_span(text, start, capitals.end())
        return
    if not gap.startswith(("为", "是")) and text[start] in NOT_SURNAMES:
        return
    before = text[max(0, label.start() - 1) : label.start()]
    # 人员高效 is no person: less common surnames need a known label.
    generic = _GENERIC.fullmatch(label[0][: len(label[0]) - len(gap)])
    safe = _SAFE.match(text, start) is not None
    if generic and not safe and (_NO_LABEL.fullmatch(before + "人") or generic[0] != "人"):
        return
    if "\n" in gap and not _stands_alone(text, label.start(), end):
        return
    if _WORD_ENDS.match(text, end) or _FOLLOWS.match(text, end) and (safe or not generic):
        yield name_span(text, start, end)
        if gap and text[end : end + 1] == "、":
            yield from _list(text, end + 1, single=False)


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether label and name fill their two lines, unlike a sentence broken between them."""
    line = text[max(0, start - 12) : start].rpartition("\n")
    short = (line[1] or start <= 12) and len(line[2]) <= 6
    return (
        bool(short) and re.match(r"[ \t|*]*(?:[\n,、(]|\Z| {2})", text[end : end + 12]) is not None
    )


def _labelled_english(view: View) -> Iterator[Span]:
    text, reached = view.text, 0
    for match in _ENGLISH_SIGN.finditer(text):
        if _english_label(text, match.end() if match[0][0] in "yY" else match.start()):
            reached = yield from _list(text, match.end(), single=match.end() < reached)
    for match in _REGARDS.finditer(text):
        yield from _list(text, match.end(), single=True)
    for match in _MAIL.finditer(text):
        before = view.before(match.start(), characters=60)
        if (name := _ADDRESSEE.search(before)) and is_person(name[0]):
            start = match.start() - len(before) + name.start()
            yield name_span(text, start, start + len(name[0]))
    for match in _ENGLISH_TITLE.finditer(text):
        if is_person(match[1].split()[0]):
            yield name_span(text, match.start(1), match.end(1))


def _english_label(text: str, position: int) -> bool:
    """Whether a label of a person ends at a position."""
    line = re.split(r"[,;|/()\n{]", text[max(0, position - 40) : position].rstrip("| \t"))[-1]
    words = [word.strip("*_#.|-\"'").lower() for word in line.split()][-2:]
    if not words:
        return False
    if words[-1] == "by":
        return words[0] in ENGLISH_VERBS
    if words[-1] == "name" and len(words) == 2 and words[0]:
        return words[0] in WHOSE_NAME
    # 联系人Contact
    return re.sub(f"[{HAN}]", "", words[-1]) in ENGLISH_LABELS


def _list(text: str, position: int, *, single: bool) -> Generator[Span, None, int]:
    """Names one after another, from a position on; returns where they end.

    A label inside another label's list reads one name only, so that no name is read twice and the
    time stays linear.
    """
    while True:
        end = name_end(text, position)
        if end and text[end : end + 1] == ":":
            # The next label, such as 司索工：, after names set apart by spaces.
            return position
        if end:
            yield name_span(text, position, end)
        else:
            skipped = _SKIPPED.match(text, position)
            if skipped is None:
                return position
            end = skipped.end()
        following = _NEXT.match(text, end)
        assert following is not None
        if single or following.end() == end:
            return end
        position = following.end()


def _titled(view: View) -> Iterator[Span]:
    """Full names before a title, and a surname alone before 先生, 女士 and the like."""
    for match in _TITLE.finditer(view.text):
        end = match.start()
        for length in (4, 3, 2, 1):
            start = end - length
            if start >= 0 and _fits_title(view.text, start, end, match[0]):
                yield name_span(view.text, start, end)
                break


def _fits_title(text: str, start: int, end: int, title: str) -> bool:
    name = text[start:end]
    if len(name) == 1:
        common = name in COMMON and name not in "高方任单项金万"
        return common and _word_begins(text, start) and name + title[0] not in WORDS
    if _FULL_NAME.fullmatch(name) is None or not is_person(name):
        return False
    if name[-1] in "和与及由" or title == "工" and name[0] not in COMMON:
        return False
    if name[0] in NOT_SURNAMES:
        return not _is_han(text[start - 1 : start]) and name[0] not in "由从向来"
    return name[0] in COMMON or name[:2] in COMPOUND or _word_begins(text, start)


def _word_begins(text: str, position: int) -> bool:
    """Whether a word begins at a position, judging by what is before it."""
    before = text[position - 1 : position]
    if text[max(0, position - 2) : position] == "敬的":
        return True
    return not _is_han(before) or before in "请由与和及向对找给经让跟问是客户系"


def _acting(view: View) -> Iterator[Span]:
    """Who does something, after 由, or says something, where a clause begins."""
    text = view.text
    for match in _ANY_LABEL.finditer(text):
        if _is_han(text[match.start() - 1 : match.start()]) and is_person(match["name"]):
            yield name_span(text, *match.span("name"))
    for match in _BY.finditer(text):
        if _sure(match[1]):
            yield name_span(text, match.start(1), match.end(1))
    for match in _SAYS.finditer(text):
        papers = match[0][-1] in "证照机话号"
        before = view.before(match.start())
        end = match.start() - (len(before) - len(before.rstrip(" ,("))) * papers
        for start in range(end - 2, max(end - 5, -1), -1):
            name = text[start:end]
            if papers and end - start < 3 and name[:1] not in COMMON:
                continue
            if _FULL_NAME.fullmatch(name) and _sure(name) and not _is_han(text[start - 1 : start]):
                yield name_span(text, start, end)
                break


def _sure(name: str) -> bool:
    return is_person(name) and name[0] not in NOT_SURNAMES


def _is_han(character: str) -> bool:
    return re.match(f"[{HAN}]", character) is not None


def _in_tables(view: View) -> Iterator[Span]:
    for position in cells_of_persons(view, _HEADING):
        yield from _list(view.text, position, single=False)


def _repeated(view: View, found: dict[str, None]) -> Iterator[Span]:
    """Every other place where an announced name stands, if it is long enough to be sure."""
    text = view.text
    for start, end in _places(text, [name for name in found if len(name) > 1]):
        name = text[start:end]
        if is_latin(name):
            alone = not (text[start - 1 : start] + text[end : end + 1]).isalnum()
            sure = " " in name and alone
        else:
            han = _is_han(text[start - 1 : start]) or _is_han(text[end : end + 1])
            sure = len(name) > 2 or not han
        if sure:
            yield name_span(text, start, end)


def _places(text: str, names: list[str]) -> Iterator[tuple[int, int]]:
    """Where some names stand in a text."""
    if len(names) > _MANY_NAMES:
        # One pass for all of them, by hash; worth the compilation for lists of staff only.
        import regex

        for match in regex.finditer(r"\L<names>", text, names=names):
            yield match.span()
        return
    for name in names:
        start = text.find(name)
        while start >= 0:
            yield start, start + len(name)
            start = text.find(name, start + len(name))
