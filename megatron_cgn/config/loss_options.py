"""Which options each loss of preference learning uses, and what they are if nobody says.

The one table that rules (`preference_rules.py`) and objectives read. The losses themselves, with
equations and papers, are in `megatron_cgn.objectives`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from megatron_cgn.config.schema import LossConfig, PreferenceLoss

DEFAULT_LOSS: PreferenceLoss = "sigmoid"
LOSS_OPTIONS: Mapping[PreferenceLoss, Mapping[str, float | bool]] = MappingProxyType(
    {
        "sigmoid": {
            "beta": 0.1,
            "label_smoothing": 0.0,
            "length_normalized": False,
            "rpo_alpha": 0.0,
        },
        "ipo": {"beta": 0.1, "rpo_alpha": 0.0},
        "hinge": {"beta": 0.1, "length_normalized": False, "rpo_alpha": 0.0},
        "robust": {"beta": 0.1, "label_smoothing": 0.1, "rpo_alpha": 0.0},
        "apo_zero": {"beta": 0.1, "rpo_alpha": 0.0},
        "apo_down": {"beta": 0.1, "rpo_alpha": 0.0},
        "simpo": {"beta": 2.0, "gamma": 0.5, "rpo_alpha": 0.0},
        "orpo": {"beta": 0.1},
        "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    }
)
"""Options of stage ``dpo`` that a loss uses, with its defaults."""
REWARD_OPTIONS = ("use_margins", "center_rewards")
"""Options of stage ``rm``, whose loss is Bradley and Terry's."""
_WITHOUT_REFERENCE = ("simpo", "orpo")
_PER_TOKEN = ("ipo", "simpo", "orpo")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedLoss:
    """A loss of stage ``dpo`` with every option decided; see `LossConfig` for their meaning.

    An option that the loss does not use has a value that changes nothing.
    """

    type: PreferenceLoss
    beta: float
    label_smoothing: float = 0.0
    length_normalized: bool = False
    rpo_alpha: float = 0.0
    gamma: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def needs_reference(self) -> bool:
        """Whether the policy is compared with a reference model."""
        return self.type not in _WITHOUT_REFERENCE

    @property
    def per_token(self) -> bool:
        """Whether what is compared is a mean over an answer's counted tokens, not their sum."""
        return self.length_normalized or self.type in _PER_TOKEN

    @property
    def sft_weight(self) -> float:
        """Weight of the next-token loss of chosen answers, which is a part of ORPO's own loss."""
        return 1.0 if self.type == "orpo" else self.rpo_alpha


def resolve(loss: LossConfig) -> ResolvedLoss:
    """Fill in the defaults of a loss of stage ``dpo``.

    Args:
        loss: Settings that `preference_rules.preference_faults` has passed.

    Returns:
        The loss with every option decided.
    """
    name = loss.type or DEFAULT_LOSS
    options: dict[str, Any] = {
        option: default if (given := getattr(loss, option)) is None else given
        for option, default in LOSS_OPTIONS[name].items()
    }
    return ResolvedLoss(type=name, **options)


def needs_reference(loss: LossConfig) -> bool:
    """Whether a loss of stage ``dpo`` compares the policy with a reference model.

    Args:
        loss: The settings.

    Returns:
        False for SimPO and ORPO.
    """
    return resolve(loss).needs_reference


def given_options(loss: LossConfig) -> dict[str, Any]:
    """The options that somebody has set, by name, ``type`` among them."""
    return {
        field.name: value
        for field in fields(loss)
        if (value := getattr(loss, field.name)) is not None
    }


def losses_using(option: str) -> list[PreferenceLoss]:
    """The losses of stage ``dpo`` that an option belongs to; none for those of stage ``rm``."""
    return [name for name, options in LOSS_OPTIONS.items() if option in options]
