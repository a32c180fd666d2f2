"""What a reference's scores depend on, how answers are packed to be scored, and what is told."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_cgn.config.schema import ChatConfig, DataConfig, LoraConfig, ModelConfig, RunConfig
from megatron_cgn.data.preference import (
    PreferenceData,
    build_preference_data,
    plan_preference,
)
from megatron_cgn.data.reference import ReferenceCache, where
from megatron_cgn.data.reference_answers import Answers, answers_between, wanted_answers
from megatron_cgn.data.reference_rows import ScoringRows
from megatron_cgn.data.sft_loader import ConversationRow
from megatron_cgn.errors import ModelError
from megatron_cgn.eval.reference_facts import model_about, model_facts
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.testing import tiny_hf_model
from tests.unit.sft_samples import WORDS, World, sft_run, source

MODEL = {"weights": "w1", "model": "m1", "adapter": None, "precision": "fp32"}
SEQ_LENGTH = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("reference"))


def pairs(count: int, *, answers: int = 2) -> list[dict[str, Any]]:
    """Records whose answers differ in length."""
    return [
        {
            "prompt": f"{number} {WORDS[number % 7]}",
            "answers": [" ".join(["pump"] * (1 + number % 5 + n)) for n in range(answers)],
        }
        for number in range(count)
    ]


def opened(world: World, *paths: str, **settings: Any) -> PreferenceData:
    settings = {"epochs": 1.0, **settings}
    sources = [source(f"s{place}", path) for place, path in enumerate(paths)]
    run = dataclasses.replace(sft_run(sources, **settings), stage="dpo")
    plan = plan_preference(
        run, chat=world.chat, tokenizer=world.tokenizer, cache=world.root / "cache"
    )
    return build_preference_data(plan)


def books(cache: Path, data: PreferenceData, **model: Any) -> ReferenceCache:
    return ReferenceCache(
        cache, Answers.of(data), model={**MODEL, **model}, about={"model": "/models/x"}
    )


def reasons(cache: Path, data: PreferenceData, **model: Any) -> list[str]:
    found = books(cache, data, **model)
    return list(found.reasons(np.flatnonzero(np.isnan(found.logps))))


def fill(cache: Path, data: PreferenceData, numbers: list[int] | None = None) -> None:
    with books(cache, data) as found:
        some = np.arange(len(found.logps)) if numbers is None else np.array(numbers)
        found.put(some, -some.astype(np.float64))


def test_answers_are_read_as_training_reads_them(world: World) -> None:
    first = world.write("first", pairs(5))
    second = world.write("second", pairs(4, answers=3))
    data = opened(world, first, second)
    answers = Answers.of(data)
    assert [len(file.lines) for file in answers.files] == [10, 12]
    assert answers.name == "answers" and len(answers.lengths) == 22
    seen = 0
    for sequence in range(len(data.train)):
        row = data.train[sequence]
        if not len(row.answers):
            continue
        again = answers.row(row.answers.tolist())
        for name in ("tokens", "labels", "loss_mask"):
            assert np.array_equal(getattr(again, name), getattr(row, name))
        assert again.lengths == row.lengths
        assert answers.lengths[row.answers].tolist() == list(row.lengths)
        seen += len(row.answers)
    assert seen == 22
    assert where(answers, 9) == f"{first}:5" and where(answers, 10) == f"{second}:1"
    counted = np.concatenate([file.counted for file in answers.files])
    assert counted.sum() == answers.row(range(22)).loss_mask.sum()


def test_only_what_a_run_reads_is_wanted(world: World) -> None:
    path = world.write("many", pairs(40))
    whole = opened(world, path, validation_fraction=0.3)
    assert wanted_answers(whole, validation_sequences=None).tolist() == list(range(80))
    short = opened(
        world,
        path,
        validation_fraction=0.3,
        train_iters=2,
        epochs=None,
        packing=False,
        global_batch_size=3,
    )
    (held_out,) = short.validation.values()
    for limit, sequences in ((None, len(held_out)), (2, 2), (1000, len(held_out))):
        wanted = wanted_answers(short, validation_sequences=limit)
        assert len(wanted) == 2 * (2 * 3 + sequences)
    first = answers_between(short.records, short.train, 0, 3)
    rows = [short.train[place].answers for place in range(3)]
    assert sorted(first.tolist()) == sorted(np.concatenate(rows).tolist())
    # Blank sequences at the end hold nothing.
    assert not len(answers_between(short.records, short.train, 6, 9))


def test_scores_belong_to_a_file_whatever_stands_beside_it(world: World, tmp_path: Path) -> None:
    one = world.write("one", pairs(5))
    two = world.write("two", pairs(7, answers=3))
    data = opened(world, one, two)
    fill(tmp_path, data)
    both = books(tmp_path, opened(world, two, one))
    assert np.array_equal(both.logps[:21], -np.arange(10.0, 31.0))
    assert np.array_equal(both.logps[21:], -np.arange(10.0))
    assert both.put(np.array([0, 30]), np.array([-1.0, -2.0])) is None


def test_why_answers_are_not_known_is_told(world: World, tmp_path: Path) -> None:
    path = world.write("why", pairs(6))
    data = opened(world, path)
    assert reasons(tmp_path, data) == [f"  {path}: 12 answers: not scored before"]
    fill(tmp_path, data, [0, 1, 2])
    (line,) = reasons(tmp_path, data)
    assert line == f"  {path}: 9 answers: those that no run before needed or finished"
    fill(tmp_path, data)
    assert reasons(tmp_path, data) == []
    for fact, told in (
        ({"weights": "w2"}, "of other weights (/models/x), which are not used"),
        ({"model": "m2"}, "of another config.json of the model, which"),
        ({"adapter": {"weights": "a"}}, "of another lora.adapter_path, which"),
        ({"precision": "bf16"}, "in another precision, which"),
        ({"weights": "w2", "precision": "bf16"}, "of other weights and in another precision (/"),
    ):
        (line,) = reasons(tmp_path, data, **fact)
        assert f"{path}: 12 answers: there are scores {told}" in line
    world.write("why", [*pairs(6), {"prompt": "new", "answers": ["valve", "rod"]}])
    (line,) = reasons(tmp_path, opened(world, path))
    assert (
        "14 answers: there are scores of another content of the file, another tokenizer or" in line
    )


def test_a_setting_scores_only_what_it_changes(world: World, tmp_path: Path) -> None:
    records = [*pairs(4), {"prompt": "long", "answers": [" ".join(["rod"] * 30), "valve"]}]
    path = world.write("setting", records)
    keep = ChatConfig(truncation="keep_start")
    whole = opened(world, path, seq_length=256, chat=keep)
    fill(tmp_path, whole)
    most = int(whole.records.lengths[:4].max())
    shorter = opened(world, path, seq_length=most, chat=keep)
    assert whole.records.answers.lengths[9] < most // 2 < whole.records.answers.lengths[8]
    found = books(tmp_path, shorter)
    assert np.flatnonzero(np.isnan(found.logps)).tolist() == [8]
    (line,) = reasons(tmp_path, shorter)
    assert "1 answers: 1 are read differently than when they were scored: data.seq_length" in line
    last = ChatConfig(truncation="keep_start", last_turn_only=True)
    (line,) = reasons(tmp_path, opened(world, path, seq_length=256, chat=last))
    assert "there are scores with another chat.last_turn_only, which are not used" in line


def test_a_useless_neighbour_hinders_nobody(world: World, tmp_path: Path) -> None:
    data = opened(world, world.write("neighbour", pairs(3)))
    (tmp_path / "reference-0").mkdir()
    (tmp_path / "reference-0" / "facts.json").write_text("{")
    (tmp_path / "reference-1").write_text("")
    assert "not scored before" in reasons(tmp_path, data)[0]


class Lengths:
    """Answers of which only the length is known; the first token of each is its number."""

    name = "answers"
    files: tuple[Any, ...] = ()

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, dtype=np.int32)

    def row(self, numbers: Any) -> ConversationRow:
        sizes = [int(self.lengths[n]) for n in numbers]
        tokens = np.concatenate([np.full(s, n) for n, s in zip(numbers, sizes, strict=True)])
        return ConversationRow(
            tokens=tokens,
            labels=tokens,
            loss_mask=np.ones(len(tokens), dtype=np.bool_),
            lengths=tuple(sizes),
            sources=(0,) * len(sizes),
        )


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, SEQ_LENGTH), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
)
def test_rows_of_all_ranks_hold_every_answer_once(
    lengths: list[int], dp_size: int, micro_batch_size: int, pad_to_full: bool
) -> None:
    wanted = np.arange(0, len(lengths), 2)
    ranks = [
        ScoringRows(
            Lengths(lengths),
            wanted,
            micro_batch_size=micro_batch_size,
            seq_length=SEQ_LENGTH,
            pad_to_full=pad_to_full,
            dp_rank=rank,
            dp_size=dp_size,
        )
        for rank in range(dp_size)
    ]
    capacity = micro_batch_size * SEQ_LENGTH
    assert {len(rows) for rows in ranks} == {len(ranks[0])}
    seen: list[int] = []
    for rows in ranks:
        assert np.array_equal(rows.numbers, ranks[0].numbers)
        for place, batch in enumerate(rows):
            assert (
                batch.tokens.size(1) == capacity if pad_to_full else batch.tokens.size(1) % 8 == 0
            )
            mine = rows.numbers[rows.mine(place)].tolist()
            assert sum(lengths[n] for n in mine) == int(batch.loss_mask.sum()) <= capacity
            starts = batch.cu_seqlens[: len(mine)].tolist()  # type: ignore[index]
            assert batch.tokens[0, starts].tolist() == mine
            seen += mine
    assert sorted(seen) == wanted.tolist()
    halves = [ranks[0].between(a, b) for a, b in ((0, 1), (1, len(ranks[0])))]
    assert (halves[0].start, halves[0].stop, halves[1].stop) == (0, halves[1].start, len(wanted))


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    path = tiny_hf_model(tmp_path / "model", vocab_size=64, num_hidden_layers=1)
    return RunConfig(stage="dpo", precision="fp32", model=ModelConfig(hf_path=str(path)))


def facts(run: RunConfig) -> dict[str, Any]:
    found = model_facts(run, read_architecture(str(run.model.hf_path)))
    assert json.loads(json.dumps(found)) == found
    return found


def _changed_weight(run: RunConfig) -> RunConfig:
    file = Path(str(run.model.hf_path)) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"].mul_(1.0001)
    save_file(tensors, file, metadata={"format": "pt"})
    return run


def _changed_config(run: RunConfig) -> RunConfig:
    file = Path(str(run.model.hf_path)) / "config.json"
    config = json.loads(file.read_text())
    config["rms_norm_eps"] = 1e-3
    file.write_text(json.dumps(config))
    return run


def _adapter(run: RunConfig) -> RunConfig:
    path = Path(str(run.model.hf_path)).parent / "adapter"
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes(b"any bytes")
    return dataclasses.replace(run, lora=LoraConfig(rank=2, adapter_path=str(path)))


CHANGES: dict[str, Callable[[RunConfig], RunConfig]] = {
    "weights": _changed_weight,
    "model": _changed_config,
    "adapter": _adapter,
    "precision": lambda run: dataclasses.replace(run, precision="bf16"),
}


@pytest.mark.parametrize("fact", CHANGES)
def test_what_decides_scores_is_a_fact_of_its_own(run: RunConfig, fact: str) -> None:
    before = facts(run)
    after = facts(CHANGES[fact](run))
    assert [name for name in before if before[name] != after[name]] == [fact]


def test_what_decides_no_score_is_no_fact(run: RunConfig, tmp_path: Path) -> None:
    before, path = facts(run), Path(str(run.model.hf_path))
    moved = path.rename(tmp_path / "elsewhere")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    other = dataclasses.replace(
        run,
        seed=7,
        output_dir="elsewhere",
        model=ModelConfig(hf_path=str(moved)),
        data=DataConfig(seq_length=77),
        # Adapters that are not loaded are off while the reference scores.
        lora=LoraConfig(rank=8, targets=("q_proj",)),
    )
    assert facts(other) == before
    assert model_about(other) == {"model": str(moved)}


def test_an_adapter_counts_with_its_scale(run: RunConfig) -> None:
    adapted = _adapter(run)
    first = facts(adapted)
    stronger = dataclasses.replace(adapted.lora, alpha=64.0)
    assert facts(dataclasses.replace(adapted, lora=stronger)) != first
    file = Path(str(adapted.lora.adapter_path)) / "adapter_model.safetensors"
    file.write_bytes(b"many bytes")
    assert facts(adapted) != first
    file.unlink()
    with pytest.raises(ModelError, match="lora.adapter_path: .*adapter_model.safetensors cannot"):
        facts(adapted)
