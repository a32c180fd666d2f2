"""Redaction of any text: it ends, changes only findings, and a second time changes nothing."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_cgn.config.corpus import RedactConfig
from megatron_cgn.corpus.document import Document
from megatron_cgn.corpus.redact import Redactor, mask

KINDS = (*RedactConfig().kinds, "address")
REDACTOR = Redactor(RedactConfig(kinds=KINDS))

# What findings are made of, so that texts are full of near misses and of neighbours.
FRAGMENTS = st.sampled_from(
    "13812345678 0755-84430000 84430000 11010519491231002X 91350100M000100Y43 6222021234567890128 "
    "4111 1111 +86 +33 (010) 192.168.1.20 10.1.2.3 fe80::1 00:1A:2B:3C:4D:5E E12345678 粤B12345 "
    "a@b.com name[at]b.cn 编制： 审核 联系人 姓名| 参会人员： 王建国 张三 欧阳 先生 工程师 Mr. "
    "John Smith "
    "Prepared by: 电话 手机 护照 账号： 订单号 IP 税号 深南大道2002号 [姓名] [手机号] "
    "[NAME-0123456789] [ ] "
    "、 ， ： | : - . / @ # 1 86 x 转 0 一三八零零一三八零零零 １３ \ue000 \u200b".split(" ")
)
TEXTS = st.lists(
    st.one_of(FRAGMENTS, st.sampled_from(["", " ", "\n", "\t", "  ", "\r\n"]), st.text(max_size=3)),
    max_size=24,
).map("".join)


def redact(text: str, redactor: Redactor = REDACTOR) -> str:
    outcome = redactor(Document(id="a", text=text, source="s"))
    assert outcome.text is not None
    return outcome.text


@settings(deadline=None, max_examples=300)
@given(TEXTS)
@example("参会人员：张三、工程部、李四、13812345678 / 84430000")
@example("电话84430000-13812345678")
def test_a_second_time_changes_nothing(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=200))
def test_any_text_is_taken(text: str) -> None:
    redact(text)


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_findings_are_apart_and_everything_else_stays(text: str) -> None:
    findings = REDACTOR.find(text)
    position = 0
    for finding in findings:
        assert position <= finding.start < finding.end <= len(text)
        assert finding.kind in KINDS
        assert finding.masked == mask(text[finding.start : finding.end])
        position = finding.end
    outcome = REDACTOR(Document(id="a", text=text, source="s"))
    # The first round's findings are replaced; a later round may find more.
    assert sum(outcome.changes.values()) >= len(findings)
    if not findings:
        assert outcome.text == text


@pytest.mark.parametrize(
    "unit", ["1", "12 ", "a@", "[姓名]", "编制：张三、", "姓名|电话\n", "1.", "ab:", "By: A "]
)
def test_work_grows_with_the_length_and_no_faster(unit: str) -> None:
    # Counts what is looked at, so that a slow machine fails no test.
    def steps(size: int) -> int:
        import sys

        count = 0

        def count_call(*_: object) -> None:
            nonlocal count
            count += 1

        text = unit * (size // len(unit))
        sys.setprofile(count_call)
        try:
            redact(text)
        finally:
            sys.setprofile(None)
        return count

    assert steps(16_000) <= 4.5 * steps(4_000) + 2_000


def test_a_line_of_five_million_digits_ends() -> None:
    text = "1234567890" * 500_000
    assert redact(text) == text
