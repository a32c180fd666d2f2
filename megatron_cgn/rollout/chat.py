"""A conversation on the terminal: lines in, streamed answers out.

Where lines come from and text goes to is the caller's; the model is asked through a function.
"""

from collections.abc import Callable, Sequence

from megatron_cgn.errors import DataError
from megatron_cgn.rollout.text import TextStream
from tokenizer.chat import ChatTemplate, Message

HELP = "/reset starts a new conversation, /exit ends; Ctrl-C stops an answer."

Ask = Callable[[list[int], Callable[[int], None]], object]
"""Continues a prompt and calls back with each token."""


def converse(
    lines: Callable[[], str | None],
    ask: Ask,
    write: Callable[[str], object],
    *,
    template: ChatTemplate,
    system: str | None = None,
    may_stop: bool = True,
) -> None:
    """Answer line after line until there are no more.

    Args:
        lines: The next line of the user; None at the end.
        ask: The model.
        write: Shows text as it comes.
        template: Makes prompts of conversations.
        system: What the system says first.
        may_stop: Whether an interrupt ends only the answer that is being given. False where other
            processes are at work on it and would not hear of it.
    """
    first = [] if system is None else [Message("system", system)]
    said = list(first)
    while (line := lines()) is not None:
        command = line.strip()
        if command == "/exit":
            return
        if command == "/reset":
            said = list(first)
            write("(new conversation)\n")
        elif command in ("/help", "/?"):
            write(f"{HELP}\n")
        elif command:
            asked = [*said, Message("user", line)]
            said = _answer(asked, ask, write, template, may_stop=may_stop) or said


def _answer(
    said: Sequence[Message],
    ask: Ask,
    write: Callable[[str], object],
    template: ChatTemplate,
    *,
    may_stop: bool,
) -> list[Message] | None:
    """Stream an answer; the conversation with it, or None if there is none."""
    stream = TextStream(template.decode)
    parts: list[str] = []

    def show(token: int) -> None:
        parts.append(stream.add(token))
        write(parts[-1])

    try:
        ask(template.encode_prompt(said), show)
        parts.append(stream.end())
        write(f"{parts[-1]}\n")
    except DataError as fault:
        reason = str(fault).rstrip(".")
        write(f"error: {reason}. Your last message was left out; /reset starts anew.\n")
        return None
    except KeyboardInterrupt:
        if not may_stop:
            raise
        write(" (stopped)\n")
    answer = "".join(parts).strip()
    return [*said, Message("assistant", answer)] if answer else None
