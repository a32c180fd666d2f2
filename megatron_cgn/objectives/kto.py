"""KTO: answers that are good or bad, each by itself."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.config.loss_options import ResolvedLoss
from megatron_cgn.objectives.answers import (
    answer_logps,
    counted_lengths,
    likelihood_args,
    weighted_means,
)
from megatron_cgn.objectives.base import ForwardArgs, LossOutput, Ratio


class Kto:
    r"""Kahneman-Tversky optimisation.

    .. math:: L = \frac{1}{N} \sum_i
              \begin{cases}
              \lambda_D\,(1 - \sigma(\beta(\rho_i - z))) & y_i \text{ good} \\
              \lambda_U\,(1 - \sigma(\beta(z - \rho_i))) & y_i \text{ bad}
              \end{cases},
              \qquad \rho = \log\frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)}

    over the :math:`N` answers of the global batch. Ethayarajh et al. 2024,
    https://arxiv.org/abs/2402.01306, equation 8; :math:`z` is
    `PreferenceBatch.baseline`, which has no gradient: the mean of :math:`\rho` over mismatched
    prompts and answers, at least 0. That mean is over the global batch; TRL takes it over a
    micro-batch of all ranks, so that its loss depends on how a batch is cut.

    Metrics have TRL's names: ``chosen`` are the good answers, ``rejected`` the bad ones, ``kl`` the
    baseline. ``rewards/margins``, the difference of two means over different answers, is made of
    them once they are known (`with_margins`). Ours are ``lengths/…``, in counted tokens, and
    ``empty_masks``, the share of answers of which nothing counts.
    """

    unit: Literal["sequence"] = "sequence"

    def __init__(self, loss: ResolvedLoss, source_names: Sequence[str] = ()) -> None:
        """Bind the options.

        Args:
            loss: The loss ``kto``.
            source_names: Sources to report one by one.
        """
        assert loss.type == "kto"
        self._options = loss
        self._source_names = tuple(source_names)

    def forward_args(self, batch: PreferenceBatch) -> ForwardArgs:
        """Ask the model for the negative log-likelihood of the answers."""
        return likelihood_args(batch)

    def loss(self, output: Tensor, batch: PreferenceBatch) -> LossOutput:
        """Sum the losses of answers.

        Args:
            output: Per-token negative log-likelihood of the whole row, ``[1, T]``.
            batch: The row, with ``desirable``, ``ref_logps`` and ``baseline``.

        Returns:
            Sum, number of answers, and metrics.
        """
        assert batch.desirable is not None and batch.ref_logps is not None
        assert batch.baseline is not None
        # Made on the model's device, and asked for on the CPU where held-out answers are scored.
        options, baseline = self._options, batch.baseline.detach().to(output.device)
        logps, lengths = answer_logps(output, batch), counted_lengths(batch)
        ratios = logps - batch.ref_logps
        logits = options.beta * (ratios - baseline)
        # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits where it is small.
        losses = torch.where(
            batch.desirable,
            options.desirable_weight * torch.sigmoid(-logits),
            options.undesirable_weight * torch.sigmoid(logits),
        )
        every = torch.ones_like(losses)
        values = {"loss": (losses, every), "empty_masks": ((lengths == 0).float(), every)}
        sides = (("chosen", batch.desirable), ("rejected", ~batch.desirable))
        for side, members in sides:
            share = members.float()
            values |= {
                f"rewards/{side}": (options.beta * ratios, share),
                f"logps/{side}": (logps, share),
                f"lengths/{side}": (lengths.float(), share),
            }
        metrics = weighted_means(values, sources=batch.source_ids, source_names=self._source_names)
        answers = every.sum()
        return LossOutput(
            loss_sum=losses.sum(),
            count=answers.int(),
            metrics={**metrics, "kl": Ratio(baseline.sum() * answers, answers)},
        )


def with_margins(metrics: dict[str, float]) -> dict[str, float]:
    """Add the margins of rewards to a step's means, of everything and of each source.

    Args:
        metrics: Means by name, as `LossOutput.metrics` names them.

    Returns:
        The same with ``…rewards/margins`` wherever good and bad answers both have a mean.
    """
    chosen, rejected, margins = "rewards/chosen", "rewards/rejected", "rewards/margins"
    found = {
        name.removesuffix(chosen) + margins: mean - metrics[other]
        for name, mean in metrics.items()
        if name.endswith(chosen) and (other := name.removesuffix(chosen) + rejected) in metrics
    }
    return {**metrics, **found}
