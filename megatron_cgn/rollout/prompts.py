"""From words to a prompt's tokens and back: through a chat template, or as they are."""

from collections.abc import Sequence
from typing import Self

from megatron_cgn.errors import DataError
from megatron_cgn.rollout.open import ModelFiles, stop_tokens
from tokenizer.chat import ChatTemplate, Message
from tokenizer.wrapper import open_backend


class Prompts:
    """How a model is spoken to.

    Attributes:
        template: The chat template; None where texts are continued as they are.
        stop_ids: Tokens that end an answer.
    """

    def __init__(self, files: ModelFiles, *, template: ChatTemplate | None) -> None:
        """Put the parts together; use `open`."""
        self.template = template
        self._backend = open_backend(files.tokenizer)
        ends = () if template is None else template.end_of_turn_ids
        self.stop_ids = tuple(
            sorted({*stop_tokens(files.tokenizer), *stop_tokens(files.hf), *ends})
        )

    @classmethod
    def open(cls, files: ModelFiles, *, template: str | None = None, raw: bool = False) -> Self:
        """Open the tokenizer and its template.

        Args:
            files: The model.
            template: A bundled template's name or a Jinja file; None for the tokenizer's own.
            raw: Whether texts are continued as they are.

        Raises:
            DataError: If there is no template, or it is faulty.
        """
        if raw:
            return cls(files, template=None)
        try:
            return cls(files, template=ChatTemplate.open(files.tokenizer, template=template))
        except DataError as fault:
            raise DataError(
                f"{fault} To continue texts as they are, without a template, give --raw."
            ) from fault

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a prompt: with a template a conversation, without the one text.

        Raises:
            DataError: If the conversation is faulty.
        """
        if self.template is not None:
            return self.template.encode_prompt(messages)
        (message,) = messages
        ids = self._backend.encode(message.content, add_special_tokens=True).ids
        if not ids:
            raise DataError("the text is empty")
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer, without special tokens."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def identity(self) -> str:
        """What tells this way of speaking from others, for records."""
        return "raw" if self.template is None else self.template.fingerprint()
