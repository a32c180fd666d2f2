"""tools/preprocess_data.py --preference: what it prints, lists and returns."""

import json
from pathlib import Path
from typing import Any

import pytest
from preference_samples import encoded_answers
from test_conversation_report import Run, tool  # noqa: F401  (a fixture)

from megatron_cgn.data.preference_formats import read_answers
from tests.unit.chat_samples import chatml_tokenizer
from tokenizer.chat import ChatTemplate

PROMPT = "压力？"
RECORDS: list[Any] = [
    {"id": "first", "prompt": PROMPT, "chosen": "15.5 MPa", "rejected": "a lot", "margin": 2},
    {"prompt": PROMPT, "chosen": "same", "rejected": "same"},
    {
        "prompt": PROMPT,
        "answers": [
            {"text": t, "rank": r} for t, r in (("b", 2), ("a", 1), ("c", 2), ("b", 2), ("d", 3))
        ],
    },
    {"chosen": [{"role": "user", "content": "x"}], "rejected": [{"role": "user", "content": "y"}]},
    {"prompt": PROMPT, "chosen": "no", "rejected": " "},
    {"prompt": PROMPT, "answers": ["only one"]},
    {"prompt": PROMPT, "chosen": "15.5 " * 40, "rejected": "no"},
]
GOOD = [read_answers(RECORDS[n]) for n in (0, 2, 6)]


class PreferenceRun(Run):
    """Runs the command on one file of preference data."""

    option = "--preference"
    records = RECORDS


@pytest.fixture
def run(
    tool: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> PreferenceRun:
    return PreferenceRun(tool, tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return ChatTemplate.open(chatml_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_validate_lists_every_faulty_record(run: PreferenceRun) -> None:
    code, out, err = run("--validate")
    assert (code, err) == (2, "")
    listed = [line for line in out.splitlines() if line.startswith(f"{run.file}:")]
    assert [line.split(":")[1] for line in listed] == ["2", "4", "5", "6"]
    assert "chosen and rejected are equal" in listed[0]
    assert "different prompts: message 1 of chosen (user)" in listed[1]
    assert "rejected is empty" in listed[2]
    assert "a ranking of 1 has nothing to compare" in listed[3]
    code, out, _ = run()
    assert code == 2 and f"{run.file}:2" not in out
    assert "--validate names every faulty record" in out


def test_what_is_found_is_counted(run: PreferenceRun, chat: ChatTemplate) -> None:
    code, out, _ = run("--json")
    figures = json.loads(out)
    encoded = [encoded_answers(chat, record) for record in GOOD]
    lengths = sorted(sum(e.turns[-1][1] - 1 for e in each) for each in encoded)
    expected = {
        "records": 3,
        "forms": {"pair": 2, "ranking": 1},
        "answers": 2 + 4 + 2,
        # Of the ranking's six, b and c are equal.
        "pairs": 1 + 5 + 1,
        "ties": 1,
        "repeated_answers": 1,
        "margins": 1,
        "tokens": sum(len(e.ids) for each in encoded for e in each),
        "counted_tokens": sum(b - a for each in encoded for e in each for a, b in e.turns),
        "faults": 4,
    }
    assert code == 2 and {name: figures[name] for name in expected} == expected
    assert figures["length_quantiles"]["0.5"] == lengths[1]
    assert figures["length_quantiles"]["1.0"] == lengths[2]
    sizes = [[sum(b - a for a, b in e.turns) for e in each] for each in encoded]
    longer = sum(
        ours > theirs
        for record, counts in zip(GOOD, sizes, strict=True)
        for one, ours in zip(record.answers, counts, strict=True)
        for other, theirs in zip(record.answers, counts, strict=True)
        if one.value > other.value
    )
    assert figures["pairs_whose_better_answer_is_longer"] == longer > 0
    text = run()[1]
    share = f"{100 * longer / 7:.1f} % with the longer answer chosen"
    assert f"  pairs                          7 ({share})" in text
    assert "  of equal rank                  1 pairs" in text


def test_records_longer_than_the_sequence_are_listed(
    run: PreferenceRun, chat: ChatTemplate
) -> None:
    run.file.write_text("".join(f"{json.dumps(RECORDS[n])}\n" for n in (0, 2, 6)))
    encoded = encoded_answers(chat, GOOD[2])
    length = sum(e.turns[-1][1] - 1 for e in encoded)
    assert run("--validate", "--seq-length", length)[0] == 0
    code, out, _ = run("--validate", "--seq-length", length - 1)
    assert code == 2
    assert f"{run.file}:3: its 2 answers, each with the prompt, take {length:,} tokens" in out
    assert run("--seq-length", length - 1)[0] == 0  # counted only
    # A reward reads the end of the turn and what the template writes behind it.
    whole = sum(len(e.ids) for e in encoded)
    assert whole > length
    assert run("--validate", "--reward", "--seq-length", whole - 1)[0] == 2
    assert run("--validate", "--reward", "--seq-length", whole)[0] == 0


def test_show_marks_what_counts(run: PreferenceRun) -> None:
    _, out, _ = run("--show", 2)
    start = "<|im_start|>user↵\n压力？<|im_end|>↵\n<|im_start|>assistant↵\n"
    assert "--- first (pair, " in out
    assert f"{start}\n[chosen, by 2]\n⟦15.5 MPa<|im_end|>⟧↵\n\n[rejected]\n⟦a lot<|im_end|>⟧" in out
    places = {"1": 2, "2": 1, "3": 2, "5": 4}
    for number, place in places.items():
        assert f"[answer {number}, place {place}]" in out
    assert "[answer 4" not in out and out.count("--- ") == 2


def test_show_of_several_turns_and_labels(run: PreferenceRun) -> None:
    said = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in said]
    run.file.write_text(json.dumps({"messages": messages, "label": False}) + "\n")
    code, out, _ = run("--show", 1)
    assert code == 0
    shown = out.partition("\n")[2]
    assert "b<|im_end|>↵" in shown.partition("[the last message, bad]")[0]
    assert "⟦d<|im_end|>⟧" in shown and "⟦b" not in shown, "turns of the prompt do not count"
    assert "good answers                   0 of 1" in out


def test_files_without_records_and_settings_without_effect(run: PreferenceRun) -> None:
    run.file.write_text("\n")
    code, out, _ = run("--validate")
    assert code == 2 and f"{run.file}:1: the file holds no record" in out.splitlines()
    for options in (("--json", "--show", 1), ("--reward", "--last-turn-only")):
        with pytest.raises(SystemExit) as ended:
            run(*options)
        assert ended.value.code == 2
