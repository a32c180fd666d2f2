"""Rules of preference learning: which loss has which options, and within which limits."""

import dataclasses
from collections.abc import Iterator

from megatron_cgn.config.loss_options import (
    LOSS_OPTIONS,
    REWARD_OPTIONS,
    given_options,
    losses_using,
    resolve,
)
from megatron_cgn.config.schema import LossConfig, PreferenceLoss, RunConfig, SamplesConfig

PREFERENCE_STAGES = ("dpo", "rm")
"""Stages that compare answers; in every other one ``loss`` has no effect."""
_BALANCE = "Usual: 1, or more for the rarer kind, so that weight × number is about equal for both."
_ABOVE_ZERO = {
    "beta": "Usual: 0.01 to 0.5, and 2 to 10 for losses per token.",
    "rpo_alpha": "Remove it to train on the comparison alone. Usual: 0.1 to 1.",
    "desirable_weight": _BALANCE,
    "undesirable_weight": _BALANCE,
    "center_rewards": "Remove it to leave rewards where they are. Usual: 0.01.",
}


def preference_faults(run: RunConfig) -> Iterator[str]:
    """Find what is wrong with the settings of preference learning.

    Whether the data are pairs or answers with a label is seen when they are read.

    Args:
        run: The configuration.

    Yields:
        A message a fault.
    """
    if run.stage not in PREFERENCE_STAGES:
        for option, value in given_options(run.loss).items():
            yield (
                f"loss.{option}: {_shown(value)} has no effect with stage={run.stage}, which "
                f"compares no answers; remove it, or start with +stage={PREFERENCE_STAGES[0]}."
            )
        return
    unused = _unused_by_reward(run.loss) if run.stage == "rm" else _unused_by_loss(run.loss)
    yield from unused
    yield from _ranges(run.loss)
    yield from _reading(run)
    if run.stage == "dpo":
        yield from _reference(run)


def _unused_by_reward(loss: LossConfig) -> Iterator[str]:
    for option, value in given_options(loss).items():
        if option not in REWARD_OPTIONS:
            yield (
                f"loss.{option}: {_shown(value)} has no effect with stage=rm, whose loss is "
                "Bradley and Terry's; remove it, or start with +stage=dpo. Options here: "
                f"{', '.join(REWARD_OPTIONS)}."
            )


def _unused_by_loss(loss: LossConfig) -> Iterator[str]:
    name = resolve(loss).type
    for option, value in given_options(loss).items():
        if option in REWARD_OPTIONS:
            yield (
                f"loss.{option}: {_shown(value)} has no effect with stage=dpo; only stage rm uses "
                "it. Remove it, or start with +stage=rm."
            )
        elif option != "type" and option not in LOSS_OPTIONS[name]:
            yield (
                f"loss.{option}: {_shown(value)} has no effect with loss.type={name}"
                f"{_why_unused(option, name)}; remove it, or choose a loss that uses it: "
                f"{', '.join(losses_using(option))}."
            )


def _why_unused(option: str, name: PreferenceLoss) -> str:
    if option == "length_normalized" and resolve(LossConfig(type=name)).per_token:
        return ", which is always per token"
    if option == "rpo_alpha" and name == "orpo":
        return ", whose own next-token loss has the weight 1"
    return ""


def _ranges(loss: LossConfig) -> Iterator[str]:
    given = given_options(loss)
    for option, hint in _ABOVE_ZERO.items():
        if option in given and given[option] <= 0:
            yield f"loss.{option}: {given[option]}; must be above 0. {hint}"
    if "gamma" in given and given["gamma"] < 0:
        yield f"loss.gamma: {given['gamma']}; must be at least 0. Usual: 0.3 to 1.6."
    smoothing = loss.label_smoothing
    if smoothing is None:
        return
    if not 0 <= smoothing < 0.5:
        yield (
            f"loss.label_smoothing: {smoothing}; must be at least 0 and below 0.5, where a label "
            "says nothing any more. Usual: 0.1."
        )
    elif smoothing == 0 and loss.type == "robust":
        yield (
            "loss.label_smoothing: 0 makes loss.type=robust the same as sigmoid; choose that, or a "
            "share above 0."
        )


def _reading(run: RunConfig) -> Iterator[str]:
    """Settings of conversations that do not go with comparing answers."""
    if run.chat.train_on_prompt:
        yield (
            f"chat.train_on_prompt: true, but with stage={run.stage} answers are compared, and "
            "their prompt is the same; set it to false."
        )
    if run.stage != "rm":
        return
    if run.chat.last_turn_only:
        yield (
            "chat.last_turn_only: true has no effect with stage=rm, where a reward is read at an "
            "answer's last token; set it to false."
        )
    default = SamplesConfig()
    for field in dataclasses.fields(default):
        if getattr(run.samples, field.name) != getattr(default, field.name):
            yield (
                f"samples.{field.name}: has no effect with stage=rm, whose model gives rewards and "
                "writes nothing; remove it."
            )


def _reference(run: RunConfig) -> Iterator[str]:
    loss = resolve(run.loss)
    if run.model.init == "random" and loss.needs_reference:
        yield (
            f"model.init: random, but loss.type={loss.type} holds the policy to a reference, the "
            "model as it starts; set model.init=from_hf, and model.hf_path to a model that has "
            "learned to answer."
        )


def _shown(value: object) -> str:
    """A value as it is written in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)
