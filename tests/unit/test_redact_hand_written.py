"""Recall and precision on documents and look-alikes that another author wrote by hand.

`docs/redaction.md` has the figures of their first reading, before anything was mended.
"""

import re
from collections import Counter
from pathlib import Path

import pytest

from megatron_cgn.config.corpus import RedactConfig
from megatron_cgn.corpus.redact import Redactor

HERE = Path(__file__).parent
MARK = re.compile("⟦([a-z]+)([?]?):(.*?)⟧")
KINDS = {
    "id": "id_card",
    "uscc": "credit_code",
    "card": "bank_card",
    "plate": "licence_plate",
    "mobile": "phone",
}
"""Kinds of marks and findings as they are compared: any telephone is a telephone."""

Marks = list[tuple[str, int, int, bool]]


def lines(name: str) -> list[str]:
    text = (HERE / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("# ")]


def unmarked(source: str) -> tuple[str, Marks]:
    """A document without its marks, and where they were: kind, start, end, whether optional."""
    text, marks, end = "", [], 0
    for match in MARK.finditer(source):
        text += source[end : match.start()]
        kind = KINDS.get(match[1], match[1])
        marks.append((kind, len(text), len(text) + len(match[3]), bool(match[2])))
        text, end = text + match[3], match.end()
    return text + source[end:], marks


@pytest.fixture(scope="module")
def redactor() -> Redactor:
    return Redactor(RedactConfig())


def test_recall_and_precision(redactor: Redactor) -> None:
    marked, found, findings, wrong = Counter[str](), Counter[str](), Counter[str](), []
    documents = "\n".join(lines("redact_hand_marked.txt")).strip("=\n").split("\n====\n")
    for source in documents:
        text, marks = unmarked(source)
        spans = [(KINDS.get(f.kind, f.kind), f.start, f.end) for f in redactor.find(text)]
        for kind, start, end, optional in marks:
            if not optional:
                marked[kind] += 1
                found[kind] += any(s[0] == kind and s[1] <= start and end <= s[2] for s in spans)
        for kind, start, end in spans:
            findings[kind] += 1
            if not any(
                start < mark[2] and mark[1] < end and (mark[3] or mark[0] == kind) for mark in marks
            ):
                wrong.append(f"{kind}: {text[start:end]}")
    assert len(documents) == 129 and marked.total() == 307
    for kind in marked:
        target = {"name": 0.94, "phone": 0.95}.get(kind, 1.0)
        assert found[kind] / marked[kind] >= target, (kind, found[kind], marked[kind])
    assert len(wrong) / findings.total() <= 0.02, wrong


def test_look_alikes_stay(redactor: Redactor) -> None:
    texts = lines("redact_hand_negatives.txt")
    assert len(texts) == 193
    assert [text for text in texts if redactor.find(text)] == [
        "试验点 010-20304050-6 至 010-20304050-9"
    ]


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("管理地址：2001:da8:215:4009::17", "ip", "2001:da8:215:4009::17"),
        ("Contact: Ville Syrjälä, Helsinki", "name", "ville syrjälä"),
        ("Nationality: Chinese, Name: Wang Fang", "name", "wang fang"),
        ("see Li Yang <li@example.cn>", "name", "li yang"),
        ('{"姓名": "王建国"}', "name", "王建国"),
        ("姓名,证件,单位\n乔峰,无,某公司", "name", "乔峰"),
        ("序号 司机 电话\n1 曾庆华 13510098877", "name", "曾庆华"),
        ("护照号 14AB37659", "passport", "14AB37659"),
    ],
)
def test_what_the_first_reading_missed(
    redactor: Redactor, text: str, kind: str, value: str
) -> None:
    assert (kind, value) in [(found.kind, found.value) for found in redactor.find(text)]


@pytest.mark.parametrize(
    "text",
    [
        "one group of DIMMs. Each channel, and VMs. There are no more",
        "不同所有者\n和权限。",
        "每个人 都可以 在其中",
        "bash-1977  [000] .... 17284.993652: sys_close",
        "08048000-080bc000 r-xp 00000000 03:02",
        "范围是 -2147483648 到 +2147483647。",
        "eth0: MAC 01:00:5e:00:00:01, route 10.0.0.0/24, wildcard 0.255.255.255",
        "发电量 13812345678 kWh",
        "个人简历\n1. 教育",
        "| Generic Driver | MT Driver | Custom Driver |",
    ],
)
def test_what_real_documents_showed_to_be_wrong(redactor: Redactor, text: str) -> None:
    assert redactor.find(text) == []
