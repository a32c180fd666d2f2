"""Messages, and the faults that a conversation can have.

What is wrong is said without the place, which whoever read the file knows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cgn.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Whose a message may be."""
_SHOWN = 40  # characters of a text in a message


@dataclass(frozen=True, slots=True)
class Message:
    """What one side of a conversation says."""

    role: str
    """One of `ROLES`."""
    content: str
    """What is said."""


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat templates read them."""
    return [{"role": message.role, "content": message.content} for message in messages]


def check_messages(messages: Sequence[Message], *, special: re.Pattern[str]) -> None:
    """Check the messages one by one.

    Args:
        messages: A conversation, or the beginning of one.
        special: Matches the tokenizer's special tokens.

    Raises:
        DataError: If there is none, a role is unknown, a question is empty, or a text spells a
            special token or is not valid Unicode.
    """
    if not messages:
        raise DataError("there is no message")
    for number, message in enumerate(messages, start=1):
        role, content = message.role, message.content
        if role not in ROLES:
            raise DataError(
                f"message {number} has the unknown role {role!r}: known are {', '.join(ROLES)}"
            )
        if found := special.search(content):
            raise DataError(
                f"message {number} ({role}) spells the special token {found.group()!r}, by which "
                "it could pass for another's turn: write it in another way"
            )
        if role == "user" and not content.strip():
            raise DataError(f"message {number} (user) is empty")
        if not content.isascii():
            _check_unicode(number, role, content)


def _check_unicode(number: int, role: str, content: str) -> None:
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"message {number} ({role}) is not valid Unicode: a lone surrogate at character "
            f"{error.start + 1}"
        ) from error


def check_answers(messages: Sequence[Message]) -> None:
    """Check that there is something to train on.

    Raises:
        DataError: If the assistant says nothing, in one of its turns or at all, or speaks first.
    """
    answers = 0
    for number, message in enumerate(messages, start=1):
        if message.role != "assistant":
            continue
        answers += 1
        if not message.content.strip():
            raise DataError(f"message {number} (assistant) is empty: there is nothing to learn")
        if number == 1:
            raise DataError(
                "the assistant speaks first, with no message to answer: put a user's or a system "
                "message before it"
            )
    if not answers:
        raise DataError("there is no turn of the assistant: nothing to learn")


def check_written(messages: Sequence[Message], text: str, *, name: str) -> None:
    """Check that a template wrote all that the model is to read.

    What it makes of the assistant's turns (some drop earlier thoughts) and of tools' answers (some
    write them as JSON) is its own affair.

    Args:
        messages: The conversation.
        text: What the template made of it.
        name: Of the template, for messages.

    Raises:
        DataError: If it left out a message of the user or the system.
    """
    for number, message in enumerate(messages, start=1):
        content = message.content.strip()
        if message.role not in ("assistant", "tool") and content not in text:
            raise DataError(
                f"chat template {name} leaves out message {number} ({message.role}: "
                f"{content[:_SHOWN]!r}): it knows no such role there. Change the role or use "
                "another template"
            )
