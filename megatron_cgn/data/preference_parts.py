"""Parts of preference records: the prompt, what an answer says behind it, what orders answers."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_cgn.data.conversation_formats import (
    alpaca_prompt,
    as_text,
    kind_of,
    listed,
    read_message,
    said,
    with_system,
)
from megatron_cgn.errors import DataError
from tokenizer.chat import Message

EXAMPLE = (
    "give prompt, chosen and rejected; prompt and answers, the best first; or, for KTO, prompt, "
    "completion and label"
)

_PROMPTS = ("prompt", "instruction", "conversations", "messages")
_TEXTS = ("text", "answer", "content", "messages")
_ORDERS = ("rank", "score")
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def find_prompt(given: Mapping[str, Any]) -> list[Message] | None:
    """The prompt, if a field gives it."""
    names = [name for name in _PROMPTS if name in given]
    if len(names) > 1:
        raise DataError(f"has {' and '.join(names)}: keep one of them as the prompt")
    if not names:
        return None
    (name,) = names
    if name == "instruction":
        messages = alpaca_prompt(given)
    else:
        value = given[name]
        transcript = _transcript(value)
        messages = said(value, name, role="user") if transcript is None else transcript
        if transcript and transcript[-1] == Message("assistant", ""):
            messages = transcript[:-1]  # where the answer is to begin
    return with_system(given, messages)


def require_prompt(given: Mapping[str, Any]) -> list[Message]:
    """The prompt, which a field must give."""
    prompt = find_prompt(given)
    if not prompt:
        raise DataError(f"has no prompt: {EXAMPLE}")
    return prompt


def said_by(value: Any, name: str) -> list[Message]:
    """What an answer says, the prompt in front of it perhaps included."""
    if isinstance(value, Mapping):
        return [read_message(value, 1)]
    if isinstance(value, str) or not isinstance(value, Sequence):
        text = as_text(value, name)
        return _transcript(text) or [Message("assistant", text)]
    try:
        return listed(value, name)
    except DataError as fault:
        raise DataError(f"{name}: {fault}") from fault


def _transcript(value: Any) -> list[Message] | None:
    """The turns of a text that begins as transcripts of ``Human:`` and ``Assistant:`` do."""
    if not isinstance(value, str) or not value.startswith("\n\nHuman:"):
        return None
    _, *parts = _TRANSCRIPT.split(value)
    return [
        Message(_SPEAKERS[who], text.strip())
        for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def behind(prompt: Sequence[Message], messages: list[Message], name: str) -> tuple[Message, ...]:
    """What an answer says behind the prompt, with which it may begin."""
    spoken = [message for message in prompt if message.role not in ("system", "developer")]
    for beginning in (list(prompt), spoken):
        if beginning and messages[: len(beginning)] == beginning:
            return tuple(messages[len(beginning) :])
    if messages and messages[0].role != "assistant":
        raise DataError(
            f"{name} answers another prompt: it begins with a message of the {messages[0].role} "
            "that the record's prompt does not begin with. Answers are compared to one prompt only"
        )
    return tuple(messages)


def said_in_ranking(item: Any, name: str) -> list[Message]:
    """What an answer of a ranking says."""
    if not isinstance(item, Mapping) or item.get("role") is not None or item.get("from"):
        return said_by(item, name)
    fields = [field for field in _TEXTS if item.get(field) is not None]
    if len(fields) != 1:
        found = " and ".join(fields) if fields else ", ".join(map(repr, item)) or "none"
        raise DataError(f"{name}: give one of {', '.join(_TEXTS)}; its fields are {found}")
    return said_by(item[fields[0]], name)


def orders_of(items: Sequence[Any]) -> list[float]:
    """What orders the answers of a ranking, larger being better."""
    orders = {
        order
        for item in items
        if isinstance(item, Mapping)
        for order in _ORDERS
        if item.get(order) is not None
    }
    if not orders:
        return [float(len(items) - number) for number in range(len(items))]
    if len(orders) > 1:
        raise DataError("answers have ranks and scores: keep one of them")
    (order,) = orders
    sign = -1.0 if order == "rank" else 1.0
    values = []
    for number, item in enumerate(items, start=1):
        value = item.get(order) if isinstance(item, Mapping) else None
        if value is None:
            raise DataError(f"answer {number} has no {order}, as others have: give it to each")
        values.append(sign * as_number(value, f"answer {number}: {order}"))
    return values


def as_number(value: Any, name: str) -> float:
    """The value, if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{name}: expected a number, found {kind_of(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"{name}: {number} is not finite")
    return number
