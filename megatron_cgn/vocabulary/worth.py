"""What an extension is worth: measured, judged, and told in a few lines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cgn.errors import ModelError
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.vocabulary.checks import Plan
from megatron_cgn.vocabulary.console import Console
from megatron_cgn.vocabulary.cost import ModelCost, TrainingShape, model_cost
from megatron_cgn.vocabulary.recommend import (
    Policy,
    Recommendation,
    candidates,
    planned_text,
    recommend,
    size_between,
)
from megatron_cgn.vocabulary.report import report_content
from megatron_cgn.vocabulary.settings import Settings
from megatron_cgn.vocabulary.sweep import ALL, Sweep, SweepPoint, TextFigures, sweep, usable_sizes
from megatron_cgn.vocabulary.texts import Texts
from tokenizer.extension import Extension


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """The measurements, and what they say."""

    sweep: Sweep
    costs: list[ModelCost] | None
    """One for each size; None without a model whose costs are known."""
    recommendation: Recommendation
    policy: Policy
    """What it went by."""
    report: dict[str, Any]
    """All of it, as ``report.json`` has it."""


def assess(
    settings: Settings, plan: Plan, extension: Extension, texts: Texts, console: Console
) -> Worth:
    """Measure every size, and choose one.

    Args:
        settings: What is asked for.
        plan: What there is.
        extension: Of all new tokens.
        texts: What is measured on.
        console: Shows progress.

    Returns:
        What was found.
    """
    policy = policy_of(settings, counted=texts.words.text_bytes, corpus=texts.corpus_bytes)
    found = _sweep(settings, plan, extension, texts, console, policy)
    architecture = _architecture(plan)
    shape = TrainingShape(
        seq_length=settings.seq_length,
        tensor_model_parallel_size=settings.tensor_parallel,
        make_vocab_size_divisible_by=settings.make_vocab_size_divisible_by,
    )
    costs = (
        None
        if architecture is None
        else [
            model_cost(
                architecture,
                num_tokens=point.num_tokens,
                old_vocab_size=extension.old_vocab_size,
                shape=shape,
            )
            for point in found.points
        ]
    )
    recommendation = recommend(
        candidates(found, extension=extension, costs=costs, policy=policy),
        policy=policy,
        basis="training FLOPs" if costs else "tokens",
    )
    report = report_content(
        plan.extender,
        extension=extension,
        sweep=found,
        recommendation=recommendation,
        policy=policy,
        domain=texts.domain,
        general=texts.general,
        words=texts.words,
        architecture=architecture,
        shape=shape,
        asked_for=settings.num_tokens,
    )
    return Worth(
        sweep=found, costs=costs, recommendation=recommendation, policy=policy, report=report
    )


def policy_of(settings: Settings, *, counted: int, corpus: int) -> Policy:
    """Say what training is planned.

    Args:
        settings: What is asked for.
        counted: UTF-8 bytes of the documents whose words were counted.
        corpus: UTF-8 bytes of the corpus, more where a sample was counted.

    Returns:
        The rules.
    """
    planned = settings.planned_training_mb
    if planned is not None:
        return Policy(planned_bytes=planned * 10**6, domain_share=settings.domain_share)
    if counted == corpus:
        return Policy(domain_share=settings.domain_share)
    # The corpus once is all of it, not what was counted.
    whole = round(corpus / settings.domain_share)
    return Policy(planned_bytes=whole, domain_share=settings.domain_share)


def _sweep(
    settings: Settings,
    plan: Plan,
    extension: Extension,
    texts: Texts,
    console: Console,
    policy: Policy,
) -> Sweep:
    sizes = [*settings.sizes, settings.num_tokens or 0]

    def further(points: Sequence[SweepPoint]) -> list[int]:
        size = size_between(
            points, extension=extension, corpus_bytes=texts.words.text_bytes, policy=policy
        )
        return [] if size is None else [size]

    count = len(usable_sizes(extension, sizes))
    with console.bar("measuring", total=count, unit=" sizes") as advance:
        return sweep(
            plan.extender,
            extension=extension,
            domain=texts.domain,
            general=texts.general,
            words=texts.words,
            sizes=sizes,
            further=further,
            progress=lambda _, __: advance(1),
        )


def table(worth: Worth) -> str:
    """Figures of every size and the advice, for a terminal."""
    points = worth.sweep.points
    lines = [f"{'new tokens':>10}  {'domain text':>18}  {'general text':>18}  {'used':>5}  FLOPs"]
    for number, point in enumerate(points):
        used = f"{(point.uses > 0).mean():.0%}" if point.num_tokens else ""
        cells = [
            f"{point.num_tokens:>10,}",
            f"{_tokens(points[0].domain, point.domain):>18}",
            f"{_tokens(points[0].general, point.general):>18}",
            f"{used:>5}",
            f"{_flops(worth, number):>5}",
        ]
        lines.append("  ".join(cells))
    return "\n".join([*lines, f"advice: {worth.recommendation.reason}", _assumed(worth)])


def _assumed(worth: Worth) -> str:
    """What the advice takes for granted, and how to say otherwise."""
    policy, model = worth.policy, worth.report["model"]
    told = [
        f"training on {planned_text(policy)} (--planned-training-mb)",
        f"{policy.domain_share:.0%} of it domain text (--domain-share)",
    ]
    if model:
        told.append(f"in sequences of {model['seq_length']:,} tokens (--seq-length)")
    return "it assumes " + ", ".join(told)


def _tokens(before: Mapping[str, TextFigures], after: Mapping[str, TextFigures]) -> str:
    """Tokens of all documents, and how many fewer than before."""
    if not after:
        return "-"
    tokens, first = after[ALL].tokens, before[ALL].tokens
    return f"{tokens:,} {tokens / first - 1:+6.1%}"


def _flops(worth: Worth, number: int) -> str:
    """Training FLOPs of the domain text, as a change."""
    if worth.costs is None:
        return "-"
    before, after = (
        worth.costs[i].training_flops_per_token * worth.sweep.points[i].domain[ALL].tokens
        for i in (0, number)
    )
    return f"{after / before - 1:+.1%}"


def _architecture(plan: Plan) -> Architecture | None:
    """The model's; None where there is none, or one whose costs are not known."""
    if plan.kind == "tokenizer":
        return None
    try:
        return read_architecture(plan.tokenizer)
    except ModelError:
        return None
