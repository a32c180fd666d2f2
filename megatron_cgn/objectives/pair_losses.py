r"""Losses of pairs, as functions of two numbers a pair.

Of a chosen answer :math:`y_w` and a rejected one :math:`y_l` to a prompt :math:`x`, those with a
reference take the log-ratios

.. math:: c = \log\frac{\pi(y_w|x)}{\pi_\mathrm{ref}(y_w|x)}, \qquad
          r = \log\frac{\pi(y_l|x)}{\pi_\mathrm{ref}(y_l|x)}

and those without the mean log-probabilities of a token. All tensors are float32 ``[P]``. Sums,
means over lengths and weights are made by `preference.py`.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

_LARGEST_LOGP = -torch.finfo(torch.float32).eps
"""Of the largest probability below 1 that FP32 tells from it: at 1 the odds are infinite."""


def sigmoid(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    r"""DPO, and cDPO with label smoothing.

    .. math:: -(1 - \varepsilon) \log\sigma(\beta(c - r)) - \varepsilon \log\sigma(-\beta(c - r))

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7; label smoothing: Mitchell
    2023, "A note on DPO with noisy preferences", https://ericmitchell.ai/cdpo.pdf. With log-ratios
    per token it is the length-normalised DPO of Lambert et al. 2024 (Tülu 3),
    https://arxiv.org/abs/2411.15124, TRL's ``sigmoid_norm``. TRL's ``DPOTrainer`` has no label
    smoothing in ``sigmoid`` any more; its ``CPOTrainer`` has this one.

    Args:
        chosen: Log-ratios :math:`c`.
        rejected: Log-ratios :math:`r`.
        beta: Strength of the hold to the reference.
        label_smoothing: Share :math:`\varepsilon` of pairs taken to be the wrong way round.

    Returns:
        The loss of each pair.
    """
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def robust(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    r"""Robust DPO: without bias where a share of the labels is the wrong way round.

    .. math:: \frac{-(1 - \varepsilon) \log\sigma(\beta(c - r))
              + \varepsilon \log\sigma(-\beta(c - r))}{1 - 2 \varepsilon}

    Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409. Its mean over flipped labels is the
    loss of the true ones; unlike `sigmoid`'s, it may be negative.

    Args:
        chosen: Log-ratios :math:`c`.
        rejected: Log-ratios :math:`r`.
        beta: Strength of the hold to the reference.
        label_smoothing: That share :math:`\varepsilon`, below 0.5.

    Returns:
        The loss of each pair.
    """
    logits = beta * (chosen - rejected)
    clean, flipped = -logsigmoid(logits), -logsigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    r"""IPO: the difference of log-ratios shall be :math:`1 / 2\tau`, and no more.

    .. math:: \left(\frac{c}{|y_w|} - \frac{r}{|y_l|} - \frac{1}{2 \tau}\right)^2

    Azar et al. 2023, https://arxiv.org/abs/2310.12036, equation 17, with :math:`\tau` = `beta`.
    The paper does not divide by the lengths :math:`|y|` in counted tokens. TRL does, on the
    authors' word that their results are of this form, and so do we: the sum's square would grow
    with the answers' lengths.

    Args:
        chosen: Log-ratios per token, :math:`c / |y_w|`.
        rejected: Log-ratios per token, :math:`r / |y_l|`.
        beta: :math:`\tau`.

    Returns:
        The loss of each pair.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    r"""The hinge loss of SLiC on DPO's rewards.

    .. math:: \max(0,\ 1 - \beta(c - r))

    Zhao et al. 2023, https://arxiv.org/abs/2305.10425, on log-probabilities; with a reference:
    Liu et al. 2023 (RSO), https://arxiv.org/abs/2309.06657, which is TRL's.

    Args:
        chosen: Log-ratios :math:`c`.
        rejected: Log-ratios :math:`r`.
        beta: One over the margin of log-ratios that is asked for.

    Returns:
        The loss of each pair.
    """
    return relu(1 - beta * (chosen - rejected))


def apo_zero(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    r"""APO-zero: chosen answers shall become likelier and rejected ones less likely.

    .. math:: 1 - \sigma(\beta c) + \sigma(\beta r)

    For chosen answers better than the model's own. D'Oosterlinck et al. 2024,
    https://arxiv.org/abs/2408.06266, equation 7. The paper leaves the 1 out; TRL, which is
    followed, has it. Gradients are the same.

    Args:
        chosen: Log-ratios :math:`c`.
        rejected: Log-ratios :math:`r`.
        beta: Strength of the hold to the reference.

    Returns:
        The loss of each pair.
    """
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    r"""APO-down: both shall become less likely, rejected answers more so.

    .. math:: \sigma(\beta c) + 1 - \sigma(\beta(c - r))

    For chosen answers worse than the model's own. D'Oosterlinck et al. 2024,
    https://arxiv.org/abs/2408.06266, equation 8. The paper leaves the 1 out; TRL, which is
    followed, has it. Gradients are the same.

    Args:
        chosen: Log-ratios :math:`c`.
        rejected: Log-ratios :math:`r`.
        beta: Strength of the hold to the reference.

    Returns:
        The loss of each pair.
    """
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    r"""SimPO: mean log-probabilities shall differ by a margin; no reference.

    .. math:: -\log\sigma\left(\frac{\beta}{|y_w|} \log\pi(y_w|x)
              - \frac{\beta}{|y_l|} \log\pi(y_l|x) - \gamma\right)

    Meng et al. 2024, https://arxiv.org/abs/2405.14734, equation 6. TRL's ``CPOTrainer`` computes
    the same with ``loss_type="simpo"`` and ``cpo_alpha=0``.

    Args:
        chosen: Mean log-probabilities of a token.
        rejected: Mean log-probabilities of a token.
        beta: Scale of the rewards.
        gamma: Margin :math:`\gamma` of the rewards.

    Returns:
        The loss of each pair.
    """
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    r"""ORPO's odds-ratio part: the odds of chosen answers shall be higher; no reference.

    .. math:: -\lambda \log\sigma\left(\log\frac{p_w}{1 - p_w} - \log\frac{p_l}{1 - p_l}\right),
              \qquad p = \pi(y|x)^{1 / |y|}

    Hong et al. 2024, https://arxiv.org/abs/2403.07691, equations 3, 4 and 7, with
    :math:`\lambda` = `beta`. The next-token loss of the chosen answer belongs to it with the weight
    1 (equation 6; `ResolvedLoss.sft_weight`). The paper's is of :math:`y_w` alone and so is ours;
    TRL's runs over the prompt too.

    Args:
        chosen: Mean log-probabilities of a token.
        rejected: Mean log-probabilities of a token.
        beta: :math:`\lambda`.

    Returns:
        The loss of each pair.
    """
    return -beta * logsigmoid(log_odds_ratio(chosen, rejected))


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    r""":math:`\log\frac{p_w}{1 - p_w} - \log\frac{p_l}{1 - p_l}` of mean log-probabilities."""
    return _log_odds(chosen) - _log_odds(rejected)


def _log_odds(logp: Tensor) -> Tensor:
    logp = logp.clamp(max=_LARGEST_LOGP)
    return logp - torch.log(-torch.expm1(logp))
