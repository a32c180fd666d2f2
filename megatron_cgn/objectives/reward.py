"""Reward models: the better answer shall have the higher reward."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.config.schema import LossConfig
from megatron_cgn.objectives.answers import weighted_means
from megatron_cgn.objectives.base import ForwardArgs, LossOutput


def answer_rewards(output: Tensor, batch: PreferenceBatch) -> Tensor:
    """The reward of each answer: what the scalar head says at its last token.

    Args:
        output: The head's values of the whole row, ``[1, T]``.
        batch: The row.

    Returns:
        Rewards, float32 ``[A]``.
    """
    return output.flatten()[batch.last_places].float()


class BradleyTerry:
    r"""Bradley and Terry's model of comparisons, with margins and centring.

    .. math:: L = \frac{\sum_p w_p\,(-\log\sigma(r_w - r_l - m) + \gamma\,(r_w + r_l)^2)}
                       {\sum_p w_p}

    over the pairs of the global batch, with weights :math:`w` of one over the pairs of a prompt:
    Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, equation 1. The margin :math:`m` is what
    the data say: Touvron et al. 2023 (Llama 2), https://arxiv.org/abs/2307.09288, equation 2. The
    last term, weighted by ``center_rewards``, keeps rewards around 0, which comparisons leave
    open: Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244. As in TRL's ``RewardTrainer``.

    Metrics ``accuracy``, ``margin`` and ``mean_reward`` have that trainer's names, and
    ``rewards/…`` those of the other preference losses; all are means over prompts. Its
    ``min_reward`` and ``max_reward`` are missing: extremes of a batch depend on its size.
    """

    unit: Literal["pair"] = "pair"

    def __init__(self, loss: LossConfig, source_names: Sequence[str] = ()) -> None:
        """Bind the options.

        Args:
            loss: Settings of stage ``rm`` without a fault.
            source_names: Sources to report one by one, in the order of
                `PreferenceBatch.source_ids`.
        """
        self._use_margins = loss.use_margins is not False
        self._center_rewards = loss.center_rewards
        self._source_names = tuple(source_names)

    def forward_args(self, batch: PreferenceBatch) -> ForwardArgs:
        """Ask the model for its head's own values."""
        return ForwardArgs(
            tokens=batch.tokens, position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens
        )

    def loss(self, output: Tensor, batch: PreferenceBatch) -> LossOutput:
        """Sum the losses of pairs, weighted.

        Args:
            output: The scalar head's values of the whole row, ``[1, T]``.
            batch: The row.

        Returns:
            Weighted sum, number of prompts, and metrics.
        """
        rewards = answer_rewards(output, batch)
        chosen, rejected = rewards[batch.chosen], rewards[batch.rejected]
        difference = chosen - rejected
        losses = -logsigmoid(difference - batch.margins if self._use_margins else difference)
        if self._center_rewards is not None:
            losses = losses + self._center_rewards * (chosen + rejected) ** 2
        values = {
            "loss": losses,
            "accuracy": (chosen > rejected).float(),
            "margin": difference,
            "mean_reward": (chosen + rejected) / 2,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
        }
        weights = batch.weights
        return LossOutput(
            loss_sum=(losses * weights).sum(),
            count=weights.sum().round().int(),
            metrics=weighted_means(
                {name: (value, weights) for name, value in values.items()},
                sources=batch.source_ids[batch.chosen],
                source_names=self._source_names,
            ),
        )
