"""Draws pairs of answers as token ids, all of one length or with the lengths that data have."""

from pathlib import Path
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from records import ANSWER, PROMPT, Words, padding, within_limits, write_lines

_BATCHINGS = 200
"""Orders of the pairs whose padding is averaged."""


def write_pairs(
    path: Path,
    *,
    tokenizer: Path,
    count: int,
    seed: int,
    seq_length: int,
    variable: bool,
    batch: int,
) -> dict[str, float]:
    """Write pairs as ``{"prompt_ids", "chosen_ids", "rejected_ids"}`` a line, TRL's columns.

    Lengths are quantiles of their distribution instead of draws: a few pairs then have the
    lengths that many would have.

    Args:
        path: JSONL to write.
        tokenizer: Hugging Face directory of a model with ChatML's tokens.
        count: How many.
        seed: Draws the words, and which length goes with which.
        seq_length: Tokens of a pack, into which the longest pair goes.
        variable: Whether lengths differ; else four answers, each with its prompt, fill a pack,
            and a quarter of each is the prompt.
        batch: Pairs that are padded to one length.

    Returns:
        ``tokens`` of an answer with its prompt on average, how many of these are ``counted``, and
        ``padding``: the share of padding to expect in such batches.
    """
    words = Words(tokenizer, seed=seed)
    longest = seq_length // 2 - words.marks
    if variable:
        prompts = _quantiles(count, *PROMPT, draw=words.draw)
        answers = _quantiles(2 * count, *ANSWER, draw=words.draw).reshape(count, 2)
    else:
        prompts = np.full(count, seq_length // 16)
        answers = np.full((count, 2), seq_length // 4 - words.marks - seq_length // 16)
    records = []
    for question, pair in zip(prompts.tolist(), answers.tolist(), strict=True):
        prompt, _ = within_limits(question, min(pair), longest=longest)
        chosen, rejected = (within_limits(prompt, n, longest=longest)[1] for n in pair)
        records.append(
            {
                "prompt_ids": words.prompt(prompt),
                "chosen_ids": words.answer(chosen),
                "rejected_ids": words.answer(rejected),
            }
        )
    write_lines(path, records)
    counted = np.array([[len(r["chosen_ids"]), len(r["rejected_ids"])] for r in records])
    lengths = counted + np.array([[len(r["prompt_ids"])] for r in records])
    orders = (words.draw.permutation(count) for _ in range(_BATCHINGS))
    shares = [padding(lengths[order].reshape(-1), batch=2 * batch) for order in orders]
    return {
        "tokens": float(lengths.mean()),
        "counted": float(counted.mean()),
        "padding": float(np.mean(shares)),
    }


def _quantiles(
    count: int, median: float, deviation: float, *, draw: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Evenly spaced quantiles of a log-normal distribution, in any order."""
    normal = NormalDist(float(np.log(median)), deviation)
    values = np.exp([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    return draw.permutation(values.astype(np.int64))
