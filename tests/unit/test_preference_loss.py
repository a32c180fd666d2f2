"""Losses of preference learning: closed forms, extremes, weights, what cannot spoil anything."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_samples import make_batch, make_row
from torch import Tensor

from megatron_cgn.batch import PreferenceBatch, to_device
from megatron_cgn.config.schema import LossConfig, PreferenceLoss
from megatron_cgn.objectives.answers import answer_logps, counted_lengths
from megatron_cgn.objectives.base import LossOutput, Objective
from megatron_cgn.objectives.kto import with_margins
from megatron_cgn.objectives.pair_losses import log_odds_ratio
from megatron_cgn.objectives.preference import make_objective, needs_reference
from megatron_cgn.objectives.reward import BradleyTerry

RTOL = 1e-6
"""FP32 against Python's FP64."""
BETA = 0.5
PAIR_LOSSES: tuple[PreferenceLoss, ...] = (
    "sigmoid",
    "ipo",
    "hinge",
    "robust",
    "apo_zero",
    "apo_down",
    "simpo",
    "orpo",
)


def _sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _log_odds(mean: float) -> float:
    return mean - math.log(-math.expm1(mean))


# Of the log-ratios c and r of answers, or mean log-probabilities: loss, and derivatives by both.
CLOSED_FORMS: dict[str, tuple[LossConfig, Callable[[float, float], tuple[float, float, float]]]] = {
    "sigmoid": (
        LossConfig(beta=BETA),
        lambda c, r: (
            _softplus(-BETA * (c - r)),
            -BETA * _sigma(BETA * (r - c)),
            BETA * _sigma(BETA * (r - c)),
        ),
    ),
    "cdpo": (
        LossConfig(beta=BETA, label_smoothing=0.2),
        lambda c, r: (
            0.8 * _softplus(-BETA * (c - r)) + 0.2 * _softplus(BETA * (c - r)),
            BETA * (0.2 - _sigma(BETA * (r - c))),
            -BETA * (0.2 - _sigma(BETA * (r - c))),
        ),
    ),
    "robust": (
        LossConfig(type="robust", beta=BETA, label_smoothing=0.2),
        lambda c, r: (
            (0.8 * _softplus(-BETA * (c - r)) - 0.2 * _softplus(BETA * (c - r))) / 0.6,
            -BETA * (0.6 * _sigma(BETA * (r - c)) + 0.2) / 0.6,
            BETA * (0.6 * _sigma(BETA * (r - c)) + 0.2) / 0.6,
        ),
    ),
    "ipo": (
        LossConfig(type="ipo", beta=BETA),
        lambda c, r: ((c - r - 1) ** 2, 2 * (c - r - 1), -2 * (c - r - 1)),
    ),
    "hinge": (
        LossConfig(type="hinge", beta=BETA),
        lambda c, r: (
            max(0.0, 1 - BETA * (c - r)),
            -BETA * (BETA * (c - r) < 1),
            BETA * (BETA * (c - r) < 1),
        ),
    ),
    "apo_zero": (
        LossConfig(type="apo_zero", beta=BETA),
        lambda c, r: (
            _sigma(-BETA * c) + _sigma(BETA * r),
            -BETA * _sigma(BETA * c) * _sigma(-BETA * c),
            BETA * _sigma(BETA * r) * _sigma(-BETA * r),
        ),
    ),
    "apo_down": (
        LossConfig(type="apo_down", beta=BETA),
        lambda c, r: (
            _sigma(BETA * c) + _sigma(BETA * (r - c)),
            BETA * _sigma(BETA * c) * _sigma(-BETA * c)
            - BETA * _sigma(BETA * (r - c)) * _sigma(BETA * (c - r)),
            BETA * _sigma(BETA * (r - c)) * _sigma(BETA * (c - r)),
        ),
    ),
    "simpo": (
        LossConfig(type="simpo", beta=BETA, gamma=0.3),
        lambda c, r: (
            _softplus(0.3 - BETA * (c - r)),
            -BETA * _sigma(0.3 - BETA * (c - r)),
            BETA * _sigma(0.3 - BETA * (c - r)),
        ),
    ),
    "orpo": (
        LossConfig(type="orpo", beta=BETA),
        lambda c, r: (
            -c + BETA * _softplus(_log_odds(r) - _log_odds(c)),
            -1 + BETA * _sigma(_log_odds(r) - _log_odds(c)) / math.expm1(c),
            -BETA * _sigma(_log_odds(r) - _log_odds(c)) / math.expm1(r),
        ),
    ),
}


def _of_one_pair(loss: LossConfig, c: float, r: float) -> tuple[LossOutput, Tensor]:
    """The loss of answers of one token each; the reference is certain of both."""
    nll = torch.tensor([-c, -r], requires_grad=True)
    ref = torch.zeros(2) if needs_reference(loss) else None
    batch = make_batch([[0, 1], [1]], pairs=[(0, 1)], ref_logps=ref)
    row = make_row([torch.stack((torch.tensor(9.0), nll[0])), nll[1:]])
    return make_objective(loss).loss(row, batch), nll


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize(
    ("c", "r"), [(-0.7, -1.9), (-3.1, -0.4), (-1.0, -1.0), (-1e4, -0.5), (-0.5, -1e4), (-40, -1e-3)]
)
def test_closed_forms(name: str, c: float, r: float) -> None:
    loss, form = CLOSED_FORMS[name]
    result, nll = _of_one_pair(loss, c, r)
    value, by_chosen, by_rejected = form(c, r)
    assert result.loss_sum.item() == pytest.approx(value, rel=RTOL, abs=RTOL)
    (gradient,) = torch.autograd.grad(result.loss_sum, nll)
    assert (-gradient).tolist() == pytest.approx([by_chosen, by_rejected], rel=1e-5, abs=RTOL)


@pytest.mark.parametrize("name", [n for n in CLOSED_FORMS if n not in ("simpo", "orpo")])
@pytest.mark.parametrize(("c", "r"), [(1e4, -1e4), (-1e4, 1e4), (1e4, 1e4), (300.0, 299.0)])
def test_extreme_ratios_have_their_closed_form(name: str, c: float, r: float) -> None:
    # A log-probability is never positive: the reference makes the ratio so.
    loss, form = CLOSED_FORMS[name]
    nll = torch.tensor([3.0, 5.0], requires_grad=True)
    ref = torch.tensor([-3.0 - c, -5.0 - r])
    batch = make_batch([[1], [1]], pairs=[(0, 1)], ref_logps=ref)
    result = make_objective(loss).loss(make_row(list(nll[:, None])), batch)
    value, by_chosen, by_rejected = form(c, r)
    assert result.loss_sum.item() == pytest.approx(value, rel=RTOL, abs=RTOL)
    (gradient,) = torch.autograd.grad(result.loss_sum, nll)
    assert (-gradient).tolist() == pytest.approx([by_chosen, by_rejected], rel=1e-5, abs=RTOL)


def test_robust_loss_of_labels_flipped_by_chance_is_the_true_labels_loss() -> None:
    share, c, r = 0.2, 1.7, -0.4
    flipping = LossConfig(type="robust", beta=BETA, label_smoothing=share)
    right, wrong = (_of_one_pair(flipping, *pair)[0].loss_sum.item() for pair in ((c, r), (r, c)))
    true = _of_one_pair(LossConfig(beta=BETA), c, r)[0].loss_sum.item()
    assert (1 - share) * right + share * wrong == pytest.approx(true, rel=RTOL)


def test_odds_of_certain_answers_are_finite_and_have_a_gradient() -> None:
    # FP32 rounds the log-probability of a near-certain answer to 0, whose odds are infinite.
    chosen, rejected = torch.tensor([0.0, -1e-7, -1e4]), torch.tensor([-1.0, 0.0, 0.0])
    chosen.requires_grad_()
    rejected.requires_grad_()
    ratio = log_odds_ratio(chosen, rejected)
    ratio.sum().backward()
    assert ratio.isfinite().all()
    assert chosen.grad is not None and chosen.grad.isfinite().all()
    assert rejected.grad is not None and rejected.grad.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "at_start"),
    [
        (LossConfig(), math.log(2)),
        (LossConfig(label_smoothing=0.3), math.log(2)),
        (LossConfig(length_normalized=True), math.log(2)),
        (LossConfig(type="robust"), math.log(2)),
        (LossConfig(type="ipo", beta=0.1), 25.0),
        (LossConfig(type="hinge"), 1.0),
        (LossConfig(type="apo_zero"), 1.0),
        (LossConfig(type="apo_down"), 1.0),
    ],
)
def test_where_policy_and_reference_are_equal(loss: LossConfig, at_start: float) -> None:
    nll = torch.rand(40, generator=torch.Generator().manual_seed(1)) * 9
    masks = [[1] * 17, [0] * 3 + [1] * 20]
    row = make_row([nll[:17], nll[17:]])
    ref = answer_logps(row, make_batch(masks))
    result = make_objective(loss).loss(row, make_batch(masks, pairs=[(0, 1)], ref_logps=ref))
    assert result.loss_sum.item() == pytest.approx(at_start, rel=RTOL)
    assert float(result.metrics["rewards/margins"].sum) == 0.0, "exactly"


def test_default_loss_is_the_dpo_papers() -> None:
    named = LossConfig(type="sigmoid", beta=0.1)
    given, default = (_of_one_pair(loss, -1.0, -2.0)[0] for loss in (named, LossConfig()))
    assert torch.equal(given.loss_sum, default.loss_sum)


def test_log_probabilities_are_sums_over_what_counts_whatever_the_packing() -> None:
    generator = torch.Generator().manual_seed(2)
    values = [torch.rand(n, generator=generator) * 9 for n in (700, 1, 300)]
    masks = [[1] * 700, [1], [0] * 100 + [1] * 200]
    together = answer_logps(make_row(values), make_batch(masks))
    alone = [
        answer_logps(make_row([v]), make_batch([m])) for v, m in zip(values, masks, strict=True)
    ]
    turned = answer_logps(make_row(values[::-1]), make_batch(masks[::-1])).flip(0)
    assert torch.equal(together, torch.cat(alone)) and torch.equal(together, turned)
    expected = [
        -math.fsum(x for x, m in zip(v.tolist(), mask, strict=True) if m)
        for v, mask in zip(values, masks, strict=True)
    ]
    assert together.tolist() == pytest.approx(expected, rel=1e-7)
    assert counted_lengths(make_batch(masks)).tolist() == [700, 1, 200]


def _any_objective(name: PreferenceLoss | str) -> Objective[PreferenceBatch]:
    if name == "rm":
        return BradleyTerry(LossConfig(center_rewards=0.1), ["one", "two"])
    loss = LossConfig(type=name)  # type: ignore[arg-type]
    return make_objective(loss, ["one", "two"])


def _any_batch(name: str, masks: list[list[int]], **fields: Any) -> PreferenceBatch:
    """A row that suits the objective: whatever is not needed is absent."""
    answers = len(masks)
    if name not in ("simpo", "orpo", "rm"):
        fields.setdefault("ref_logps", torch.linspace(-4, -1, answers))
    if name == "kto":
        fields.pop("pairs", None)
        fields.pop("weights", None)
        fields |= {"desirable": torch.arange(answers) % 2 == 0, "baseline": torch.tensor([0.2])}
    return make_batch(masks, **fields)


EVERY = (*PAIR_LOSSES, "kto", "rm")


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_does_not_count_reaches_neither_loss_nor_gradient(name: str, bad: float) -> None:
    masks = [[0, 1, 1], [0, 0, 1]]
    values = torch.tensor([[bad, 1.0, 2.0], [bad, bad, 3.0]], requires_grad=True)
    batch = _any_batch(name, masks, pairs=[(0, 1)])
    result = _any_objective(name).loss(make_row(list(values), padding=bad), batch)
    (gradient,) = torch.autograd.grad(result.loss_sum, values)
    assert result.loss_sum.isfinite() and gradient.isfinite().all()
    assert gradient[0, 0] == 0 and gradient[1, :2].eq(0).all()
    assert gradient[0, 2] != 0 and gradient[1, 2] != 0
    for metric, ratio in result.metrics.items():
        assert ratio.sum.isfinite(), metric


@pytest.mark.parametrize("name", EVERY)
def test_a_row_without_answers_adds_nothing(name: str) -> None:
    output = torch.full((1, 3), 5.0, requires_grad=True)
    objective = _any_objective(name)
    result = objective.loss(output, _any_batch(name, []))
    assert result.loss_sum.item() == 0.0 and result.count.item() == 0
    result.loss_sum.backward()
    assert output.grad is not None and output.grad.eq(0).all()
    full_batch = _any_batch(name, [[1, 1]] * 2, pairs=[(0, 1)])
    full = objective.loss(make_row([torch.ones(2)] * 2), full_batch)
    assert list(result.metrics) == list(full.metrics), "as in every micro-batch of a step"
    assert all(ratio.sum == 0 and ratio.count == 0 for ratio in result.metrics.values())


@pytest.mark.parametrize("name", [n for n in EVERY if n != "rm"])
def test_an_empty_answer_is_finite_and_told(name: str) -> None:
    masks = [[1, 1], [0, 0]]
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    result = _any_objective(name).loss(
        make_row(list(values)), _any_batch(name, masks, pairs=[(0, 1)])
    )
    (gradient,) = torch.autograd.grad(result.loss_sum, values)
    assert result.loss_sum.isfinite() and gradient.isfinite().all()
    assert gradient[1].eq(0).all()
    told = result.metrics["empty_masks"]
    assert float(told.sum / told.count) == 0.5


@pytest.mark.parametrize("name", EVERY)
def test_sums_and_counts_do_not_depend_on_how_a_batch_is_cut(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    masks = [[0, 1, 1, 1], [1, 1], [0, 1], [1, 1, 1], [0, 1, 1], [1] * 5]
    values = [torch.rand(len(m), generator=generator) * 4 for m in masks]
    ref = torch.linspace(-6, -2, len(masks)) if name not in ("simpo", "orpo", "rm") else None
    sources = [0, 0, 1, 1, 0, 0]
    good = torch.tensor([True, False, False, True, False, True])

    def result_of(records: list[int]) -> tuple[LossOutput, list[Tensor]]:
        answers = [a for record in records for a in (2 * record, 2 * record + 1)]
        fields: dict[str, Any] = {"sources": [sources[a] for a in answers]}
        if ref is not None:
            fields["ref_logps"] = ref[answers]
        if name == "kto":
            fields |= {"desirable": good[answers], "baseline": torch.tensor([0.3])}
        else:
            fields["pairs"] = [(2 * i, 2 * i + 1) for i in range(len(records))]
        mine = [values[a].clone().requires_grad_() for a in answers]
        batch = make_batch([masks[a] for a in answers], **fields)
        return _any_objective(name).loss(make_row(mine), batch), mine

    whole, _ = result_of([0, 1, 2])
    parts = [result_of(records)[0] for records in ([2], [0], [1])]
    total = sum(p.loss_sum.item() for p in parts)
    assert total == pytest.approx(whole.loss_sum.item(), rel=RTOL)
    assert sum(int(p.count) for p in parts) == int(whole.count) == (6 if name == "kto" else 3)
    for metric, ratio in whole.metrics.items():
        found = [p.metrics[metric] for p in parts]
        assert float(sum(r.sum for r in found)) == pytest.approx(float(ratio.sum), abs=1e-5)
        assert float(sum(r.count for r in found)) == pytest.approx(float(ratio.count))
    assert float(whole.metrics["train/one/loss"].count) == (4 if name == "kto" else 2)
    of_two = parts[2].metrics["train/two/loss"]
    assert float(of_two.sum) == pytest.approx(parts[2].loss_sum.item(), rel=RTOL)
    assert parts[2].metrics["train/one/loss"].count == 0


@pytest.mark.parametrize("name", [*PAIR_LOSSES, "rm"])
def test_a_ranking_counts_once(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    masks = [[1, 1], [0, 1, 1], [1], [1, 1, 1], [1, 1]]
    values = [torch.rand(len(m), generator=generator) * 4 for m in masks]
    ranking, pair = [(0, 1), (0, 2), (1, 2)], [(3, 4)]
    objective = _any_objective(name)

    def mean_of(pairs: list[tuple[int, int]], weights: list[float]) -> tuple[float, int]:
        batch = _any_batch(name, masks, pairs=pairs, weights=weights)
        result = objective.loss(make_row(values), batch)
        return result.loss_sum.item(), int(result.count)

    alone = [mean_of([p], [1.0])[0] for p in ranking + pair]
    total, count = mean_of(ranking + pair, [1 / 3] * 3 + [1.0])
    assert count == 2
    assert total == pytest.approx(sum(alone[:3]) / 3 + alone[3], rel=RTOL)


def test_count_of_many_fractions_is_whole() -> None:
    weights = [1 / 3] * 9
    assert torch.tensor(weights).sum() < 3, "or it would not matter how FP32 is made whole"
    batch = make_batch([[1]] * 3, pairs=[(0, 1), (0, 2), (1, 2)] * 3, weights=weights)
    result = make_objective(LossConfig(type="simpo")).loss(make_row([torch.ones(1)] * 3), batch)
    assert int(result.count) == 3 and result.count.dtype == torch.int32


def test_equal_rewards_are_no_accuracy() -> None:
    batch = make_batch([[1], [1]], pairs=[(0, 1)], ref_logps=torch.tensor([-2.0, -2.0]))
    row = make_row([torch.tensor([3.0])] * 2)
    told = make_objective(LossConfig()).loss(row, batch).metrics["rewards/accuracies"]
    assert told.sum == 0 and told.count == 1
    told = BradleyTerry(LossConfig()).loss(row, batch).metrics["accuracy"]
    assert told.sum == 0 and told.count == 1


@pytest.mark.parametrize("name", EVERY)
def test_the_engine_tells_the_loss_of_everything_itself(name: str) -> None:
    result = _any_objective(name).loss(
        make_row([torch.ones(2)] * 2), _any_batch(name, [[1, 1]] * 2, pairs=[(0, 1)])
    )
    assert "loss" not in result.metrics and "train/one/loss" in result.metrics


def test_an_infinity_among_good_answers_leaves_the_means_of_bad_ones() -> None:
    batch = make_batch(
        [[1], [1]],
        ref_logps=torch.zeros(2),
        desirable=torch.tensor([True, False]),
        baseline=torch.zeros(1),
    )
    row = make_row(list(torch.tensor([[math.inf], [1.0]])))
    metrics = make_objective(LossConfig(type="kto"), ["one"]).loss(row, batch).metrics
    assert metrics["logps/chosen"].sum == -math.inf
    assert metrics["logps/rejected"].sum == metrics["train/one/logps/rejected"].sum == -1.0


def test_accuracy_and_margins_are_of_rewards() -> None:
    ref = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    batch = make_batch([[1]] * 4, pairs=[(0, 1), (2, 3)], weights=[1.0, 0.5], ref_logps=ref)
    row = make_row(list(torch.tensor([[0.0], [3.0], [2.0], [1.0]])))
    metrics = make_objective(LossConfig(beta=0.5)).loss(row, batch).metrics
    found = {name: float(r.sum / r.count) for name, r in metrics.items()}
    # Rewards are half of 1, -2, -1 and 0.
    assert found["rewards/chosen"] == pytest.approx((0.5 - 0.25) / 1.5)
    assert found["rewards/rejected"] == pytest.approx((-1.0 + 0.0) / 1.5)
    assert found["rewards/margins"] == pytest.approx((1.5 - 0.25) / 1.5)
    assert found["rewards/accuracies"] == pytest.approx(1 / 1.5)
    assert found["logps/chosen"] == pytest.approx((0.0 - 1.0) / 1.5)
    assert found["lengths/chosen"] == found["lengths/rejected"] == 1.0


def test_infinite_loss_of_what_counts_is_not_hidden() -> None:
    batch = make_batch([[1], [1]], pairs=[(0, 1)], ref_logps=torch.zeros(2))
    row = make_row(list(torch.tensor([[math.inf], [1.0]])))
    assert make_objective(LossConfig()).loss(row, batch).loss_sum.item() == math.inf


def test_baseline_of_kto_has_no_gradient_and_is_told() -> None:
    baseline = torch.tensor([0.4], requires_grad=True)
    batch = make_batch(
        [[1]] * 3,
        ref_logps=torch.zeros(3),
        desirable=torch.tensor([True, True, False]),
        baseline=baseline,
    )
    row = make_row(list(torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)))
    result = make_objective(LossConfig(type="kto", beta=1.0)).loss(row, batch)
    expected = _sigma(1.4) + _sigma(2.4) + _sigma(-3.4)
    assert result.loss_sum.item() == pytest.approx(expected, rel=RTOL)
    result.loss_sum.backward()
    assert baseline.grad is None
    kl = result.metrics["kl"]
    assert float(kl.sum / kl.count) == pytest.approx(0.4)


def test_baseline_of_kto_may_lie_on_another_device() -> None:
    """Held-out rows are judged on the CPU, and the baseline is the model's, on its device."""
    batch = make_batch([[1]] * 2, ref_logps=torch.zeros(2), desirable=torch.tensor([True, False]))
    row = make_row(list(torch.tensor([[1.0], [2.0]])))
    there = dataclasses.replace(
        to_device(batch, torch.device("meta")), baseline=torch.tensor([0.4])
    )
    result = make_objective(LossConfig(type="kto")).loss(row.to("meta"), there)
    assert result.loss_sum.is_meta


def test_margins_of_kto_are_differences_of_means_by_source() -> None:
    metrics = {
        "rewards/chosen": 3.0,
        "rewards/rejected": 1.0,
        "train/a/rewards/chosen": 5.0,
        "train/a/rewards/rejected": 7.0,
        "train/b/rewards/chosen": 9.0,
    }
    margins = {"rewards/margins": 2.0, "train/a/rewards/margins": -2.0}
    assert with_margins(metrics) == metrics | margins


def test_model_is_asked_for_likelihoods_or_for_its_heads_values() -> None:
    batch = make_batch([[0, 1], [1]], pairs=[(0, 1)])
    asked = make_objective(LossConfig(type="simpo")).forward_args(batch)
    assert asked.labels is batch.labels and asked.cu_seqlens is batch.cu_seqlens
    assert asked.counted is not None
    assert asked.counted.tolist() == [[False, True, True, False, False, False]]
    head = BradleyTerry(LossConfig()).forward_args(batch)
    assert head.labels is None and head.counted is None and head.tokens is batch.tokens


def test_margin_of_the_data_is_asked_for_unless_switched_off() -> None:
    row = make_row(list(torch.tensor([[2.0], [1.5]])))
    batch = make_batch([[1], [1]], pairs=[(0, 1)], margins=[1.5])
    asked, ignored = (
        float(BradleyTerry(LossConfig(use_margins=use)).loss(row, batch).loss_sum)
        for use in (None, False)
    )
    assert asked == pytest.approx(_softplus(1.0), rel=RTOL)
    assert ignored == pytest.approx(_softplus(-0.5), rel=RTOL)


def test_half_precision_rewards_are_compared_in_fp32() -> None:
    row = make_row(list(torch.tensor([[2.0], [1.5]]))).bfloat16()
    batch = make_batch([[1], [1]], pairs=[(0, 1)])
    result = BradleyTerry(LossConfig(use_margins=False)).loss(row, batch)
    assert result.loss_sum.dtype == torch.float32
    assert result.loss_sum.item() == pytest.approx(_softplus(-0.5), rel=RTOL)


@pytest.mark.parametrize("name", EVERY)
def test_batch_is_left_as_it_was(name: str) -> None:
    batch = _any_batch(name, [[1, 1]] * 2, pairs=[(0, 1)])
    before = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    before = {n: v.clone() if isinstance(v, Tensor) else v for n, v in before.items()}
    row = make_row([torch.ones(2), torch.zeros(2)])
    kept = row.clone()
    _any_objective(name).loss(row, batch)
    assert torch.equal(row, kept)
    for field, value in before.items():
        now = getattr(batch, field)
        assert torch.equal(now, value) if isinstance(value, Tensor) else now is value
