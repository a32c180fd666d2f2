"""The step *decontaminate*: documents that hold what a model will be examined on.

How passages are found is in ``overlap.py``, how evaluation files are read in ``evaluation.py``.
Here it is decided what becomes of a document.
"""

import logging
import multiprocessing
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from megatron_cgn.config.corpus import DecontaminateConfig
from megatron_cgn.corpus.document import Document, Outcome
from megatron_cgn.corpus.evaluation import Passage, read_passages
from megatron_cgn.corpus.overlap import Match, OverlapIndex

_logger = logging.getLogger(__name__)

_LONGEST_BLOCK = 1000  # characters of a paragraph that is cut as a whole, and not by lines
_EXCERPT = 80
# Choices and answers go with the question above them.
_FOLLOWS = re.compile(
    r"[ \t]*(?:[(（]?[A-Fa-f][)）.、．:：]|(?:正确|参考)?答案|解析"
    r"|(?:correct )?answer\b|explanation\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class EvaluationFile:
    """What became of an evaluation file."""

    path: str
    """The file."""
    items: int
    """Items in it."""
    unmatched_items: int
    """Items with no text long enough and of its own: nothing is looked for."""


class Decontaminator:
    """Drops documents that hold evaluation items, or cuts these out."""

    def __init__(self, settings: DecontaminateConfig) -> None:
        """Read the evaluation files.

        Args:
            settings: Checked settings.

        Raises:
            DataError: If an evaluation file cannot be read.
            ConfigError: If OpenCC is needed and missing.
        """
        self._settings = settings
        passages = [
            passage
            for path in settings.evaluation_files
            for passage in read_passages(path, fields=settings.fields)
        ]
        self._index = OverlapIndex(
            passages,
            ngram_tokens=settings.ngram_tokens,
            min_item_tokens=settings.min_item_tokens,
            max_shared_items=settings.max_shared_items,
            fold_traditional=settings.fold_traditional and bool(passages),
        )
        self.files = _summaries(passages, self._index)
        """What became of each evaluation file."""

    def __call__(self, document: Document) -> Outcome:
        """Look for evaluation items in a document.

        Args:
            document: The document.

        Returns:
            Its text, or the reason to drop it. Evidence is the item, its share found and the
            passage; it is also given where paragraphs were cut.
        """
        text = document.text
        matches = self._search(text)
        if not matches:
            return Outcome(text=text)
        evidence = _evidence(matches, text)
        if self._settings.mode == "drop":
            return Outcome(text=None, reason="contaminated/overlap", evidence=evidence)
        cut = 0
        while matches:
            text, paragraphs = _cut(text, [span for match in matches for span in match.spans])
            cut += paragraphs
            # What was apart may now stand together.
            matches = self._search(text)
        share = 1 - len(text) / len(document.text)
        limit = self._settings.max_cut_fraction
        if share > limit or not text.strip():
            return Outcome(
                text=None,
                reason="contaminated/mostly",
                evidence=f"{share:.3f} of it would be cut; decontaminate.max_cut_fraction is "
                f"{limit}; {evidence}",
            )
        return Outcome(text=text, evidence=evidence, changes={"decontaminate/cut": cut})

    def _search(self, text: str) -> list[Match]:
        return self._index.search(text, min_coverage=self._settings.min_coverage)


def _summaries(passages: Sequence[Passage], index: OverlapIndex) -> tuple[EvaluationFile, ...]:
    """Count the items of each file, and those of which nothing is looked for; tell of these."""
    searched = {(passage.file, passage.item) for passage in index.searched()}
    files = []
    for path in dict.fromkeys(passage.file for passage in passages):
        items = {passage.item for passage in passages if passage.file == path}
        found = {item for file, item in searched if file == path}
        files.append(EvaluationFile(path, len(items), len(items - found)))
        # Every worker reads the files; one process tells.
        if len(found) < len(items) and multiprocessing.parent_process() is None:
            _tell(path, len(items - found), len(items))
    return tuple(files)


@cache
def _tell(path: str, unmatched: int, items: int) -> None:
    """Say once how many items are not looked for."""
    _logger.warning(
        "%s: %d of %d items are too short or nothing but stock phrases: documents are not searched "
        "for them.",
        path,
        unmatched,
        items,
    )


def _evidence(matches: Sequence[Match], text: str) -> str:
    best = matches[0]
    start, end = max(best.spans, key=lambda span: span[1] - span[0])
    excerpt = " ".join(text[start : min(end, start + _EXCERPT)].split())
    more = f"; and {len(matches) - 1} more" if len(matches) > 1 else ""
    return (
        f"{best.passage.file} item {best.passage.item} ({best.passage.field}): "
        f"{best.tokens} of {best.of_tokens} tokens, {excerpt!r}{more}"
    )


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> tuple[str, int]:
    """Take out the paragraphs that hold a span.

    Args:
        text: The text.
        spans: Code points, at least one.

    Returns:
        What is left, and how many paragraphs or lines went.
    """
    units = _units(text)
    gone = [
        any(start < unit_end and unit_start < end for start, end in spans)
        for unit_start, unit_end in units
    ]
    for i in range(1, len(units)):
        if gone[i - 1] and not gone[i] and _FOLLOWS.match(text, *units[i]):
            gone[i] = True
    kept = "".join(
        text[start:end] for (start, end), out in zip(units, gone, strict=True) if not out
    )
    return re.sub(r"\n{3,}", "\n\n", kept).strip("\n"), sum(gone)


def _units(text: str) -> list[tuple[int, int]]:
    """Split a text into paragraphs, and paragraphs that are long into lines: bounds of each."""
    blocks = [match.span() for match in re.finditer(r"(?:[^\n]+\n?)+\n*|\n+", text)]
    units = []
    for start, end in blocks:
        if end - start <= _LONGEST_BLOCK and len(blocks) > 1:
            units.append((start, end))
        else:
            lines = re.finditer(r"[^\n]*\n+|[^\n]+", text[start:end])
            units += [(start + line.start(), start + line.end()) for line in lines]
    return units
