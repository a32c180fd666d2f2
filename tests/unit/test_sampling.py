"""Which tokens are drawn, and how likely: against `transformers` and against the probabilities."""

import itertools

import pytest
import torch

from megatron_cgn.errors import ConfigError
from megatron_cgn.rollout.sampling import Draws, Sampling, choose, inverse_cdf, probabilities

PROBABILITY_ATOL = 1e-6
"""FP32 softmax of the same logits, summed in another order."""
CHI_SQUARE_LIMIT = 32.9
"""The 0.9999 quantile for 8 degrees of freedom is 31.8; the seed is fixed, so that it is kept."""


def _logits() -> torch.Tensor:
    """Random rows, one with ties at every value, one all alike, one almost certain."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(5, 64, generator=generator) * 3
    rows[1] = torch.randint(0, 4, (64,), generator=generator).float()
    rows[2] = 0.25
    rows[3, 7] = 60.0
    return rows


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [*itertools.product((0.3, 1.0, 1.7), (None, 1, 9, 64, 900), (1.0, 0.9, 0.2, 1e-4))],
)
def test_probabilities_are_those_of_transformers(
    temperature: float, top_k: int | None, top_p: float
) -> None:
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        chain.append(TopPLogitsWarper(top_p))
    logits = _logits()
    expected = chain(torch.zeros(5, 1, dtype=torch.long), logits.clone()).softmax(-1)
    sampling = Sampling(max_new_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    found = probabilities(logits, sampling)
    distinct = [0, 3, 4]  # which of equals are kept below top_p is left to a sort by transformers
    assert torch.equal(found[distinct] > 0, expected[distinct] > 0)
    torch.testing.assert_close(found[distinct], expected[distinct], rtol=0, atol=PROBABILITY_ATOL)
    found, expected = found.sort().values, expected.sort().values
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=PROBABILITY_ATOL)


def test_draws_follow_the_probabilities() -> None:
    probs = torch.tensor([0.3, 0.0, 0.25, 0.15, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01])
    sampling = Sampling(max_new_tokens=1, temperature=1.0)
    count, draws = 20_000, Draws(7, 0)
    tokens, logprobs = choose(probs.log().expand(count, -1), sampling, [draws] * count)
    seen = tokens.bincount(minlength=len(probs)).double()
    expected = probs.double() * count
    assert seen[1] == 0
    possible = expected > 0
    chi_square = ((seen - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < CHI_SQUARE_LIMIT
    torch.testing.assert_close(logprobs.exp(), probs[tokens])


def test_a_draw_depends_on_seed_and_place_alone() -> None:
    logits, sampling = _logits(), Sampling(max_new_tokens=1, temperature=1.0, seed=3)

    def draw(rows: list[int], seed: int = 3) -> list[list[int]]:
        draws = [Draws(seed, row) for row in rows]
        return [choose(logits[rows], sampling, draws)[0].tolist() for _ in range(6)]

    together = draw([0, 1, 2, 4])
    assert [[step[1], step[3]] for step in together] == draw([1, 4])
    assert draw([0, 1, 2, 4], seed=4) != together


def test_the_ends_of_the_scale_have_a_token() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).expand(2, -1)
    numbers = torch.tensor([0.0, 1.0 - 2.0**-32], dtype=torch.float64)
    assert inverse_cdf(probs, numbers).tolist() == [1, 2]


def test_greedy_takes_the_first_of_equals_and_tells_its_probability() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0]])
    tokens, logprobs = choose(logits, Sampling(max_new_tokens=1), [])
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[:, 1])


def test_logprobs_are_the_models_own() -> None:
    logits = _logits()
    sampling = Sampling(max_new_tokens=1, temperature=0.5, top_k=3, top_p=0.9)
    tokens, logprobs = choose(logits, sampling, [Draws(0, row) for row in range(5)])
    expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p: 1.1"),
        ({"seed": -1}, "seed: -1"),
        ({"top_k": 5}, "have no effect"),
        ({"top_p": 0.5}, "have no effect"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, float], named: str) -> None:
    given: dict[str, float] = {"max_new_tokens": 1, **settings}
    with pytest.raises(ConfigError, match=named):
        Sampling(**given)  # type: ignore[arg-type]
