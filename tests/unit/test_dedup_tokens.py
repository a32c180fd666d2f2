"""Cutting text into tokens: what counts, what does not, and that batching changes nothing."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cgn.corpus.dedup.tokens import canonical_bytes, token_hashes, tokenize

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


def cut(text: str) -> list[str]:
    """Tokens of one document, as text."""
    tokens = tokenize([text])
    characters = [chr(code) for code in tokens.codes]
    ends = [*tokens.starts[1:], len(characters)][: len(tokens.starts)]
    return ["".join(characters[a:b]) for a, b in zip(tokens.starts, ends, strict=True)]


def canonical(text: str) -> bytes:
    return next(canonical_bytes(tokenize([text])))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", []),
        ("，。 \n\t—…", []),
        ("核电厂 Safety Analysis", ["核", "电", "厂", "safety", "analysis"]),
        ("使用Linux系统", ["使", "用", "linux", "系", "统"]),
        ("ＰＵＭＰ　１５．３２ＭＰａ", ["pump", "15.32mpa"]),
        ("2026-05-01 08:30", ["2026-05-01", "08:30"]),
        ("2026年5月1日投运", ["2026年5月1", "日", "投", "运"]),
        ("今年 本月", ["今", "年", "本", "月"]),
        ("位号1RCV-001PO,", ["位", "号", "1rcv-001po"]),
        ("state-of-the-art and/or", ["state", "of", "the", "art", "and", "or"]),
        ("1,000 a,b", ["1,000", "a", "b"]),
        ("-5℃ 至 +5℃", ["-5", "°", "c", "至", "+", "5", "°", "c"]),
        ("50%以上 %d", ["50%", "以", "上", "d"]),
        ("p >= 15.5.", ["p", ">", "=", "15.5"]),
        ("| 名称 | 值 |\n└──┘", ["名", "称", "值"]),
        ("co\u00adoperate zero\u200bwidth", ["cooperate", "zerowidth"]),
        ("核電廠の設計", ["核", "电", "厂", "の", "设", "计"]),
        ("STRASSE Straße", ["strasse", "strasse"]),
        ("한국어 тест", ["한국어", "тест"]),
        ("ภาษา", ["ภ", "า", "ษ", "า"]),
        ("\U00020000\U0010ffff", ["\U00020000"]),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert cut(text) == tokens


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("压力15.3 abc 1RCV001PO 第三章", ["15.3", "1rcv001po"]), ("①", ["1"]), ("三 x", [])],
)
def test_numbers(text: str, numbers: list[str]) -> None:
    found = tokenize([text]).numbers
    assert [token for token, number in zip(cut(text), found, strict=True) if number] == numbers


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("反应堆 冷却剂 RCP 系统。", "反应堆冷却剂rcp系统"),
        ("“核岛”（NI）\n\n设计", "核島 (ni) 設計"),
        ("The pump,  is\nOFF.", "the pump is off"),
        ("ｶﾅ", "カナ"),
        ("cafe\u0301", "café"),
    ],
)
def test_layout_makes_no_difference(left: str, right: str) -> None:
    assert canonical(left) == canonical(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("15.5", "155"),
        ("1 5", "15"),
        ("p > 15", "p < 15"),
        ("-5", "5"),
        ("a b", "ab"),
        ("中a b", "中ab"),
        ("5%", "5"),
        ("x + y", "x y"),
        ("阀门开", "阀门关"),
    ],
)
def test_meaning_makes_a_difference(left: str, right: str) -> None:
    assert canonical(left) != canonical(right)


@settings(deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=6))
def test_documents_do_not_depend_on_their_neighbours(texts: list[str]) -> None:
    tokens = tokenize(texts)
    assert tokens.offsets[0] == 0 and tokens.offsets[-1] == len(tokens.starts)
    hashes, pieces = token_hashes(tokens), list(canonical_bytes(tokens))
    for number, text in enumerate(texts):
        alone = tokenize([text])
        here = slice(tokens.offsets[number], tokens.offsets[number + 1])
        np.testing.assert_array_equal(hashes[here], token_hashes(alone))
        np.testing.assert_array_equal(tokens.numbers[here], alone.numbers)
        assert pieces[number] == next(canonical_bytes(alone))


@settings(deadline=None)
@given(st.text(st.sampled_from("核电厂abZ9 \n。,"), max_size=60))
def test_agrees_with_a_regular_expression(text: str) -> None:
    plain = text.replace(",", " ")
    assert cut(plain) == re.findall(r"[\u4e00-\u9fff]|[a-z0-9]+", plain.lower())


def test_hash_tells_tokens_apart() -> None:
    words = [f"w{number}" for number in range(20000)] + [
        chr(code) for code in range(0x4E00, 0x9FA6)
    ]
    tokens = tokenize([" ".join(words)])
    distinct = {bytes(cutout) for cutout in map(str.encode, cut(" ".join(words)))}
    assert len(set(token_hashes(tokens).tolist())) == len(distinct)


def test_order_within_a_token_counts() -> None:
    first, second = token_hashes(tokenize(["abc acb"]))
    assert first != second
