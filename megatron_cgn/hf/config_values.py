"""Values of a ``config.json``: what counts as a number, and one spelling of RoPE's parameters."""

import sys
from collections.abc import Mapping
from typing import Any


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float holds: neither NaN nor infinite, nor a flag."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )


def is_integer(value: Any, *, least: int) -> bool:
    """Whether a value is an integer of at least `least`, and no flag."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def normal_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """One spelling of RoPE's parameters, without those that say nothing."""
    rope = {key: value for key, value in fields.items() if value is not None}
    if rope.get("rope_type", rope.get("type")) == rope.get("type"):
        rope["rope_type"] = rope.pop("type", "default")
    rope.setdefault("rope_type", "default")
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    return rope
