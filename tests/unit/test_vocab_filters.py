"""What a new token of the corpus may be."""

from pathlib import Path

import pytest

from megatron_cgn.errors import ConfigError, DataError
from tokenizer import filters
from tokenizer.filters import Judge, Rules, read_deny_list

GOOD = (
    "反应堆",
    "反应堆冷却剂系统",
    " 安全壳",
    "冷却剂的",
    " pressuriser",
    "Zircaloy",
    "ΔT",
    "μm",
    "U-235",
    "AP1000",
    "℃",
    "①",
    "VIII",
    "3",
    "锆",
    "，如果",
    "。\u201d",
    "）。",
    "(MPa",
    "_pump",
    "naïve",
    "ядерный",
)
BAD = {
    filters.SPACE: (" ", "   ", "\n\n", " \n", "\t", "\u3000", "", "核电 站"),
    filters.CONTROL: ("\x00a", "核\u200b", "a\ue000", "。\n", "\x07", "\ufffd核"),
    filters.NUMBER: ("1000", " 2024", "①②", "a3f0", "0x1F4A", "deadbeef01", "12-34"),
    filters.RULING: ("====", "----", "____", "───", "│", " ═", "■□", "aaa", "哈哈哈", "ababab"),
    filters.MARKUP: ("&nbsp", "&#x", "<td", "</p", "http", "://", "nbsp", "\\fB", "\\-", ".TP"),
    filters.PUNCTUATION: ("核，电", "a)", "a_b", "@#", "#*", "“核”", "+a", "((核", "核。"),
    filters.MIXED: ("核reactor", "αя", "，核a"),
    filters.TOO_LONG: ("反" * 4 + "应堆冷却剂系", "abcdefghijklmnopqrstu"),
}


@pytest.mark.parametrize("text", GOOD)
def test_words_are_taken(text: str) -> None:
    assert Judge(Rules()).spelling(text.encode()) is None


@pytest.mark.parametrize(("reason", "text"), [(r, t) for r, texts in BAD.items() for t in texts])
def test_what_is_no_word_is_refused_for_its_reason(reason: str, text: str) -> None:
    assert Judge(Rules()).text(text) == reason


def test_parts_of_characters_are_refused() -> None:
    assert Judge(Rules()).spelling("核".encode()[:2]) == filters.PARTIAL


@pytest.mark.parametrize("text", ["的反应", "系统在", "，的系统", "们的", "系统和"])
def test_particles_are_refused_at_wish(text: str) -> None:
    assert Judge(Rules()).text(text) is None
    assert Judge(Rules(particles=False)).text(text) == filters.PARTICLE


@pytest.mark.parametrize(
    "text",
    ["目的", "存在", "饱和", "等离子体", "轴向", "所以", "了解", "可以", "换料的", "在役检查"],
)
def test_words_that_have_particles_by_nature_are_taken(text: str) -> None:
    assert Judge(Rules(particles=False)).text(text) is None


def test_marks_are_refused_at_wish() -> None:
    judge = Judge(Rules(marks=False))
    for text in ("，如果", "）。", "(MPa", "_pump"):
        assert judge.text(text) == filters.PUNCTUATION
    assert judge.text("反应堆") is None
    assert judge.text("U-235") is None


def test_what_is_denied_is_refused_with_and_without_a_space() -> None:
    judge = Judge(Rules(deny=frozenset({"公司", "Corp"}), deny_patterns=("^第.+章$", "ABC")))
    for text in ("公司", " 公司", " Corp", "第三章", "xABCy"):
        assert judge.text(text) == filters.DENIED
    for text in ("公司法", "第三章节", "abc"):
        assert judge.text(text) is None


def test_lengths_are_limits() -> None:
    judge = Judge(Rules(max_characters=5, max_han_characters=3))
    for text in ("steam", " steam", "反应堆", " 反应堆"):
        assert judge.text(text) is None
    for text in ("steams", "反应堆芯"):
        assert judge.text(text) == filters.TOO_LONG


def test_faults_of_the_rules_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Rules(min_frequency=0, min_spread=500, max_characters=1, deny_patterns=("(", "a"))
    message = str(caught.value)
    for part in ("min_frequency: 0", "min_spread: 500", "max_characters: 1", "'('"):
        assert part in message
    assert "'a'" not in message


def test_a_deny_list_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deny.txt"
    path.write_text("\ufeff# companies\n公司\n\n /^第.+章$/ \n/\n//\n", encoding="utf-8")
    assert read_deny_list(path) == (frozenset({"公司", "/", "//"}), ("^第.+章$",))


def test_faults_of_a_deny_list_are_named_together(tmp_path: Path) -> None:
    path = tmp_path / "deny.txt"
    path.write_text("/(/\nok\n/[/\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 1.*line 3"):
        read_deny_list(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_deny_list(tmp_path / "missing")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_deny_list(path)
