import tracemalloc
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cgn.corpus import unicode
from megatron_cgn.corpus.unicode import normalise

PLAIN_CHINESE = "中"
_AWKWARD = st.sampled_from("\r\n\f\x08\x1b\u200d\u061c\u17b4\u0301：1中\uf06e [m")


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("ＡＢＣ１２３ｘｙｚ", "ABC123xyz"),
        ("＋－＝％／＜＞［］｛｝＃＆＠", "+-=%/<>[]{}#&@"),
        ("１５．５中", "15.5中"),
        ("中１２：３０", "中12:30"),
        ("ﬁnal ﬂow oﬀice", "final flow office"),
        ("5 µm", "5 μm"),
        ("10 \u2126", "10 Ω"),
        ("300 \u212a", "300 K"),
        ("㎡ ㎥ ㎏ ㎜ ㏄ ㎧", "m² m³ kg mm cc m/s"),
        ("ｶﾞｽ", "ガス"),
        ("\ufe8d\ufedf", "\u0627\u0644"),
        ("\uf900\uf9d1", "豈六"),
        ("⾞⻋⻓⻔", "車车长门"),
        ("a\u3000b\u00a0c\u2009d", "a b c d"),
        ("1RCP\u2011001\u2010PO", "1RCP-001-PO"),
        ("e\u0301", "é"),
        ("中︵一︶︐", "中（一），"),
        ("𝑇 = 𝛼ℎ", "T = αh"),
        ("㏗ 9.2", "pH 9.2"),
    ],
)
def test_characters_that_differ_in_looks_only_are_unified(written: str, wanted: str) -> None:
    assert normalise(written)[0] == wanted


@pytest.mark.parametrize(
    "text",
    [
        "10²³ m³ ²³⁵U CO₂ H₂¹⁸O x⁻¹ aⁿ",
        "½ ¾ ⅓",
        "①②⑳ ⒈5 ⑴ ㈠ ㊣ Ⓐ",
        "安全壳Ⅲ级 ⅳ Ⅻ",
        "25℃ 77℉ 30° 5′ 10″ № ™",
        "，。：；！？（）、「」《》【】——……～·“”‘’",
        "10～20 1∶2 −5 ±0.1 ≥3 × ÷ ≈ ∬ √",
        "αβγ Ω Δ φϕ ϑ 𝐁 ℝ ℏ",
        "👩\u200d🔬 می\u200cخواهم",
        "한국어 ภาษาไทย العربية हिन्दी Ελληνικά ÀÉÖ ß",
        "𠮷㐀",
    ],
)
def test_what_nfkc_would_destroy_survives(text: str) -> None:
    text = PLAIN_CHINESE + text
    assert normalise(text) == (text, 0)


def test_wide_punctuation_becomes_ascii_only_where_nothing_is_chinese() -> None:
    assert normalise("Ｐｕｍｐ（Ａ）：ｏｎ，ｏｆｆ")[0] == "Pump(A):on,off"
    assert normalise("泵（Ａ）：开，关")[0] == "泵（A）：开，关"


def test_what_cannot_be_seen_goes() -> None:
    invisible = "\ufeff\u200b\u00ad\u2060\u202e\u200f\u200d\x00\x07\x7f\U000e0041\ufe00"
    assert normalise(f"安{invisible}全")[0] == "安全"
    assert normalise("\x1b[31m红\x1b[0m")[0] == "红"
    assert normalise("N\x08NA\x08A")[0] == "NA"
    assert normalise("a\r\nb\rc\u2028d\x0be\x85f")[0] == "a\nb\nc\nd\ne\nf"


def test_a_lost_unit_stays_visible() -> None:
    """Micro signs of the Symbol font must not vanish: 5 μm is not 5 m."""
    assert normalise("5 \uf06dm, 90\uf0b0, \uf0b13")[0] == "5 μm, 90°, ±3"
    assert normalise("5 \ue123m")[0] == "5 \ufffdm"
    assert normalise("\uf06e item\n  \uf0d8 item")[0] == "• item\n  • item"


def test_fonts_of_symbols_are_read_as_what_they_show() -> None:
    formula = (
        "\uf044T \uf03d 5 \uf0b4 \uf028\uf031\uf02b\uf065\uf029 \uf0a3 3\uf02d\uf0d6x \uf0ae \uf0a5"
    )
    assert normalise(formula)[0] == "ΔT = 5 × (1+ε) ≤ 3−√x → ∞"
    form = "\uf06c检查\n\uf0d8记录\n\uf0a3合格 \uf0fe 不合格 \uf052是\n\uf061射线 \uf06e"
    assert normalise(form)[0] == "•检查\n•记录\n□合格 ☑ 不合格 ☑是\nα射线 ν"
    assert normalise("压力\uf0a3设计值，结论：\uf0a3合格")[0] == "压力≤设计值，结论：□合格"
    # GBK's own private characters are ideographs that nobody can tell.
    assert normalise("\ue123某")[0] == "\ufffd某"


def test_long_texts_are_normalised_alike_in_little_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unit = "　泵Ａ😀\u200b压力5 \uf06dm，"
    once, changed = normalise(unit)
    monkeypatch.setattr(unicode, "_PIECE_CHARACTERS", 1 << 12)
    tracemalloc.start()
    text, times = normalise(unit * 10_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (text, times) == (once * 10_000, changed * 10_000)
    # The text takes 0.5 MB; an object for each of the 40,000 replacements took 3 more.
    assert peak < 2.5e6


def test_controls_of_windows_1252_are_read_as_such() -> None:
    assert normalise("\x93safe\x94 \x96 1\x80\x81")[0] == "“safe” – 1€"


def test_every_character_settles_at_once() -> None:
    astral = (*range(0x1D400, 0x1D800), *range(0xE0000, 0xE0200), *range(0x10000, 0x110000, 251))
    for point in (*range(0x10000), *astral):
        if not 0xD800 <= point < 0xE000:
            for text in (chr(point), f"中{chr(point)}\u0301a"):
                once = normalise(text)[0]
                assert normalise(once) == (once, 0), hex(point)


@given(st.text(st.characters(codec="utf-8") | _AWKWARD))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once, _ = normalise(text)
    assert normalise(once) == (once, 0)
    assert unicodedata.is_normalized("NFC", once)
    assert not any(unicodedata.category(c) in ("Cc", "Co", "Cs") for c in once if c not in "\t\n\f")
