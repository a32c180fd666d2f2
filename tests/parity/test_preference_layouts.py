"""FP32 steps on every preference loss, on every kind of layout, against one process.

One start of four processes runs all cases, each on as many as it needs. Records have two or three
answers of very unequal lengths, and some are blank: a mean of means would show. That one process
is right is `test_preference_trl.py`'s to show.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
from lora_runs import join, layout
from preference_runs import (
    LORA,
    LOSSES,
    REWARDS,
    SOURCES,
    Head,
    PreferenceCase,
    PreferenceOutcome,
    read_weights,
    records,
    run_cases,
    write_models,
)

from megatron_cgn.testing import FP32_PARALLEL_RTOL, run_distributed

FP32_PARALLEL_ATOL = 1e-5
"""Of metrics that may be near zero, such as margins, which are differences of sums of hundreds."""
MOVED_RTOL = 1e-3
"""Difference of a trained tensor, of how far it has moved. AdamW's first steps move every weight by
the rate whatever its gradient's size, so rounding of the smallest gradients shows (3e-4 was
seen)."""
ADAPTERS_RTOL = 2e-3
"""Likewise of an adapter's, as in `test_lora_layouts.py`: ``B`` begins at zero."""

_score: dict[str, Any] = {"head": "score"}
_lora: dict[str, Any] = {"lora": LORA}
_TP2_PP2_SP = layout(tp=2, pp=2, sequence_parallel=True)
CASES: dict[str, PreferenceCase] = {
    "one": PreferenceCase(),
    "one-packed": PreferenceCase(packed=4),
    "one-packed-padded": PreferenceCase(packed=2, padded=True, recompute="full"),
    "tp2": PreferenceCase(world=2, parallel=layout(tp=2), packed=2),
    "tp2-sp": PreferenceCase(
        world=2, parallel=layout(tp=2, sequence_parallel=True), packed=2, padded=True
    ),
    "pp2": PreferenceCase(world=2, parallel=layout(pp=2), padded=True),
    "pp2-interleaved": PreferenceCase(world=2, parallel=layout(pp=2, vp=2), packed=2, padded=True),
    "dp2": PreferenceCase(world=2),
    "cp2": PreferenceCase(world=2, parallel=layout(cp=2), packed=2, padded=True),
    "tp2-pp2": PreferenceCase(world=4, parallel=layout(tp=2, pp=2), packed=2, padded=True),
    "one-lora": PreferenceCase(**_lora),
    "tp2-pp2-sp-lora": PreferenceCase(
        world=4, parallel=_TP2_PP2_SP, packed=2, padded=True, **_lora
    ),
    "score-one": PreferenceCase(**_score),
    "score-one-packed": PreferenceCase(packed=4, **_score),
    "score-tp2": PreferenceCase(world=2, parallel=layout(tp=2), packed=2, **_score),
    "score-tp2-sp": PreferenceCase(
        world=2, parallel=layout(tp=2, sequence_parallel=True), padded=True, **_score
    ),
    "score-pp2": PreferenceCase(world=2, parallel=layout(pp=2), padded=True, **_score),
    "score-pp2-interleaved": PreferenceCase(
        world=2, parallel=layout(pp=2, vp=2), padded=True, **_score
    ),
    "score-dp2": PreferenceCase(world=2, **_score),
    "score-cp2": PreferenceCase(world=2, parallel=layout(cp=2), packed=2, padded=True, **_score),
    "score-tp2-pp2-sp": PreferenceCase(
        world=4, parallel=_TP2_PP2_SP, packed=2, padded=True, **_score
    ),
    "score-one-lora": PreferenceCase(**_lora, **_score),
    "score-tp2-pp2-lora": PreferenceCase(
        world=4, parallel=layout(tp=2, pp=2), padded=True, **_lora, **_score
    ),
}


def _reference(case: PreferenceCase) -> str:
    """The case of one process, unpacked, that takes the same steps."""
    name = "one" if case.lora.rank is None else "one-lora"
    return name if case.head == "lm" else f"score-{name}"


OTHERS = [name for name, case in CASES.items() if _reference(case) != name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Head, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preference")


@pytest.fixture(scope="module")
def ranks(models: dict[Head, Path], root: Path) -> dict[str, list[PreferenceOutcome]]:
    """Every case's outcomes, rank by rank."""
    found = run_distributed(run_cases, 4, CASES, models, root, warm=True)
    return {name: [rank[name] for rank in found if name in rank] for name in CASES}


def test_the_steps_differ_and_teach(ranks: dict[str, list[PreferenceOutcome]]) -> None:
    for name, losses in (("one", LOSSES), ("score-one", REWARDS)):
        outcome = ranks[name][0]
        assert len(outcome.metrics) == len(losses)
        assert min(outcome.grad_norms) > 0
        assert len({m["loss"] for m in outcome.metrics}) == len(losses)
        for source in SOURCES:
            assert any(f"train/{source}/loss" in m for m in outcome.metrics)


@pytest.mark.parametrize("case", OTHERS)
def test_every_loss_on_every_layout_is_that_of_one_process(
    ranks: dict[str, list[PreferenceOutcome]], case: str
) -> None:
    (expected,) = ranks[_reference(CASES[case])]
    names = CASES[case].losses
    for rank in ranks[case]:
        assert rank.counts == expected.counts
        for name, mine, whole in zip(names, rank.metrics, expected.metrics, strict=True):
            assert mine == pytest.approx(whole, rel=FP32_PARALLEL_RTOL, abs=FP32_PARALLEL_ATOL), (
                name
            )
            assert mine["loss"] == pytest.approx(whole["loss"], rel=FP32_PARALLEL_RTOL), name
        assert rank.grad_norms == pytest.approx(expected.grad_norms, rel=FP32_PARALLEL_RTOL)


@pytest.mark.parametrize("case", [name for name in OTHERS if CASES[name].lora.rank is None])
def test_every_layout_trains_the_same_weights(
    ranks: dict[str, list[PreferenceOutcome]], models: dict[Head, Path], root: Path, case: str
) -> None:
    before = read_weights(models[CASES[case].head])
    expected = read_weights(root / _reference(CASES[case]))
    found = read_weights(root / case)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        moved = float((before[name] - weight).norm())
        assert float((found[name] - weight).norm()) < MOVED_RTOL * moved, name


@pytest.mark.parametrize("case", [name for name in OTHERS if CASES[name].lora.rank is not None])
def test_every_layout_trains_the_same_adapters(
    ranks: dict[str, list[PreferenceOutcome]], case: str
) -> None:
    expected = join([rank.adapters for rank in ranks[_reference(CASES[case])]])
    found = join([rank.adapters for rank in ranks[case]])
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert float((found[name] - weight).norm() / weight.norm()) < ADAPTERS_RTOL, name


def test_a_prompt_counts_once(ranks: dict[str, list[PreferenceOutcome]]) -> None:
    for step, (name, count) in enumerate(zip(LOSSES, ranks["one"][0].counts, strict=True)):
        found = records(step, unpaired=name == "kto")
        assert count == sum(bool(record.answers) for record in found)
    assert len(set(itertools.chain.from_iterable(o.counts for o in ranks["one"]))) > 1
