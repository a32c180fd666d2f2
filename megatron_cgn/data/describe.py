"""What an index holds: sizes, where its documents come from, a sample of them."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_cgn.data.indexed import Sidecar, check_index, map_tokens
from megatron_cgn.data.lineage import has_lineage, read_lineage
from tokenizer.wrapper import Tokenizer

COUNTED = ("source", "license", "classification")
"""Columns of the lineage whose values are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What an index holds."""

    sidecar: Sidecar
    """What its sidecar says."""
    median_tokens: float
    """Tokens of the document in the middle."""
    longest_tokens: int
    """Tokens of the longest document."""
    longest_document: int
    """Its number."""
    counts: dict[str, Counter[str | None]] = field(default_factory=dict)
    """Documents of each value of the columns `COUNTED`; empty without a lineage."""
    sample: list[tuple[int, str]] = field(default_factory=list)
    """Numbers of some documents, and the beginnings of their texts."""


def describe(
    prefix: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    sample: int = 0,
    sample_tokens: int = 100,
) -> Description:
    """Look through an index.

    Args:
        prefix: The index, without suffix.
        tokenizer_dir: The tokenizer that made it; needed for a sample.
        sample: Documents to show, evenly spread.
        sample_tokens: Tokens of each to show, at most.

    Returns:
        What it holds.

    Raises:
        DataError: If the index is damaged, or the tokenizer is another one.
    """
    tokenizer = None if tokenizer_dir is None else Tokenizer.from_pretrained(tokenizer_dir)
    fingerprint = None if tokenizer is None else tokenizer.fingerprint()
    index = check_index(prefix, tokenizer_fingerprint=fingerprint)
    longest = int(np.argmax(index.lengths))
    shown = []
    if tokenizer is not None and sample:
        tokens = map_tokens(index)
        count = min(sample, index.documents)
        for number in np.linspace(0, index.documents - 1, count, dtype=np.int64).tolist():
            start = index.tokens_of(0, number)
            length = min(sample_tokens, int(index.lengths[number]))
            shown.append((number, tokenizer.decode(tokens[start : start + length].tolist())))
    return Description(
        sidecar=index.sidecar,
        median_tokens=float(np.median(index.lengths)),
        longest_tokens=int(index.lengths[longest]),
        longest_document=longest,
        counts=_count(prefix) if has_lineage(prefix) else {},
        sample=shown,
    )


def _count(prefix: str | Path) -> dict[str, Counter[str | None]]:
    counts: dict[str, Counter[str | None]] = {name: Counter() for name in COUNTED}
    for batch in read_lineage(prefix, columns=COUNTED):
        for name, counter in counts.items():
            for entry in batch.column(name).value_counts().to_pylist():
                counter[entry["values"]] += entry["counts"]
    return counts
