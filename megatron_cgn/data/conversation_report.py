"""What files of conversations hold: counts, lengths, faults by reason, and examples to look at.

For people who prepare data, before a run: ``tools/preprocess_data.py --sft``. What a run does with
what it reads is its own account.
"""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cgn.data.conversations import (
    Conversation,
    Fault,
    encode_conversations,
    read_conversations,
)
from tokenizer.chat import ChatTemplate, EncodedChat

QUANTILES = (0.5, 0.9, 0.95, 0.99, 1.0)
"""Of the lengths, as they are shown; the last is the longest."""
EMPTY = "the file holds no {}"
"""Fault of a file without records."""
_DETAIL = re.compile(r"'[^']*'|\"[^\"]*\"|\b\d[\d,]*\b")
# Data may hold escape codes: they must not act on the reader's terminal. C0, C1 and delete.
_VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(32)},
    **{code: f"\\x{code:02x}" for code in range(128, 160)},
    127: "␡",
    ord("\t"): "\t",
    ord("\n"): "↵\n",
}
_COUNTED, _NORMAL = "\x1b[1;32m", "\x1b[0m"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counting:
    """Which tokens count, and how many may be read: the settings of ``chat`` and ``data``."""

    train_on_prompt: bool = False
    """Whether every token counts."""
    last_turn_only: bool = False
    """Whether of the assistant's turns only the last counts."""
    seq_length: int | None = None
    """Longest conversation. None: none is too long."""
    whole: bool = False
    """Whether the last token is read too, as it is for a reward."""

    def spans(self, encoded: EncodedChat) -> tuple[tuple[int, int], ...]:
        """Ranges of the tokens that count; the first token of all is nobody's prediction."""
        if self.train_on_prompt:
            return ((1, len(encoded.ids)),)
        return encoded.turns[-1:] if self.last_turn_only else encoded.turns

    def places(self, encoded: EncodedChat) -> int:
        """What the conversation takes of ``data.seq_length``.

        One less than its tokens up to the last that counts: that one is predicted, not read. All
        tokens where it is read whole.
        """
        if self.whole:
            return len(encoded.ids)
        return self.spans(encoded)[-1][1] - 1


@dataclass(slots=True, kw_only=True)
class Survey:
    """What was found in files of conversations; faulty records count as faults and no more."""

    kinds: Counter[str] = field(default_factory=Counter)
    """Conversations by kind of record."""
    turns: int = 0
    """The assistant's."""
    tokens: int = 0
    """Of all conversations."""
    counted: int = 0
    """Tokens that count."""
    unanswered: int = 0
    """Conversations that go on after the assistant's last turn: what follows trains nothing."""
    spaced: int = 0
    """Answers that begin with white space. Most templates keep it, and it becomes one token with
    the line feed in front of the answer: one that the model never sees when it serves."""
    too_long: int = 0
    """Conversations longer than ``seq_length``."""
    faults: Counter[str] = field(default_factory=Counter)
    """Faults by reason, without what differs from record to record."""
    lengths: "array[int]" = field(default_factory=lambda: array("q"))
    """What each conversation takes of ``seq_length``."""

    @property
    def conversations(self) -> int:
        """Number of conversations without faults."""
        return len(self.lengths)

    def quantiles(self) -> dict[str, int]:
        """Lengths by quantile (`QUANTILES`), such as ``{"0.5": 212, …}``; empty without any."""
        return quantiles_of(self.lengths)

    def to_json(self) -> dict[str, Any]:
        """The same as an object of JSON, with the lengths as quantiles."""
        return {
            "conversations": self.conversations,
            "kinds": dict(self.kinds),
            "turns": self.turns,
            "tokens": self.tokens,
            "counted_tokens": self.counted,
            "unanswered": self.unanswered,
            "answers_beginning_with_space": self.spaced,
            "too_long": self.too_long,
            "length_quantiles": self.quantiles(),
            "faults": self.faults.total(),
            "faults_by_reason": dict(self.faults.most_common()),
        }


def quantiles_of(lengths: Sequence[int]) -> dict[str, int]:
    """Lengths by quantile (`QUANTILES`); empty without any."""
    if not lengths:
        return {}
    values = np.quantile(np.asarray(lengths), QUANTILES, method="higher").tolist()
    return {str(quantile): int(value) for quantile, value in zip(QUANTILES, values, strict=True)}


def survey(
    paths: Sequence[str | Path],
    *,
    chat: ChatTemplate,
    counting: Counting,
    on_fault: Callable[[Fault], object],
    on_conversation: Callable[[Conversation, EncodedChat], object],
    report: Callable[[int], object],
) -> Survey:
    """Read files of conversations to their end and count what is in them.

    Args:
        paths: The files.
        chat: The chat template.
        counting: Which tokens count.
        on_fault: Called with each record that cannot be used, with each conversation that is too
            long, in order, and with a file that holds none, which a run refuses too.
        on_conversation: Called with each conversation without faults, in order.
        report: Called with how many more bytes are read.

    Returns:
        What was found.

    Raises:
        DataError: If a file is missing or damaged.
    """
    found = Survey()
    for path in paths:
        before = found.conversations + found.faults.total()
        records = read_conversations(path, report=report)
        for item in encode_conversations(records, chat=chat):
            if isinstance(item, Fault):
                found.faults[without_detail(item.reason)] += 1
                on_fault(item)
                continue
            _count(found, *item, counting=counting)
            on_conversation(*item)
            length = found.lengths[-1]
            if counting.seq_length is not None and length > counting.seq_length:
                found.too_long += 1
                on_fault(_too_long(item[0], length, counting.seq_length))
        if found.conversations + found.faults.total() == before:
            empty = EMPTY.format("conversation")
            found.faults[empty] += 1
            on_fault(Fault(str(path), 1, empty))
    return found


def _count(
    found: Survey, conversation: Conversation, encoded: EncodedChat, *, counting: Counting
) -> None:
    found.kinds[conversation.kind] += 1
    found.turns += len(encoded.turns)
    found.tokens += len(encoded.ids)
    found.counted += sum(end - start for start, end in counting.spans(encoded))
    found.unanswered += conversation.messages[-1].role != "assistant"
    found.spaced += sum(
        message.role == "assistant" and message.content[0].isspace()
        for message in conversation.messages
    )
    found.lengths.append(counting.places(encoded))


def _too_long(conversation: Conversation, length: int, limit: int) -> Fault:
    reason = f"takes {length:,} tokens, more than the sequence length of {limit:,}"
    return Fault(conversation.path, conversation.line, reason)


def show(
    conversation: Conversation,
    encoded: EncodedChat,
    *,
    chat: ChatTemplate,
    counting: Counting,
    colour: bool,
) -> str:
    """Write a conversation as the model reads it, with what counts marked.

    Args:
        conversation: The conversation.
        encoded: Its tokens.
        chat: The chat template.
        counting: Which tokens count.
        colour: Whether to mark by the escape codes of terminals; else by brackets, ``⟦…⟧``, which
            outlive a pipe and a screenshot of a log.

    Returns:
        Lines: where it is from and how long, then the text. ``↵`` stands at every line's end.
    """
    spans = counting.spans(encoded)
    text = marked_text(encoded.ids, spans, chat=chat, colour=colour)
    counted = sum(end - start for start, end in spans)
    head = (
        f"--- {visible(conversation.id)} ({conversation.kind}, {conversation.path}:"
        f"{conversation.line}): "
        f"{len(encoded.ids):,} tokens, {counted:,} of them count"
    )
    return f"{head}\n{text}"


def marked_text(
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    *,
    chat: ChatTemplate,
    colour: bool,
    begin: int = 0,
) -> str:
    """Write tokens as text, with what counts marked.

    Args:
        ids: A conversation.
        spans: Which tokens count, in order.
        chat: The chat template.
        colour: As for `show`.
        begin: The first token to write, in front of the first that counts or at it.

    Returns:
        The text.
    """
    opening, closing = (_COUNTED, _NORMAL) if colour else ("⟦", "⟧")
    pieces, done = [], begin
    for start, end in spans:
        pieces.append(_text(ids[done:start], chat))
        pieces.append(f"{opening}{_text(ids[start:end], chat)}{closing}")
        done = end
    return "".join([*pieces, _text(ids[done:], chat)])


def visible(text: str) -> str:
    """Text without what would act on a terminal."""
    return text.translate(_VISIBLE)


def _text(ids: Sequence[int], chat: ChatTemplate) -> str:
    text = chat.decode(ids, skip_special_tokens=False) if ids else ""
    return visible(text)


def without_detail(reason: str) -> str:
    """A fault without what differs from record to record."""
    return _DETAIL.sub("…", reason)


def summary(found: Survey, *, counting: Counting) -> list[str]:
    """Write what was found as lines of text."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.kinds.most_common())
    share = f"{100 * found.counted / found.tokens:.1f} %" if found.tokens else "none"
    lines = [
        f"  conversations    {found.conversations:>15,} ({kinds or 'none'})",
        f"  answers          {found.turns:>15,}",
        f"  tokens           {found.tokens:>15,}",
        f"  tokens counted   {found.counted:>15,} ({share})",
    ]
    lines += length_lines(found.quantiles())
    if found.unanswered:
        lines.append(f"  end unanswered   {found.unanswered:>15,} (what follows trains nothing)")
    if found.spaced:
        lines.append(f"  begin with space {found.spaced:>15,} answers (most templates keep it)")
    if counting.seq_length is not None:
        lines.append(f"  too long         {found.too_long:>15,} (over {counting.seq_length:,})")
    return lines + fault_lines(found.faults)


def length_lines(quantiles: Mapping[str, int]) -> list[str]:
    """Lines of a summary about lengths."""
    names = ("median length", "90 % at most", "95 % at most", "99 % at most", "longest")
    return [
        f"  {name:<16} {length:>15,} tokens"
        for name, length in zip(names, quantiles.values(), strict=False)
    ]


def fault_lines(faults: Counter[str]) -> list[str]:
    """Lines of a summary about faults."""
    lines = [f"  faulty records   {faults.total():>15,}"]
    return lines + [f"    {count:>14,}  {reason}" for reason, count in faults.most_common()]
