"""Settings of preference learning: none without effect, each within its limits."""

import dataclasses
from typing import Any

import pytest

from megatron_cgn.config.loss_options import (
    LOSS_OPTIONS,
    REWARD_OPTIONS,
    given_options,
    needs_reference,
    resolve,
)
from megatron_cgn.config.preference_rules import preference_faults
from megatron_cgn.config.schema import (
    ChatConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    SamplesConfig,
)

GOOD_VALUES: dict[str, Any] = {
    "beta": 0.2,
    "label_smoothing": 0.1,
    "length_normalized": True,
    "rpo_alpha": 0.5,
    "gamma": 0.5,
    "desirable_weight": 1.3,
    "undesirable_weight": 1.1,
    "use_margins": False,
    "center_rewards": 0.01,
}


def _faults(
    stage: str | None = "dpo", *, loss: dict[str, Any] | None = None, **more: Any
) -> list[str]:
    return list(preference_faults(RunConfig(stage=stage, loss=LossConfig(**loss or {}), **more)))


def test_every_option_is_tried_here() -> None:
    options = {field.name for field in dataclasses.fields(LossConfig)} - {"type"}
    assert set(GOOD_VALUES) == options
    used = {option for options in LOSS_OPTIONS.values() for option in options}
    assert used | set(REWARD_OPTIONS) == options and not used & set(REWARD_OPTIONS)


@pytest.mark.parametrize("option", GOOD_VALUES)
@pytest.mark.parametrize("name", LOSS_OPTIONS)
def test_an_option_that_the_loss_does_not_use_is_refused(name: str, option: str) -> None:
    faults = _faults(loss={"type": name, option: GOOD_VALUES[option]})
    if option in LOSS_OPTIONS[name]:  # type: ignore[index]
        assert faults == []
        return
    (fault,) = faults
    assert fault.startswith(f"loss.{option}: ") and "no effect" in fault
    users = [loss for loss, options in LOSS_OPTIONS.items() if option in options]
    assert all(user in fault for user in users) if users else "stage rm" in fault


@pytest.mark.parametrize("option", ["type", *GOOD_VALUES])
def test_reward_models_have_their_own_options(option: str) -> None:
    value = "ipo" if option == "type" else GOOD_VALUES[option]
    faults = _faults("rm", loss={option: value})
    assert bool(faults) == (option not in REWARD_OPTIONS)
    assert all(f.startswith(f"loss.{option}: ") and "stage=rm" in f for f in faults)


@pytest.mark.parametrize("stage", ["cpt", "sft", None])
@pytest.mark.parametrize("option", ["type", *GOOD_VALUES])
def test_stages_that_compare_nothing_have_no_loss_options(stage: str | None, option: str) -> None:
    value = "sigmoid" if option == "type" else GOOD_VALUES[option]
    (fault,) = _faults(stage, loss={option: value})
    assert fault.startswith(f"loss.{option}: ") and f"stage={stage}" in fault
    assert _faults(stage) == []


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [
        ({"beta": 0.0}, "above 0"),
        ({"beta": -0.1, "type": "kto"}, "above 0"),
        ({"rpo_alpha": 0.0}, "above 0"),
        ({"type": "simpo", "gamma": -0.1}, "at least 0"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"label_smoothing": -0.1}, "at least 0"),
        ({"type": "robust", "label_smoothing": 0.0}, "sigmoid"),
        ({"type": "kto", "desirable_weight": 0.0}, "above 0"),
        ({"type": "kto", "undesirable_weight": -1.0}, "above 0"),
    ],
)
def test_values_out_of_range_are_refused(loss: dict[str, Any], wanted: str) -> None:
    (fault,) = _faults(loss=loss)
    option = next(name for name in reversed(loss) if name != "type")
    assert fault.startswith(f"loss.{option}: {loss[option]:g}"[: len(f"loss.{option}: ") + 1])
    assert wanted in fault


def test_values_at_the_limit_are_taken() -> None:
    assert _faults(loss={"label_smoothing": 0.0}) == []
    assert _faults(loss={"type": "simpo", "gamma": 0.0}) == []
    (fault,) = _faults("rm", loss={"center_rewards": 0.0})
    assert fault.startswith("loss.center_rewards: 0.0; must be above 0")


@pytest.mark.parametrize(
    ("stage", "more", "wanted"),
    [
        ("dpo", {"chat": ChatConfig(train_on_prompt=True)}, "chat.train_on_prompt"),
        ("rm", {"chat": ChatConfig(train_on_prompt=True)}, "chat.train_on_prompt"),
        ("rm", {"chat": ChatConfig(last_turn_only=True)}, "chat.last_turn_only"),
        ("rm", {"samples": SamplesConfig(prompts=("你好",))}, "samples.prompts"),
        ("rm", {"samples": SamplesConfig(count=0)}, "samples.count"),
        ("dpo", {"model": ModelConfig(init="random")}, "model.init"),
    ],
)
def test_settings_that_do_not_go_with_comparing(
    stage: str, more: dict[str, Any], wanted: str
) -> None:
    (fault,) = _faults(stage, **more)
    assert fault.startswith(f"{wanted}: ")


@pytest.mark.parametrize(
    ("stage", "loss", "more"),
    [
        ("dpo", {}, {"chat": ChatConfig(last_turn_only=True)}),
        ("dpo", {}, {"samples": SamplesConfig(count=2)}),
        ("dpo", {"type": "simpo"}, {"model": ModelConfig(init="random")}),
        ("rm", {}, {"model": ModelConfig(init="random")}),
    ],
)
def test_settings_that_do_go_with_comparing(
    stage: str, loss: dict[str, Any], more: dict[str, Any]
) -> None:
    assert _faults(stage, loss=loss, **more) == []


def test_defaults_are_those_that_the_schema_tells() -> None:
    assert resolve(LossConfig()).type == "sigmoid"
    assert {resolve(LossConfig(type=name)).beta for name in LOSS_OPTIONS if name != "simpo"} == {
        0.1
    }
    simpo = resolve(LossConfig(type="simpo"))
    assert (simpo.beta, simpo.gamma, simpo.per_token) == (2.0, 0.5, True)
    assert resolve(LossConfig(type="robust")).label_smoothing == 0.1
    assert resolve(LossConfig(length_normalized=True)).per_token
    assert not resolve(LossConfig()).per_token
    assert resolve(LossConfig(type="orpo")).sft_weight == 1.0
    assert resolve(LossConfig(rpo_alpha=0.3)).sft_weight == 0.3


def test_given_values_win_even_if_they_are_zero_or_false() -> None:
    loss = LossConfig(type="sigmoid", label_smoothing=0.0, length_normalized=False)
    assert given_options(loss) == {
        "type": "sigmoid",
        "label_smoothing": 0.0,
        "length_normalized": False,
    }
    assert resolve(LossConfig(type="simpo", gamma=0.0)).gamma == 0.0


def test_simpo_and_orpo_need_no_reference() -> None:
    without = {name for name in LOSS_OPTIONS if not needs_reference(LossConfig(type=name))}
    assert without == {"simpo", "orpo"}
