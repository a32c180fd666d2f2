"""The n-grams of passages of evaluation files, on the way into the index (``overlap.py``).

Folding makes equal what differs in looks only: case, width, compatibility forms, accents and, if
wanted, traditional and simplified characters. Punctuation and blanks do not count (``ngrams.py``).
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import batched, islice
from typing import Self

import numpy as np
import numpy.typing as npt

from megatron_cgn.corpus import characters, chinese, ngrams
from megatron_cgn.corpus.evaluation import Passage

_BATCH_PASSAGES = 1000

# A question that is nothing but such words asks nothing by itself: it stands above its choices.
_STOCK = re.compile(
    "(?:关于|对于|以下|下列|下面|上述|选项|各项|各个|哪|个|些|种|一|项|组|中|的|之|说法|叙述|描述|表述|陈述|观点|"
    "做法|判断|理解|内容|情况|是|为|有|最|正确|错误|恰当|合适|准确|合理|不|符合|属于|包括|题意|请|选择|选出|"
    "which|what|of|the|following|is|are|statements?|correct|incorrect|true|false|not|best|answer|"
    "choose|select|a|an|about|one|most|except|options?|below|above)*",
    re.IGNORECASE,
)
_NOT_WORDS = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True)
class Entries:
    """N-grams of passages, one an element."""

    hashes: ngrams.Hashes
    """What it is."""
    owners: npt.NDArray[np.int32]
    """The passage."""
    positions: npt.NDArray[np.int32]
    """Its first token among those of the passage's long texts."""
    lengths: npt.NDArray[np.int32]
    """Its tokens."""

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Put entries one after the other."""
        none = np.empty(0, np.int32)
        return cls(
            np.concatenate([np.empty(0, np.uint64), *(part.hashes for part in parts)]),
            np.concatenate([none, *(part.owners for part in parts)]),
            np.concatenate([none, *(part.positions for part in parts)]),
            np.concatenate([none, *(part.lengths for part in parts)]),
        )


def _hash_runs(runs: Sequence[ngrams.Hashes], owners: Sequence[int], n: int) -> Iterator[Entries]:
    """Hash the n-grams of runs of tokens, and those runs whole that are shorter than n.

    Args:
        runs: Hashes of the tokens of each run.
        owners: The passage of each run, rising.
        n: Tokens of an n-gram.

    Yields:
        Entries, by their number of tokens.
    """
    if not runs:
        return
    sizes = np.array([len(run) for run in runs])
    of_run = np.repeat(np.arange(len(runs)), sizes)
    inside = ranges(sizes)  # the position of each token within its run
    owner = np.array(owners, np.int32)[of_run]
    passage_starts = np.flatnonzero(np.diff(owner, prepend=-1))
    passage_sizes = np.diff(np.append(passage_starts, len(owner)))
    position = ranges(passage_sizes).astype(np.int32)
    tokens = ngrams.Tokens(np.concatenate(list(runs)), inside, inside)
    lengths = np.minimum(sizes, n)
    for length in np.unique(lengths).tolist():
        fits = (lengths[of_run] == length) & (inside + length <= sizes[of_run])
        first = np.flatnonzero(fits)
        yield Entries(
            ngrams.ngrams(tokens, length)[first],
            owner[first],
            position[first],
            np.full(len(first), length, np.int32),
        )


class PassageReader:
    """Makes entries of passages."""

    def __init__(self, *, ngram_tokens: int, min_item_tokens: int, fold_traditional: bool) -> None:
        """Prepare to fold.

        Args:
            ngram_tokens: Tokens of an n-gram.
            min_item_tokens: Fewest tokens of a text.
            fold_traditional: Whether to fold traditional into simplified characters.

        Raises:
            ConfigError: If OpenCC is needed and missing.
        """
        self._ngram_tokens = ngram_tokens
        self._min_tokens = min_item_tokens
        self.fold = fold_table(traditional=fold_traditional)
        """What each code point compares as."""
        self.passages: list[Passage] = []
        """The passages read, without their texts."""
        self.copies: list[tuple[Passage, int]] = []
        """Passages that are the same as an earlier one, and which."""
        self.short_tokens: list[int] = []
        """Of each, the tokens of texts too short to look for."""

    def read(self, passages: Iterable[Passage]) -> Entries:
        """Hash the n-grams of all passages that are long enough and not there already."""
        parts: list[Entries] = []
        seen: dict[bytes, int] = {}
        for batch in batched(passages, _BATCH_PASSAGES):
            hashes: list[ngrams.Hashes] = []
            owners: list[int] = []
            for passage, runs in zip(batch, self._tokenise(batch), strict=True):
                long = [run for run in runs if len(run) >= self._min_tokens]
                key = b"".join(run.tobytes() for run in runs)
                # One choice among several is often a plain fact: it takes two to know the item.
                if not long or len(long) < min(2, len(passage.texts)):
                    continue
                where = Passage(passage.file, passage.item, passage.field, ())
                if key in seen:
                    self.copies.append((where, seen[key]))
                    continue
                seen[key] = len(self.passages)
                hashes += long
                owners += [len(self.passages)] * len(long)
                self.short_tokens.append(sum(map(len, runs)) - sum(map(len, long)))
                self.passages.append(where)
            parts += _hash_runs(hashes, owners, self._ngram_tokens)
        return Entries.joined(parts)

    def _tokenise(self, passages: Sequence[Passage]) -> Iterator[list[ngrams.Hashes]]:
        """Give the token hashes of each text of each passage; of stock phrases none."""
        texts = [
            "" if _is_stock(text) else unicodedata.normalize("NFC", text)
            for passage in passages
            for text in passage.texts
        ]
        # All at once: an array of the few words of one question is nearly all overhead.
        tokens = ngrams.tokens(self.fold[characters.code_points("\n".join(texts))])
        bounds = np.cumsum([len(text) + 1 for text in texts])[:-1]
        runs = iter(np.split(tokens.hashes, np.searchsorted(tokens.starts, bounds)))
        for passage in passages:
            yield [run for run in islice(runs, len(passage.texts)) if len(run)]


def ranges(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count from 0 up to each of the counts, one after the other: 2, 3 gives 0 1 0 1 2."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)


def _is_stock(text: str) -> bool:
    return _STOCK.fullmatch(_NOT_WORDS.sub("", text)) is not None


@cache
def fold_table(*, traditional: bool) -> npt.NDArray[np.uint32]:
    """Give what each code point compares as: `[0x110000]`."""
    table = np.arange(0x110000, dtype=np.uint32)
    for point in (*range(0x80, 0xD800), *range(0xF900, 0x10000), *range(0x1D400, 0x1D800)):
        folded = unicodedata.normalize("NFKD", chr(point)).casefold()
        if len(folded) == 1 or all(map(unicodedata.combining, folded[1:])):
            table[point] = ord(folded[0])
    # What composes again, such as Hangul, is no accented letter.
    table[0xAC00:0xD7A4] = np.arange(0xAC00, 0xD7A4)
    table[ord("A") : ord("Z") + 1] += 32
    if traditional:
        ideographs = [*range(0x3400, 0x4DC0), *range(0x4E00, 0xA000)]
        convert = chinese.simplifier(setting="decontaminate.fold_traditional")
        converted = convert("\n".join(map(chr, ideographs))).split("\n")
        table[ideographs] = [ord(each) for each in converted]
    table.setflags(write=False)
    return table
