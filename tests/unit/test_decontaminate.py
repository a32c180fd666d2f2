import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cgn.config.corpus import DecontaminateConfig
from megatron_cgn.corpus import characters, ngrams
from megatron_cgn.corpus.decontaminate import Decontaminator
from megatron_cgn.corpus.document import Document, Outcome
from megatron_cgn.corpus.evaluation import read_passages
from megatron_cgn.errors import DataError

QUESTION_ZH = "压水堆核电厂一回路冷却剂在额定功率下的正常运行压力约为多少兆帕"
QUESTION_EN = (
    "Which of the valves between the letdown heat exchanger and the volume control tank closes "
    "when the temperature at the outlet becomes too high?"
)
STOCK = "以下说法正确的是"
CEVAL = [
    ["id", "question", "A", "B", "C", "D", "answer"],
    ["0", QUESTION_ZH, "7.0", "12.5", "15.5", "22.1", "C"],
    [
        "1",
        STOCK,
        "反应堆冷却剂泵是一回路的核心设备之一",
        "蒸汽发生器的传热管属于三回路的压力边界",
        "稳压器安装在二回路的主蒸汽管道上",
        "控制棒由石墨制成并且不吸收中子",
        "A",
    ],
    ["2", "沸点", "1", "2", "3", "4", "A"],
]
BEFORE = "核电厂的安全文化要求每一位员工保持质疑的工作态度。\n\n"
AFTER = "\n\n风电场的出力随风速变化，需要与火电机组和储能协调运行。"


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


@pytest.fixture
def ceval(tmp_path: Path) -> str:
    return write_csv(tmp_path / "ceval.csv", CEVAL)


@pytest.fixture
def english(tmp_path: Path) -> str:
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"question": QUESTION_EN, "choices": ["TCV-145", "a", "b"]}) + "\n")
    return str(path)


def run(step: Decontaminator, text: str) -> Outcome:
    return step(Document(id="d", text=text, source="s"))


def build(*files: str, **changes: object) -> Decontaminator:
    return Decontaminator(DecontaminateConfig(evaluation_files=files, **changes))  # type: ignore[arg-type]


def test_a_copied_question_drops_the_document_with_evidence(ceval: str) -> None:
    outcome = run(build(ceval), BEFORE + QUESTION_ZH + "？" + AFTER)
    assert outcome.text is None
    assert outcome.reason == "contaminated/overlap"
    assert outcome.evidence == f"{ceval} item 1 (question): 31 of 31 tokens, '{QUESTION_ZH}'"


@pytest.mark.parametrize(
    "disguise",
    [
        "壓水堆核電廠一回路冷卻劑在額定功率下的正常運行壓力約為多少兆帕",
        "压水堆核电厂，一回路冷却剂（在额定功率下）的“正常运行压力”，约为多少兆帕？",
        "压水堆 核电厂 一回路 冷却剂 在额定功率下的\n正常运行压力\u3000约为多少兆帕",
        "已知压水堆核电厂一回路冷却剂在额定功率下的正常运行压力约为多少兆帕呢",
        "压水堆核电厂一回路冷却剂在额定功率下的正常运行压力大约是几兆帕",
    ],
)
def test_disguises_in_chinese(ceval: str, disguise: str) -> None:
    assert run(build(ceval), BEFORE + disguise + AFTER).text is None


@pytest.mark.parametrize(
    "disguise",
    [
        QUESTION_EN.upper(),
        QUESTION_EN.replace(" ", "\n   "),
        "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in QUESTION_EN),
        QUESTION_EN.replace(" ", " - ").replace("?", ""),
        QUESTION_EN.replace("Which", "What").replace("becomes", "gets"),
    ],
)
def test_disguises_in_english(english: str, disguise: str) -> None:
    assert run(build(english), f"Some text before. {disguise} Some text after.").text is None


@pytest.mark.parametrize(
    "text",
    [
        "关于稳压器，以下说法正确的是：它维持一回路的压力。",
        "反应堆冷却剂泵是一回路的核心设备之一。",
        "压水堆核电厂一回路冷却剂的流量由主泵维持，在额定功率下的正常运行压力由稳压器控制。",
        "水的沸点随压力升高而升高。",
        "The valves between the letdown heat exchanger and the volume control tank are new.",
    ],
)
def test_plain_facts_and_stock_phrases_do_not_condemn(ceval: str, english: str, text: str) -> None:
    assert run(build(ceval, english), text) == Outcome(text=text)


def test_all_choices_of_an_item_condemn_though_one_does_not(ceval: str) -> None:
    choices = "；".join(CEVAL[2][2:6])
    assert run(build(ceval), BEFORE + choices + AFTER).text is None


def test_phrases_of_many_items_do_not_condemn(tmp_path: Path) -> None:
    stem = "根据国家核安全局发布的有关规定请判断下面这道题目的描述是否符合要求"
    own = "甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉戌亥"
    path = tmp_path / "items.txt"
    path.write_text("\n\n".join(f"{stem}{own[i:]}{own[:i]}" for i in range(12)))
    assert run(build(str(path)), BEFORE + stem + AFTER).text is not None
    assert run(build(str(path)), BEFORE + stem + own + AFTER).text is None
    # With fewer items in common the phrase alone is most of an item.
    assert run(build(str(path), max_shared_items=12), BEFORE + stem + AFTER).text is None


def test_copies_of_an_item_count_once(tmp_path: Path) -> None:
    path = tmp_path / "items.txt"
    path.write_text("\n\n".join([QUESTION_ZH] * 20))
    step = build(str(path))
    assert run(step, QUESTION_ZH).text is None
    assert [(each.items, each.unmatched_items) for each in step.files] == [(20, 0)]


def test_short_questions_must_be_there_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "items.txt"
    path.write_text("什么是反应堆冷却剂泵？\n\n沸点是多少？")
    step = build(str(path))
    assert [(each.items, each.unmatched_items) for each in step.files] == [(2, 1)]
    assert run(step, BEFORE + "问：什么是反应堆冷却剂泵？" + AFTER).text is None
    assert run(step, BEFORE + "什么是反应堆冷却剂系统？沸点是多少？" + AFTER).text is not None


def test_items_not_looked_for_are_told(ceval: str, caplog: pytest.LogCaptureFixture) -> None:
    step = build(ceval)
    assert [(each.items, each.unmatched_items) for each in step.files] == [(3, 1)]
    assert "1 of 3 items" in caplog.text


def test_cutting_takes_the_question_with_its_choices(ceval: str) -> None:
    block = f"{QUESTION_ZH}？\nA. 7.0\nB. 15.5\n答案：B"
    outcome = run(build(ceval, mode="cut"), BEFORE + block + AFTER)
    assert outcome.text == BEFORE.strip() + AFTER
    assert outcome.changes == {"decontaminate/cut": 1}
    assert outcome.evidence and "item 1" in outcome.evidence


def test_cutting_by_lines_where_there_are_no_paragraphs(ceval: str) -> None:
    kept = "第一行说明运行人员的职责与交接班的要求，请各值认真执行并做好记录。"
    text = f"{kept}\n{QUESTION_ZH}？\nA. 7.0\nB. 15.5\n答案：B\n{kept}"
    assert run(build(ceval, mode="cut"), text).text == f"{kept}\n{kept}"


def test_what_is_mostly_contaminated_is_dropped_even_when_cutting(ceval: str) -> None:
    outcome = run(build(ceval, mode="cut"), f"练习\n\n{QUESTION_ZH}？")
    assert outcome.reason == "contaminated/mostly"
    assert "decontaminate.max_cut_fraction is 0.5" in (outcome.evidence or "")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([QUESTION_ZH, QUESTION_ZH[:20], QUESTION_ZH[20:], "\n", "\n\n", "好。"])
    )
)
def test_nothing_is_left_after_cutting(pieces: list[str]) -> None:
    text = "".join(pieces)
    first = run(_CUTTER, text)
    if first.text is not None:
        assert run(_CUTTER, first.text) == Outcome(text=first.text)


def test_spans_across_chunks_are_found(ceval: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_cgn.corpus import overlap

    monkeypatch.setattr(overlap, "_CHUNK_CHARACTERS", 300)
    monkeypatch.setattr(overlap, "_CHUNK_OVERLAP", 100)
    step = build(ceval)
    for before in range(0, 640, 7):
        text = "".join(chr(0x5000 + i) for i in range(before)) + QUESTION_ZH + "，无关" * 200
        outcome = run(step, text)
        assert "31 of 31" in (outcome.evidence or ""), before


def test_against_a_slow_search(tmp_path: Path) -> None:
    """Which items are found equals a search by strings, on random texts with planted pieces."""
    rng = random.Random(0)
    alphabet = "".join(map(chr, range(0x4E00, 0x4E40)))
    items = ["".join(rng.choices(alphabet, k=rng.randrange(10, 60))) for _ in range(40)]
    path = tmp_path / "items.txt"
    path.write_text("\n\n".join(items))
    step = build(str(path), fold_traditional=False)
    found = 0
    for _ in range(200):
        item = rng.choice(items)
        start = rng.randrange(len(item))
        piece = item[start : start + rng.randrange(8, 60)]
        text = "".join(rng.choices(alphabet, k=300)) + piece + "".join(rng.choices(alphabet, k=300))
        wanted = any(_covered(each, text) >= 0.5 * len(each) for each in items)
        found += wanted
        assert (run(step, text).text is None) == wanted
    assert 40 < found < 160


def _covered(item: str, text: str) -> int:
    n = min(13, len(item))
    inside = [False] * len(item)
    for i in range(len(item) - n + 1):
        if item[i : i + n] in text:
            inside[i : i + n] = [True] * n
    return sum(inside)


def test_hashes_of_ngrams_are_equal_exactly_where_the_ngrams_are() -> None:
    text = "泵a泵bb 泵a泵bb，ab abb a bb 泵1 2泵12"
    tokens = ngrams.tokens(characters.code_points(text))
    words = [text[start:end] for start, end in zip(tokens.starts, tokens.ends, strict=True)]
    assert words == "泵 a 泵 bb 泵 a 泵 bb ab abb a bb 泵 1 2 泵 12".split()
    for n in (1, 2, 3):
        hashes = ngrams.ngrams(tokens, n).tolist()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        assert len(set(zip(hashes, grams, strict=True))) == len(set(hashes)) == len(set(grams))
    assert len(ngrams.ngrams(tokens, 99)) == 0


def test_hashes_are_the_same_on_every_machine() -> None:
    """The value of one token, by the definition: (mix(mix(code point + 1)))."""

    def mix(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    tokens = ngrams.tokens(characters.code_points("，核"))
    assert tokens.hashes.dtype == np.uint64
    assert int(tokens.hashes[0]) == mix(mix(ord("核") + 1))


def test_no_evaluation_files_let_everything_through() -> None:
    assert run(build(), QUESTION_ZH) == Outcome(text=QUESTION_ZH)
    assert run(build(), "") == Outcome(text="")


def test_file_formats_give_the_same_items(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"id": "x1", "question": QUESTION_ZH, "A": "甲", "B": "乙", "answer": "A"}
    (tmp_path / "a.jsonl").write_text("\ufeff" + json.dumps(row) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps([row], ensure_ascii=False))
    write_csv(tmp_path / "a.csv", [list(row), list(row.values())])
    (tmp_path / "a.tsv").write_text("\t".join(row) + "\n" + "\t".join(row.values()) + "\n")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        passages = [(each.item, each.field, each.texts) for each in read_passages(path)]
        assert passages == [
            (1, "question", (QUESTION_ZH,)),
            (1, "answer", ("A",)),
            (1, "choices", ("甲", "乙")),
        ], path


def test_tables_without_names_are_read_as_mmlu_has_them(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "mmlu.csv", [["What is k?", "one", "two", "three", "four", "B"]])
    fields = [(each.field, each.texts) for each in read_passages(path)]
    assert fields == [
        ("question", ("What is k?",)),
        ("answer", ("B",)),
        ("choices", ("one", "two", "three", "four")),
    ]


@pytest.mark.parametrize(
    "names", [("选项A", "选项B"), ("option_a", "option_b"), ("choice1", "choice2")]
)
def test_choices_are_known_by_many_names(tmp_path: Path, names: tuple[str, str]) -> None:
    path = tmp_path / "a.jsonl"
    row = {"question": QUESTION_ZH, names[0]: CEVAL[2][2], names[1]: CEVAL[2][3]}
    path.write_text(json.dumps(row))
    assert [each.texts for each in read_passages(path)] == [
        (QUESTION_ZH,),
        (CEVAL[2][2], CEVAL[2][3]),
    ]
    # One choice alone is a plain fact.
    assert run(build(str(path)), BEFORE + CEVAL[2][2] + AFTER).text is not None


def test_only_the_fields_asked_for_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "无关的问题", "context": QUESTION_ZH}))
    assert run(build(str(path)), QUESTION_ZH).text is None
    assert run(build(str(path), fields=("question",)), QUESTION_ZH).text is not None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"question": "x"}\n{broken\n', r"a\.jsonl:2: is not JSON"),
        ("a.json", b"[1,", r"a\.json:1: is not JSON"),
        ("a.jsonl", b"", r"holds no items.*decontaminate\.evaluation_files"),
        ("a.csv", "题目".encode("gb18030"), r"is not UTF-8.*Convert"),
        ("a.parquet", b"nothing", r"no Parquet file"),
        ("a.pdf", b"", r"unknown kind.*\.jsonl"),
        ("a.txt", None, r"cannot be read"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        build(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_fields_that_no_item_has_are_refused(english: str) -> None:
    with pytest.raises(DataError, match=r"none of the fields.*\(query\).*choices, question"):
        build(english, fields=("query",))


def test_settings_tell_their_faults() -> None:
    wrong = DecontaminateConfig(mode="keep", ngram_tokens=1, min_coverage=0, max_shared_items=0)  # type: ignore[arg-type]
    assert len(list(wrong.faults())) == 5
    assert list(DecontaminateConfig().faults()) == []


def test_settings_without_effect_are_refused() -> None:
    (fault,) = DecontaminateConfig(max_cut_fraction=0.2).faults()
    assert fault.startswith("decontaminate.max_cut_fraction: 0.2; has no effect with")
    assert list(DecontaminateConfig(mode="cut", max_cut_fraction=0.2).faults()) == []
    (fault,) = DecontaminateConfig(fields=("question",)).faults()
    assert "has no effect without decontaminate.evaluation_files" in fault


def _cutter() -> Decontaminator:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        return build(write_csv(Path(directory) / "a.csv", CEVAL), mode="cut", max_cut_fraction=1.0)


_CUTTER = _cutter()
