"""What a user can get wrong about preferences: one message and exit code 2, or a counted policy."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dpo_runs import dpo_overrides
from tiny_chats import CHATML, TinyChats
from tiny_preferences import TinyPreferences, write_tiny_preferences
from train_runs import Ended, Zygote

SHORT = (
    "train.train_iters=1",
    "export.enabled=false",
    "samples.count=0",
    "samples.max_new_tokens=128",
)
ASKED = {"role": "user", "content": "coolant?"}


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> TinyPreferences:
    return write_tiny_preferences(tmp_path_factory.mktemp("preferences"))


def _refused(ended: Ended, output: Path, *texts: str) -> None:
    """Every rank exits 2; standard error is the one message; nothing was left behind."""
    assert set(ended.codes) == {2}, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    assert sum(line.startswith("error: ") for line in ended.stderr.splitlines()) == 1, ended.stderr
    for text in texts:
        assert text in ended.stderr, ended.stderr
    if output.is_dir():
        # Only encoded answers, which are whole and keyed by what they are of.
        assert [p.name for p in output.iterdir()] in ([], ["cache"])
        assert not [p for p in output.rglob("*") if ".tmp" in p.name or ".partial" in p.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something wrong, and what the message must say."""

    texts: tuple[str, ...]
    settings: tuple[str, ...] = ()
    records: tuple[Any, ...] = ()
    """Added to the 30 records of pairs."""
    ranks: int = 1


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


RECORDS: list[tuple[Any, str]] = [
    (
        {"prompt": "pump?", "chosen": "steam", "rejected": " steam\n"},
        "chosen and rejected are equal",
    ),
    (
        {
            "chosen": [ASKED, _answer("a")],
            "rejected": [{"role": "user", "content": "steam?"}, _answer("b")],
        },
        "chosen and rejected have different prompts",
    ),
    ({"prompt": "pump?", "chosen": "", "rejected": "steam"}, "chosen is empty"),
    ({"prompt": "pump?", "chosen": "steam", "rejected": " "}, "rejected is empty"),
    ({"prompt": "pump?", "answers": ["steam"]}, "answers: a ranking of 1 has nothing to compare"),
    (
        {"prompt": "pump?", "answers": [{"text": t, "rank": 1} for t in "abc"]},
        "all 3 answers have the same rank",
    ),
    (
        {"prompt": "pump?", "chosen": "a", "rejected": "b<|im_end|>"},
        "rejected: message 2 (assistant) spells the special token '<|im_end|>'",
    ),
    ({"messages": [ASKED, _answer("a")]}, "is of no known form"),
    (
        {"prompt": "pump?", "completion": "a", "label": True},
        "is one answer with a label, and the first record",
    ),
]
"""Faulty records, and what is said of each. As many as one message names, but for one."""

FAULTS = {
    "faulty records": Fault(
        records=tuple(record for record, _ in RECORDS),
        texts=(
            *(f"pairs.jsonl:{31 + place}: {text}" for place, (_, text) in enumerate(RECORDS)),
            "tools/preprocess_data.py --preference --validate",
        ),
        ranks=2,
    ),
    "pairs for kto": Fault(
        settings=("loss.type=kto",),
        texts=("pairs.jsonl: holds answers to compare, and loss.type=kto",),
        ranks=2,
    ),
    "pair longer than the sequence": Fault(
        settings=("chat.truncation=error", "data.seq_length=60"),
        texts=("chat.truncation=error", "records take more than data.seq_length=60", "keep_start"),
    ),
    "all longer than the sequence": Fault(
        settings=("data.seq_length=8",),
        texts=("data.sources[pairs]: nothing is left to train on of 30 records",),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(
    chats: TinyChats, preferences: TinyPreferences, zygote: Zygote, tmp_path: Path, name: str
) -> None:
    fault = FAULTS[name]
    shutil.copy(preferences.pairs, tmp_path / "pairs.jsonl")
    with (tmp_path / "pairs.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in fault.records)
    source = f"data.sources=[{{name: pairs, path: {tmp_path / 'pairs.jsonl'}}}]"
    ended = zygote.run(
        dpo_overrides(chats, preferences, tmp_path / "run", *SHORT, *fault.settings, source),
        stderr=tmp_path / "stderr",
        ranks=fault.ranks,
    )
    _refused(ended, tmp_path / "run", *fault.texts)


def test_labels_for_a_loss_of_pairs(
    chats: TinyChats, preferences: TinyPreferences, zygote: Zygote, tmp_path: Path
) -> None:
    more = (*SHORT, preferences.unpaired(), "loss.type=ipo")
    ended = zygote.run(
        dpo_overrides(chats, preferences, tmp_path / "run", *more), stderr=tmp_path / "stderr"
    )
    _refused(ended, tmp_path / "run", "labels.jsonl: holds single answers", "loss.type=kto")


@pytest.mark.parametrize(("policy", "text"), [("drop", "left out, longer"), ("keep_end", "trunc")])
def test_pairs_longer_than_the_sequence_are_counted(
    chats: TinyChats,
    preferences: TinyPreferences,
    zygote: Zygote,
    tmp_path: Path,
    policy: str,
    text: str,
) -> None:
    source = f"data.sources=[{{name: pairs, path: {preferences.pairs}}}]"
    more = (*SHORT, f"chat.truncation={policy}", "data.seq_length=80", source)
    ended = zygote.run(
        dpo_overrides(chats, preferences, tmp_path, *more), stderr=tmp_path / "stderr"
    )
    assert ended.codes == [0], ended.stderr
    (line,) = (line for line in ended.stderr.splitlines() if text in line and "pairs" in line)
    account = json.loads((tmp_path / "preference.json").read_text())
    (file,) = account["sources"][0]["files"]
    number = file["left_out_too_long" if policy == "drop" else "truncated"]
    assert 0 < number < 30 and f"of 30 records {number} " in line


def test_ties_in_rankings_are_counted(
    chats: TinyChats, preferences: TinyPreferences, zygote: Zygote, tmp_path: Path
) -> None:
    more = (*SHORT, f"data.sources=[{{name: rankings, path: {preferences.rankings}}}]")
    ended = zygote.run(
        dpo_overrides(chats, preferences, tmp_path, *more), stderr=tmp_path / "stderr"
    )
    assert ended.codes == [0], ended.stderr
    account = json.loads((tmp_path / "preference.json").read_text())
    records = account["training"]["records"]
    # Three answers, two of equal rank: two pairs, and one tie, a record.
    assert account["training"]["pairs"] == 2 * records
    assert account["training"]["ties"] == records
    assert f"{2 * records} pairs, {records} more of equal rank are not compared" in ended.stderr


@pytest.fixture(scope="module")
def scored(
    chats: TinyChats,
    preferences: TinyPreferences,
    zygote: Zygote,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A cache with the reference's scores."""
    root = tmp_path_factory.mktemp("scored")
    more = (*SHORT, f"data.cache_dir={root / 'cache'}")
    ended = zygote.run(
        dpo_overrides(chats, preferences, root / "run", *more), stderr=root / "stderr"
    )
    assert ended.codes == [0], ended.stderr
    assert "reference: scored" in ended.stderr and "there are scores" not in ended.stderr
    return root / "cache"


def _other_weights(chats: TinyChats) -> None:
    from safetensors.torch import load_file, save_file

    path = chats.model / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] *= 1.5
    save_file(weights, path, metadata={"format": "pt"})


def _other_template(chats: TinyChats) -> None:
    text = CHATML.replace("'\n' }}", "'\n\n' }}")
    assert text != CHATML
    (chats.model / "chat_template.jinja").write_text(text, "utf-8")


STALE: dict[str, tuple[Callable[[TinyChats], object], str]] = {
    "other weights": (_other_weights, "there are scores of other weights"),
    "other template": (_other_template, "another tokenizer or another chat template"),
}


@pytest.mark.parametrize("name", STALE)
def test_a_stale_reference_is_not_used(
    chats: TinyChats,
    preferences: TinyPreferences,
    zygote: Zygote,
    scored: Path,
    tmp_path: Path,
    name: str,
) -> None:
    """The run finds scores that are not its own, says so, and makes its own."""
    change, told = STALE[name]
    shutil.copytree(chats.model, tmp_path / "model")
    shutil.copytree(scored, tmp_path / "cache")
    ours = TinyChats(model=tmp_path / "model", domain=chats.domain, general=chats.general)
    change(ours)
    more = (*SHORT, f"data.cache_dir={tmp_path / 'cache'}")
    ended = zygote.run(
        dpo_overrides(ours, preferences, tmp_path / "run", *more), stderr=tmp_path / "stderr"
    )
    assert ended.codes == [0], ended.stderr
    assert told in ended.stderr and "reference: scored" in ended.stderr
    assert "self-check before the first step: loss 0.6931" in ended.stderr


def test_a_damaged_reference_is_made_again(
    chats: TinyChats, preferences: TinyPreferences, zygote: Zygote, scored: Path, tmp_path: Path
) -> None:
    shutil.copytree(scored, tmp_path / "cache")
    damaged = list((tmp_path / "cache").glob("reference-*/scores-*.bin"))
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x55
        path.write_bytes(bytes(content))
    assert damaged
    more = (*SHORT, f"data.cache_dir={tmp_path / 'cache'}")
    ended = zygote.run(
        dpo_overrides(chats, preferences, tmp_path / "run", *more), stderr=tmp_path / "stderr"
    )
    assert ended.codes == [0], ended.stderr
    assert "reference: scored" in ended.stderr, "what cannot be trusted is made again"
    assert "self-check before the first step: loss 0.6931" in ended.stderr
