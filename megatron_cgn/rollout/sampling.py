"""From logits to a token: greedy, or drawn after temperature, top-k and top-p.

The three act in this order and keep as much as those of `transformers` keep, ties included, so that
a setting means here what it means there; of equals that top-p parts, the higher ids stay. A draw
depends on the logits, the seed and the number of tokens drawn before, never on what else is in the
batch.

Shapes: B sequences, V ids of the vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_cgn.errors import ConfigError

_DRAW_BITS = 32
"""Bits of a draw. Few enough that a draw times a sum stays below the sum in FP64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How answers are drawn, and when they end.

    Attributes:
        max_new_tokens: Longest answer, in tokens, the stop token included.
        temperature: Logits are divided by it; 0 takes the likeliest token.
        top_k: Only the `top_k` likeliest tokens are drawn; None for all.
        top_p: Only the likeliest tokens that together have this probability are drawn; Holtzman
            et al. 2019, https://arxiv.org/abs/1904.09751.
        stop_ids: Tokens that end an answer.
        seed: Draws of another seed are others.

    Raises:
        ConfigError: If a value is out of bounds, or has no effect.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: {self.max_new_tokens}; must be 1 or more.")
        if not 0.0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature: {self.temperature}; must be a number from 0 on. 0 takes the "
                "likeliest token, 1 draws from the model's own probabilities."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k: {self.top_k}; must be 1 or more, or not given.")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p: {self.top_p}; must be above 0 and at most 1.")
        if self.seed < 0:
            raise ConfigError(f"seed: {self.seed}; must be 0 or more.")
        if self.is_greedy and (self.top_k is not None or self.top_p < 1.0):
            raise ConfigError(
                "top_k, top_p: have no effect at temperature 0, which takes the likeliest token. "
                "Give a temperature, e.g. 0.7, or leave them out."
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature == 0.0


class Draws:
    """The random numbers of one answer.

    Args:
        seed: Of all answers together.
        answer: Tells this one from the others.
    """

    def __init__(self, seed: int, answer: int) -> None:
        self._generator = np.random.Generator(
            np.random.Philox(np.random.SeedSequence((seed, answer)))
        )

    def next(self) -> float:
        """A number from 0 up to, but not including, 1."""
        return float(self._generator.integers(2**_DRAW_BITS) * 2.0**-_DRAW_BITS)


def choose(logits: Tensor, sampling: Sampling, draws: Sequence[Draws]) -> tuple[Tensor, Tensor]:
    """Take one token for each sequence.

    Args:
        logits: FP32 ``[B, V]``.
        sampling: How.
        draws: Random numbers of each sequence; unused if greedy.

    Returns:
        Tokens, int64 ``[B]``, and their log-probabilities under the model itself, that is at
        temperature 1 and before top-k and top-p, FP32 ``[B]``: what `Engine.score` gives.
    """
    if sampling.is_greedy:
        tokens = logits.argmax(-1)
    else:
        numbers = torch.tensor([d.next() for d in draws], dtype=torch.float64)
        tokens = inverse_cdf(probabilities(logits, sampling), numbers.to(logits.device))
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return tokens, logprobs


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What tokens are drawn with.

    Args:
        logits: FP32 ``[B, V]``.
        sampling: Not greedy.

    Returns:
        FP32 ``[B, V]``; rows add up to 1.
    """
    scores = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.size(-1):
        least = scores.topk(sampling.top_k).values[:, -1:]
        # All that tie with the last one stay.
        scores = scores.masked_fill(scores < least, -math.inf)
    if sampling.top_p < 1.0:
        ordered, order = scores.sort(dim=-1, stable=True)
        # Summed from the unlikely end: those that together have 1 - top_p go, save the last.
        gone = ordered.softmax(-1).cumsum(-1) <= 1.0 - sampling.top_p
        gone[:, -1] = False
        scores = scores.masked_fill(torch.zeros_like(gone).scatter(-1, order, gone), -math.inf)
    return scores.softmax(-1)


def inverse_cdf(probs: Tensor, numbers: Tensor) -> Tensor:
    """The token at which the probabilities, summed in the ids' order, exceed a number.

    Args:
        probs: FP32 ``[B, V]``.
        numbers: From 0 up to 1, FP64 ``[B]``.

    Returns:
        Tokens of a probability above zero, int64 ``[B]``.
    """
    sums = probs.double().cumsum(-1)
    wanted = numbers[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True)[:, 0]
