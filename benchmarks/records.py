"""Text as token ids, cut as questions and answers: what benchmarks of training are fed with.

All contestants of a benchmark are given the same ids and the same counted tokens.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenizer.wrapper import Tokenizer

SAMPLES = Path(__file__).parents[1] / "samples"
PROMPT, ANSWER = (45.0, 0.8), (115.0, 0.65)
"""Median of the tokens and standard deviation of their logarithm, both log-normal, as instruction
data has them: padded in batches of four, a third of the tokens is padding."""
SHORTEST, LONGEST = 24, 512
"""Tokens of a question and its answer together."""


class Words:
    """The words of the samples, from anywhere, between ChatML's marks."""

    def __init__(self, tokenizer: Path, *, seed: int) -> None:
        """Encode the samples.

        Args:
            tokenizer: Hugging Face directory of a model with ChatML's tokens.
            seed: Draws the places.
        """
        encode = Tokenizer.from_pretrained(tokenizer).encode
        texts = [
            json.loads(line)["text"]
            for name in ("domain_zh.jsonl", "domain_en.jsonl", "general.jsonl")
            for line in (SAMPLES / name).read_text().splitlines()
        ]
        self._stream = np.array([i for text in texts for i in encode(text)])
        self._before = encode("<|im_start|>user\n")
        self._between = encode("<|im_end|>\n<|im_start|>assistant\n")
        self._end = encode("<|im_end|>")
        self.draw = np.random.default_rng(seed)

    @property
    def marks(self) -> int:
        """Tokens that a question and an answer have beside their words."""
        return len(self._before) + len(self._between) + len(self._end)

    def prompt(self, words: int) -> list[int]:
        """A question of this many words, and the beginning of its answer."""
        return [*self._before, *self._words(words), *self._between]

    def answer(self, words: int) -> list[int]:
        """An answer of this many words, and its end."""
        return [*self._words(words), *self._end]

    def _words(self, count: int) -> list[int]:
        place = int(self.draw.integers(len(self._stream) - LONGEST))
        found: list[int] = self._stream[place : place + count].tolist()
        return found


def within_limits(prompt: int, answer: int, *, longest: int = LONGEST) -> tuple[int, int]:
    """Words of a question and its answer, so that both together are neither long nor short."""
    total = min(max(prompt + answer, SHORTEST), longest)
    prompt = max(1, min(prompt, total // 2))
    return prompt, total - prompt


def padding(lengths: npt.NDArray[np.int64], *, batch: int) -> float:
    """Share of the places that is padding, in batches of so many that follow one another."""
    batches = lengths[: len(lengths) // batch * batch].reshape(-1, batch)
    return 1.0 - float(batches.sum() / (batch * batches.max(axis=1)).sum())


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records, one a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_records(path: Path) -> list[dict[str, list[int]]]:
    """Read what was written."""
    return [json.loads(line) for line in path.read_text().splitlines()]
