"""What the tests of the bundled samples share: reading them, and how alike texts are."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cgn.config.corpus import DeduplicateConfig
from megatron_cgn.corpus.dedup import Signer

SAMPLES = Path(__file__).parents[2] / "samples"
# Of the sets of three-token n-grams. Unrelated questions of one form ("What is the difference
# between ...") share up to a quarter; a reworded question shares more than half.
ALIKE = 0.3


def records(*names: str) -> list[dict[str, Any]]:
    lines = (line for name in names for line in (SAMPLES / name).read_text("utf-8").splitlines())
    return [json.loads(line) for line in lines]


def turns(record: dict[str, Any]) -> list[str]:
    """What user and assistant of a conversation say in turn, read without the code that trains."""
    if "messages" in record:
        return [m["content"] for m in record["messages"] if m["role"] != "system"]
    if "conversations" in record:
        return [m["value"] for m in record["conversations"]]
    earlier = itertools.chain.from_iterable(record.get("history", []))
    question = record["instruction"] + ("\n" + record["input"] if record["input"] else "")
    return [*earlier, question, record["output"]]


def similarities(one: list[str], other: list[str]) -> np.ndarray:
    """Jaccard similarity of every pair: `[len(one), len(other)]`."""
    signer = Signer(DeduplicateConfig(ngram_tokens=3, number_weight=0))
    elements, starts = signer.elements([*one, *other])
    sets = [set(elements[a:b].tolist()) for a, b in itertools.pairwise(starts)]
    return np.array(
        [
            [len(a & b) / max(1, len(a | b)) for b in sets[len(one) :]]
            for a in sets[: len(one)]
        ]
    )  # fmt: skip


def alike(one: list[str], other: list[str]) -> np.ndarray:
    """Places of pairs of texts that are nearly the same."""
    return np.argwhere(similarities(one, other) >= ALIKE)
