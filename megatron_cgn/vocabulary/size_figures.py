"""The figures of every size in ``report.json``; its layout is in ``report.py``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_cgn.vocabulary.cost import ModelCost
from megatron_cgn.vocabulary.recommend import Candidate, Judgement, Policy
from megatron_cgn.vocabulary.sweep import ALL, Sweep, SweepPoint, TextFigures


def size_figures(
    sweep: Sweep,
    *,
    candidates: Sequence[Candidate],
    judgements: Sequence[Judgement],
    costs: Sequence[ModelCost] | None,
    policy: Policy,
) -> list[dict[str, Any]]:
    """Put together what is known of each size.

    Args:
        sweep: The measurements.
        candidates: What the rules saw; one a size, as the next.
        judgements: What became of it.
        costs: Of the model, if there is one.
        policy: The rules.

    Returns:
        An object a size.
    """
    first = sweep.points[0]
    return [
        {
            "num_tokens": point.num_tokens,
            "domain": _languages(point.domain, first.domain),
            "general": _languages(point.general, first.general),
            **_uses(point, policy),
            "share_seen": candidate.share_seen,
            "gain": candidate.gain,
            "marginal_gain": judgement.marginal_gain,
            "accepted": judgement.accepted,
            "verdict": judgement.reason,
            "cost": costs and _cost(costs[place], point, sweep, policy),
        }
        for place, (point, candidate, judgement) in enumerate(
            zip(sweep.points, candidates, judgements, strict=True)
        )
    ]


def _languages(
    figures: Mapping[str, TextFigures], before: Mapping[str, TextFigures]
) -> dict[str, dict[str, Any]]:
    return {
        name: asdict(of_language)
        | {
            "saved": 1 - of_language.tokens / max(1, before[name].tokens),
            "characters_per_token": of_language.characters / max(1, of_language.tokens),
            "bytes_per_token": of_language.text_bytes / max(1, of_language.tokens),
        }
        for name, of_language in figures.items()
    }


def _uses(point: SweepPoint, policy: Policy) -> dict[str, Any]:
    if not point.num_tokens:
        return {"used_share": None, "rare_in_corpus": None, "uses_per_million": None}
    uses, tokens = point.corpus_uses, point.corpus_tokens
    rare = None if uses is None else int((uses < policy.min_uses).sum())
    if uses is None or not tokens:
        uses, tokens = point.uses.astype(np.float64), float(point.domain[ALL].tokens)
    tenth, median = np.quantile(uses / tokens * 1e6, (0.1, 0.5)).tolist()
    return {
        "used_share": float((point.uses > 0).mean()),
        "rare_in_corpus": rare,
        "uses_per_million": {"tenth": tenth, "median": median},
    }


def _cost(cost: ModelCost, point: SweepPoint, sweep: Sweep, policy: Policy) -> dict[str, Any]:
    domain = _flops_per_byte(cost, point.domain)
    # Where there is no general text, it is taken to cost what domain text did: see recommend.py.
    general = _flops_per_byte(cost, point.general or sweep.points[0].domain)
    share = policy.domain_share
    mix = share * domain + (1 - share) * general
    figures = point.domain[ALL]
    return asdict(cost) | {
        "flops_per_byte": {
            "domain": domain,
            "general": general if point.general else None,
            "mix": mix,
        },
        "corpus_flops": sweep.corpus_bytes and domain * sweep.corpus_bytes,
        "planned_flops": policy.planned_bytes and mix * policy.planned_bytes,
        "kv_cache_bytes_per_character": cost.kv_cache_bytes_per_token
        * figures.tokens
        / figures.characters,
    }


def _flops_per_byte(cost: ModelCost, figures: Mapping[str, TextFigures]) -> float:
    return cost.training_flops_per_token * figures[ALL].tokens / figures[ALL].text_bytes
