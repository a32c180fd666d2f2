"""Words as the symbols that merges are counted on: old pieces, and characters that are none.

Text that the old vocabulary spells in bytes, or not at all, cannot be merged: SentencePiece joins
characters, never bytes. So characters that are frequent enough become candidates for new pieces
themselves, and words are cut at all others.
"""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from tokenizer.merge_loop import TOO_FEW_DOCUMENTS, estimate_documents
from tokenizer.words import Words

_WORDS_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Character:
    """A character that the old vocabulary lacks."""

    symbol: int
    frequency: int
    spread: int
    saved: int
    """Tokens that it saves in the corpus. Its frequency, if it saves none because it is one byte or
    one unknown token: without it, nothing with it can be a piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Symbols:
    """Words in symbols; see `merge_loop.continue_merges` for the arrays."""

    symbols: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    sketches: npt.NDArray[np.uint64]
    spellings: list[bytes]
    """Of old ids, then of characters."""
    old_ids: list[tuple[int, ...]]
    """What each symbol is in the old vocabulary."""
    characters: list[Character]
    """Those that satisfy the rules, the one that saves most first."""
    of_character: Mapping[str, int]
    """Symbols of all new characters, wanted ones included."""


class Segmenter:
    """Encodes words with the old vocabulary."""

    def __init__(self, bare: Backend, *, vocabulary: Mapping[str, int], size: int) -> None:
        """Prepare.

        Args:
            bare: The model proper.
            vocabulary: Pieces that text can become, and their ids; bytes are none of them.
            size: Number of old ids.
        """
        self._bare = bare
        self._size = size
        self._pieces = set(vocabulary.values())
        self._known = {text for text in vocabulary if len(text) == 1}
        self._spellings = [b""] * size
        for text, token_id in bare.get_vocab().items():
            self._spellings[token_id] = text.encode()

    def encode(self, texts: Sequence[str]) -> list[array[int]]:
        """Encode normalised words."""
        ids: list[array[int]] = []
        for start in range(0, len(texts), _WORDS_AT_ONCE):
            some = list(texts[start : start + _WORDS_AT_ONCE])
            found = self._bare.encode_batch_fast(some, add_special_tokens=False)
            ids += [array("i", encoding.ids) for encoding in found]
        return ids

    def encode_symbols(self, text: str, of_character: Mapping[str, int]) -> list[int]:
        """Encode a normalised word; characters that the old vocabulary lacks get their symbols."""
        symbols: list[int] = []
        start = 0
        for index, character in enumerate([*text, None]):
            if character is None or character in of_character:
                symbols += self.encode([text[start:index]])[0] if start < index else []
                symbols += [of_character[character]] if character is not None else []
                start = index + 1
        return symbols

    def segment(
        self,
        words: Words,
        *,
        judge: Callable[[bytes], str | None],
        min_frequency: int,
        min_spread: int,
        wanted: Iterable[str] = (),
        refused: Counter[str],
    ) -> Symbols:
        """Encode the words of a corpus.

        Args:
            words: The words.
            judge: Says why a character shall be no piece, or None.
            min_frequency: Least frequency of a new character.
            min_spread: Least number of documents.
            wanted: Characters that are to be pieces whatever the rules say.
            refused: Counts, by reason, characters that were frequent enough and are not made.

        Returns:
            The words in symbols.
        """
        lacking = sorted(set().union(wanted, *words.spellings) - self._known)
        pattern = re.compile(f"([{re.escape(''.join(lacking))}])") if lacking else None
        parts = [pattern.split(word) if pattern else [word] for word in words.spellings]
        old_ids: list[tuple[int, ...]] = [(token_id,) for token_id in range(self._size)]
        spellings = list(self._spellings)
        of_character: dict[str, int] = {}
        characters = []
        usage = _usage(parts, words)
        for text, ids in zip(lacking, self.encode(lacking), strict=True):
            frequency, sketch = usage.get(text, (0, 0))
            spread = estimate_documents(sketch)
            if text not in wanted:
                reason = TOO_FEW_DOCUMENTS if spread < min_spread else judge(text.encode())
                if frequency < min_frequency:
                    continue
                if reason is not None:
                    refused[reason] += 1
                    continue
            of_character[text] = len(spellings)
            saved = max(len(ids) - 1, 1) * frequency
            characters.append(
                Character(symbol=len(spellings), frequency=frequency, spread=spread, saved=saved)
            )
            spellings.append(text.encode())
            old_ids.append(tuple(ids))
        symbols, starts, origins = self._flatten(parts, of_character)
        return Symbols(
            symbols=symbols,
            starts=starts,
            counts=words.counts[origins],
            sketches=words.sketches[origins],
            spellings=spellings,
            old_ids=old_ids,
            characters=sorted(characters, key=lambda c: (-c.saved, c.symbol)),
            of_character=of_character,
        )

    def _flatten(
        self, parts: Sequence[Sequence[str]], of_character: Mapping[str, int]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Give symbols, where each stretch without a cut begins, and which word it is from."""
        known = list(dict.fromkeys(part for word in parts for part in word[::2]))
        encodings = dict(zip(known, self.encode(known), strict=True))
        flat, lengths = array("i"), array("q")
        for word in parts:
            before = len(flat)
            for number, part in enumerate(word):
                if number % 2 == 0:
                    flat.extend(encodings[part])
                else:
                    flat.append(of_character.get(part, -1))
            lengths.append(len(flat) - before)
        symbols = np.array(flat, dtype=np.int32)
        owners = np.repeat(np.arange(len(lengths)), np.array(lengths, dtype=np.int64))
        # The last place is that of -1.
        usable = np.zeros(self._size + len(of_character) + 1, dtype=bool)
        usable[[*self._pieces, *of_character.values()]] = True
        kept = usable[symbols]
        goes_on = np.zeros(len(symbols), dtype=bool)
        goes_on[1:] = kept[:-1] & (owners[1:] == owners[:-1])
        starts = np.flatnonzero(~goes_on[kept])
        return symbols[kept], np.append(starts, kept.sum()), owners[kept & ~goes_on]


def _usage(parts: Sequence[Sequence[str]], words: Words) -> dict[str, tuple[int, int]]:
    """Frequency and sketch of the documents of each character that words were cut at."""
    usage: dict[str, tuple[int, int]] = {}
    values = zip(parts, words.counts.tolist(), words.sketches.tolist(), strict=True)
    for word, count, sketch in values:
        for text in word[1::2]:
            frequency, documents = usage.get(text, (0, 0))
            usage[text] = (frequency + count, documents | sketch)
    return usage
