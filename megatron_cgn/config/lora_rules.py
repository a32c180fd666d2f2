"""Rules of ``lora``: those of the settings alone, and those that need the model's shape."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Protocol

from megatron_cgn.config.schema import LoraConfig, RunConfig

TARGETS = LoraConfig().targets
"""Every matrix that can have an adapter."""
WHOLE = ("embed_tokens", "lm_head")
"""Every matrix that can be trained whole beside adapters."""
SCORE = "score"
"""The head of a reward model, which is trained whole in any case."""


class AdaptedArchitecture(Protocol):
    """What of a model's architecture the rules need."""

    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def ffn_hidden_size(self) -> int: ...  # noqa: D102
    @property
    def num_attention_heads(self) -> int: ...  # noqa: D102
    @property
    def num_key_value_heads(self) -> int: ...  # noqa: D102
    @property
    def head_dim(self) -> int: ...  # noqa: D102
    @property
    def tie_word_embeddings(self) -> bool: ...  # noqa: D102
    @property
    def head(self) -> str: ...  # noqa: D102


def lora_faults(run: RunConfig) -> Iterator[str]:
    """Find what is wrong with the adapters' settings whatever the model is.

    Args:
        run: The configuration.

    Yields:
        A message a fault.
    """
    lora = run.lora
    if lora.rank is None:
        yield from _without_effect(lora)
        return
    if lora.rank < 1:
        yield f"lora.rank: {lora.rank}; must be at least 1, or null to train all weights."
    if lora.alpha is not None and lora.alpha <= 0:
        yield f"lora.alpha: {lora.alpha}; must be above 0. Usual: the rank, or twice the rank."
    if not 0 <= lora.dropout < 1:
        yield f"lora.dropout: {lora.dropout}; must be at least 0 and below 1. Usual: 0 to 0.1."
    yield from _names("lora.targets", lora.targets, TARGETS, other=WHOLE)
    if not lora.targets:
        yield (
            "lora.targets: is empty, so that there would be no adapter. Name at least one of "
            f"{', '.join(TARGETS)}."
        )
    yield from _names("lora.modules_to_save", lora.modules_to_save, WHOLE, other=TARGETS)
    if run.checkpoint.load_optimizer:
        yield (
            "checkpoint.load_optimizer: true, but the optimizer state of a model is that of the "
            "weights, which adapters leave as they are; set it to false."
        )
    if run.model.backend == "te":
        yield (
            "model.backend: te, but adapters need native layers; set model.backend=auto or native."
        )


def lora_model_faults(run: RunConfig, architecture: AdaptedArchitecture) -> Iterator[str]:
    """Find what of the adapters' settings does not fit a model.

    Args:
        run: The configuration, which `lora_faults` has passed.
        architecture: The model.

    Yields:
        A message a fault.
    """
    lora = run.lora
    if lora.rank is None:
        return
    smaller = [
        (target, min(shape), shape)
        for target, shape in matrix_shapes(architecture).items()
        if target in lora.targets and lora.rank > min(shape)
    ]
    if smaller:
        limit = min(side for _, side, _ in smaller)
        shapes = ", ".join(f"{target} [{rows}, {cols}]" for target, _, (rows, cols) in smaller)
        yield (
            f"lora.rank: {lora.rank} is more than the smaller side of {shapes}, so that an adapter "
            f"would hold more than the matrix; at most {limit}, or leave these out of lora.targets."
        )
    if architecture.head == "score" and "lm_head" in lora.modules_to_save:
        yield (
            "lora.modules_to_save: lm_head, but a reward model has none: it ends in a score, which "
            "is always trained whole; remove lm_head."
        )
    elif architecture.tie_word_embeddings and "lm_head" in lora.modules_to_save:
        yield (
            "lora.modules_to_save: lm_head, but the model's output layer is its embedding "
            "(tie_word_embeddings); name embed_tokens alone, which trains both as the one matrix "
            "that they are."
        )


def matrix_shapes(architecture: AdaptedArchitecture) -> dict[str, tuple[int, int]]:
    """Rows and columns of each matrix that can have an adapter.

    Args:
        architecture: The model.

    Returns:
        Shapes by target, in the order of `TARGETS`.
    """
    a = architecture
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    hidden, wide = a.hidden_size, a.ffn_hidden_size
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (wide, hidden),
        "up_proj": (wide, hidden),
        "down_proj": (hidden, wide),
    }


def _without_effect(lora: LoraConfig) -> Iterator[str]:
    """Settings of adapters that there are none of."""
    default = LoraConfig()
    for field in fields(lora):
        value = getattr(lora, field.name)
        if value != getattr(default, field.name):
            shown = list(value) if isinstance(value, tuple) else value
            yield (
                f"lora.{field.name}: {shown} has no effect without adapters; set lora.rank, or "
                "remove it."
            )


def _names(
    where: str, names: Sequence[str], known: Sequence[str], *, other: Sequence[str]
) -> Iterator[str]:
    """Names that are unknown, or given twice."""
    for index, name in enumerate(names):
        if name in names[:index]:
            yield f"{where}: {name} is given twice; remove one."
        elif name in other:
            place = "lora.modules_to_save" if other is WHOLE else "lora.targets"
            yield f"{where}: {name} belongs to {place}; here may be {', '.join(known)}."
        elif name == SCORE:
            yield (
                f"{where}: score has no effect: stage rm trains a reward model's whole anyway, "
                "and no other model has one; remove it."
            )
        elif name not in known:
            # Users write whole paths, as `peft` allows.
            near = difflib.get_close_matches(name.rpartition(".")[2], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}? " if near else ""
            yield (f"{where}: {name!r} matches no layer; {hint}choose from {', '.join(known)}.")
