"""The quickstart's own parts: what it learns from, which folders it removes, what it reports."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_cgn.data.preference_records import Preference, read_preferences

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tools() -> dict[str, ModuleType]:
    """The modules as the script sees them: beside it on the path."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        parts = ("", "_data", "_models", "_preferences", "_report")
        names = [f"quickstart{part}" for part in parts]
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_held_out_samples_are_divided_by_language(
    tools: dict[str, ModuleType], tmp_path: Path, kind: str
) -> None:
    counts = tools["quickstart_data"].divide_held_out(tmp_path)
    found = {
        language: _ids(tmp_path / f"{kind}_{language}_held_out.jsonl") for language in ("zh", "en")
    }
    everything = _ids(ROOT / f"samples/{kind}_held_out.jsonl")
    assert sorted(found["zh"] + found["en"]) == sorted(everything)
    for language, ids in found.items():
        assert counts[f"{kind}_{language}_held_out"] == len(ids)
        known = _ids(ROOT / f"samples/{kind}_{language}.jsonl")
        assert counts[f"{kind}_{language}_train"] == len(known) and not set(known) & set(ids)


def _ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text("utf-8").splitlines()]


def test_the_questions_asked_are_held_out_ones(tools: dict[str, ModuleType]) -> None:
    train = "".join(
        (ROOT / f"samples/{kind}_{language}.jsonl").read_text("utf-8")
        for kind in ("sft", "preference")
        for language in ("zh", "en")
    )
    asked = tools["quickstart_data"].questions()
    assert asked and all(question.text not in train for question in asked)


def test_only_an_earlier_quickstart_is_removed(
    tools: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quickstart = tools["quickstart"]
    model = ROOT / ".cache/smollm2-135m-instruct"
    output = tmp_path / "run"
    (output / "sft").mkdir(parents=True)
    mine = output / "sft/mine.txt"
    mine.write_text("keep me")
    monkeypatch.setattr(
        sys, "argv", ["quickstart", "--model", str(model), "--output-dir", str(output)]
    )
    assert quickstart.main() == 2
    assert "no earlier quickstart" in capsys.readouterr().err and mine.exists()
    (output / quickstart.MARK).touch()
    quickstart._make_room(output, model)
    assert [path.name for path in output.iterdir()] == [quickstart.MARK]


def test_a_missing_export_is_named(
    tools: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    quickstart = tools["quickstart"]
    trained: list[str] = []
    monkeypatch.setattr(quickstart, "index_documents", lambda *_: {})
    monkeypatch.setattr(quickstart, "divide_held_out", lambda *_: {})
    monkeypatch.setattr(quickstart, "_train", lambda stage, *_: trained.append(stage))
    model = ROOT / ".cache/smollm2-135m-instruct"
    words = ["--model", str(model), "--output-dir", str(tmp_path / "run"), "export.enabled=false"]
    monkeypatch.setattr(sys, "argv", ["quickstart", *words])
    assert quickstart.main() == 2
    assert trained == ["cpt"] and "run/export/config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "overrides", "sft", "dpo"),
    [
        ([], [], [], []),
        (["train.train_iters=2"], ["train.train_iters=2"], [], []),
        (["a.b=1", "c=2", "--sft", "d=3", "e=4"], ["a.b=1", "c=2"], ["d=3", "e=4"], []),
        (["--sft", "d=3", "--output-dir", "runs/x"], [], ["d=3"], []),
        (["a=1", "--dpo", "b=2", "--sft", "c=3"], ["a=1"], ["c=3"], ["b=2"]),
    ],
)
def test_settings_go_to_the_part_they_are_for(
    tools: dict[str, ModuleType],
    words: list[str],
    overrides: list[str],
    sft: list[str],
    dpo: list[str],
) -> None:
    args = tools["quickstart"]._parser().parse_args(words)
    assert (args.overrides, args.sft, args.dpo) == (overrides, sft, dpo)


GOOD: dict[str, Any] = {
    "domain_zh": (2.0, 1.8),
    "domain_en": (1.2, 1.1),
    "general": (1.5, 1.52),
    "zh": (3.0, 2.5),
    "en": (2.0, 1.9),
    "difference": 1e-5,
    "zh/rewards/margins": (0.0, 0.3),
    "en/rewards/margins": (0.0, 0.2),
    # Means of what `SCORED` says.
    "zh/logps/chosen": (-25.0, -20.0),
    "zh/logps/rejected": (-25.0, -36.0),
    "en/logps/chosen": (-50.0, -50.0),
    "en/logps/rejected": (-40.0, -38.0),
}
SCORED = (
    ("zh", "unsafe", ((-20, -30), (-18, -33))),
    ("zh", "vague", ((-30, -20), (-22, -39))),
    ("en", "wrong figure", ((-50, -40), (-50, -38))),
)
"""Language, fault, and log-probabilities of ten tokens of both answers, before and after."""
MARGINS_FALL = "Held-out margins rise above 0 in both languages: **NO**"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"domain_zh": (2.0, 2.01)}, "Domain bits per byte fall: **NO**"),
        ({"general": (1.5, 1.6)}, "rise by at most 5%: **NO** (+6.7%)"),
        ({"general": (1.5, None)}, "rise by at most 5%: **NO** (+nan%)"),
        ({"en": (2.0, 2.1)}, "falls in both languages: **NO**"),
        ({"difference": 0.01}, "within 0.001: **NO** (1.0e-02)"),
        ({"en/rewards/margins": (0.0, -0.1)}, MARGINS_FALL),
        ({"zh/rewards/margins": (0.0, None)}, MARGINS_FALL),
        ({"zh/logps/chosen": (-25.0, -20.1)}, "within 0.001 a token: **NO** (1.0e-02)"),
        ({"en/logps/rejected": (-40.0, None)}, "within 0.001 a token: **NO** (nan)"),
    ],
)
def test_the_report_says_what_is_not_as_it_should_be(
    tools: dict[str, ModuleType], tmp_path: Path, change: dict[str, Any], told: str | None
) -> None:
    scores = GOOD | change
    for part in ("sft", "dpo"):
        (tmp_path / part).mkdir()
    _write_records(tmp_path, scores, ("domain_zh", "domain_en", "general"), ("bits_per_byte",))
    _write_records(tmp_path / "sft", scores, ("zh", "en"), ("token_accuracy",))
    pairs = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    _write_records(tmp_path / "dpo", scores, ("zh", "en"), pairs)
    findings = _findings(tools, difference=scores["difference"])
    passed = tools["quickstart_report"].write_report(tmp_path, findings)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert passed == (told is None) and text.count("**NO**") == (told is not None)
    assert told is None or told in text
    assert "3 steps, 300 tokens, 20 tokens/s" in text and "1.5 minutes in all" in text
    assert "- after tuning: tuned says … *(cut off)*" in text
    assert "147 pairs to learn from and 3 held-out ones" in text
    assert "in 1 of 3 held-out pairs before and 2 after" in text
    assert "| unsafe | 1 | 1 | 1 |" in text and "| wrong figure | 1 | 0 | 1 |" in text
    assert "| all | 3 | 2 | 3 |" in text


def _write_records(
    folder: Path, scores: dict[str, Any], names: tuple[str, ...], kinds: tuple[str, ...]
) -> None:
    """Write held-out scores before and after; those of no name of their own are a source's loss."""
    held_out = [
        {
            f"val/{name}/{kind}": scores.get(f"{name}/{kind}", scores[name])[place]
            for name in names
            for kind in ("loss", *kinds)
        }
        for place in (0, 1)
    ]
    steps = [
        {"step": n, "loss": 1.0, "tokens": 100 * n, "tokens_per_s": 10.0 * n} for n in (1, 2, 3)
    ]
    records = [{"step": 0, **held_out[0]}, *steps, {"step": 3, **held_out[1]}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")


def _findings(tools: dict[str, ModuleType], *, difference: float) -> Any:
    report, models = tools["quickstart_report"], tools["quickstart_models"]
    check = models.AdapterCheck(rank=16, parameters=5, model_parameters=1000, difference=difference)
    answers = [
        report.Answers([f"{name} text"], [models.Answer(f"{name} says", ended=name != "tuned")])
        for name in ("base", "pretrained", "tuned", "aligned")
    ]
    return report.Findings(
        documents={"domain_zh_train": {"documents": 3, "tokens": 4000, "bytes": 9000}},
        samples={"sft_zh_train": 2},
        prompts=("Once",),
        asked=[tools["quickstart_data"].Question("为什么？", "因为。")],
        answers=answers,
        adapter=check,
        preferences=_preferences(tools),
        seconds={"all": 90.0},
    )


def _preferences(tools: dict[str, ModuleType]) -> Any:
    told, score = tools["quickstart_preferences"], tools["quickstart_models"].AnswerScore
    before, after = (
        [told.PairScore(*(score(logprob, 10) for logprob in sides[place])) for *_, sides in SCORED]
        for place in (0, 1)
    )
    prompt = [{"role": "user", "content": "?"}]
    pairs = [told.Pair(prompt, "yes", "no", language, fault) for language, fault, _ in SCORED]
    return told.Preferences(pairs * 49, pairs, before, after)


def test_pairs_are_read_in_each_of_their_forms(tools: dict[str, ModuleType]) -> None:
    """The same prompts and answers as training finds in them."""
    for name in ("zh", "en", "held_out"):
        path = ROOT / f"samples/preference_{name}.jsonl"
        found = tools["quickstart_preferences"].read_pairs(path)
        for pair, record in zip(found, read_preferences(path), strict=True):
            assert isinstance(record, Preference)
            prompt = [{"role": m.role, "content": m.content} for m in record.record.prompt]
            answers = [answer.messages[0].content for answer in record.record.answers]
            assert (pair.prompt, [pair.chosen, pair.rejected]) == (prompt, answers)


def test_letters_tell_only_what_was_counted(tools: dict[str, ModuleType]) -> None:
    """By hand: of the pairs of letters "ab" and "xy", each is known from one side."""
    told = tools["quickstart_preferences"]

    def pair(chosen: str, rejected: str) -> Any:
        return told.Pair([], chosen, rejected, "en", "vague")

    known = [pair("ab", "xy")]
    asked = [pair("AB", "xy"), pair("xy", "ab"), pair("cd", "xy"), pair("cd", "ef")]
    assert told.tell_by_letters(known, asked) == [True, False, True, False]


def test_the_samples_say_how_much_wording_tells(tools: dict[str, ModuleType]) -> None:
    told, samples = tools["quickstart_preferences"], ROOT / "samples"
    known = [p for k in ("zh", "en") for p in told.read_pairs(samples / f"preference_{k}.jsonl")]
    pairs = told.read_pairs(samples / "preference_held_out.jsonl")
    right = sum(told.tell_by_letters(known, pairs))
    said = " ".join((samples / "README.md").read_text("utf-8").split())
    assert f"tells {right} of the {len(pairs)} held-out pairs apart" in said
