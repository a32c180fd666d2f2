r"""Which number of new tokens to take, if any: a pure function of what was measured.

The cost of training on a mix of domain and general text, by bytes of text, with N new tokens is

.. math:: C(N) = \sum_{t} w_t \, \frac{\mathrm{tokens}_t(N)}{\mathrm{bytes}_t} \, F(N)

with :math:`F` from ``cost.py``, or 1 where no model is given; the gain is
:math:`g(N) = 1 - C(N) / C(0)`. An N is taken if

1. general text gets no longer by it,
2. at least `Policy.min_share_seen` of its tokens from the corpus would be met `Policy.min_uses`
   times over the planned training. The rule, with both of its numbers, is that of Gowda and May
   2020, "Finding the Optimal Vocabulary Size for Neural Machine Translation" (Findings of EMNLP),
   who take the largest vocabulary in which 95 % of the classes have 100 examples,
3. each further 1,000 tokens since the last N taken gain `Policy.min_marginal_gain`,
4. and the whole gain is `Policy.min_gain`: a changed vocabulary costs what no FLOP count shows
   (every index made again, servers and prompts that must follow, rows that start cold).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_cgn.errors import ConfigError
from megatron_cgn.vocabulary.cost import ModelCost
from megatron_cgn.vocabulary.sweep import ALL, Sweep, SweepPoint, TextFigures
from tokenizer.extension import Extension

_LEAST_BETWEEN = 100
"""Fewest tokens that a size is measured for unasked: fewer save little anywhere."""

Basis = Literal["training FLOPs", "tokens"]
"""What a gain is a share of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What training is planned, and what a vocabulary must be worth."""

    planned_bytes: int | None = None
    """UTF-8 bytes of text that will be trained on, repetitions counted, domain and general; None
    for the corpus once, with the general text that goes with it."""
    domain_share: float = 0.8
    """Of the bytes."""
    min_uses: int = 100
    """Uses of a token in training from which it counts as met often enough to be learnt."""
    min_share_seen: float = 0.95
    """Least share of the corpus's new tokens with so many uses."""
    min_marginal_gain: float = 0.0025
    """Least gain of each further 1,000 tokens."""
    min_gain: float = 0.03
    """Least gain for which a vocabulary is changed at all."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If one is out of range; names all.
        """
        faults = [
            f"{name}: {getattr(self, name)}, but it must be from 0 to 1."
            for name in ("domain_share", "min_share_seen", "min_marginal_gain", "min_gain")
            if not 0 <= getattr(self, name) <= 1
        ]
        if self.domain_share == 0:
            faults.append("domain_share: 0, but new tokens are for domain text; raise it.")
        if self.planned_bytes is not None and self.planned_bytes < 1:
            faults.append(f"planned_bytes: {self.planned_bytes}, but at least 1 is needed.")
        if self.min_uses < 0:
            faults.append(f"min_uses: {self.min_uses}, but at least 0 is needed.")
        if faults:
            raise ConfigError("\n".join(faults))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One N as the rules see it."""

    num_tokens: int
    gain: float
    """Share of the cost of training on the mix that is saved; negative where it grows."""
    share_seen: float | None
    """Share of the new tokens that training would meet often enough; None if unknown."""
    general_growth: float
    """Tokens of general text that are added, as a share of those before; 0 where none was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What became of one N."""

    num_tokens: int
    accepted: bool
    marginal_gain: float | None
    """Gain of each further 1,000 tokens since the last N that was taken; None for 0."""
    reason: str
    """Why not, or that it was taken: part of a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The number of new tokens to take."""

    num_tokens: int
    gain: float
    basis: Basis
    reason: str
    """One sentence with the figures that decided."""
    judgements: tuple[Judgement, ...]


def candidates(
    sweep: Sweep,
    *,
    extension: Extension,
    costs: Sequence[ModelCost] | None,
    policy: Policy,
) -> list[Candidate]:
    """Reduce what was measured to what decides.

    Args:
        sweep: The measurements.
        extension: Of the largest N.
        costs: One for each point of the sweep, or None without a model.
        policy: The plan.

    Returns:
        One for each point of the sweep.
    """
    flops = [1.0] * len(sweep.points)
    if costs is not None:
        flops = [cost.training_flops_per_token for cost in costs]
    # Of general text that is not known, new tokens are taken to save nothing.
    unknown = _tokens_per_byte(sweep.points[0].domain[ALL])
    of_mix = [
        _mix_cost(point, of_token, policy, unknown_general=unknown)
        for point, of_token in zip(sweep.points, flops, strict=True)
    ]
    is_corpus = np.array([t.origin == "corpus" for t in extension.new_tokens], dtype=bool)
    return [
        Candidate(
            num_tokens=point.num_tokens,
            gain=1 - cost / of_mix[0],
            share_seen=_share_seen(point, is_corpus, sweep.corpus_bytes, policy),
            general_growth=_growth(sweep.points[0], point),
        )
        for point, cost in zip(sweep.points, of_mix, strict=True)
    ]


def size_between(
    points: Sequence[SweepPoint],
    *,
    extension: Extension,
    corpus_bytes: int | None,
    policy: Policy,
) -> int | None:
    """Find a size below the first one whose tokens would be met too rarely.

    A token is used no less where fewer tokens follow it, so what the uses at the larger size say of
    its first N tokens, N tokens alone keep.

    Args:
        points: What was measured, smallest size first.
        extension: Of the largest size.
        corpus_bytes: As `Sweep.corpus_bytes`.
        policy: The rules.

    Returns:
        About the largest N of which enough tokens would be met often enough, rounded down; None
        where every size has it, or no N of some use beyond the size before.
    """
    is_corpus = np.array([t.origin == "corpus" for t in extension.new_tokens], dtype=bool)
    for before, point in zip(points, points[1:], strict=False):
        seen = _share_seen(point, is_corpus, corpus_bytes, policy)
        if seen is None or seen >= policy.min_share_seen:
            continue
        is_met = _is_met(point, corpus_bytes, policy)
        judged = is_corpus[: point.num_tokens]
        shares = np.cumsum(is_met & judged) / np.maximum(1, np.cumsum(judged))
        enough = np.flatnonzero((shares >= policy.min_share_seen) & judged)
        size = _rounded_down(int(enough[-1]) + 1) if len(enough) else 0
        return size if size >= _LEAST_BETWEEN and size > before.num_tokens else None
    return None


def recommend(found: Sequence[Candidate], *, policy: Policy, basis: Basis) -> Recommendation:
    """Choose an N.

    Args:
        found: In ascending order; the first is 0.
        policy: The rules.
        basis: What gains are shares of, for the sentence.

    Returns:
        The choice, and why.
    """
    best, judgements = found[0], [_judgement_of_nothing()]
    for candidate in found[1:]:
        marginal = (candidate.gain - best.gain) / (candidate.num_tokens - best.num_tokens) * 1000
        fault = _fault(candidate, marginal, best, policy)
        judgements.append(
            Judgement(
                num_tokens=candidate.num_tokens,
                accepted=fault is None,
                marginal_gain=marginal,
                reason=fault or "taken",
            )
        )
        best = candidate if fault is None else best
    if 0 < best.num_tokens and best.gain < policy.min_gain:
        why = (
            f"No extension: the best one, of {best.num_tokens:,} tokens, saves only "
            f"{best.gain:.1%} of the {basis}, less than the {policy.min_gain:.1%} for which a "
            "vocabulary should be changed"
        )
        refused = [j for j in judgements if j.num_tokens > best.num_tokens]
        if refused:
            why += f"; with {refused[0].num_tokens:,}, {refused[0].reason}"
        why += "."
        return _result(found[0], basis, why, judgements)
    return _result(best, basis, _reason(best, found, judgements, policy, basis), judgements)


def planned_text(policy: Policy) -> str:
    """Name what will be trained on, inside a sentence."""
    if policy.planned_bytes is None:
        return "the corpus once"
    unit, name = (10**9, "GB") if policy.planned_bytes >= 10**9 else (10**6, "MB")
    return f"{policy.planned_bytes / unit:,.3g} {name} of text"


def _judgement_of_nothing() -> Judgement:
    return Judgement(num_tokens=0, accepted=True, marginal_gain=None, reason="the old vocabulary")


def _fault(candidate: Candidate, marginal: float, best: Candidate, policy: Policy) -> str | None:
    """Why an N is not taken, as a clause."""
    if candidate.general_growth > 0:
        return f"general text would take {candidate.general_growth:.2%} more tokens"
    seen = candidate.share_seen
    if seen is not None and seen < policy.min_share_seen:
        return (
            f"training on {planned_text(policy)} would meet only {seen:.1%} of its tokens "
            f"{policy.min_uses:,} times or more, not {policy.min_share_seen:.0%}"
        )
    if marginal < policy.min_marginal_gain:
        return (
            f"each further 1,000 tokens after {best.num_tokens:,} would save {marginal:.2%}, less "
            f"than {policy.min_marginal_gain:.2%}"
        )
    return None


def _reason(
    best: Candidate,
    found: Sequence[Candidate],
    judgements: Sequence[Judgement],
    policy: Policy,
    basis: Basis,
) -> str:
    refused = [j for j in judgements if j.num_tokens > best.num_tokens]
    if best.num_tokens == 0:
        if not refused:
            return "No extension: no size was tried."
        least = found[1]
        if least.gain <= 0:
            return f"No extension: {least.num_tokens:,} new tokens save none of the {basis}."
        return (
            f"No extension: {least.num_tokens:,} new tokens, the fewest that were tried, would "
            f"save {least.gain:.1%} of the {basis}, but {refused[0].reason}."
        )
    parts = [
        f"{best.num_tokens:,} new tokens save {best.gain:.1%} of the {basis} for a mix with "
        f"{policy.domain_share:.0%} domain text"
    ]
    if best.share_seen is None:
        parts.append("how often training would meet them is not known")
    else:
        parts.append(
            f"training on {planned_text(policy)} would meet {best.share_seen:.1%} of them "
            f"{policy.min_uses:,} times or more"
        )
    if refused:
        parts.append(f"with {refused[0].num_tokens:,}, {refused[0].reason}")
    else:
        parts.append(f"no more than {found[-1].num_tokens:,} were tried")
    return "; ".join(parts) + "."


def _result(
    chosen: Candidate, basis: Basis, reason: str, judgements: Sequence[Judgement]
) -> Recommendation:
    return Recommendation(
        num_tokens=chosen.num_tokens,
        gain=chosen.gain,
        basis=basis,
        reason=reason,
        judgements=tuple(judgements),
    )


def _mix_cost(
    point: SweepPoint, flops_per_token: float, policy: Policy, *, unknown_general: float
) -> float:
    """Cost of a byte of the mix."""
    domain = _tokens_per_byte(point.domain[ALL])
    general = _tokens_per_byte(point.general[ALL]) if point.general else unknown_general
    share = policy.domain_share
    return flops_per_token * (share * domain + (1 - share) * general)


def _tokens_per_byte(figures: TextFigures) -> float:
    return figures.tokens / figures.text_bytes


def _growth(before: SweepPoint, point: SweepPoint) -> float:
    if not point.general:
        return 0.0
    return point.general[ALL].tokens / before.general[ALL].tokens - 1


def _share_seen(
    point: SweepPoint,
    is_corpus: npt.NDArray[np.bool_],
    corpus_bytes: int | None,
    policy: Policy,
) -> float | None:
    if point.corpus_uses is None or corpus_bytes is None:
        return None
    judged = is_corpus[: point.num_tokens]
    if not judged.any():
        return None
    return float(np.mean(_is_met(point, corpus_bytes, policy)[judged]))


def _is_met(point: SweepPoint, corpus_bytes: int | None, policy: Policy) -> npt.NDArray[np.bool_]:
    """Which tokens the planned training would meet often enough, bool ``[N]``."""
    assert point.corpus_uses is not None and corpus_bytes is not None
    planned = corpus_bytes if policy.planned_bytes is None else policy.planned_bytes
    share = 1.0 if policy.planned_bytes is None else policy.domain_share
    return point.corpus_uses * (planned * share / corpus_bytes) >= policy.min_uses


def _rounded_down(size: int) -> int:
    """To two digits, which is as exact as the figures are."""
    unit = int(10 ** max(0, len(str(size)) - 2))
    return size // unit * unit
