"""From rewards of candidates to preference data: which answer is said to be better than which.

Rewards are compared within a prompt only; those of two prompts mean nothing to each other.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, combinations, pairwise
from typing import Any, Literal, get_args

from megatron_cgn.errors import ConfigError
from megatron_cgn.rollout.candidates import Candidates, LeftOut
from tokenizer.chat_message import as_dicts

Keep = Literal["best-worst", "all", "ranking"]
"""What becomes of a prompt: a pair of its best and its worst answer; a pair of every two answers,
each a record; or one record of all answers with their ranks."""


@dataclass(slots=True)
class Tally:
    """What became of the candidates.

    Attributes:
        prompts: Prompts read.
        answers: Answers read.
        records: Records written.
        pairs: Pairs of a better and a worse answer in them.
        margin: Sum of the pairs' differences of rewards.
        longer: Pairs whose better answer has more characters: reward models like length.
        left_out: Answers left out, by reason.
        too_few: Prompts with fewer than two answers to compare.
        too_close: Prompts with none of whose answers is far enough from another.
    """

    prompts: int = 0
    answers: int = 0
    records: int = 0
    pairs: int = 0
    margin: float = 0.0
    longer: int = 0
    left_out: Counter[LeftOut] = field(default_factory=Counter)
    too_few: int = 0
    too_close: int = 0

    def describe(self) -> str:
        """Say it in a few lines."""
        lines = [
            f"prompts: {self.prompts:,}, answers: {self.answers:,}; records: {self.records:,}, "
            f"pairs: {self.pairs:,}"
            + (f", mean margin {self.margin / self.pairs:.3f}" if self.pairs else "")
        ]
        if self.pairs:
            lines.append(f"the better answer is the longer one in {self.longer / self.pairs:.0%}")
        if self.left_out:
            found = [reason for reason in get_args(LeftOut) if self.left_out[reason]]
            counts = ", ".join(f"{reason} {self.left_out[reason]:,}" for reason in found)
            lines.append(f"answers left out: {counts}")
        if self.too_few or self.too_close:
            lines.append(
                f"prompts left out: fewer than two answers to compare {self.too_few:,}, answers "
                f"too close {self.too_close:,}"
            )
        return "\n".join(lines)


def check_min_margin(min_margin: float) -> None:
    """Refuse a least margin that is none.

    Raises:
        ConfigError: If it is below 0, infinite or not a number.
    """
    if not 0.0 <= min_margin < float("inf"):
        raise ConfigError(
            f"--min-margin: {min_margin}; must be a number from 0 on: the least difference of two "
            "rewards. 0 takes every difference."
        )


def prefer(
    candidates: Candidates,
    rewards: Sequence[float | None],
    *,
    keep: Keep,
    min_margin: float = 0.0,
    tally: Tally | None = None,
) -> list[dict[str, Any]]:
    """Make preference data of one prompt's answers.

    Args:
        candidates: The prompt and its answers.
        rewards: Of each answer; None where it is not to be compared.
        keep: What to make.
        min_margin: Least difference of rewards of a pair. In a ranking, answers follow one another
            at one rank until two neighbours differ as much; so no pair of it differs by less.
        tally: Counts what becomes of the prompt.

    Returns:
        Records as stages ``dpo`` and ``rm`` read them; none if no two answers differ enough.
    """
    tally = Tally() if tally is None else tally
    scored = [(reward, place) for place, reward in enumerate(rewards) if reward is not None]
    # Of equals the earlier first.
    order = sorted(scored, key=lambda pair: (-pair[0], pair[1]))
    if keep == "ranking":
        ranks = _ranks(order, min_margin)
        pairs = [
            (a, b) for (a, i), (b, j) in combinations(zip(order, ranks, strict=True), 2) if i < j
        ]
        records = [_ranking(candidates, order, ranks)] if pairs else []
    else:
        ends = [(order[0], order[-1])] if order else []
        pairs = [
            (better, worse)
            for better, worse in (ends if keep == "best-worst" else combinations(order, 2))
            if _is_better(better, worse, min_margin)
        ]
        records = [_pair(candidates, better, worse, keep=keep) for better, worse in pairs]
    tally.prompts += 1
    tally.answers += len(rewards)
    tally.records += len(records)
    tally.pairs += len(pairs)
    tally.margin += sum(better[0] - worse[0] for better, worse in pairs)
    lengths = [len(answer.strip()) for answer in candidates.answers]
    tally.longer += sum(lengths[better[1]] > lengths[worse[1]] for better, worse in pairs)
    if len(scored) < 2:
        tally.too_few += 1
    elif not records:
        tally.too_close += 1
    return records


_Scored = tuple[float, int]
"""An answer's reward and its place."""


def _is_better(one: _Scored, other: _Scored, min_margin: float) -> bool:
    return one[0] > other[0] and one[0] - other[0] >= min_margin


def _ranks(order: Sequence[_Scored], min_margin: float) -> list[int]:
    """Ranks of answers that are ordered, the best first, from 1 on."""
    steps = [_is_better(one, other, min_margin) for one, other in pairwise(order)]
    return list(accumulate(steps, initial=1))[: len(order)]


def _ranking(
    candidates: Candidates, order: Sequence[_Scored], ranks: Sequence[int]
) -> dict[str, Any]:
    return {
        "id": candidates.question.id,
        "prompt": _prompt(candidates),
        "answers": [
            {"messages": _said(candidates, place), "rank": rank, "reward": reward}
            for (reward, place), rank in zip(order, ranks, strict=True)
        ],
    }


def _pair(candidates: Candidates, better: _Scored, worse: _Scored, *, keep: Keep) -> dict[str, Any]:
    name = candidates.question.id
    if keep == "all":
        name = f"{name}/{better[1] + 1}>{worse[1] + 1}"
    return {
        "id": name,
        "prompt": _prompt(candidates),
        "chosen": _said(candidates, better[1]),
        "rejected": _said(candidates, worse[1]),
        "reward_chosen": better[0],
        "reward_rejected": worse[0],
    }


def _prompt(candidates: Candidates) -> list[dict[str, str]]:
    return as_dicts(candidates.question.messages)


def _said(candidates: Candidates, place: int) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": candidates.answers[place]}]
