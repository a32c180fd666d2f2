"""Losses of preference learning against TRL's own code on the same log-probabilities.

TRL's methods run on stand-ins for trainer and model: values, gradients and metrics are compared,
whatever its data pipeline does.
"""

import collections
import dataclasses
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from loss_samples import make_batch, make_row
from torch import Tensor

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.config.schema import LossConfig
from megatron_cgn.objectives.base import LossOutput
from megatron_cgn.objectives.kto import with_margins
from megatron_cgn.objectives.preference import make_objective
from megatron_cgn.objectives.reward import BradleyTerry

ATOL = 1e-6
"""The same equations in FP32 on numbers around 1, summed in another order."""
PAIRS = 5
WIDTH = 12
"""Tokens of the longest answer, its prompt included; the label of each but the first is scored."""
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
TRL_METHODS = ("concatenated_forward", "odds_ratio_loss", "cpo_loss")


def _accelerator() -> Any:
    def same(values: Tensor) -> Tensor:
        return values

    return SimpleNamespace(
        device=torch.device("cpu"), gather=same, gather_for_metrics=same, unwrap_model=same
    )


def _stand_in(trainer: type, **settings: Any) -> Any:
    """Something that has what a trainer's loss reads."""
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=_accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    for name in TRL_METHODS:
        if hasattr(trainer, name):
            setattr(stand_in, name, MethodType(getattr(trainer, name), stand_in))
    for name in ("concatenated_inputs", "get_batch_logps"):
        if hasattr(trainer, name):
            setattr(stand_in, name, getattr(trainer, name))
    return stand_in


class _Scores:
    """A model with TRL's fused head: it says what it is told to."""

    def __init__(self, logps: Tensor, mask: Tensor) -> None:
        self.logps, self.mask = logps, mask

    def __call__(self, **_: Any) -> Any:
        nothing = torch.zeros_like(self.logps)
        return SimpleNamespace(
            log_probs=torch.where(self.mask, self.logps, 0.0),
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )


def _answers(number: int, *, seed: int, equal_lengths: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens, a leaf, and which tokens are of the completion.

    They are multiples of 1/64, so that their sums are exact in any order.
    """
    generator = torch.Generator().manual_seed(seed)
    logps = -(torch.rand(number, WIDTH - 1, generator=generator) * 200).round() / 64
    prompt = torch.randint(1, 4, (number, 1), generator=generator)
    length = torch.randint(1, WIDTH - 3, (number, 1), generator=generator)
    if equal_lengths:
        length = torch.full_like(length, 6)
    places = torch.arange(WIDTH)
    completion = (places >= prompt) & (places < prompt + length)
    return logps.requires_grad_(), completion


def _references(logps: Tensor, completion: Tensor, *, seed: int) -> Tensor:
    sums = torch.where(completion[:, 1:], logps.detach(), 0.0).sum(1)
    noise = torch.randn(len(sums), generator=torch.Generator().manual_seed(seed))
    return sums + (noise * 128).round() / 64


def _ours(logps: Tensor, completion: Tensor, **fields: Any) -> tuple[Tensor, PreferenceBatch]:
    """The same as one packed row, with infinities wherever nothing counts."""
    counted = completion[:, 1:]
    output = make_row([row for row in torch.where(counted, -logps, torch.inf)])
    return output, make_batch(counted.int().tolist(), **fields)


def _gradient(loss: Tensor, of: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, of)
    return found


def _mean(result: LossOutput) -> Tensor:
    return result.loss_sum / result.count


def _means(result: LossOutput) -> dict[str, float]:
    return {name: float(r.sum / r.count) for name, r in result.metrics.items() if r.count}


def _assert_metrics(ours: dict[str, float], theirs: Any, names: tuple[str, ...] = METRICS) -> None:
    for name in names:
        found = theirs[name]
        expected = found[-1] if isinstance(found, list) else float(found)
        assert ours[name] == pytest.approx(expected, abs=1e-5), name


def _dpo(
    kinds: list[str], logps: Tensor, completion: Tensor, ref: Tensor, **settings: Any
) -> tuple[Tensor, Any]:
    """TRL's loss of pairs: the first half of the rows is chosen, the second rejected."""
    from trl import DPOTrainer

    options: dict[str, Any] = dict(beta=0.1, label_smoothing=0.0, loss_weights=[1.0])
    trainer = _stand_in(
        DPOTrainer,
        loss_types=kinds,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        **options | settings,
    )
    chosen, rejected = ref.chunk(2)
    inputs = {
        "input_ids": torch.zeros(completion.shape, dtype=torch.long),
        "attention_mask": torch.ones(completion.shape, dtype=torch.long),
        "completion_mask": completion.long(),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    model = _Scores(logps, completion[:, 1:])
    loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
    return loss, trainer._metrics["train"]


@pytest.mark.parametrize("beta", [0.1, 1.7])
@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        ("sigmoid", LossConfig(type="sigmoid")),
        ("sigmoid_norm", LossConfig(length_normalized=True)),
        ("ipo", LossConfig(type="ipo")),
        ("hinge", LossConfig(type="hinge")),
        ("robust", LossConfig(type="robust", label_smoothing=0.2)),
        ("apo_zero", LossConfig(type="apo_zero")),
        ("apo_down", LossConfig(type="apo_down")),
    ],
)
def test_pair_losses_are_those_of_dpo_trainer(kind: str, ours: LossConfig, beta: float) -> None:
    logps, completion = _answers(2 * PAIRS, seed=3)
    ref = _references(logps, completion, seed=4)
    theirs, metrics = _dpo(
        [kind], logps, completion, ref, beta=beta, label_smoothing=ours.label_smoothing or 0.0
    )
    pairs = [(i, i + PAIRS) for i in range(PAIRS)]
    output, batch = _ours(logps, completion, pairs=pairs, ref_logps=ref)
    result = make_objective(dataclasses.replace(ours, beta=beta)).loss(output, batch)
    assert _mean(result).item() == pytest.approx(theirs.item(), rel=ATOL, abs=ATOL)
    torch.testing.assert_close(
        _gradient(_mean(result), logps), _gradient(theirs, logps), rtol=ATOL, atol=ATOL
    )
    _assert_metrics(_means(result), metrics)


def test_length_normalised_hinge_is_trls_hinge_of_means_per_token() -> None:
    logps, completion = _answers(2 * PAIRS, seed=5)
    ref = _references(logps, completion, seed=6)
    lengths = completion.sum(1)
    theirs, _ = _dpo(["hinge"], logps / lengths[:, None], completion, ref / lengths, beta=3.0)
    pairs = [(i, i + PAIRS) for i in range(PAIRS)]
    output, batch = _ours(logps, completion, pairs=pairs, ref_logps=ref)
    objective = make_objective(LossConfig(type="hinge", beta=3.0, length_normalized=True))
    mean = _mean(objective.loss(output, batch))
    assert mean.item() == pytest.approx(theirs.item(), abs=ATOL)
    torch.testing.assert_close(
        _gradient(mean, logps), _gradient(theirs, logps), rtol=ATOL, atol=ATOL
    )


def test_label_smoothing_is_that_of_trls_smoothed_losses() -> None:
    logps, completion = _answers(2, seed=7)
    ref = _references(logps, completion, seed=8)
    # Of one pair, `aot` sorts nothing, and is the smoothed loss of DPO.
    theirs, _ = _dpo(["aot"], logps, completion, ref, beta=0.5, label_smoothing=0.3)
    output, batch = _ours(logps, completion, pairs=[(0, 1)], ref_logps=ref)
    mean = _mean(make_objective(LossConfig(beta=0.5, label_smoothing=0.3)).loss(output, batch))
    assert mean.item() == pytest.approx(theirs.item(), abs=ATOL)
    torch.testing.assert_close(
        _gradient(mean, logps), _gradient(theirs, logps), rtol=ATOL, atol=ATOL
    )


def test_next_token_term_is_trls_where_chosen_answers_have_one_length() -> None:
    logps, completion = _answers(2 * PAIRS, seed=9, equal_lengths=True)
    ref = _references(logps, completion, seed=10)
    theirs, _ = _dpo(["sigmoid", "sft"], logps, completion, ref, loss_weights=[1.0, 0.4])
    pairs = [(i, i + PAIRS) for i in range(PAIRS)]
    output, batch = _ours(logps, completion, pairs=pairs, ref_logps=ref)
    mean = _mean(make_objective(LossConfig(rpo_alpha=0.4)).loss(output, batch))
    assert mean.item() == pytest.approx(theirs.item(), abs=ATOL)
    torch.testing.assert_close(
        _gradient(mean, logps), _gradient(theirs, logps), rtol=ATOL, atol=ATOL
    )


def _from_logits(trainer: Any, loss: LossConfig, **settings: Any) -> None:
    """Compare with a trainer that reads logits, of answers of one length a side.

    The prompt is one token: ORPO's next-token loss in TRL runs over the prompt too, of which the
    first token is not predicted.
    """
    vocabulary, longer, shorter = 17, 8, 5
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(2 * PAIRS, longer, vocabulary, generator=generator).requires_grad_()
    ids = torch.randint(1, vocabulary, (2 * PAIRS, longer), generator=generator)
    batch: dict[str, Tensor] = {}
    for side, rows, length in (
        ("chosen", ids[:PAIRS], longer),
        ("rejected", ids[PAIRS:, :shorter], shorter),
    ):
        batch[f"{side}_input_ids"] = rows
        batch[f"{side}_attention_mask"] = torch.ones_like(rows)
        batch[f"{side}_labels"] = torch.where(torch.arange(length) == 0, -100, rows)

    def model(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(logits=logits)

    stand_in = _stand_in(trainer, **settings)
    theirs, metrics = trainer.get_batch_loss_metrics(stand_in, model, batch)
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(2 * PAIRS, -1)
    masks = [[1] * (longer - 1)] * PAIRS + [[1] * (shorter - 1)] * PAIRS
    row = make_row([values[: len(mask)] for values, mask in zip(nll, masks, strict=True)])
    pairs = [(i, i + PAIRS) for i in range(PAIRS)]
    result = make_objective(loss).loss(row, make_batch(masks, pairs=pairs))
    assert _mean(result).item() == pytest.approx(theirs.item(), abs=ATOL)
    torch.testing.assert_close(
        _gradient(_mean(result), logits), _gradient(theirs, logits), rtol=ATOL, atol=ATOL
    )
    more = tuple({"nll_loss", "log_odds_chosen"} & result.metrics.keys())
    _assert_metrics(_means(result), metrics, METRICS + more)


@pytest.mark.parametrize("rpo_alpha", [None, 0.7])
def test_simpo_is_that_of_cpo_trainer(rpo_alpha: float | None) -> None:
    from trl.experimental.cpo import CPOTrainer

    _from_logits(
        CPOTrainer,
        LossConfig(type="simpo", beta=2.5, gamma=0.9, rpo_alpha=rpo_alpha),
        loss_type="simpo",
        beta=2.5,
        simpo_gamma=0.9,
        alpha=0.0,
        label_smoothing=0.0,
        cpo_alpha=rpo_alpha or 0.0,
    )


def test_orpo_is_that_of_orpo_trainer() -> None:
    from trl.experimental.orpo import ORPOTrainer

    _from_logits(ORPOTrainer, LossConfig(type="orpo", beta=0.3), beta=0.3)


def test_kto_is_that_of_kto_trainer() -> None:
    from trl import KTOTrainer

    logps, completion = _answers(7, seed=12)
    ref = _references(logps, completion, seed=13)
    good = torch.tensor([True, False, False, True, True, False, True])
    drawn = torch.Generator().manual_seed(14)
    kl, ref_kl = torch.randn(2, 7, generator=drawn) * 3 + torch.tensor([[2.0], [0.0]])
    assert (kl - ref_kl).mean() > 0.1, "a baseline of 0 would test nothing"
    trainer = _stand_in(
        KTOTrainer,
        loss_type="kto",
        beta=0.3,
        calculate_KL=True,
        desirable_weight=1.3,
        undesirable_weight=0.6,
        _compute_kl_logps=lambda *_: kl,
    )
    inputs = {
        "input_ids": torch.zeros(completion.shape, dtype=torch.long),
        "attention_mask": torch.ones(completion.shape, dtype=torch.long),
        "completion_mask": completion.long(),
        "label": good,
        "ref_logps": ref,
        "ref_KL_logps": ref_kl,
    }
    model = _Scores(logps, completion[:, 1:])
    theirs = KTOTrainer._compute_loss(trainer, model, inputs, False)
    baseline = (kl - ref_kl).mean().clamp(min=0)[None]
    output, batch = _ours(logps, completion, ref_logps=ref, desirable=good, baseline=baseline)
    loss = LossConfig(type="kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.6)
    result = make_objective(loss).loss(output, batch)
    assert _mean(result).item() == pytest.approx(theirs.item(), abs=ATOL)
    torch.testing.assert_close(
        _gradient(_mean(result), logps), _gradient(theirs, logps), rtol=ATOL, atol=ATOL
    )
    names = tuple(n for n in (*METRICS, "kl") if n != "rewards/accuracies")
    _assert_metrics(with_margins(_means(result)), trainer._metrics["train"], names)


@pytest.mark.parametrize("margins", [None, [0.5, 0.0, 2.0, 0.1, 1.0]])
@pytest.mark.parametrize("center", [None, 0.05])
def test_reward_loss_is_that_of_reward_trainer(
    margins: list[float] | None, center: float | None
) -> None:
    from trl import RewardTrainer

    rewards = torch.randn(2 * PAIRS, generator=torch.Generator().manual_seed(15)).requires_grad_()
    trainer = _stand_in(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=center))
    inputs: dict[str, Any] = {"attention_mask": torch.ones(2 * PAIRS, 3)}
    if margins is not None:
        inputs["margin"] = torch.tensor(margins)
    theirs = RewardTrainer.compute_loss(
        trainer, lambda **_: SimpleNamespace(logits=rewards[:, None]), inputs
    )
    # Values before the last place are not the reward.
    before = torch.full((2,), torch.nan)
    row = make_row([torch.cat((before, reward[None])) for reward in rewards])
    pairs = [(i, i + PAIRS) for i in range(PAIRS)]
    batch = make_batch([[1, 1, 1]] * (2 * PAIRS), pairs=pairs, margins=margins)
    result = BradleyTerry(LossConfig(center_rewards=center)).loss(row, batch)
    assert _mean(result).item() == pytest.approx(theirs.item(), abs=ATOL)
    torch.testing.assert_close(
        _gradient(_mean(result), rewards), _gradient(theirs, rewards), rtol=ATOL, atol=ATOL
    )
    _assert_metrics(
        _means(result), trainer._metrics["train"], ("accuracy", "margin", "mean_reward")
    )
