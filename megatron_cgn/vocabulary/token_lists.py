"""The new tokens that are used most and least, in ``report.json``."""

from typing import Any

import numpy as np

from megatron_cgn.vocabulary.segments import Segments
from megatron_cgn.vocabulary.sweep import ALL, SweepPoint
from tokenizer.extension import Extension

_NUM_BEST = 100
_NUM_LEAST = 40


def token_lists(point: SweepPoint, *, extension: Extension, segments: Segments) -> dict[str, Any]:
    """List new tokens by what they save, and those that are met least.

    Args:
        point: The size that is shown.
        extension: Of the largest size.
        segments: Shows what a token was made of.

    Returns:
        ``uses_in``, ``best_tokens`` and ``least_used_tokens`` of the report. Steps and terms are
        not among the least used: they are wanted whatever their use.
    """
    by_corpus = point.corpus_uses is not None and bool(point.corpus_tokens)
    uses = point.corpus_uses if point.corpus_uses is not None and by_corpus else point.uses
    tokens = point.corpus_tokens if by_corpus else point.domain[ALL].tokens
    new = extension.new_tokens[: point.num_tokens]
    joined = np.array([len(token.old_ids) - 1 for token in new], dtype=np.float64)
    saved = uses * joined

    def entry(place: int) -> dict[str, Any]:
        token = new[place]
        return {
            "id": token.id,
            "text": token.text if token.text is not None else token.token,
            "origin": token.origin,
            "pieces": [list(piece) for piece in segments.pieces(token.old_ids)],
            "uses": round(float(uses[place])),
            "per_million": float(uses[place]) / max(1.0, float(tokens or 0)) * 1e6,
            "saved_tokens": round(float(saved[place])),
        }

    best = np.argsort(-saved, kind="stable")[:_NUM_BEST].tolist()
    from_corpus = [place for place, token in enumerate(new) if token.origin == "corpus"]
    least = sorted(from_corpus, key=lambda place: (uses[place], -place))[:_NUM_LEAST]
    return {
        "uses_in": "corpus" if by_corpus else "held-out",
        "best_tokens": [entry(place) for place in best],
        "least_used_tokens": [entry(place) for place in least],
    }
