"""Encodes the distinct words of a corpus, each by itself: millions of short ones at a time.

A call of the tokenizer for every word costs more than the encoding. So many words go into one
call, with a letter between them that no text has: the one that spells the byte 0xFF. Runs of
ideographs, which hardly ever come twice, are cut where no token joins them; see ``han_cuts.py``.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from tokenizer.han_cuts import CannotCut, HanCuts
from tokenizer.han_segments import Flat, HanSegments
from tokenizer.joined_pairs import byte_characters

_SEPARATOR = 0xFF
_WORDS_AT_ONCE = 1 << 14
_BYTES_OF_TEXT = 1 << 14  # of words in one call's text; its encoding takes a hundred times as many
_LETTER_OF = dict(enumerate(byte_characters()))


class WordEncoder:
    """Encodes words with the model of a byte-level tokenizer, its merges and options included."""

    def __init__(self, definition: Mapping[str, Any]) -> None:
        """Take a tokenizer's model.

        Args:
            definition: Content of ``tokenizer.json``.
        """
        letter = _LETTER_OF[_SEPARATOR]
        model = definition["model"]
        vocab = {letter: max(model["vocab"].values()) + 1} | model["vocab"]
        self._separator: int = vocab[letter]
        split = {"type": "Split", "pattern": {"String": letter}, "behavior": "Isolated"}
        parts = {"added_tokens": [], "pre_tokenizer": split | {"invert": False}}
        self._backend = Backend.from_str(
            json.dumps({"version": "1.0", "model": model | {"vocab": vocab}} | parts)
        )
        try:
            cuts = HanCuts(dict(definition))
        except CannotCut:
            self._segments = None
        else:
            self._segments = HanSegments(cuts, self._encode_whole)

    def encode(self, words: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Encode words.

        Args:
            words: Pre-tokens as text; valid Unicode, none empty.

        Returns:
            Ids of all words one after another, and where each word begins, ``[words + 1]``.
        """
        symbols: list[npt.NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)]
        lengths: list[npt.NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
        for start in range(0, len(words), _WORDS_AT_ONCE):
            some = words[start : start + _WORDS_AT_ONCE]
            utf8 = [word.encode() for word in some]
            if self._segments is None:
                ids, counts = self._encode_whole(utf8)
            else:
                ids, counts = self._segments.encode(some, utf8)
            symbols.append(ids.astype(np.int32))
            lengths.append(counts)
        return np.concatenate(symbols), np.concatenate(lengths).cumsum()

    def _encode_whole(self, words: Sequence[bytes]) -> Flat:
        ids: list[npt.NDArray[np.int32]] = []
        lengths: list[npt.NDArray[np.int64]] = []
        texts = list(_texts(words))
        for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False):
            given = np.array(encoding.ids, dtype=np.int32)
            ends = np.flatnonzero(given == self._separator)
            lengths.append(np.diff(ends, prepend=-1) - 1)
            ids.append(given[given != self._separator])
        return np.concatenate(ids), np.concatenate(lengths)


def _texts(words: Sequence[bytes]) -> Iterator[str]:
    """Texts of many words, spelt in the byte-level alphabet, a separator after each."""
    waiting: list[bytes] = []
    size = 0
    for word in words:
        waiting.append(word)
        size += len(word)
        if size >= _BYTES_OF_TEXT:
            yield _spell(waiting)
            waiting, size = [], 0
    if waiting:
        yield _spell(waiting)


def _spell(words: list[bytes]) -> str:
    end = bytes([_SEPARATOR])
    return (end.join(words) + end).decode("latin-1").translate(_LETTER_OF)
