"""Draws conversations as token ids, with the lengths that instruction data has."""

from pathlib import Path

import numpy as np
from records import ANSWER, PROMPT, Words, padding, within_limits, write_lines


def write_conversations(
    path: Path, *, tokenizer: Path, count: int, seed: int, batch: int
) -> dict[str, float]:
    """Write conversations of one question and one answer, as ``{"input_ids", "labels"}`` a line.

    Text is that of the samples, cut anywhere. Labels are the ids, as `transformers` has them, and
    -100 in the question.

    Args:
        path: JSONL to write.
        tokenizer: Hugging Face directory of a model with ChatML's tokens.
        count: How many.
        seed: Draws lengths and places.
        batch: Conversations that are padded to one length.

    Returns:
        ``tokens`` and ``counted`` tokens on average, and ``padding``: its share in such batches.
    """
    words = Words(tokenizer, seed=seed)
    records = []
    for _ in range(count):
        question, answer = within_limits(
            *(int(words.draw.lognormal(np.log(m), deviation)) for m, deviation in (PROMPT, ANSWER))
        )
        prompt, reply = words.prompt(question), words.answer(answer)
        records.append({"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply})
    write_lines(path, records)
    lengths = np.array([len(record["input_ids"]) for record in records])
    return {
        "tokens": float(lengths.mean()),
        "counted": sum(label != -100 for r in records for label in r["labels"]) / count,
        "padding": padding(lengths, batch=batch),
    }
