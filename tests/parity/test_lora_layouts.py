"""FP32 steps with adapters on every kind of layout, against `peft` and `transformers`.

`peft` begins with the adapters that ours drew, and reads the same batches; what it computes is the
reference of every case: ten steps where only the layout differs, a few where anything else does.
Batches have very unequal loss masks, as in the engine's own tests.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import STEPS, write_models
from lora_peft import PeftOutcome, peft_loop
from lora_runs import CLIP, LORA, LoraCase, LoraOutcome, join, layout, run_cases

from megatron_cgn.config.schema import LoraConfig, ParamGroupConfig
from megatron_cgn.testing import FP32_PARALLEL_RTOL, run_distributed

WEIGHTS_RTOL = 2e-3
"""Of a tensor's norm after ten steps. ``B`` begins at zero, so it is nothing but the sum of AdamW's
steps, whose size is the learning rate whatever the gradient's: where a gradient is as small as its
rounding, so is a step's sign (7e-4 was seen, in the keys of a model whose keys have biases)."""
FIRST_NEW = 900
"""Rows of the embedding from here on are new."""
BIAS = LoraConfig(rank=8, alpha=5.0, use_rslora=True, targets=("v_proj", "q_proj", "down_proj"))
QK = LoraConfig(rank=4, targets=("k_proj", "o_proj", "up_proj"))
ROWS = dataclasses.replace(LORA, modules_to_save=("embed_tokens", "lm_head"))
NEW_ROWS = (
    ParamGroupConfig(
        name="old",
        parameters=("embeddings", "output"),
        rows="old",
        rows_from=FIRST_NEW,
        trained_until_step=0,
    ),
)
DORA = dataclasses.replace(LORA, use_dora=True, targets=("q_proj", "v_proj", "o_proj", "up_proj"))
DROPPED = dataclasses.replace(LORA, dropout=0.3)
TIED = dataclasses.replace(LORA, modules_to_save=("embed_tokens",))
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}

_ten: dict[str, Any] = {"steps": STEPS}
_bias: dict[str, Any] = {"model": "qwen2-tied-bias", "lora": BIAS}
_qk: dict[str, Any] = {"model": "qwen3-qk-norm", "lora": QK}
_dora: dict[str, Any] = {"model": "qwen2-tied-bias", "lora": DORA}
_rows: dict[str, Any] = {"lora": ROWS, "groups": NEW_ROWS}
_tied: dict[str, Any] = {"model": "qwen2-tied-bias", "lora": TIED}
CASES: dict[str, LoraCase] = {
    "one": LoraCase(saves=True, **_ten),
    "one-bias": LoraCase(**_bias),
    "one-qk": LoraCase(**_qk),
    "one-dora": LoraCase(**_dora),
    "one-rows": LoraCase(saves=True, **_rows),
    "one-tied": LoraCase(saves=True, **_tied),
    "tp2": LoraCase(world=2, parallel=layout(tp=2), saves=True, **_ten),
    "tp2-sp-full-packed": LoraCase(
        world=2, parallel=layout(tp=2, sequence_parallel=True), recompute="full", packed=True
    ),
    "tp2-sp-qk": LoraCase(world=2, parallel=layout(tp=2, sequence_parallel=True), **_qk),
    "tp2-sp-dora": LoraCase(world=2, parallel=layout(tp=2, sequence_parallel=True), **_dora),
    "tp2-dropout": LoraCase(world=2, parallel=layout(tp=2), lora=DROPPED, recompute="full"),
    "tp2-sp-dropout": LoraCase(
        world=2, parallel=layout(tp=2, sequence_parallel=True), lora=DROPPED
    ),
    "tp2-rows-from-one": LoraCase(world=2, parallel=layout(tp=2), start="one-rows", **_rows),
    "pp2-bias": LoraCase(world=2, parallel=layout(pp=2), **_bias),
    "pp2-tied-from-one": LoraCase(world=2, parallel=layout(pp=2), start="one-tied", **_tied),
    "pp2-interleaved-full": LoraCase(
        world=2, parallel=layout(pp=2, vp=2), micro_batch_size=1, recompute="full"
    ),
    "cp2-packed": LoraCase(world=2, parallel=layout(cp=2), packed=True),
    "dp2": LoraCase(world=2, **_ten),
    "dp2-plain-optimizer": LoraCase(world=2, parallel=layout(distributed_optimizer=False)),
    "dp2-overlap-rows": LoraCase(world=2, parallel=layout(**OVERLAP), micro_batch_size=1, **_rows),
    "one-from-tp2": LoraCase(start="tp2", **_ten),
    "tp2-from-tp2": LoraCase(world=2, parallel=layout(tp=2), start="tp2", **_ten),
    "pp2-from-one": LoraCase(world=2, parallel=layout(pp=2), start="one", **_ten),
    "tp2-pp2": LoraCase(world=4, parallel=layout(tp=2, pp=2), **_ten),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def ranks(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[LoraOutcome]]:
    """Every case's outcomes, rank by rank."""
    root = tmp_path_factory.mktemp("lora")
    found = run_distributed(run_cases, 4, CASES, models, root, warm=True)
    return {name: [rank[name] for rank in found if name in rank] for name in CASES}


@pytest.fixture(scope="module")
def reference(
    models: dict[str, Path], ranks: dict[str, list[LoraOutcome]]
) -> dict[LoraConfig, PeftOutcome]:
    """What `peft` gives, by settings."""
    return {
        case.lora: peft_loop(
            models[case.model],
            case.lora,
            ranks[name][0].first,
            steps={c.steps for c in CASES.values() if c.lora == case.lora},
            first_row=FIRST_NEW if case.groups else 0,
        )
        for name, case in CASES.items()
        if name in ("one", "one-bias", "one-qk", "one-dora", "one-rows", "one-tied")
    }


def test_the_reference_clips_some_steps_only_and_changes_every_adapter(
    reference: dict[LoraConfig, PeftOutcome],
) -> None:
    norms = reference[LORA].grad_norms
    assert min(norms) < CLIP < max(norms)
    for outcome in reference.values():
        assert all(
            not torch.equal(last[name], drawn)
            for last in outcome.after.values()
            for name, drawn in outcome.drawn.items()
        )


@pytest.mark.parametrize("case", [name for name, c in CASES.items() if not c.lora.dropout])
def test_every_layout_is_peft(
    ranks: dict[str, list[LoraOutcome]], reference: dict[LoraConfig, PeftOutcome], case: str
) -> None:
    expected = reference[CASES[case].lora]
    steps = slice(CASES[case].half if CASES[case].start else 0, CASES[case].steps)
    for rank in ranks[case]:
        assert rank.losses == pytest.approx(expected.losses[steps], rel=FP32_PARALLEL_RTOL)
        assert rank.grad_norms == pytest.approx(expected.grad_norms[steps], rel=FP32_PARALLEL_RTOL)
    last = join([rank.last for rank in ranks[case]])
    head = last.pop("output_layer.weight", None)
    if head is not None and CASES[case].lora == TIED:
        assert torch.equal(head, last["embedding.word_embeddings.weight"])
    elif head is not None:
        last["output_layer.weight"] = head
    after = expected.after[CASES[case].steps]
    trained = {n: w for n, w in after.items() if n in last}
    assert last.keys() == trained.keys()
    assert trained.keys() == after.keys() or CASES[case].lora == TIED
    for name, weight in trained.items():
        assert (last[name] - weight).norm() < WEIGHTS_RTOL * weight.norm(), name


@pytest.mark.parametrize("case", CASES)
def test_frozen_weights_stay_bit_for_bit(ranks: dict[str, list[LoraOutcome]], case: str) -> None:
    for rank in ranks[case]:
        assert rank.frozen_before == rank.frozen_after


@pytest.mark.parametrize("case", [name for name, c in CASES.items() if not c.lora.modules_to_save])
def test_without_its_adapters_the_model_is_the_base_bit_for_bit(
    ranks: dict[str, list[LoraOutcome]], case: str
) -> None:
    assert all(rank.off_is_base for rank in ranks[case])


@pytest.mark.parametrize("case", ["tp2-dropout", "tp2-sp-dropout"])
def test_dropout_keeps_copies_alike_and_draws_its_own_for_what_is_split(
    ranks: dict[str, list[LoraOutcome]], case: str
) -> None:
    first, second = ranks[case]
    join([first.last, second.last])  # copies would part if an input were dropped differently
    assert first.draws[0] == second.draws[0] and first.draws[1] != second.draws[1]
    assert first.draws[0] != first.draws[1]
    without = ranks["one"][0].losses
    assert first.losses[0] == pytest.approx(without[0], rel=FP32_PARALLEL_RTOL)  # B is zero
    assert first.losses[-1] != pytest.approx(without[len(first.losses) - 1], rel=1e-4)


def test_rows_of_old_tokens_stay_bit_for_bit(ranks: dict[str, list[LoraOutcome]]) -> None:
    for case in (name for name, c in CASES.items() if c.groups):
        first = join([rank.first for rank in ranks[case]])
        last = join([rank.last for rank in ranks[case]])
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert torch.equal(first[name][:FIRST_NEW], last[name][:FIRST_NEW])
            assert not torch.equal(first[name][FIRST_NEW:], last[name][FIRST_NEW:])


def test_adapters_begin_as_those_of_peft(
    ranks: dict[str, list[LoraOutcome]], reference: dict[LoraConfig, PeftOutcome]
) -> None:
    """The same distribution: uniform within ±1/sqrt(columns), and nothing twice."""
    first = join([ranks["one"][0].first])
    drawn = reference[LORA].drawn
    assert first.keys() == drawn.keys()
    values = set()
    for name, ours in first.items():
        assert ours.shape == drawn[name].shape
        if name.endswith("lora_B"):
            assert not ours.any() and not drawn[name].any()
            continue
        limit = ours.shape[1] ** -0.5
        assert 0.9 * limit < ours.abs().max() <= limit
        assert 0.9 * limit < drawn[name].abs().max() <= limit
        # 256 or more uniform values: their mean square is within a quarter of limit² / 3.
        assert ours.square().mean().item() == pytest.approx(limit**2 / 3, rel=0.25)
        values.add(float(ours[0, 0]))
    assert len(values) == sum(name.endswith("lora_A") for name in first)


@pytest.mark.parametrize("case", [name for name, c in CASES.items() if c.lora == LORA])
def test_adapters_begin_alike_on_every_layout(
    ranks: dict[str, list[LoraOutcome]], case: str
) -> None:
    one, first = join([ranks["one"][0].first]), join([rank.first for rank in ranks[case]])
    assert one.keys() == first.keys()
    assert all(torch.equal(first[name], value) for name, value in one.items())


def test_resumed_on_its_own_layout_a_run_goes_on_bit_for_bit(
    ranks: dict[str, list[LoraOutcome]],
) -> None:
    whole, resumed = ranks["tp2"][0], ranks["tp2-from-tp2"][0]
    half = CASES["tp2"].half
    assert resumed.losses == whole.losses[half:] and len(resumed.losses) == STEPS - half
    assert resumed.grad_norms == whole.grad_norms[half:]
    ours, theirs = (join([r.last for r in ranks[n]]) for n in ("tp2", "tp2-from-tp2"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_holds_the_adapters_and_nothing_else(
    ranks: dict[str, list[LoraOutcome]],
) -> None:
    for case in ("one", "tp2"):
        adapters = set(ranks[case][0].first)
        moments = {f"optimizer.state.{m}.{n}" for n in adapters for m in ("exp_avg", "exp_avg_sq")}
        assert set(ranks[case][0].stored) == adapters | moments
