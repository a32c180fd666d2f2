"""Scores of new pieces of a unigram model, on the scale of the old ones.

A score is the logarithm of a piece's probability, and text becomes the pieces whose scores have the
greatest sum (Kudo 2018, https://arxiv.org/abs/1804.10959). Old scores stay as they are, so text in
which no new piece wins keeps its ids. A new piece gets ln(frequency / tokens), both as counted in
the corpus in the old pieces and those before it: what the trainer's last step would give it, and
what old scores are for the corpus of the old model. Frequencies change little when further pieces
are added, and re-estimating them would make the first n pieces depend on those that follow; so
there is no further round.

A piece must beat the best way to make its text of others, or it would never be used. The loop that
found it says that it should be; so its score is raised to just above that way where it is below.
Shorter pieces go first, because longer ones are made of them: then each is reachable, and stays so
where only the first n pieces are taken.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tokenizer.extension import NewToken

# By how much a raised score is above the best other way. The library sums up scores of a whole text
# in single precision: in long texts less than this is lost. The frequency decides between pieces
# that overlap, which without it would often be equal.
_MARGIN = 0.1
_MARGIN_FOR_FREQUENCY = 0.1
_UNKNOWN = 10.0  # SentencePiece's penalty below the lowest score


def unigram_scores(
    tokens: Sequence[NewToken], *, old: Mapping[str, float], corpus_tokens: int
) -> list[float]:
    """Score new pieces.

    Args:
        tokens: New tokens; those of the user's terms get at least the best old score.
        old: Scores of the old pieces that text can become.
        corpus_tokens: How many tokens the old model makes of the corpus.

    Returns:
        A score for each, in single precision. None is below the lowest old one, to which the
        library ties what it does with unknown characters.
    """
    lowest, highest = min(old.values()), max(old.values())
    scores = dict(old)
    longest = max(map(len, [*old, *(token.token for token in tokens)]))
    new = {}
    for token in sorted(tokens, key=lambda token: (len(token.token), token.id)):
        rival = _best_sum(token.token, scores, longest=longest, unknown=lowest - _UNKNOWN)
        score = max(math.log(max(token.frequency, 1) / max(corpus_tokens, 1)), lowest)
        if token.origin == "term":
            score = max(score, highest)
        margin = _MARGIN + _MARGIN_FOR_FREQUENCY * math.log10(1 + token.frequency)
        score = float(np.float32(min(max(score, rival + margin), 0.0)))
        scores[token.token] = new[token.id] = score
    return [new[token.id] for token in tokens]


def _best_sum(text: str, scores: Mapping[str, float], *, longest: int, unknown: float) -> float:
    """Score of the best way to make a text of pieces, which has it not as a piece itself."""
    best = [0.0]
    for end in range(1, len(text) + 1):
        ways = [
            best[start] + scores[piece]
            for start in range(max(0, end - longest), end)
            if (piece := text[start:end]) in scores
        ]
        if text[end - 1] not in scores:
            ways.append(best[end - 1] + unknown)
        best.append(max(ways))
    return best[-1]
