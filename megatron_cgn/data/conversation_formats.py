"""What the records of instruction data look like, and the conversations in them.

========================  =====================================================================
kind                      fields of the record
========================  =====================================================================
``alpaca``                ``instruction``, ``input``, ``output``; optionally ``system`` and
                          ``history``, a list of ``[question, answer]``
``sharegpt``              ``conversations``: a list of ``{"from", "value"}``; optionally ``system``
``messages``              ``messages``: a list of ``{"role", "content"}``, OpenAI's format;
                          optionally ``system``
``prompt``                ``prompt`` and ``completion``: texts, or lists of messages
========================  =====================================================================

The kind is told from the fields, record by record. An alpaca record's question is its
``instruction``, followed, where ``input`` is not empty, by a newline and the ``input``, as
LLaMA-Factory joins them. Other fields, such as ``id`` or ``source``, are not text to train on and
are passed over, except those that would change what is trained: they are refused, since they would
have no effect here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cgn.errors import DataError
from tokenizer.chat import Message

KINDS = ("alpaca", "sharegpt", "messages", "prompt")
"""Kinds of records."""

FIELDS = (
    "id",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "conversations",
    "messages",
    "prompt",
    "completion",
    "tools",
    "functions",
    "images",
    "videos",
    "audios",
)
"""Fields that are looked at. The others of a table need not be read."""

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_TOOL_CALL_ROLES = ("function_call", "tool_call")
_RECORD_FIELDS_REFUSED = ("tools", "functions", "images", "videos", "audios")
_MESSAGE_FIELDS_REFUSED = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
)
_MESSAGE_SWITCHES = ("weight", "train", "loss")  # whether a turn counts, where 1 means as usual


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation as a record tells it."""

    kind: str
    """One of `KINDS`."""
    messages: tuple[Message, ...]
    """The conversation; not yet held against a chat template."""


def read_record(row: Any) -> Record:
    """Find the conversation in a record.

    Args:
        row: What a line of JSON or a row of a table holds.

    Raises:
        DataError: If it is of no known kind, or not as its kind should be; says why, not where.
    """
    fields = check_fields(row)
    kind = _detect(fields)
    if kind == "alpaca":
        messages = alpaca_prompt(fields)
        messages.append(Message("assistant", as_text(fields["output"], "output")))
    elif kind == "prompt":
        question = said(fields["prompt"], "prompt", role="user")
        messages = [*question, *said(fields["completion"], "completion", role="assistant")]
    else:
        messages = listed(fields["conversations" if kind == "sharegpt" else "messages"])
    return Record(kind, tuple(with_system(fields, messages)))


def check_fields(row: Any) -> Mapping[str, Any]:
    """Check that a record is an object, and has nothing in it that cannot be trained on.

    Raises:
        DataError: If not.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"expected an object, found {kind_of(row)}")
    for name in _RECORD_FIELDS_REFUSED:
        if row.get(name) and row[name] != "[]":  # no tools at all, as JSON in a column of texts
            raise DataError(f"has the field {name!r}, which cannot be trained on and is not empty")
    return row


def _detect(row: Mapping[str, Any]) -> str:
    has = {name for name, value in row.items() if value is not None}
    fits = {
        "alpaca": "instruction" in has and "output" in has,
        "sharegpt": "conversations" in has,
        "messages": "messages" in has,
        "prompt": "prompt" in has and "completion" in has,
    }
    kinds = [kind for kind in KINDS if fits[kind]]
    if len(kinds) > 1:
        raise DataError(
            f"is of several kinds at once ({', '.join(kinds)}): keep the fields of one of them"
        )
    if kinds:
        return kinds[0]
    names = ", ".join(map(repr, row)) or "none"
    raise DataError(f"is of no known kind, its fields being {names}: {_hint(has)}")


def _hint(has: set[str]) -> str:
    if "chosen" in has and "rejected" in has:
        return "this is preference data (stage dpo or rm), not instruction data"
    if "instruction" in has:
        return "instruction lacks its output"
    if "prompt" in has:
        return "prompt lacks its completion"
    return (
        "give instruction, input and output; conversations of from and value; messages of role "
        "and content; or prompt and completion"
    )


def alpaca_prompt(row: Mapping[str, Any]) -> list[Message]:
    """What an alpaca record asks: its history, and its instruction with the input behind it."""
    messages = []
    for number, pair in enumerate(as_list(row.get("history") or (), "history"), start=1):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise DataError(f"history, entry {number}: expected [question, answer]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append(Message(role, as_text(text, f"history, entry {number}")))
    question = as_text(row["instruction"], "instruction")
    more = as_text(row.get("input") or "", "input")
    if more.strip():
        question = f"{question}\n{more}" if question.strip() else more
    messages.append(Message("user", question))
    return messages


def said(value: Any, name: str, *, role: str) -> list[Message]:
    """What one side says: a text, which has the role, or a list of messages."""
    return [Message(role, value)] if isinstance(value, str) else listed(value, name)


def listed(value: Any, name: str = "the list of messages") -> list[Message]:
    """Messages of a list."""
    return [read_message(item, n) for n, item in enumerate(as_list(value, name), start=1)]


def read_message(item: Any, number: int) -> Message:
    """A message in either notation.

    Args:
        item: What stands for it.
        number: Its place in the conversation, for faults.

    Raises:
        DataError: If it is none, or has what would have no effect.
    """
    place = f"message {number}"
    if not isinstance(item, Mapping):
        raise DataError(f"{place}: expected an object, found {kind_of(item)}")
    names = ("from", "value") if item.get("from") is not None else ("role", "content")
    for name in _MESSAGE_FIELDS_REFUSED:
        if item.get(name):
            raise DataError(f"{place} has the field {name!r}, which would have no effect")
    for name in _MESSAGE_SWITCHES:
        if item.get(name) not in (None, 1, True):
            raise DataError(
                f"{place} has {name} {item[name]!r}, which would have no effect: turns are chosen "
                "for a whole run (chat.last_turn_only)"
            )
    given = item.get(names[0])
    if given is None:
        fields = ", ".join(map(repr, item)) or "none"
        raise DataError(
            f"{place}: has neither role and content nor from and value; its fields are {fields}"
        )
    if given in _TOOL_CALL_ROLES:
        raise DataError(f"{place} is a call of a tool, which cannot be trained on")
    if not isinstance(given, str) or given not in _ROLES:
        raise DataError(f"{place} has the unknown role {given!r}: known are {', '.join(_ROLES)}")
    return Message(_ROLES[given], _content(item.get(names[1]), f"{place} ({given})"))


def _content(value: Any, place: str) -> str:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return as_text(value, place)
    texts = []
    for part in value:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
            raise DataError(f"{place} has a part that is no text ({kind})")
        texts.append(as_text(part.get("text"), place))
    return "".join(texts)


def with_system(row: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Put the field ``system`` first; empty, as columns of tables often are, it says nothing."""
    system = row.get("system")
    if not system:
        return messages
    if messages and messages[0].role == "system":
        raise DataError("has the field 'system' and begins with a system message: keep one")
    return [Message("system", as_text(system, "system")), *messages]


def as_list(value: Any, name: str) -> Sequence[Any]:
    """The value, if it is a list."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise DataError(f"{name}: expected a list, found {kind_of(value)}")
    return value


def as_text(value: Any, place: str) -> str:
    """The value, if it is a text."""
    if not isinstance(value, str):
        raise DataError(f"{place}: expected a text, found {kind_of(value)}")
    return value


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    if value is None:
        return "null"
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else "no text")
