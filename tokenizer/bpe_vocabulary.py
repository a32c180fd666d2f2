"""A byte-level BPE vocabulary as it is before an extension: its bytes, and what it makes of words.

How text is cut into words is in ``splitters.py``; what is added to it, in ``extend_bpe.py``.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from megatron_cgn.errors import DataError
from tokenizer.joined_pairs import byte_characters
from tokenizer.word_encoder import WordEncoder

Pair = tuple[int, int]

_WORDS_AT_ONCE = 1 << 14
_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}
_CHARACTER_OF = {byte: character for character, byte in _BYTE_OF.items()}


def spell(utf8: bytes) -> str:
    """Spell bytes in the byte-level alphabet, one character for each."""
    return utf8.decode("latin-1").translate(_CHARACTER_OF)


def bytes_of(token: str) -> bytes:
    """Give the bytes a token stands for; one that is not in the alphabet is spelt as it stands."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, token))
    except KeyError:
        return token.encode()


class ByteLevelVocabulary:
    """Tokens and merges of a tokenizer, added tokens included.

    Attributes:
        size: Largest id plus one; the first new id.
        tokens: Every token with its id: of the model, then added ones.
        added: The added tokens, as ``tokenizer.json`` lists them.
        spellings: Bytes by id; empty where there is none.
    """

    def __init__(self, definition: Mapping[str, Any], *, name: str) -> None:
        """Read a definition.

        Args:
            definition: Content of ``tokenizer.json``, from the backend: ids as they really are.
            name: What to call the tokenizer in messages.

        Raises:
            DataError: If it has options under which merges cannot be continued.
        """
        self._definition = definition
        self._model: Mapping[str, Any] = definition["model"]
        self.added: list[dict[str, Any]] = list(definition.get("added_tokens") or ())
        self._refuse_options(name)
        self.tokens: dict[str, int] = dict(self._model["vocab"])
        for token in self.added:
            self.tokens[token["content"]] = token["id"]
        self.size = max(self.tokens.values()) + 1
        self.spellings = [b""] * self.size
        for text, token_id in self.tokens.items():
            self.spellings[token_id] = bytes_of(text)
        for token in self.added:
            self.spellings[token["id"]] = token["content"].encode()

    @cached_property
    def names(self) -> dict[int, str]:
        """Spelling in the vocabulary by id."""
        return {token_id: token for token, token_id in self.tokens.items()}

    @property
    def added_texts(self) -> frozenset[str]:
        """Texts of the added tokens."""
        return frozenset(token["content"] for token in self.added)

    @property
    def special_texts(self) -> frozenset[str]:
        """Texts of those that ordinary text never becomes."""
        return frozenset(token["content"] for token in self.added if token["special"])

    def refuse_spelt_tokens(self, split: Callable[[str], Sequence[str]], *, name: str) -> None:
        """Refuse a tokenizer whose special tokens could be made from ordinary text once extended.

        Extending puts added tokens into the model's vocabulary. There, no merges lead to them; but
        with ``ignore_merges`` a word that is spelt like one would become it.

        Args:
            split: Cuts a text into words as the tokenizer does.
            name: What to call the tokenizer in the message.

        Raises:
            DataError: If there are such tokens; names them.
        """
        if not self._model.get("ignore_merges"):
            return
        words = [
            token["content"]
            for token in self.added
            if token["special"] and token["content"] not in self._model["vocab"]
            if _is_word(bytes_of(token["content"]), token["content"], split)
        ]
        if words:
            raise DataError(
                f"tokenizer {name}: its special tokens {', '.join(map(repr, words))} are spelt "
                "like words, and it has ignore_merges: extended, it would make them from ordinary "
                "text. Extend another tokenizer, or set ignore_merges to false in tokenizer.json."
            )

    def encode(self, words: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Encode words, each by itself.

        Args:
            words: Pre-tokens as text, none empty.

        Returns:
            Ids of all words one after another, and where each word begins, ``[words + 1]``.
        """
        return self._encoder.encode(words)

    @cached_property
    def _encoder(self) -> WordEncoder:
        return WordEncoder(self._definition)

    def _refuse_options(self, name: str) -> None:
        faults = [
            f"{option} is {self._model[option]!r}"
            for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
            if self._model.get(option)
        ]
        if faults:
            raise DataError(
                f"tokenizer {name}: {', '.join(faults)}. Merges can be continued only without "
                "these options; extend another tokenizer, or unset them if they are a mistake."
            )


def _is_word(utf8: bytes, token: str, split: Callable[[str], Sequence[str]]) -> bool:
    """Whether some text is one word that is spelt like a token in the byte-level alphabet."""
    try:
        text = utf8.decode()
    except UnicodeDecodeError:
        return False
    return spell(utf8) == token and list(split(text)) == [text]


def encoder_of_words(model: Mapping[str, Any]) -> Backend:
    """Make a tokenizer that takes a text for one word, spelt in the byte-level alphabet."""
    return Backend.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def encode_words(backend: Backend, words: Sequence[str]) -> Iterator[list[int]]:
    """Encode words by a tokenizer from `encoder_of_words`."""
    # Few words at a time: an encoding takes a hundred times the memory of its ids.
    for start in range(0, len(words), _WORDS_AT_ONCE):
        spelt = [spell(word.encode()) for word in words[start : start + _WORDS_AT_ONCE]]
        for encoding in backend.encode_batch_fast(spelt, add_special_tokens=False):
            yield encoding.ids


def apply_merges(pieces: Sequence[int], merges: Mapping[Pair, int]) -> list[int]:
    """Apply merges to a word, those with the smallest product first.

    Args:
        pieces: Symbols.
        merges: Symbol that each pair makes; later merges make larger ones.

    Returns:
        What is left.
    """
    word = list(pieces)
    while len(word) > 1:
        pairs = zip(word, word[1:], strict=False)
        symbol, pair = min(((merges[p], p) for p in pairs if p in merges), default=(-1, (0, 0)))
        if symbol < 0:
            break
        word = merge_pair(word, pair, symbol)
    return word


def merge_pair(word: Sequence[int], pair: Pair, symbol: int) -> list[int]:
    """Replace every occurrence of a pair, from the left."""
    merged: list[int] = []
    place = 0
    while place < len(word):
        if tuple(word[place : place + 2]) == pair:
            merged.append(symbol)
            place += 2
        else:
            merged.append(word[place])
            place += 1
    return merged
