"""Rules of ``optim.param_groups`` that need no model; those that do are the engine's."""

from collections import Counter
from collections.abc import Iterator

from megatron_cgn.config.schema import OptimConfig, ParamGroupConfig

OTHERS = "others"
"""The selector of all that no other group has."""
_WITHOUT_TOKENS = (OTHERS, "norms", "blocks")
"""Selectors of parameters whose rows are not tokens'."""


def param_group_faults(optim: OptimConfig) -> Iterator[str]:
    """Find what is wrong with the groups whatever the model is.

    Args:
        optim: The settings.

    Yields:
        A message a fault.
    """
    groups = optim.param_groups
    for name, count in Counter(group.name for group in groups).items():
        if count > 1:
            yield (
                f"optim.param_groups: the name {name!r} is given {count} times. Names must differ."
            )
    rest = any(OTHERS in group.parameters for group in groups)
    for index, group in enumerate(groups):
        where = f"optim.param_groups.{index}"
        if not group.name or "/" in group.name:
            yield f"{where}.name: {group.name!r}; must be a word without slashes."
        where = f"optim.param_groups[{group.name}]"
        yield from _parameters(where, group)
        yield from _rows(where, group)
        yield from _rates(where, group, optim)
        yield from _times(where, group)
        if not rest and not _differs(group, optim):
            yield (
                f"{where}: has no effect, since it is trained like everything else. Give it lr, "
                "lr_mult, weight_decay, frozen_until_step or trained_until_step, or remove it."
            )


def param_group_step_faults(optim: OptimConfig, total_steps: int, setting: str) -> Iterator[str]:
    """Find groups whose time does not fit into the run.

    Args:
        optim: The settings.
        total_steps: Optimizer steps of the run.
        setting: What makes it so long, for the message.

    Yields:
        A message a fault.
    """
    for group in optim.param_groups:
        where = f"optim.param_groups[{group.name}]"
        if group.frozen_until_step >= total_steps:
            yield (
                f"{where}.frozen_until_step: {group.frozen_until_step}; the run ends with step "
                f"{total_steps} ({setting}), so that the group is never trained. Use fewer, or "
                "trained_until_step=0 if that is meant."
            )
        if group.trained_until_step is not None and group.trained_until_step >= total_steps:
            yield (
                f"{where}.trained_until_step: {group.trained_until_step} has no effect in a run of "
                f"{total_steps} steps ({setting}); set it to null."
            )


def _parameters(where: str, group: ParamGroupConfig) -> Iterator[str]:
    if not group.parameters:
        yield (
            f"{where}.parameters: is empty. Name embeddings, output, norms, blocks, others, or "
            "Hugging Face names such as model.layers.*.mlp.*."
        )
    elif OTHERS in group.parameters and len(group.parameters) > 1:
        yield (
            f"{where}.parameters: others stands for all that no other group has, and cannot be "
            "named with anything else."
        )


def _rows(where: str, group: ParamGroupConfig) -> Iterator[str]:
    if group.rows == "all":
        if group.rows_from is not None:
            yield (
                f"{where}.rows_from: {group.rows_from} has no effect with rows=all; set rows to "
                "old or new."
            )
        return
    wrong = [name for name in group.parameters if name in _WITHOUT_TOKENS]
    if wrong:
        yield (
            f"{where}.rows: {group.rows}, but the rows of {', '.join(wrong)} are not those of "
            "tokens; only embeddings and output have them."
        )
    if group.rows_from is not None and group.rows_from < 1:
        yield (
            f"{where}.rows_from: {group.rows_from}; must be at least 1, the id of the first new "
            "token."
        )


def _rates(where: str, group: ParamGroupConfig, optim: OptimConfig) -> Iterator[str]:
    if group.lr is not None and group.lr_mult is not None:
        yield f"{where}: has both lr and lr_mult, which say the same; give one."
    for name in ("lr", "lr_mult"):
        value = getattr(group, name)
        if value is not None and value <= 0:
            yield f"{where}.{name}: {value}; must be above 0. To freeze: trained_until_step=0."
    if group.weight_decay is not None and group.weight_decay < 0:
        yield f"{where}.weight_decay: {group.weight_decay}; must be at least 0."
    given = [n for n in ("lr", "lr_mult", "weight_decay") if getattr(group, n) is not None]
    if given and group.trained_until_step == 0:
        yield f"{where}.{given[0]}: has no effect on a group that is never trained; remove it."


def _times(where: str, group: ParamGroupConfig) -> Iterator[str]:
    first, last = group.frozen_until_step, group.trained_until_step
    if first < 0:
        yield f"{where}.frozen_until_step: {first}; must be at least 0."
    if last is not None and last < 0:
        yield f"{where}.trained_until_step: {last}; must be at least 0."
    elif last is not None and 0 < max(first, last) and last <= first:
        yield (
            f"{where}.trained_until_step: {last} is not after frozen_until_step={first}, so that "
            "the group is never trained. Raise it, or leave only trained_until_step=0."
        )


def _differs(group: ParamGroupConfig, optim: OptimConfig) -> bool:
    """Whether a group is trained otherwise than what belongs to none."""
    return (
        group.lr not in (None, optim.lr)
        or group.lr_mult not in (None, 1.0)
        or group.weight_decay not in (None, optim.weight_decay)
        or group.frozen_until_step != 0
        or group.trained_until_step is not None
    )
