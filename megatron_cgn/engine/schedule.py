"""The learning rate as a pure function of the step, so that resuming needs no state."""

import math

from megatron_cgn.config.schema import OptimConfig


def learning_rate(step: int, optim: OptimConfig, *, total_steps: int) -> float:
    r"""Learning rate of one optimizer step.

    With :math:`n = step + 1` and :math:`w` warm-up steps of :math:`T` in all, the rate rises as
    :math:`lr \cdot n / w` and then falls from ``lr`` to exactly ``min_lr`` at the last step:
    along half a cosine, a line, not at all, or (``wsd``) along a line over the last
    ``decay_steps`` only (Hu et al. 2024, https://arxiv.org/abs/2404.06395).

    Args:
        step: Steps done before this one, from 0.
        optim: Peak, floor and shape.
        total_steps: Steps of the whole run.

    Returns:
        The rate of this step.
    """
    n = step + 1
    if n < optim.warmup_steps:
        return optim.lr * n / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    start = optim.warmup_steps
    if optim.schedule == "wsd":
        assert optim.decay_steps is not None, "configuration validation demands it"
        start = max(start, total_steps - optim.decay_steps)
    progress = min(1.0, max(0.0, (n - start) / max(1, total_steps - start)))
    if optim.schedule == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        share = 1.0 - progress
    return optim.min_lr + (optim.lr - optim.min_lr) * share
