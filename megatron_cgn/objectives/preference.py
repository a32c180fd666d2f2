"""Preference learning on pairs: DPO and its family.

The losses are in `pair_losses.py`; here they meet the model's output. Unpaired data: `kto.py`;
reward models: `reward.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from torch import Tensor

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.config.loss_options import ResolvedLoss, needs_reference, resolve
from megatron_cgn.config.schema import LossConfig
from megatron_cgn.objectives import pair_losses
from megatron_cgn.objectives.answers import (
    answer_logps,
    counted_lengths,
    likelihood_args,
    weighted_means,
)
from megatron_cgn.objectives.base import ForwardArgs, LossOutput, Objective
from megatron_cgn.objectives.kto import Kto

__all__ = ["PairPreference", "ResolvedLoss", "make_objective", "needs_reference", "resolve"]


def make_objective(
    loss: LossConfig, source_names: Sequence[str] = ()
) -> Objective[PreferenceBatch]:
    """Make the objective of stage ``dpo``.

    Args:
        loss: Settings without a fault.
        source_names: Sources to report one by one, in the order of `PreferenceBatch.source_ids`.

    Returns:
        `Kto` for ``kto``, `PairPreference` for every other loss.
    """
    resolved = resolve(loss)
    if resolved.type == "kto":
        return Kto(resolved, source_names)
    return PairPreference(resolved, source_names)


class PairPreference:
    r"""A loss of pairs, and the next-token loss of chosen answers beside it.

    .. math:: L = \frac{\sum_p w_p\,(\ell_p - \alpha \log\pi(y_w|x) / |y_w|)}{\sum_p w_p}

    with the pair's loss :math:`\ell` from `pair_losses`, weights :math:`w` that make a prompt
    count once (as for the rankings of Ouyang et al. 2022, https://arxiv.org/abs/2203.02155,
    equation 1), and :math:`\alpha` = ``rpo_alpha`` (Pang et al. 2024,
    https://arxiv.org/abs/2404.19733); the sums run over the whole global batch. The next-token
    loss of a chosen answer is a mean over its own counted tokens, as in that paper. TRL averages
    over the tokens of a micro-batch, so that its loss depends on how a batch is cut: both are
    equal where all chosen answers are of one length.

    Metrics, means over prompts, have TRL's names and meaning. With a reference, rewards are
    :math:`\beta` times log-ratios of whole answers, also where the loss compares means per token
    (as in TRL's ``DPOTrainer``); without one, rewards and log-probabilities are means per token
    (as in its ``CPOTrainer`` and ``ORPOTrainer``). Ours are ``lengths/chosen`` and
    ``lengths/rejected``, in counted tokens, and ``empty_masks``, the share of answers of which
    nothing counts.
    """

    unit: Literal["pair"] = "pair"

    def __init__(self, loss: ResolvedLoss, source_names: Sequence[str] = ()) -> None:
        """Bind the loss and its options.

        Args:
            loss: Any loss but ``kto``.
            source_names: Sources to report one by one.
        """
        self._options = loss
        self._compare = _comparison(loss)
        self._source_names = tuple(source_names)

    def forward_args(self, batch: PreferenceBatch) -> ForwardArgs:
        """Ask the model for the negative log-likelihood of the answers."""
        return likelihood_args(batch)

    def loss(self, output: Tensor, batch: PreferenceBatch) -> LossOutput:
        """Sum the losses of pairs, weighted.

        Args:
            output: Per-token negative log-likelihood of the whole row, ``[1, T]``.
            batch: The row; with `PreferenceBatch.ref_logps` if the loss needs a reference.

        Returns:
            Weighted sum, number of prompts, and metrics.
        """
        options, chosen, rejected = self._options, batch.chosen, batch.rejected
        logps, lengths = answer_logps(output, batch), counted_lengths(batch)
        tokens = lengths.clamp(min=1)
        means = logps / tokens
        if options.needs_reference:
            assert batch.ref_logps is not None, f"{options.type} compares with a reference"
            told, rewarded = logps, logps - batch.ref_logps
            compared = rewarded / tokens if options.per_token else rewarded
        else:
            told = rewarded = compared = means
        losses = self._compare(compared[chosen], compared[rejected])
        nll = -means[chosen]
        if options.sft_weight:
            losses = losses + options.sft_weight * nll
        rewards = options.beta * rewarded.detach()
        empty = (lengths == 0).float()
        values = {
            "loss": losses,
            "rewards/chosen": rewards[chosen],
            "rewards/rejected": rewards[rejected],
            "rewards/margins": rewards[chosen] - rewards[rejected],
            "rewards/accuracies": (rewards[chosen] > rewards[rejected]).float(),
            "logps/chosen": told[chosen],
            "logps/rejected": told[rejected],
            "lengths/chosen": lengths[chosen].float(),
            "lengths/rejected": lengths[rejected].float(),
            "empty_masks": (empty[chosen] + empty[rejected]) / 2,
        }
        if options.sft_weight:
            values["nll_loss"] = nll
        if options.type == "orpo":
            values["log_odds_chosen"] = pair_losses.log_odds_ratio(means[chosen], means[rejected])
        weights = batch.weights
        return LossOutput(
            loss_sum=(losses * weights).sum(),
            count=weights.sum().round().int(),
            metrics=weighted_means(
                {name: (value, weights) for name, value in values.items()},
                sources=batch.source_ids[chosen],
                source_names=self._source_names,
            ),
        )


def _comparison(options: ResolvedLoss) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of pairs as a function of chosen and rejected alone."""
    beta, smoothing = options.beta, options.label_smoothing
    match options.type:
        case "sigmoid":
            return partial(pair_losses.sigmoid, beta=beta, label_smoothing=smoothing)
        case "robust":
            return partial(pair_losses.robust, beta=beta, label_smoothing=smoothing)
        case "ipo":
            return partial(pair_losses.ipo, beta=beta)
        case "hinge":
            return partial(pair_losses.hinge, beta=beta)
        case "apo_zero":
            return partial(pair_losses.apo_zero, beta=beta)
        case "apo_down":
            return partial(pair_losses.apo_down, beta=beta)
        case "simpo":
            return partial(pair_losses.simpo, beta=beta, gamma=options.gamma)
        case "orpo":
            return partial(pair_losses.orpo, beta=beta)
        case "kto":
            raise AssertionError("kto has no pairs")
