"""Finds passages of evaluation files in texts, by n-grams of folded tokens.

Folding makes equal what differs in looks only: case, width, compatibility forms, accents and, if
wanted, traditional and simplified characters. Punctuation and blanks do not count (``ngrams.py``).

Memory: 17 bytes for each n-gram (as many as the evaluation files have tokens) and a table of at
most 32 MiB that answers most look-ups at once; a text takes some 80 bytes for each of at most 2²⁰
characters at a time.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from megatron_cgn.corpus import characters, chinese, ngrams
from megatron_cgn.corpus.evaluation import Passage

_CHUNK_CHARACTERS = (1 << 20) - 1
_CHUNK_OVERLAP = 1 << 13  # far more than an n-gram is long
_MOST_TABLE_BITS = 25

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
class Match:
    """A passage found in a text."""

    passage: Passage
    """The passage, without its texts."""
    tokens: int
    """How many of its tokens are in the text."""
    of_tokens: int
    """How many were looked for."""
    spans: tuple[tuple[int, int], ...]
    """Where in the text, in code points: disjoint and in order."""


class OverlapIndex:
    """The n-grams of all passages."""

    def __init__(
        self,
        passages: Iterable[Passage],
        *,
        ngram_tokens: int,
        min_item_tokens: int,
        max_shared_items: int,
        fold_traditional: bool,
    ) -> None:
        """Index passages.

        Args:
            passages: The passages; equal ones count once.
            ngram_tokens: Tokens of an n-gram.
            min_item_tokens: Fewest tokens of a text to index; one below `ngram_tokens` as a whole.
            max_shared_items: Most passages with an n-gram in common for it to count.
            fold_traditional: Whether to fold traditional into simplified characters.

        Raises:
            ConfigError: If OpenCC is needed and missing.
        """
        self._ngram_tokens = ngram_tokens
        self._min_tokens = min_item_tokens
        self._fold = _fold_table(traditional=fold_traditional)
        self.passages: list[Passage] = []
        """The passages indexed, without their texts."""
        hashes, owners, positions, lengths = self._collect(passages)
        kept = _rare(hashes, owners, max_shared_items)
        order = np.argsort(hashes[kept], kind="stable")
        self._owners, self._positions = owners[kept][order], positions[kept][order]
        self._lengths = lengths[kept][order]
        self._hashes, self._first = np.unique(hashes[kept][order], return_index=True)
        self._first = np.append(self._first, len(order))
        self._used_lengths = [int(length) for length in np.unique(self._lengths)]
        bits = min(_MOST_TABLE_BITS, max(16, (8 * len(self._hashes)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, np.bool_)
        self._table[self._hashes >> self._shift] = True
        self._totals = self._covered_totals()

    def searched(self) -> list[Passage]:
        """Give the passages that have an n-gram to look for."""
        return [
            passage for passage, total in zip(self.passages, self._totals, strict=True) if total
        ]

    def search(self, text: str, *, min_coverage: float) -> list[Match]:
        """Find the passages of which a text holds enough.

        Args:
            text: The text.
            min_coverage: Least share of a passage's tokens.

        Returns:
            The matches, best covered first.
        """
        grams, starts, ends = self._hits(text)
        if not len(grams):
            return []
        found = np.unique(grams)
        counts = self._first[found + 1] - self._first[found]
        entries = np.repeat(self._first[found], counts) + _ranges(counts)
        matches = []
        for owner, covered in self._coverage(entries).items():
            if covered >= min_coverage * self._totals[owner]:
                mine = np.isin(grams, np.repeat(found, counts)[self._owners[entries] == owner])
                spans = _union(starts[mine], ends[mine])
                total = int(self._totals[owner])
                matches.append(Match(self.passages[owner], covered, total, spans))
        return sorted(matches, key=lambda match: -match.tokens / match.of_tokens)

    def _collect(
        self, passages: Iterable[Passage]
    ) -> tuple[ngrams.Hashes, npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        hashes: list[ngrams.Hashes] = []
        shape: list[tuple[int, int, int]] = []  # passage, first position, length of n-grams
        seen: set[bytes] = set()
        short_tokens: list[int] = []
        for passage in passages:
            runs = [self._tokens(text) for text in passage.texts if not _is_stock(text)]
            key = b"".join(run.hashes.tobytes() for run in runs)
            long = [run for run in runs if len(run) >= self._min_tokens]
            # One choice among several is often a plain fact: it takes two to know the item again.
            if len(long) < min(2, len(passage.texts)) or key in seen:
                continue
            seen.add(key)
            short_tokens.append(sum(map(len, runs)) - sum(map(len, long)))
            position = 0
            for run in long:
                length = min(self._ngram_tokens, len(run))
                hashes.append(ngrams.ngrams(run, length))
                shape.append((len(self.passages), position, length))
                position += len(run)
            self.passages.append(Passage(passage.file, passage.item, passage.field, ()))
        sizes = np.array([len(each) for each in hashes], np.int64)
        owners, firsts, lengths = np.array(shape, np.int32).reshape(-1, 3).T
        positions = np.repeat(firsts, sizes) + _ranges(sizes).astype(np.int32)
        self._short_tokens = np.array(short_tokens, np.int64)
        joined = np.concatenate([*hashes, np.empty(0, np.uint64)])
        return joined, np.repeat(owners, sizes), positions, np.repeat(lengths, sizes)

    def _tokens(self, text: str) -> ngrams.Tokens:
        return ngrams.tokens(self._fold[characters.code_points(unicodedata.normalize("NFC", text))])

    def _hits(
        self, text: str
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Look up every n-gram of a text: indices of those known, and where they start and end."""
        found = [(np.empty(0, np.int64),) * 3]
        step = _CHUNK_CHARACTERS - _CHUNK_OVERLAP
        for offset in range(0, max(len(text) - _CHUNK_OVERLAP, 1), step):
            chunk = text[offset : offset + _CHUNK_CHARACTERS]
            tokens = ngrams.tokens(self._fold[characters.code_points(chunk)])
            for length in self._used_lengths:
                hashes = ngrams.ngrams(tokens, length)
                likely = np.flatnonzero(self._table[hashes >> self._shift])
                if len(likely):
                    places = np.searchsorted(self._hashes, hashes[likely])
                    places[places == len(self._hashes)] = 0
                    known = self._hashes[places] == hashes[likely]
                    first = likely[known]
                    starts, ends = tokens.starts[first], tokens.ends[first + length - 1]
                    found.append((places[known], starts + offset, ends + offset))
        grams, starts, ends = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return grams, starts, ends

    def _coverage(self, entries: npt.NDArray[np.int64]) -> dict[int, int]:
        """Count the tokens of each passage that entries of the index cover."""
        owners = self._owners[entries]
        covered = {}
        for owner in np.unique(owners).tolist():
            mine = entries[owners == owner]
            starts = self._positions[mine]
            spans = _union(starts, starts + self._lengths[mine])
            covered[owner] = sum(end - start for start, end in spans)
        return covered

    def _covered_totals(self) -> npt.NDArray[np.int64]:
        totals = np.zeros(len(self.passages), np.int64)
        order = np.argsort(self._owners, kind="stable")
        bounds = np.searchsorted(self._owners[order], np.arange(len(self.passages) + 1))
        for owner in range(len(self.passages)):
            mine = order[bounds[owner] : bounds[owner + 1]]
            starts = self._positions[mine]
            spans = _union(starts, starts + self._lengths[mine])
            totals[owner] = sum(end - start for start, end in spans)
        return np.where(totals > 0, totals + self._short_tokens, 0)


def _rare(hashes: ngrams.Hashes, owners: npt.NDArray[np.int32], most: int) -> npt.NDArray[np.bool_]:
    """Tell which entries are of n-grams that at most so many passages share."""
    if not len(hashes):
        return np.empty(0, np.bool_)
    _, group = np.unique(hashes, return_inverse=True)
    pairs = np.unique(group.astype(np.int64) * (int(owners.max()) + 1) + owners)
    sharing = np.bincount(pairs // (int(owners.max()) + 1))
    kept: npt.NDArray[np.bool_] = sharing[group] <= most
    return kept


def _ranges(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count from 0 up to each of the counts, one after the other: 2, 3 gives 0 1 0 1 2."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)


def _union(
    starts: npt.NDArray[np.int64] | npt.NDArray[np.int32],
    ends: npt.NDArray[np.int64] | npt.NDArray[np.int32],
) -> tuple[tuple[int, int], ...]:
    """Join spans that overlap or touch."""
    spans: list[tuple[int, int]] = []
    for start, end in sorted(zip(starts.tolist(), ends.tolist(), strict=True)):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return tuple(spans)


def _is_stock(text: str) -> bool:
    return _STOCK.fullmatch(_NOT_WORDS.sub("", text)) is not None


@cache
def _fold_table(*, traditional: bool) -> npt.NDArray[np.uint32]:
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
