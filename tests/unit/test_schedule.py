"""The learning rate of every step, in closed form."""

import math

import pytest

from megatron_cgn.config.schema import OptimConfig
from megatron_cgn.engine.schedule import learning_rate

PEAK, FLOOR, TOTAL = 1e-3, 1e-4, 40


def _rates(optim: OptimConfig, total: int = TOTAL) -> list[float]:
    return [learning_rate(step, optim, total_steps=total) for step in range(total)]


def _optim(schedule: str, warmup: int, decay: int | None = None) -> OptimConfig:
    return OptimConfig(
        lr=PEAK,
        min_lr=FLOOR,
        warmup_steps=warmup,
        schedule=schedule,  # type: ignore[arg-type]
        decay_steps=decay,
    )


def _expected(schedule: str, n: int, warmup: int, decay: int) -> float:
    """Rate of the n-th step, counted from 1."""
    if n <= warmup:
        return PEAK * n / warmup
    if schedule == "constant":
        return PEAK
    if schedule == "cosine":
        angle = math.pi * (n - warmup) / (TOTAL - warmup)
        return (PEAK + FLOOR) / 2 + (PEAK - FLOOR) / 2 * math.cos(angle)
    if schedule == "linear":
        return PEAK + (FLOOR - PEAK) * (n - warmup) / (TOTAL - warmup)
    left = TOTAL - n
    return PEAK if left >= decay else FLOOR + (PEAK - FLOOR) * left / decay


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
@pytest.mark.parametrize("decay", [1, 7, 30])
def test_every_step_is_the_closed_form(schedule: str, warmup: int, decay: int) -> None:
    rates = _rates(_optim(schedule, warmup, decay if schedule == "wsd" else None))
    expected = [_expected(schedule, n, warmup, decay) for n in range(1, TOTAL + 1)]
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 3, 39])
@pytest.mark.parametrize("total", [40, 41, 1000])
def test_last_step_is_exactly_the_floor(schedule: str, warmup: int, total: int) -> None:
    optim = _optim(schedule, warmup, 1 if schedule == "wsd" else None)
    assert _rates(optim, total)[-1] == FLOOR


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_ends_exactly_at_the_peak(schedule: str) -> None:
    rates = _rates(_optim(schedule, 5, 10 if schedule == "wsd" else None))
    assert rates[4] == PEAK
    assert max(rates) == PEAK
    assert min(rates) == pytest.approx(min(PEAK / 5, PEAK if schedule == "constant" else FLOOR))


def test_floor_of_zero_and_of_the_peak() -> None:
    assert _rates(OptimConfig(lr=PEAK, min_lr=0.0))[-1] == 0.0
    assert set(_rates(OptimConfig(lr=PEAK, min_lr=PEAK))) == {PEAK}


def test_a_run_of_one_step_trains_at_the_floor() -> None:
    assert _rates(OptimConfig(lr=PEAK, min_lr=FLOOR), total=1) == [FLOOR]


def test_rate_beyond_the_last_step_stays_at_the_floor() -> None:
    optim = _optim("cosine", 5)
    assert learning_rate(TOTAL + 7, optim, total_steps=TOTAL) == FLOOR
