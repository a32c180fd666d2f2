"""The quickstart's pairs of answers: read, scored in `transformers`, and reported."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from quickstart_models import AnswerScore, Reopened

SCORE_BOUND = 1e-3
"""Nats a token, of log-probabilities in two programs that add FP32 numbers in different orders."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, of which the first is better."""

    prompt: list[dict[str, str]]
    """Messages."""
    chosen: str
    rejected: str
    language: str
    fault: str
    """What is wrong with the rejected answer, in a word or two."""


@dataclass(frozen=True, slots=True)
class PairScore:
    """What a model makes of a pair."""

    chosen: AnswerScore
    rejected: AnswerScore

    @property
    def likelier(self) -> bool:
        """Whether the better answer is the likelier one, a token."""
        return self.chosen.mean > self.rejected.mean


@dataclass(frozen=True, slots=True)
class Preferences:
    """Held-out pairs before and after preference learning, scored in `transformers`."""

    known: list[Pair]
    """Pairs to learn from."""
    pairs: list[Pair]
    """Held-out ones."""
    before: list[PairScore]
    after: list[PairScore]


def read_pairs(path: Path) -> list[Pair]:
    """Read a file of preference samples, in each of the forms that they are written in."""
    return [_pair(json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def score_pairs(directory: Path, pairs: Sequence[Pair]) -> list[PairScore]:
    """Score pairs with a Hugging Face directory, opened in `transformers`."""
    opened = Reopened(directory)
    return [
        PairScore(
            opened.score_answer(pair.prompt, pair.chosen),
            opened.score_answer(pair.prompt, pair.rejected),
        )
        for pair in pairs
    ]


def tell_by_letters(known: Sequence[Pair], pairs: Sequence[Pair]) -> list[bool]:
    """Tell better answers by which two letters stand together how often, without any model.

    Naive Bayes with one added to each count: what can be had by wording alone.

    Args:
        known: Pairs to count in.
        pairs: Pairs to tell apart.

    Returns:
        Of each pair, whether the better answer was taken to be the better one.
    """
    better, worse = (
        Counter(twos for pair in known for twos in _twos(getattr(pair, side)))
        for side in ("chosen", "rejected")
    )
    totals = better.total(), worse.total()
    size = len(better | worse)

    def score(text: str) -> float:
        return sum(
            math.log((better[twos] + 1) / (totals[0] + size))
            - math.log((worse[twos] + 1) / (totals[1] + size))
            for twos in _twos(text)
        )

    return [score(pair.chosen) > score(pair.rejected) for pair in pairs]


def _twos(text: str) -> list[str]:
    return ["".join(two) for two in pairwise(text.casefold())]


def report_preferences(
    records: Sequence[dict[str, Any]], found: Preferences, *, table: str, speed: str
) -> tuple[list[str], bool]:
    """Write the report's part on preference learning.

    Args:
        records: What training wrote to ``metrics.jsonl``.
        found: The same pairs, scored in `transformers`.
        table: Held-out scores before and after, in Markdown.
        speed: How much was trained, how fast.

    Returns:
        Lines of Markdown, and whether margins rose and both programs agree.
    """
    languages = sorted({pair.language for pair in found.pairs})
    margins = [_last(records, f"val/{language}/rewards/margins") for language in languages]
    better = all(margin > 0 for margin in margins)
    difference = _difference(records, found, languages)
    agrees = difference <= SCORE_BOUND
    before, after = (sum(s.likelier for s in scores) for scores in (found.before, found.after))
    by_letters = tell_by_letters(found.known, found.pairs)
    lines = [
        "## Preference learning (DPO, LoRA): held-out pairs before and after",
        "",
        f"Each pair is a question with two answers; the worse one has a fault that an expert would "
        f"name. There are {len(found.known)} pairs to learn from and {len(found.pairs)} held-out "
        f"ones. {speed}",
        "",
        table,
        "",
        "Before the first step the model is its own reference: every margin is 0, the loss is "
        "ln 2 = 0.6931, and the accuracy says nothing. Afterwards a margin above 0 is a pair that "
        "the model tells apart better than before.",
        "",
        f"- Held-out margins rise above 0 in both languages: **{_yes(better)}**",
        f"- `transformers` gives the held-out answers the log-probabilities that training "
        f"reported, within {SCORE_BOUND:g} a token: **{_yes(agrees)}** ({difference:.1e})",
        f"- Per token, the better answer is the likelier one in {before} of {len(found.pairs)} "
        f"held-out pairs before and {after} after.",
        "",
        *_by_fault(found, by_letters),
        "",
        f"A model of this size knows too little to see which figure is right. What it can learn "
        f"from {len(found.known)} pairs is how the worse answers speak: that they wave checks "
        f"aside, name no step, make up sources or ramble. So much is in their wording that merely "
        f"counting which letters follow one another tells {sum(by_letters)} of {len(found.pairs)} "
        "apart (last column): the accuracy shows that training works, not that the model "
        f"understands. And {len(found.pairs)} pairs are few: of an accuracy of one half, the "
        f"standard error is {_standard_error(len(found.pairs)):.0%}.",
        "",
        "![loss, rewards and accuracy](dpo/loss.png)",
        "",
    ]
    return lines, better and agrees


def _by_fault(found: Preferences, told: Sequence[bool]) -> list[str]:
    """How many pairs of each kind are told apart, by the model and without one."""
    kinds = Counter(pair.fault for pair in found.pairs)
    scored = zip(found.pairs, found.before, found.after, strict=True)
    right = Counter(pair.fault for pair, before, after in scored if _margin(before, after) > 0)
    by_letters = Counter(p.fault for p, is_right in zip(found.pairs, told, strict=True) if is_right)
    rows = [*kinds.most_common(), ("all", kinds.total())]
    right["all"], by_letters["all"] = right.total(), by_letters.total()
    return [
        "| fault of the rejected answer | held-out pairs | margin above 0 | told by letters |",
        "| --- | --- | --- | --- |",
        *(f"| {kind} | {count} | {right[kind]} | {by_letters[kind]} |" for kind, count in rows),
    ]


def _margin(before: PairScore, after: PairScore) -> float:
    """How much better the pair is told apart than before, in nats."""
    chosen = after.chosen.logprob - before.chosen.logprob
    return chosen - (after.rejected.logprob - before.rejected.logprob)


def _difference(
    records: Sequence[dict[str, Any]], found: Preferences, languages: Sequence[str]
) -> float:
    """Largest difference of mean log-probabilities, a token, from those that training reported."""
    differences = []
    for language, side in product(languages, ("chosen", "rejected")):
        answers: list[AnswerScore] = [
            getattr(score, side)
            for pair, score in zip(found.pairs, found.after, strict=True)
            if pair.language == language
        ]
        total = sum(answer.logprob for answer in answers)
        reported = _last(records, f"val/{language}/logps/{side}") * len(answers)
        differences.append(abs(total - reported) / sum(answer.tokens for answer in answers))
    return max(differences, key=lambda value: math.inf if math.isnan(value) else value)


def _last(records: Sequence[dict[str, Any]], name: str) -> float:
    """The last value of a score; no number if it was none."""
    value = [record[name] for record in records if name in record][-1]
    return math.nan if value is None else float(value)


def _standard_error(count: int) -> float:
    return 0.5 / math.sqrt(count)


def _pair(record: dict[str, Any]) -> Pair:
    chosen, rejected = _said(record["chosen"]), _said(record["rejected"])
    prompt = record.get("prompt", chosen[:-1])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    fault = record["why"].partition(":")[0]
    return Pair(prompt, chosen[-1]["content"], rejected[-1]["content"], record["lang"], fault)


def _said(answer: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _yes(holds: bool) -> str:
    return "yes" if holds else "NO"
