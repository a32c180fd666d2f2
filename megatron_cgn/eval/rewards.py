r"""How well rewards tell better answers from worse ones, and how far their size can be trusted.

The difference of two rewards is a forecast: under the Bradley–Terry model (Bradley & Terry 1952,
https://doi.org/10.2307/2334029) the first answer is the better one with probability
:math:`\sigma(r_1 - r_2)`. Calibration holds such forecasts against what people chose.

Every prompt counts once, however many pairs its answers make: each pair has its weight from
`PreferenceBatch.weights`.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.engine.engine import Engine
from megatron_cgn.eval.preferences import score_preferences
from megatron_cgn.objectives.base import ForwardArgs, LossOutput, Objective
from megatron_cgn.objectives.reward import answer_rewards
from megatron_cgn.parallel.reduce import sum_over_data

BINS = 10
"""Equal parts of the confidences, which lie between a half and one."""
CALIBRATION_ERROR = "rewards/calibration_error"
KENDALL_TAU = "rewards/kendall_tau"
PREFERS_LONGER, CHOSEN_LONGER = "rewards/prefers_longer", "chosen_is_longer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Pairs of which a reward model is about as sure.

    Attributes:
        prompts: Sum of the pairs' weights.
        confidence: Mean probability that the answer with the higher reward is the better one.
        accuracy: How often it is. Two equal rewards are right half the time.
    """

    prompts: float
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardScore:
    """How well held-out answers are told apart.

    Attributes:
        metrics: ``loss`` and the objective's metrics; `CALIBRATION_ERROR`; `KENDALL_TAU`, if
            there are rankings of more than two answers; and of pairs whose answers differ in
            length, how often the longer one has the higher reward (`PREFERS_LONGER`), and how
            often the data call it the better one (`CHOSEN_LONGER`).
        reliability: The bins that hold anything, the least sure first.
    """

    metrics: dict[str, float]
    reliability: tuple[Bin, ...]


def score_answers_by_reward(
    engine: Engine, batches: Iterable[PreferenceBatch], objective: Objective[PreferenceBatch]
) -> RewardScore:
    r"""Score held-out answers. Collective over all ranks.

    The expected calibration error is that of Guo et al. 2017, https://arxiv.org/abs/1706.04599:

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{n} \, | \mathrm{acc}_b - \mathrm{conf}_b |

    over `BINS` bins of the confidence :math:`\sigma(|r_1 - r_2|)`, of n weighted pairs. It is made
    of absolute values, so few pairs make it large: of 100 perfectly calibrated ones it is about
    0.1, of 1,000 about 0.03 (simulated).

    Args:
        engine: A reward model.
        batches: This data-parallel rank's micro-batches, at least one; as many on every rank.
        objective: Of one source, so made without names of sources.

    Returns:
        The score, equal on every rank.
    """
    judged = _Judged(objective)
    metrics = score_preferences(engine, batches, judged)
    # Every rank of a model-parallel group has the whole output, also under context parallelism.
    totals = sum_over_data(judged.totals / engine.state.cp_size, engine.state).cpu()
    bins = totals[: 3 * BINS].view(BINS, 3)
    tau, rankings, prefers, chosen, unequal = totals[3 * BINS :].tolist()
    reliability = tuple(
        Bin(prompts=weight, confidence=sure / weight, accuracy=right / weight)
        for weight, sure, right in bins.tolist()
        if weight
    )
    if reliability:
        metrics[CALIBRATION_ERROR] = calibration_error(reliability)
    if rankings:
        metrics[KENDALL_TAU] = tau / rankings
    if unequal:
        metrics |= {PREFERS_LONGER: prefers / unequal, CHOSEN_LONGER: chosen / unequal}
    return RewardScore(metrics=metrics, reliability=reliability)


def calibration_error(reliability: Iterable[Bin]) -> float:
    """Expected calibration error: see `score_answers_by_reward`."""
    bins = list(reliability)
    gaps = sum(b.prompts * abs(b.accuracy - b.confidence) for b in bins)
    return gaps / sum(b.prompts for b in bins)


def write_reliability(path: Path, step: int, scores: Mapping[str, RewardScore]) -> None:
    """Write the reliability tables of all sources as JSON, in place of an earlier step's.

    Args:
        path: The file.
        step: Steps done.
        scores: By source.

    Raises:
        OSError: If the disk refuses; what was there before stays.
    """
    tables = {name: [asdict(b) for b in score.reliability] for name, score in scores.items()}
    partial = path.with_suffix(".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump({"step": step, "sources": tables}, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _Judged:
    """An objective that keeps sums of what rewards say beside its loss."""

    def __init__(self, objective: Objective[PreferenceBatch]) -> None:
        self._objective = objective
        self.unit = objective.unit
        self.totals = torch.zeros(3 * BINS + 5, dtype=torch.float64)

    def forward_args(self, batch: PreferenceBatch) -> ForwardArgs:
        return self._objective.forward_args(batch)

    def loss(self, output: Tensor, batch: PreferenceBatch) -> LossOutput:
        rewards = answer_rewards(output.detach(), batch).double()
        sums = (bin_sums(rewards, batch).flatten(), tau_sums(rewards, batch))
        self.totals += torch.cat((*sums, length_sums(rewards, batch)))
        return self._objective.loss(output, batch)


def bin_sums(rewards: Tensor, batch: PreferenceBatch) -> Tensor:
    """Sort the pairs of a micro-batch by how sure their rewards are.

    Args:
        rewards: Of the answers, float64 ``[A]``.
        batch: The micro-batch.

    Returns:
        Float64 ``[BINS, 3]``: sums of weights, of confidences and of right ones, weighted.
    """
    difference = rewards[batch.chosen] - rewards[batch.rejected]
    weights = batch.weights.double()
    confidence = difference.abs().sigmoid()
    right = 0.5 * (1.0 + difference.sign())
    place = ((2.0 * confidence - 1.0) * BINS).long().clamp(0, BINS - 1)
    sums = torch.zeros(BINS, 3, dtype=torch.float64)
    return sums.index_add_(
        0, place, torch.stack((weights, weights * confidence, weights * right), dim=1)
    )


def tau_sums(rewards: Tensor, batch: PreferenceBatch) -> Tensor:
    r"""Correlate rewards with the ranks of every ranking in a micro-batch.

    Kendall's tau-b, which allows for ties on both sides (Kendall 1945,
    https://doi.org/10.1093/biomet/33.3.239):

    .. math:: \tau = \frac{C - D}{\sqrt{P U}}

    with C and D pairs the right and the wrong way round, of P with unequal ranks and U with unequal
    rewards; 0 where all rewards are equal.

    Args:
        rewards: Of the answers, float64 ``[A]``.
        batch: The micro-batch.

    Returns:
        Float64 ``[2]``: sum over the rankings with more than one pair, and their number.
    """
    taus = []
    for answers, pairs in _rankings(batch):
        difference = rewards[batch.chosen[pairs]] - rewards[batch.rejected[pairs]]
        values = rewards[answers].tolist()
        unequal = sum(a != b for a, b in combinations(values, 2))
        agreement = float(difference.sign().sum())
        taus.append(agreement / (len(pairs) * unequal) ** 0.5 if unequal else 0.0)
    return torch.tensor([sum(taus), len(taus)], dtype=torch.float64)


def length_sums(rewards: Tensor, batch: PreferenceBatch) -> Tensor:
    """Count how often the longer of two answers is preferred.

    Args:
        rewards: Of the answers, float64 ``[A]``.
        batch: The micro-batch.

    Returns:
        Float64 ``[3]``, weighted, of the pairs whose answers have different numbers of tokens: how
        often the longer one has the higher reward (half of equal rewards), how often it is the
        better one, and how many there are.
    """
    lengths = batch.cu_seqlens.diff()[: batch.num_answers]
    longer = (lengths[batch.chosen] - lengths[batch.rejected]).sign().double()
    higher = (rewards[batch.chosen] - rewards[batch.rejected]).sign()
    weights = batch.weights.double() * longer.abs()
    shares = torch.stack((0.5 * (1 + higher * longer), 0.5 * (1 + longer), torch.ones_like(longer)))
    return (shares * weights).sum(1)


def _rankings(batch: PreferenceBatch) -> Iterator[tuple[list[int], list[int]]]:
    """Answers and pairs of every prompt with more than one pair: what pairs link together."""
    group = list(range(batch.num_answers))
    members = {answer: [answer] for answer in group}
    ends = list(zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True))
    for one, other in ends:
        kept, gone = group[one], group[other]
        if kept != gone:
            for answer in members[gone]:
                group[answer] = kept
            members[kept] += members.pop(gone)
    pairs: dict[int, list[int]] = {}
    for number, (one, _) in enumerate(ends):
        pairs.setdefault(group[one], []).append(number)
    for name, numbers in pairs.items():
        if len(numbers) > 1:
            yield members[name], numbers
