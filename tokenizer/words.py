"""The words of a corpus as a tokenizer cuts it, how often it has each, and in how many documents.

A word here is a pre-token: what the tokenizer's model encodes by itself. New merges are counted
inside words (``merge_loop.py``), so a corpus needs to be cut only once, and each distinct word
encoded only once. How a byte-level tokenizer cuts is in ``splitters.py``; reading a corpus by
many processes is ``megatron_cgn/vocabulary/count.py``.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Splitter = Callable[[str], Iterable[str]]
"""Text to its pre-tokens, normalised; what is an added token is left out. Can be pickled."""

SKETCH_BITS = 64
# Most texts that are cut before their words are counted: bounds memory, costs no speed.
_CHARACTERS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """Distinct words: the most frequent first, equals by their text.

    Chinese is cut at punctuation and hardly ever repeats what is between: 100 MB of technical text
    have two million distinct words, which take 0.4 GB, and as much again while they are merged.
    """

    spellings: list[str]
    counts: npt.NDArray[np.int64]
    """How often the corpus has each, ``[n]``."""
    sketches: npt.NDArray[np.uint64]
    """In which documents, ``[n]``: every document sets one bit of 64, chosen by its text's hash."""
    text_bytes: int
    """UTF-8 bytes of the documents."""
    documents: int

    def __len__(self) -> int:
        return len(self.spellings)


class WordCounter:
    """Counts words. The order in which texts are added does not matter."""

    def __init__(self, split: Splitter) -> None:
        """Count what a splitter gives."""
        self._split = split
        # Most words are met once: all those of one bit share one value.
        self._once = [(1, 1 << bit) for bit in range(SKETCH_BITS)]
        self._found: dict[str, tuple[int, int]] = {}
        self._text_bytes = 0
        self._documents = 0

    def add(self, texts: Sequence[str]) -> None:
        """Count the words of documents; fastest with some megabytes at a time.

        Args:
            texts: Whole documents; valid Unicode.
        """
        groups: dict[int, list[str]] = {}
        characters = 0
        for text in texts:
            utf8 = text.encode()
            digest = hashlib.blake2b(utf8, digest_size=8).digest()
            groups.setdefault(digest[0] % SKETCH_BITS, []).append(text)
            self._text_bytes += len(utf8)
            self._documents += 1
            characters += len(text)
            if characters >= _CHARACTERS_AT_ONCE:
                self._add_groups(groups)
                groups, characters = {}, 0
        self._add_groups(groups)

    def update(self, other: "Words | WordCounter") -> None:
        """Add what was counted elsewhere.

        Args:
            other: Of other documents.
        """
        words = other.words(in_order=False) if isinstance(other, WordCounter) else other
        self._text_bytes += words.text_bytes
        self._documents += words.documents
        found, get, once = self._found, self._found.get, self._once
        values = zip(words.counts.tolist(), words.sketches.tolist(), strict=True)
        for word, value in zip(words.spellings, values, strict=True):
            before = get(word)
            if before is not None:
                found[word] = (before[0] + value[0], before[1] | value[1])
            elif value[0] == 1:
                found[word] = once[value[1].bit_length() - 1]
            else:
                found[word] = value

    def words(self, *, in_order: bool = True) -> Words:
        """Give what was counted.

        Args:
            in_order: Whether to sort. Without it the order is that in which words were met.
        """
        spellings = sorted(self._found) if in_order else list(self._found)
        values = [self._found[word] for word in spellings]
        size = len(values)
        counts = np.fromiter((count for count, _ in values), dtype=np.int64, count=size)
        sketches = np.fromiter((sketch for _, sketch in values), dtype=np.uint64, count=size)
        del values
        if in_order:
            order = np.argsort(-counts, kind="stable")
            counts, sketches = counts[order], sketches[order]
            spellings = [spellings[index] for index in order.tolist()]
        return Words(
            spellings=spellings,
            counts=counts,
            sketches=sketches,
            text_bytes=self._text_bytes,
            documents=self._documents,
        )

    def _add_groups(self, groups: dict[int, list[str]]) -> None:
        """Count texts by the bit that they set, so that the counting itself is the library's."""
        found, get, split = self._found, self._found.get, self._split
        for bit, texts in groups.items():
            counter: Counter[str] = Counter()
            for text in texts:
                counter.update(split(text))
            once, mask = self._once[bit], 1 << bit
            for word, count in counter.items():
                before = get(word)
                if before is not None:
                    found[word] = (before[0] + count, before[1] | mask)
                else:
                    found[word] = once if count == 1 else (count, mask)
