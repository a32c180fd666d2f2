"""Conversations to ids by a chat template, and which ids are the assistant's.

A conversation is rendered once, whole, and tokenised once, as `apply_chat_template` of transformers
does: special tokens are parsed and none is added, so a BOS is there exactly where the template
writes one. An assistant's turn begins where the template's generation prompt for it ends and ends
with the end-of-turn token, which belongs to it: a model that is not trained on it never stops.
Where a token reaches across a turn's beginning, as a line feed of the template and one of an answer
become one, it belongs to the turn; but a control token of the template that takes white space in,
as some of Phi 3's do, does not.

Text of users that spells a control token is refused, because it could forge a turn. Which
conversations a file holds is in ``megatron_cgn.data.conversations``; what a template may do in
``chat_jinja.py``; where it comes from in ``chat_sources.py``; what is demanded of it in
``chat_probe.py`` and of a conversation in ``chat_message.py``. Importing this loads neither PyTorch
nor transformers.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Self

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from megatron_cgn.errors import DataError
from tokenizer.chat_jinja import TEMPLATE_DATE, Renderer
from tokenizer.chat_message import ROLES as ROLES
from tokenizer.chat_message import Message as Message
from tokenizer.chat_message import as_dicts, check_answers, check_messages, check_written
from tokenizer.chat_probe import Probed, control_tokens, probe
from tokenizer.chat_sources import bundled_templates as bundled_templates
from tokenizer.chat_sources import find_template, special_tokens
from tokenizer.wrapper import open_backend

log = logging.getLogger(__name__)

_BATCH = 256  # conversations tokenised at a time: their offsets are held meanwhile


@dataclass(frozen=True, slots=True)
class EncodedChat:
    """A conversation as ids."""

    ids: list[int]
    """Ids of the whole conversation."""
    turns: tuple[tuple[int, int], ...]
    """The assistant's turns in order: first token, and one past the end-of-turn token."""


@dataclass(frozen=True, slots=True)
class _Written:
    """A conversation as text."""

    text: str
    starts: list[int]
    """Where the assistant's turns begin, in characters."""


class ChatTemplate:
    """A chat template together with the tokenizer that it is written for.

    Attributes:
        name: Where the template comes from, for messages.
        source: Jinja text. A template without a generation prompt has one added, so this, and not
            the file, belongs into an exported model's ``chat_template.jinja``.
        end_of_turn_ids: Tokens that end the assistant's turns: those at which a server must stop.
    """

    def __init__(
        self, renderer: Renderer, backend: Backend, probed: Probed, *, fingerprint: str
    ) -> None:
        """Put the parts together; use `open`."""
        self.name = renderer.name
        self.source = renderer.source
        self.end_of_turn_ids = probed.end_of_turn_ids
        self._fingerprint = fingerprint
        self._renderer = renderer
        self._backend = backend
        self._unasked = probed.unasked
        control = control_tokens(backend)
        self._control_ids = frozenset(control)
        longest_first = sorted(control.values(), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @classmethod
    def open(cls, directory: str | Path, *, template: str | None = None) -> Self:
        """Open a tokenizer's chat template and hold it to a short conversation.

        Args:
            directory: Hugging Face tokenizer directory.
            template: None for the directory's own; the name of one of several that it has; the
                name of a bundled one (`bundled_templates`); or a Jinja file.

        Raises:
            DataError: If there is no such template, or it cannot be trained on: it is not valid
                Jinja, fails, writes tokens that the tokenizer lacks, ends the assistant's turns
                with no special token, or rewrites what it wrote once a conversation goes on.
        """
        path = Path(directory)
        backend = open_backend(path)
        tokens = special_tokens(path)
        bos = tokens.get("bos_token")
        adds = backend.encode("", add_special_tokens=True).tokens
        found = find_template(path, template=template, writes_bos=bos is not None and bos in adds)
        renderer = Renderer(found.text, name=found.name, special_tokens=tokens)
        probed = probe(renderer, backend)
        if probed.header:
            log.warning(
                "chat template %s: has no generation prompt, so %r was added to it as one",
                found.name,
                probed.header,
            )
            text = f"{found.text}{_prompt_block(probed.header)}"
            renderer = Renderer(text, name=found.name, special_tokens=tokens)
            probed = probe(renderer, backend)
        if renderer.asks_for_time:
            log.info(
                "chat template %s: asks for the time and is told %s, always, so that a run can be "
                "repeated",
                found.name,
                TEMPLATE_DATE.date(),
            )
        identity = [renderer.source, tokens, probed.end_of_turn_ids, str(TEMPLATE_DATE)]
        digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16)
        return cls(renderer, backend, probed, fingerprint=digest.hexdigest())

    def fingerprint(self) -> str:
        """Hash of what decides the text of a conversation and its turns; not of the tokenizer.

        Returns:
            32 hexadecimal digits.
        """
        return self._fingerprint

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Write a conversation as text, as transformers does with the same template.

        Args:
            messages: The conversation.
            add_generation_prompt: Whether to end where the assistant is to begin.

        Raises:
            DataError: If the template refuses the conversation.
        """
        return self._renderer(as_dicts(messages), add_generation_prompt=add_generation_prompt)

    def encode(self, messages: Sequence[Message]) -> EncodedChat:
        """Turn a conversation into ids and find the assistant's turns.

        Args:
            messages: The conversation.

        Raises:
            DataError: If the conversation is faulty; says why. Its place in a file is the
                caller's to add.
        """
        (encoded,) = self.encode_batch([messages])
        if isinstance(encoded, DataError):
            raise encoded
        return encoded

    def encode_batch(
        self, conversations: Iterable[Sequence[Message]]
    ) -> list[EncodedChat | DataError]:
        """Turn conversations into ids: as `encode`, and several times faster.

        Args:
            conversations: The conversations.

        Returns:
            For each, its ids; or what is wrong with it.
        """
        found: list[EncodedChat | DataError] = []
        for group in batched(conversations, _BATCH):
            written = [self._write_or_fault(messages) for messages in group]
            texts = [each.text for each in written if isinstance(each, _Written)]
            encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
            for each in written:
                if isinstance(each, _Written):
                    found.append(self._find_turns(next(encodings), each))
                else:
                    found.append(each)
        return found

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Turn the beginning of a conversation into ids, up to where the assistant is to write.

        Args:
            messages: The conversation so far.

        Raises:
            DataError: If the conversation is faulty.
        """
        check_messages(messages, special=self._special)
        text = self.render(messages, add_generation_prompt=True)
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Turn ids, such as an answer's, back into text."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def _write_or_fault(self, messages: Sequence[Message]) -> _Written | DataError:
        try:
            return self._write(messages)
        except DataError as fault:
            return fault

    def _write(self, messages: Sequence[Message]) -> _Written:
        check_messages(messages, special=self._special)
        check_answers(messages)
        dicts = as_dicts(messages)
        text = self._renderer(dicts)
        starts = []
        for turn, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._renderer(dicts[:turn], add_generation_prompt=True)
            if not text.startswith(prompt):
                raise DataError(
                    f"chat template {self.name} writes what comes before message {turn + 1}, the "
                    "assistant's, in another way once that and what follows is known: it cannot "
                    "be said where the turn begins. Split the conversation there, or use another "
                    "template."
                )
            starts.append(len(prompt))
        if self._unasked:
            text = text.removesuffix(self._unasked)
        check_written(messages, text, name=self.name)
        return _Written(text, starts)

    def _find_turns(self, encoding: Encoding, written: _Written) -> EncodedChat | DataError:
        ids, text = encoding.ids, written.text
        turns: list[tuple[int, int]] = []
        for number, (start, limit) in enumerate(
            zip(written.starts, [*written.starts[1:], len(text)], strict=True), start=1
        ):
            first = _token_at(encoding, start, limit)
            span = encoding.token_to_chars(first) if first < len(ids) else None
            if span is not None and span[0] < start and ids[first] in self._control_ids:
                first += 1  # the prompt's last token has taken the answer's first white space in
            end = _end_of_turn(ids, first, self.end_of_turn_ids)
            last = None if end is None else encoding.token_to_chars(end - 1)
            if end is None or last is None or last[0] >= limit:
                return DataError(
                    f"chat template {self.name} ends turn {number} of the assistant with none of "
                    "its end-of-turn tokens. Split the conversation there, or use another template."
                )
            if end - first < 2 or not text[start : last[0]].strip():
                return DataError(
                    f"chat template {self.name} leaves nothing of turn {number} of the assistant: "
                    "some templates drop thoughts, and some tokenizers control characters. Write "
                    "an answer besides."
                )
            turns.append((first, end))
        return EncodedChat(ids, tuple(turns))


def _token_at(encoding: Encoding, position: int, limit: int) -> int:
    """The token that holds a character, or the first after it where none does."""
    for place in range(position, limit):
        token = encoding.char_to_token(place)
        if token is not None:
            return int(token)
    return len(encoding.ids)


def _end_of_turn(ids: Sequence[int], first: int, ends: Sequence[int]) -> int | None:
    """One past the first end-of-turn token from ``first`` on."""
    found = []
    for token in ends:
        try:
            found.append(ids.index(token, first))
        except ValueError:
            continue
    return min(found) + 1 if found else None


def _prompt_block(header: str) -> str:
    """Jinja that writes a header when asked for a generation prompt."""
    # JSON's way of writing a text is one that Jinja reads, for all that headers hold.
    literal = json.dumps(header, ensure_ascii=False)
    return f"{{% if add_generation_prompt %}}{{{{ {literal} }}}}{{% endif %}}"
