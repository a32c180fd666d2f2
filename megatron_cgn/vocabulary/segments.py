"""How a tokenizer cuts a text, as a person can read it: tokens that are whole characters.

Tokens that hold a part of a character are shown together, as the characters they make.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizer.extension import Extension
from tokenizer.joined_pairs import byte_characters
from tokenizer.wrapper import Tokenizer

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


class Piece(NamedTuple):
    """A piece of a text."""

    text: str
    tokens: int
    """How many tokens it takes; more than 1 where they are parts of characters."""
    is_new: bool
    """Whether it is one of the new tokens."""


class Segments:
    """Cuts ids of an extended tokenizer into pieces."""

    def __init__(self, tokenizer: Tokenizer, extension: Extension) -> None:
        """Learn which bytes each token stands for.

        Args:
            tokenizer: The old tokenizer.
            extension: What extends it.
        """
        definition = tokenizer.definition()
        vocabulary = definition["model"]["vocab"]
        pairs = (
            vocabulary.items()
            if isinstance(vocabulary, dict)
            else ((entry[0], place) for place, entry in enumerate(vocabulary))
        )
        spelt = {token_id: token for token, token_id in pairs}
        spelt |= {token.id: token.token for token in extension.new_tokens}
        letters = {letter: byte for byte, letter in enumerate(byte_characters())}
        is_byte_level = "ByteLevel" in repr(definition.get("pre_tokenizer"))
        self._first = extension.old_vocab_size
        self._bytes = {
            token_id: _byte_level(token, letters) if is_byte_level else _sentencepiece(token)
            for token_id, token in spelt.items()
        }
        for added in definition.get("added_tokens") or ():  # spelt as they stand
            self._bytes[added["id"]] = added["content"].encode()
        for term in extension.terms:
            if term.way == "added_token":
                self._bytes[term.id] = term.text.encode()

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """Cut.

        Args:
            ids: Of the old tokenizer or an extended one.

        Returns:
            Pieces that together are the text.
        """
        pieces: list[Piece] = []
        waiting, tokens = b"", 0
        for token_id in ids:
            waiting += self._bytes.get(token_id, b"")
            tokens += 1
            try:
                text = waiting.decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    continue
                text = waiting.decode(errors="replace")
            pieces.append(Piece(text, tokens, tokens == 1 and token_id >= self._first))
            waiting, tokens = b"", 0
        if tokens:
            pieces.append(Piece(_hexadecimal(waiting), tokens, False))
        return pieces


def _byte_level(token: str, letters: dict[str, int]) -> bytes:
    try:
        return bytes(letters[letter] for letter in token)
    except KeyError:  # a token that is in the vocabulary as it stands
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()


def _hexadecimal(content: bytes) -> str:
    """Bytes that are no whole character."""
    return "".join(f"<{byte:02X}>" for byte in content)
