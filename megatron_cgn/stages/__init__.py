"""Training stages: each wires a batch source to an objective on the engine, and nothing more."""

from collections.abc import Callable

from megatron_cgn.config.schema import RunConfig
from megatron_cgn.errors import ConfigError


def find_stage(name: str | None) -> Callable[[RunConfig], None]:
    """The function that runs a stage.

    Args:
        name: ``stage`` of the configuration.

    Returns:
        Its entry point.

    Raises:
        ConfigError: If there is no such stage.
    """
    if name == "cpt":
        from megatron_cgn.stages import cpt

        return cpt.run
    if name == "sft":
        from megatron_cgn.stages import sft

        return sft.run
    if name == "dpo":
        from megatron_cgn.stages import dpo

        return dpo.run
    if name == "rm":
        from megatron_cgn.stages import rm

        return rm.run
    choices = "+stage=cpt, +stage=sft, +stage=rm or +stage=dpo"
    raise ConfigError(f"stage: {name or 'not chosen'}; start with {choices}.")
