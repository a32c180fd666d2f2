"""A conversation on the terminal: what interrupts and faults leave of it."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from megatron_cgn.errors import DataError
from megatron_cgn.rollout.chat import converse
from tokenizer.chat import Message


class _Template:
    """Prompts are what was said; tokens are characters."""

    def encode_prompt(self, messages: Sequence[Message]) -> Any:
        return [(message.role, message.content) for message in messages]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def _converse(lines: list[str], ask: Callable[..., object], **options: Any) -> str:
    waiting, written = iter(lines), list[str]()
    template: Any = _Template()
    converse(lambda: next(waiting, None), ask, written.append, template=template, **options)
    return "".join(written)


def test_an_interrupted_answer_stays_in_the_conversation() -> None:
    asked: list[Any] = []

    def ask(prompt: Any, on_token: Callable[[int], None]) -> None:
        asked.append(prompt)
        for letter in "yes":
            on_token(ord(letter))
            if len(asked) == 2:
                raise KeyboardInterrupt

    shown = _converse(["a", "b", " ", "/reset", "c"], ask, system="s")
    assert shown == "yes\ny (stopped)\n(new conversation)\nyes\n"
    first = [("system", "s"), ("user", "a")]
    assert asked == [
        first,
        [*first, ("assistant", "yes"), ("user", "b")],
        [("system", "s"), ("user", "c")],
    ]
    asked[1:] = []  # the next is the second again
    with pytest.raises(KeyboardInterrupt):
        _converse(["a"], ask, may_stop=False)


def test_a_faulty_message_is_left_out() -> None:
    asked: list[Any] = []

    def ask(prompt: Any, on_token: Callable[[int], None]) -> None:
        asked.append(prompt)
        if len(asked) == 1:
            raise DataError("the conversation is too long. Shorten it.")
        on_token(ord("y"))

    shown = _converse(["a", "b", "/exit", "c"], ask)
    assert shown == (
        "error: the conversation is too long. Shorten it. Your last message was left out; /reset "
        "starts anew.\ny\n"
    )
    assert asked[1:] == [[("user", "b")]]
