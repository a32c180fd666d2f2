"""Accuracy, calibration and rank correlation of rewards, against closed forms and counting."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.eval.rewards import (
    BINS,
    Bin,
    RewardScore,
    bin_sums,
    calibration_error,
    length_sums,
    tau_sums,
    write_reliability,
)


def _batch(ranks: list[list[int]], lengths: list[int] | None = None) -> PreferenceBatch:
    """The pairs of some rankings, one list of ranks a prompt; answers need no tokens here."""
    chosen, rejected, weights, first = [], [], [], 0
    for prompt in ranks:
        pairs = [
            (first + i, first + j)
            for (i, a), (j, b) in itertools.permutations(enumerate(prompt), 2)
            if a < b
        ]
        chosen += [i for i, _ in pairs]
        rejected += [j for _, j in pairs]
        weights += [1 / len(pairs)] * len(pairs)
        first += len(prompt)
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    return PreferenceBatch(
        tokens=nothing,
        labels=nothing,
        loss_mask=nothing.float(),
        position_ids=nothing,
        answer_ids=nothing,
        # And padding behind the answers.
        cu_seqlens=torch.tensor([0, *itertools.accumulate([*(lengths or [1] * first), 9])]),
        last_places=torch.zeros(first, dtype=torch.int64),
        source_ids=torch.zeros(first, dtype=torch.int64),
        chosen=torch.tensor(chosen, dtype=torch.int64),
        rejected=torch.tensor(rejected, dtype=torch.int64),
        weights=torch.tensor(weights),
        margins=torch.zeros(len(chosen)),
    )


def _bins(rewards: list[float], batch: PreferenceBatch) -> list[list[float]]:
    sums: list[list[float]] = bin_sums(torch.tensor(rewards, dtype=torch.float64), batch).tolist()
    return sums


def test_forecasts_that_come_true_as_often_as_they_say_are_calibrated() -> None:
    # Four pairs, each forecast with 3 : 1; three of them come true.
    difference = math.log(3)
    rewards = [difference, 0.0] * 3 + [0.0, difference]
    place = int((2 * 0.75 - 1) * BINS)
    sums = _bins(rewards, _batch([[1, 2]] * 4))
    for number, row in enumerate(sums):
        assert row == (pytest.approx([4.0, 3.0, 3.0]) if number == place else [0.0] * 3)
    assert calibration_error([Bin(prompts=4, confidence=0.75, accuracy=0.75)]) == 0.0
    # The same with all true is 0.25 off.
    assert _bins([difference, 0.0] * 4, _batch([[1, 2]] * 4))[place][2] == 4.0


def test_calibration_error_weighs_its_bins() -> None:
    table = [
        Bin(prompts=1, confidence=0.6, accuracy=0.5),
        Bin(prompts=3, confidence=0.9, accuracy=0.95),
    ]
    assert calibration_error(table) == pytest.approx((1 * 0.1 + 3 * 0.05) / 4)


def test_a_prompt_counts_once_and_equal_rewards_are_half_right() -> None:
    # A ranking of three makes three pairs; all rewards are equal, so nothing is said.
    sums = _bins([2.0, 2.0, 2.0], _batch([[1, 2, 3]]))
    assert sums[0] == pytest.approx([1.0, 0.5, 0.5])
    assert all(row == [0.0] * 3 for row in sums[1:])


def test_the_surest_forecasts_are_in_the_last_bin() -> None:
    sums = _bins([1e4, -1e4], _batch([[2, 1]]))
    assert sums[-1] == [1.0, 1.0, 0.0]


def _tau_b(ranks: list[int], rewards: list[float]) -> float:
    """Kendall's tau-b by its definition, over all pairs of answers."""
    pairs = list(itertools.combinations(range(len(ranks)), 2))

    def sign(a: float, b: float) -> int:
        return (a > b) - (a < b)

    by_rank = [sign(-ranks[i], -ranks[j]) for i, j in pairs]
    by_reward = [sign(rewards[i], rewards[j]) for i, j in pairs]
    agreement = sum(a * b for a, b in zip(by_rank, by_reward, strict=True))
    size = sum(map(abs, by_rank)) * sum(map(abs, by_reward))
    return agreement / math.sqrt(size) if size else 0.0


def test_known_correlations() -> None:
    whole = torch.tensor([5.0, 3.0, 1.0, 0.0, 2.0, 4.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    # Right, wrong, and with one tie of rewards: C − D = 2 of 3 pairs, 2 of them unequal.
    taus = tau_sums(whole, _batch([[1, 2, 3], [1, 2, 3], [1, 2, 3]]))
    assert taus.tolist() == pytest.approx([1.0 - 1.0 + 2 / math.sqrt(6), 3.0])
    # Pairs are no rankings.
    assert tau_sums(whole[:2], _batch([[1, 2]])).tolist() == [0.0, 0.0]


def test_how_often_the_longer_answer_is_preferred() -> None:
    # Pairs of equal length say nothing; equal rewards prefer it half the time.
    lengths = [7, 5, 5, 7, 6, 6, 3, 2, 9, 8, 7]
    batch = _batch([[1, 2], [1, 2], [1, 2], [1, 2], [1, 2, 3]], lengths)
    rewards = torch.tensor([1, 0, 1, 0, 1, 0, 2, 2, 0, 1, -1], dtype=torch.float64)
    # Of the last prompt's three pairs, the longer is higher in two, and better in all.
    expected = [1 + 0 + 0.5 + 2 / 3, 1 + 0 + 1 + 1, 4]
    assert length_sums(rewards, batch).tolist() == pytest.approx(expected)


RANKING = st.lists(st.tuples(st.integers(1, 4), st.integers(-3, 3)), min_size=2, max_size=6)


@given(st.lists(RANKING, min_size=1, max_size=4))
def test_correlation_is_that_of_its_definition(prompts: list[list[tuple[int, int]]]) -> None:
    known = [p for p in prompts if len({rank for rank, _ in p}) > 1]
    if not known:
        return
    ranks = [[rank for rank, _ in prompt] for prompt in known]
    rewards = [[float(reward) for _, reward in prompt] for prompt in known]
    taus = [_tau_b(a, b) for a, b in zip(ranks, rewards, strict=True) if len(a) > 2]
    flat = torch.tensor([r for prompt in rewards for r in prompt], dtype=torch.float64)
    assert tau_sums(flat, _batch(ranks)).tolist() == pytest.approx([sum(taus), len(taus)])


def test_a_table_replaces_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "reliability.json"
    score = RewardScore(metrics={}, reliability=(Bin(prompts=2, confidence=0.75, accuracy=0.5),))
    write_reliability(path, 4, {"核电": score})
    write_reliability(path, 8, {"核电": score})
    bins = [{"prompts": 2, "confidence": 0.75, "accuracy": 0.5}]
    assert json.loads(path.read_text("utf-8")) == {"step": 8, "sources": {"核电": bins}}
    assert [p.name for p in tmp_path.iterdir()] == ["reliability.json"]
