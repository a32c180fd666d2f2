"""Wiring that every stage shares which reads conversations: rows, their account, their template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_cgn.config.schema import RunConfig
from megatron_cgn.data.packed_plan import PackedData
from megatron_cgn.model.build import resolve_backend
from megatron_cgn.model.packing import check_packing
from tokenizer.chat import ChatTemplate
from tokenizer.wrapper import Tokenizer

PLAN = "data.plan"
"""Name of the plan in a checkpoint's record."""


class TokensRead:
    """Tokens that a run has read after so many steps, padding left out: packs are not all full."""

    def __init__(self, data: PackedData[Any]) -> None:
        """Count nothing yet."""
        self._data = data
        self._known = (0, 0)

    def __call__(self, step: int) -> int:
        """Tokens of the first steps, over all ranks."""
        before, tokens = self._known if self._known[0] <= step else (0, 0)
        plan = self._data.plan
        start, stop = (min(s * plan.global_batch_size, plan.sequences) for s in (before, step))
        tokens += sum(tally.tokens for tally in self._data.train.tally(start, stop))
        self._known = (step, tokens)
        return tokens


def check_rows(run: RunConfig) -> None:
    """Check that the model's layers keep conversations of one row apart.

    Args:
        run: The configuration.

    Raises:
        ConfigError: If they cannot.
    """
    backend = "native" if run.lora.rank is not None else resolve_backend(run.model.backend)
    check_packing(backend, cp_size=run.parallel.context_parallel_size)


def cache_dir(run: RunConfig) -> Path:
    """``data.cache_dir`` or its default."""
    return Path(run.data.cache_dir or Path(run.output_dir) / "cache")


def full_rows(run: RunConfig) -> bool:
    """Whether rows of all micro-batches must have one length, to be sent or cut."""
    p = run.parallel
    return p.pipeline_model_parallel_size > 1 or p.context_parallel_size > 1 or p.sequence_parallel


def describe_template(chat: ChatTemplate) -> str:
    """Say which template is used, and how turns end."""
    ends = ", ".join(
        repr(chat.decode([i], skip_special_tokens=False)) for i in chat.end_of_turn_ids
    )
    return f"chat template: {chat.name}; turns end with {ends}"


def encoding_of(tokenizer: Tokenizer, chat: ChatTemplate) -> Mapping[str, str]:
    """What decides how conversations become tokens, by names of a checkpoint's record."""
    return {"tokenizer": tokenizer.fingerprint(), "chat.template": chat.fingerprint()}
