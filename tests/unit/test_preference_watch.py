"""Warnings of preference learning: told of what goes wrong, once, and not of what goes well."""

from typing import Any

import pytest

from megatron_cgn.engine.callbacks import SampleAnswer
from megatron_cgn.engine.engine import StepReport
from megatron_cgn.eval.preference_watch import EXPLODED, FALLEN_NATS, PreferenceWatch

STEPS = 100
BATCH = 16
HEALTHY = {
    "loss": 0.5,
    "rewards/chosen": 0.3,
    "rewards/rejected": -0.4,
    "rewards/margins": 0.7,
    "rewards/accuracies": 0.7,
    "lengths/chosen": 100.0,
    "lengths/rejected": 90.0,
    "empty_masks": 0.0,
}


def _watched(**settings: Any) -> tuple[PreferenceWatch, list[str]]:
    told: list[str] = []
    return PreferenceWatch(told.append, **({"total_steps": STEPS, "beta": 0.1} | settings)), told


def _run(
    watch: PreferenceWatch,
    *,
    steps: range = range(1, STEPS + 1),
    every: int = 1,
    count: int = BATCH,
    **changes: float,
) -> None:
    """Report steps of equal figures, every so many of them with metrics."""
    for step in steps:
        logged = step % every == 0
        watch.on_step(
            StepReport(
                step=step,
                metrics={**HEALTHY, **{k.replace("_", "/", 1): v for k, v in changes.items()}}
                if logged
                else {},
                count=count if logged else 0,
                lr=1e-6,
                grad_norm=1.0,
                skipped=False,
            )
        )


def test_a_healthy_run_is_left_in_peace() -> None:
    watch, told = _watched()
    _run(watch)
    watch.on_samples(0, _samples(40, 40))
    watch.on_samples(50, _samples(50, 45))
    assert told == []


# A fall of 0.12 nats a token: rewards are β times sums over 100 and 90 tokens.
FALLEN = {"rewards_chosen": -0.1 * 100 * 0.12, "rewards_rejected": -0.1 * 90 * 0.12}


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        (FALLEN, ("less probable together", "0.12 and 0.12 nats", "-1.200 and -1.080")),
        ({"rewards_margins": EXPLODED + 1}, ("margin of rewards is 11.0",)),
        ({"rewards_accuracies": 0.5}, ("50.0%", "chance")),
        ({"lengths_chosen": 150.0}, ("150 and 90", "longer than rejected")),
    ],
)
def test_known_faults_are_told_once_with_step_and_figures(
    changes: dict[str, float], texts: tuple[str, ...], every: int
) -> None:
    watch, told = _watched()
    _run(watch, every=every, count=BATCH * every, **changes)
    (line,) = told
    step = int(line.removeprefix("warning: step ").partition(":")[0])
    assert step % every == 0  # figures are those of a logged step
    assert step <= STEPS // 2
    for text in texts:
        assert text in line, line


def test_margins_of_losses_per_token_are_judged_per_token() -> None:
    """Their rewards are sums over answers: IPO wants half a nat a token, times 95 tokens here."""
    for margin, expected in ((0.5, 0), (EXPLODED + 1, 1)):
        watch, told = _watched(per_token=True)
        _run(watch, rewards_margins=95 * margin)
        assert len(told) == expected, told
    assert "margin of rewards is 11.0 a token" in told[0]


def test_a_fall_of_one_side_alone_is_what_is_wanted() -> None:
    watch, told = _watched()
    _run(watch, rewards_chosen=0.5, rewards_rejected=-8.0)
    assert told == []


def test_a_fall_is_judged_per_token() -> None:
    """The same rewards are a large fall of short answers, and a small one of long ones."""
    for tokens, expected in ((10.0, 1), (1000.0, 0)):
        watch, told = _watched()
        changes = {"lengths_chosen": tokens, "lengths_rejected": tokens}
        _run(watch, rewards_chosen=-0.2, rewards_rejected=-0.3, **changes)
        assert len(told) == expected, told


def test_without_a_reference_the_first_rewards_take_its_place() -> None:
    watch, told = _watched(beta=2.0, has_reference=False)
    start = {"rewards_chosen": -2 * 1.5, "rewards_rejected": -2 * 1.7}
    _run(watch, steps=range(1, 20), **start)
    assert told == []
    fall = 2 * (FALLEN_NATS + 0.01)
    fallen = {name: value - fall for name, value in start.items()}
    _run(watch, steps=range(20, 40), **fallen)
    (line,) = told
    assert "0.11 and 0.11 nats" in line


def test_rewards_of_a_head_cannot_fall() -> None:
    watch, told = _watched(beta=None)
    _run(watch, rewards_chosen=-50.0, rewards_rejected=-51.0)
    assert told == []


def test_accuracy_is_judged_after_a_quarter_of_the_run() -> None:
    watch, told = _watched()
    _run(watch, steps=range(1, STEPS // 4 + 1), rewards_accuracies=0.0)
    assert told == []
    _run(watch, steps=range(STEPS // 4 + 1, STEPS + 1), rewards_accuracies=0.6)
    assert told == []


def test_what_counts_nothing_is_told_at_once() -> None:
    watch, told = _watched()
    watch.on_step(
        StepReport(
            step=3,
            metrics={**HEALTHY, "empty_masks": 0.25},
            count=4,
            lr=1.0,
            grad_norm=1.0,
            skipped=False,
        )
    )
    assert len(told) == 1 and "step 3: nothing counts in 25.0% of the answers" in told[0]
    watch, told = _watched()
    _run(watch, steps=range(5, 7), count=0)
    assert len(told) == 1 and "step 5: nothing counts" in told[0]


def test_a_loss_that_is_no_number_is_told_and_nothing_else() -> None:
    watch, told = _watched()
    _run(watch, loss=float("nan"), **FALLEN)
    assert len(told) == 1 and "step 1: the loss is nan" in told[0]


def _samples(*lengths: int, ended: bool = True) -> list[SampleAnswer]:
    return [
        SampleAnswer(prompt="p", answer="a", reference=None, num_tokens=n, ended=ended)
        for n in lengths
    ]


@pytest.mark.parametrize("resumed", [False, True])
def test_growing_answers_are_told_also_after_resuming(resumed: bool) -> None:
    watch, told = _watched(first_samples=[20, 24] if resumed else [])
    if not resumed:
        watch.on_samples(0, _samples(20, 24))
    watch.on_samples(10, _samples(30, 30))
    assert told == []
    watch.on_samples(20, _samples(30, 50, ended=False))
    watch.on_samples(30, _samples(60, 60))
    (line,) = told
    assert "step 20" in line and "from 22 to 40 tokens" in line and "0 of 2 end" in line


def test_a_few_tokens_more_are_no_growth() -> None:
    watch, told = _watched()
    watch.on_samples(0, _samples(2))
    watch.on_samples(10, _samples(9))
    assert told == []
