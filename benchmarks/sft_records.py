"""Draws conversations as token ids, with the lengths that instruction data has.

All contestants of `sft.py` are given the same ids and the same counted tokens.
"""

import json
from pathlib import Path

import numpy as np

from tokenizer.wrapper import Tokenizer

SAMPLES = Path(__file__).parents[1] / "samples"
_PROMPT, _ANSWER = (45.0, 0.8), (115.0, 0.65)
"""Median of the tokens and standard deviation of their logarithm, both log-normal: padded in
batches of four, a third of the tokens is padding."""
_SHORTEST, _LONGEST = 24, 512


def write_records(path: Path, *, tokenizer: Path, count: int, seed: int) -> dict[str, float]:
    """Write conversations of one question and one answer, as ``{"input_ids", "labels"}`` a line.

    Text is that of the samples, cut anywhere. Labels are the ids, as `transformers` has them, and
    -100 in the question.

    Args:
        path: JSONL to write.
        tokenizer: Hugging Face directory of a model with ChatML's tokens.
        count: How many.
        seed: Draws lengths and places.

    Returns:
        ``tokens`` and ``counted`` tokens on average, and ``padding``: its share in batches of 4.
    """
    encode = Tokenizer.from_pretrained(tokenizer).encode
    texts = [
        json.loads(line)["text"]
        for name in ("domain_zh.jsonl", "domain_en.jsonl", "general.jsonl")
        for line in (SAMPLES / name).read_text().splitlines()
    ]
    stream = np.array([i for text in texts for i in encode(text)])
    before, between = encode("<|im_start|>user\n"), encode("<|im_end|>\n<|im_start|>assistant\n")
    end = encode("<|im_end|>")
    draw = np.random.default_rng(seed)
    lengths, counted = [], 0
    with path.open("w") as file:
        for _ in range(count):
            question, answer = (
                int(draw.lognormal(np.log(median), deviation))
                for median, deviation in (_PROMPT, _ANSWER)
            )
            total = min(max(question + answer, _SHORTEST), _LONGEST)
            question = max(1, min(question, total // 2))
            place = int(draw.integers(len(stream) - _LONGEST))
            words = stream[place : place + total].tolist()
            prompt = [*before, *words[:question], *between]
            reply = [*words[question:], *end]
            record = {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}
            file.write(json.dumps(record) + "\n")
            lengths.append(len(prompt) + len(reply))
            counted += len(reply)
    batches = np.array(lengths[: count // 4 * 4]).reshape(-1, 4)
    return {
        "tokens": float(np.mean(lengths)),
        "counted": counted / count,
        "padding": 1.0 - float(batches.sum() / (4 * batches.max(axis=1)).sum()),
    }


def read_records(path: Path) -> list[dict[str, list[int]]]:
    """Read what `write_records` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]
