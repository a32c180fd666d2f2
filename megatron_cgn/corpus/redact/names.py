"""Names of persons: after a label, in a column headed by one, beside a title, and repeated.

A name is a surname of the list and one or two characters, or capitalised words, in a place where a
name is expected. Names in running text that no label or title announces are not found, unless the
same document announces them elsewhere.
"""

import re
from collections.abc import Iterator

from megatron_cgn.corpus.redact.surnames import (
    COMMON,
    COMPOUND,
    NOT_GIVEN,
    NOT_SURNAMES,
    OTHER,
    WORDS,
)
from megatron_cgn.corpus.redact.view import MASKED, Span, View

_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_SURNAMES = "".join(sorted(set(COMMON + OTHER)))
_ROLES = (
    "姓名|联系人|联络人|编制|编写|编者|起草|拟稿|撰写|撰稿|作者|译者|校核|校对|审核|审查|审定|"
    "审批|审阅|批准|会签|签发|签字|"
    "签名|签署|签收|复核|核对|核准|确认人|负责人|责任人|经办|承办|主办人|主持|主讲|记录|纪要人|"
    "整理人|汇报人|报告人|发言人|"
    "参会人员|参会人|参会|参加人员|参加人|与会人员|与会|出席人员|出席|列席|缺席|请假|到会|操作人|"
    "操作员|监护人|监督人|值班|值长|"
    "许可人|签发人|工作班成员|工作成员|作业人员|申请人|收件人|发件人|寄件人|收货人|取货人|送货人|"
    "收款人|付款人|户名|持卡人|"
    "开户人|借款人|代理人|代表人|代表|法人|监理|项目经理|技术负责|检查人|检验人|检修人|检验员|"
    "检查员|巡检人|巡检员|验收人|"
    "试验人|测量人|测试人|试验员|调试人|维修人|安装人|焊工|专责|班长|组长|主任|处长|科长|总工|"
    "工程师|技术员|安全员|质检员|"
    "采购员|业务员|驾驶员|司机|患者|病人|员工|职工|当事人|被保险人|投保人|受益人|紧急联系人|配偶|"
    "父亲|母亲|导师|学生|"
    "主编|副主编|编委|专家|抄送|主送|报告者|填表|填报|制表|制图|设计|绘图|描图|处理人|发现人|"
    "报缺人|验证人|接收人|交接人|"
    "交班|接班|交班人|接班人|甲方|乙方|主管|分管领导|值班人员|当班|授权人|委托人|受托人|承租人|"
    "出租人|买方|卖方"
)
_LABEL = re.compile(
    rf"(?:{_ROLES})(?:人员?|者|签字|签名|签章|姓名|负责人|代表|工程师)?"
    r"(?:[ ]?\([^()\n]{0,12}\))?"
    r"(?P<gap>[ \t]{0,8}(?::|=|\|)[ \t|]{0,6}(?:\r?\n[ \t|]{0,4})?|为[: ]?|是[: ]?|[ \t]{1,8}|"
    r"[ \t]{0,4}\r?\n[ \t|]{0,4}|)"
)
# Of the labels, those that are a person and no activity.
_PERSON = re.compile("(?:[人员者长师]|代表|经理|主任|姓名|专责|司机|户名)\\Z")
_TITLES = (
    "先生|女士|小姐|同志|同学|老师|师傅|博士|教授|院士|总工程师|高级工程师|工程师|总经理|"
    "副总经理|经理|董事长|副总|总监|主任|"
    "副主任|处长|副处长|科长|副科长|部长|副部长|院长|副院长|所长|书记|班长|组长|值长|厂长|副厂长|"
    "厂长|局长|主管|工(?![\u4e00-\u9fff])"
)
# What may follow a name without a space.
_AFTER = (
    rf"(?=[^{_HAN}]|$|{_TITLES}|电话|手机|邮箱|联系|身份证|性别|部门|职务|职称|工号|日期|编制|"
    rf"校核|校对|审核|审定|"
    r"批准|会签|负责|提出|汇报|介绍|表示|指出|认为|说|主持|和|与|及|等|的|在|于|已|将|于|以及|男|"
    r"女|签)"
)
_WORD_ENDS = re.compile(f"[^{_HAN}]|$|{_TITLES}")
_G = rf"[{_HAN}](?<![{NOT_GIVEN}])"
_SURNAME = rf"(?:{'|'.join(COMPOUND)}|[{_SURNAMES}])"
_CHINESE = re.compile(rf"{_SURNAME}(?:{_G}{_G}|{_G}|[ ]{{1,4}}{_G}|[ ]{_G}[ ]{_G}){_AFTER}")
_FULL_NAME = re.compile(rf"{_SURNAME}(?:{_G}){{1,2}}")
_MINORITY = re.compile(
    rf"[{_HAN}]{{2,10}}[·•・][{_HAN}]{{2,10}}(?:[·•・][{_HAN}]{{2,10}})?{_AFTER}"
)

_TOKEN = r"(?:[A-Z](?:\.|[a-z]+(?:[-'][A-Z]?[a-z]+)*)|[A-Z][a-z]?['][A-Z][a-z]+|Mc[A-Z][a-z]+)"
_ENGLISH = re.compile(
    rf"(?:{_TOKEN}|[A-Z]{{2,12}}(?= [A-Z][a-z]))"
    rf"(?: ?{_TOKEN}|(?<=\.)-{_TOKEN}| [A-Z]{{2,15}}(?![A-Za-z])"
    r"| (?:de|van|von|der|la|le|bin|al)(?= )){1,3}"
    r"(?![A-Za-z])"
)
_ENGLISH_SIGN = re.compile(r"[:|][ \t|]{0,6}(?=[A-Z])|[yY] (?=[A-Z])")
_ENGLISH_LABELS = frozenset(
    "name contact person author authors author(s) attn attention signature engineer manager "
    "supervisor operator inspector attendees participants present chair chairman chairperson "
    "representative sender recipient cardholder employee patient responsible surname".split()
)
_ENGLISH_VERBS = frozenset(
    "prepared reviewed approved checked written signed verified issued compiled authorized "
    "authorised submitted inspected performed reported requested drawn tested witnessed recorded "
    "drafted edited chaired presented".split()
)
_WHOSE_NAME = frozenset(
    "full contact person employee author first last your patient customer applicant holder "
    "cardholder engineer manager supervisor operator inspector owner".split()
)
_ENGLISH_TITLE = re.compile(
    rf"(?:Mr|Mrs|Ms|Miss|Dr|Prof|Ing|Engr|Mme)\.? (?={_TOKEN})({_TOKEN}(?: {_TOKEN}){{0,3}})"
)
_ORGANISATIONS = frozenset(
    "department division team group committee company ltd inc limited corp corporation office "
    "service "
    "services engineering quality safety nuclear power plant station laboratory institute "
    "university "
    "secretariat agency commission board section unit bureau ministry center centre technical "
    "project "
    "operations maintenance management assurance control system systems design review training "
    "security "
    "energy electric reactor water the this that all none not see to be date number no yes pending "
    "approved general chief senior deputy shift customer support sales help desk public affairs "
    "human "
    "pump valve tank pipe line building room feedwater coolant steam generator turbine pressure "
    "vessel heat exchanger emergency containment fuel core cooling spray primary secondary loop "
    "main "
    "auxiliary model data file type status value note notes results summary introduction method "
    "methods background overview appendix annex section see using new open source first last use "
    "default example input output time "
    "resources test report version revision table figure chapter china "
    "republic international national atomic standard standards document procedure".split()
)
_NEXT = re.compile(
    r"(?:[ ]?\([^()\n]{0,20}\))?(?:[ ]?(?:,? and |[、,;/&]|和|及|与)[ ]?(?:and )?|[ ]{1,4})?"
)
_SKIPPED = re.compile(rf"(?:{MASKED}+|[^、,;:。\n|]{{1,16}}(?=[、;]))")
_TITLE = re.compile(_TITLES)
_BY = re.compile(
    rf"由({_SURNAME}(?:{_G}{_G}|{_G}))(?=负责|编制|审核|批准|主持|担任|牵头|汇报|提出|完成|组织|"
    rf"操作|监护)"
)
_HEADING = re.compile(rf"{_ROLES}|[Nn]ame|[Aa]uthor|[Cc]ontact|[Bb]y$")
_MAX_LIST = 200


def names(view: View) -> Iterator[Span]:
    """Names of persons."""
    found: dict[str, None] = {}
    for span in _announced(view):
        found[view.text[span.start : span.end]] = None
        yield span
    yield from _repeated(view, found)


def _announced(view: View) -> Iterator[Span]:
    text = view.text
    for match in _LABEL.finditer(text):
        clear = any(sign in match["gap"] for sign in ":=|")
        # Without a sign between, the label may be a verb or part of a word.
        if clear:
            yield from _list(text, match.end(), single=False)
        elif match["gap"] or _PERSON.search(match[0]):
            end = _name_end(text, match.end())
            if end and text[match.end()] not in NOT_SURNAMES and _WORD_ENDS.match(text, end):
                yield _span(text, match.end(), end)
    for match in _ENGLISH_SIGN.finditer(text):
        if _english_label(text, match.end() if match[0][0] in "yY" else match.start()):
            yield from _list(text, match.end(), single=False)
    for match in _ENGLISH_TITLE.finditer(text):
        if not _organisation(match[1].split()[:1]):
            yield _span(text, match.start(1), match.end(1))
    for match in _BY.finditer(text):
        if _is_person(match[1]):
            yield _span(text, match.start(1), match.end(1))
    yield from _before_titles(text)
    yield from _in_tables(view)


def _english_label(text: str, position: int) -> bool:
    """Whether a label of a person ends at a position."""
    line = text[max(0, position - 40) : position].rpartition("\n")[2]
    words = [word.strip("*_#.|-").lower() for word in line.split()][-2:]
    if not words:
        return False
    if words[-1] == "by":
        return words[0] in _ENGLISH_VERBS
    if words[-1] == "name" and len(words) == 2 and words[0]:
        return words[0] in _WHOSE_NAME
    return words[-1] in _ENGLISH_LABELS


def _list(text: str, position: int, *, single: bool) -> Iterator[Span]:
    """Names one after another, from a position on."""
    for number in range(_MAX_LIST):
        end = _name_end(text, position)
        if end:
            yield _span(text, position, end)
        else:
            skipped = _SKIPPED.match(text, position)
            if skipped is None or single:
                return
            end = skipped.end()
        following = _NEXT.match(text, end)
        assert following is not None
        if single or following.end() == end or number == _MAX_LIST:
            return
        position = following.end()


def _name_end(text: str, position: int) -> int | None:
    """Where the name that begins at a position ends, or None."""
    for pattern in (_CHINESE, _MINORITY, _ENGLISH):
        match = pattern.match(text, position)
        if match and (pattern is _MINORITY or _is_person(match[0])):
            return match.end()
    return None


def _is_person(name: str) -> bool:
    if name.isascii():
        return not _organisation(re.split(r"[ .-]+", name))
    joined = name.replace(" ", "")
    return joined not in WORDS and joined[:2] not in WORDS


def _organisation(words: list[str]) -> bool:
    return any(word.lower() in _ORGANISATIONS for word in words)


def _before_titles(text: str) -> Iterator[Span]:
    """Full names before a title, and a surname alone before 先生, 女士 and the like."""
    for match in _TITLE.finditer(text):
        end = match.start()
        for length in (4, 3, 2, 1):
            start = end - length
            if start < 0:
                continue
            name = text[start:end]
            if length == 1:
                fits = name in COMMON and _word_begins(text, start)
                fits = fits and name + match[0][0] not in WORDS and name not in "高方任单项金万"
            else:
                fits = _FULL_NAME.fullmatch(name) is not None and _is_person(name)
                fits = fits and (name[0] in COMMON or _word_begins(text, start))
            if fits:
                yield _span(text, start, end)
                break


def _word_begins(text: str, position: int) -> bool:
    """Whether a word begins at a position, judging by what is before it."""
    before = text[position - 1 : position]
    return (
        not before
        or not re.match(f"[{_HAN}]", before)
        or before in "请由与和及向对找给经让跟问是客户"
    )


def _in_tables(view: View) -> Iterator[Span]:
    for table in view.tables:
        columns = [i for i, heading in enumerate(table.headings) if _HEADING.search(heading)]
        if not columns:
            continue
        ends = [start - 1 for start in table.starts[1:]] + [table.end]
        for start, end in list(zip(table.starts, ends, strict=True))[1:]:
            offset = start
            for column, cell in enumerate(view.text[start:end].split(table.separator)):
                if column in columns and cell.strip():
                    begin = offset + len(cell) - len(cell.lstrip())
                    yield from _list(view.text, begin, single=False)
                offset += len(cell) + 1


def _repeated(view: View, found: dict[str, None]) -> Iterator[Span]:
    """Every other place where an announced name stands, if it is long enough to be sure."""
    long = [name for name in found if (len(name) > 2 and not name.isascii()) or " " in name]
    short = [name for name in found if len(name) == 2]
    alternatives = [re.escape(name) for name in sorted(long, key=len, reverse=True)]
    alternatives += [rf"(?<![{_HAN}]){re.escape(name)}(?![{_HAN}])" for name in short]
    if alternatives:
        for match in re.finditer("|".join(alternatives), view.text):
            yield _span(view.text, match.start(), match.end())


def _span(text: str, start: int, end: int) -> Span:
    name = text[start:end]
    if not name.isascii():
        return Span("name", start, end, re.sub(r"\s", "", name))
    return Span("name", start, end, " ".join(name.split()).lower())
