"""The quickstart's report: what was measured, in Markdown, and whether it is as it should be."""

import importlib.metadata
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickstart_data import CONVERSATIONS, SOURCES, Question
from quickstart_models import AdapterCheck, Answer
from quickstart_preferences import Preferences, report_preferences

GENERAL_BOUND = 0.05
"""Held-out general bits per byte may rise by this share at most."""
ADAPTER_BOUND = 1e-3
"""Nats. Adding the adapter to the weights first only changes the order of FP32 additions."""
MODELS = ("base", "after pre-training", "after tuning", "after preferences")


@dataclass(frozen=True, slots=True)
class Answers:
    """What one of `MODELS` said."""

    continued: list[str]
    """To the beginnings of texts."""
    answered: list[Answer]
    """To questions, in its chat template."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What a quickstart found out, beside what training wrote."""

    documents: dict[str, dict[str, Any]]
    """Documents, tokens and bytes by the index's name."""
    samples: dict[str, int]
    """Conversations and pairs by language and part."""
    prompts: tuple[str, ...]
    """Beginnings of texts."""
    asked: list[Question]
    """Questions of held-out conversations."""
    answers: list[Answers]
    """Of every one of `MODELS`."""
    adapter: AdapterCheck
    """Of instruction tuning."""
    preferences: Preferences
    seconds: dict[str, float]
    """How long each step took, by what it was."""


def write_report(output_dir: Path, findings: Findings) -> bool:
    """Write ``report.md``.

    Args:
        output_dir: Of the quickstart, with pre-training's ``metrics.jsonl`` in it and those of the
            other stages in ``sft`` and ``dpo``.
        findings: The rest.

    Returns:
        Whether the domain improved, general text held, tuning improved held-out answers, the
        adapter opens as what was exported, and preference learning raised held-out margins.
    """
    from megatron_cgn.engine.metrics import read_records

    pretraining, pretrained_well = _pretraining(read_records(output_dir / "metrics.jsonl"))
    tuning, tuned_well = _tuning(read_records(output_dir / "sft/metrics.jsonl"), findings)
    comparing, compared_well = _comparing(read_records(output_dir / "dpo/metrics.jsonl"), findings)
    parts = [
        _heading(findings), pretraining, tuning, comparing, _answers(findings), _details(findings)
    ]  # fmt: skip
    text = "\n".join(line for part in parts for line in part) + "\n"
    (output_dir / "report.md").write_text(text, "utf-8")
    return pretrained_well and tuned_well and compared_well


def _heading(findings: Findings) -> list[str]:
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}"
        for p in ("torch", "megatron-core", "transformers", "peft")
    )
    return [
        "# Quickstart report",
        "",
        f"SmolLM2-135M-Instruct on 2 processes (pipeline parallel), "
        f"{sum(findings.seconds.values()) / 60:.1f} minutes in all on {os.cpu_count()} CPU cores "
        f"({platform.machine()}); {versions}.",
        "",
    ]


def _pretraining(records: list[dict[str, Any]]) -> tuple[list[str], bool]:
    from megatron_cgn.engine.metrics import before_after_table

    change = {name: _change(records, f"val/{name}/bits_per_byte") for name in SOURCES}
    better = all(change[name] < 0 for name in SOURCES if name.startswith("domain"))
    held = change["general"] <= GENERAL_BOUND
    lines = [
        "## Continual pre-training: held-out documents before and after",
        "",
        _speed(records),
        "",
        before_after_table(records),
        "",
        f"- Domain bits per byte fall: **{_yes(better)}**",
        f"- General bits per byte rise by at most {GENERAL_BOUND:.0%}: "
        f"**{_yes(held)}** ({change['general']:+.1%})",
        "",
        "![training loss and held-out bits per byte](loss.png)",
        "",
    ]
    return lines, better and held


def _tuning(records: list[dict[str, Any]], findings: Findings) -> tuple[list[str], bool]:
    from megatron_cgn.engine.metrics import before_after_table

    better = all(_change(records, f"val/{language}/loss") < 0 for language in CONVERSATIONS)
    adapter = findings.adapter
    agrees = adapter.difference <= ADAPTER_BOUND
    lines = [
        "## Instruction tuning (LoRA): held-out answers before and after",
        "",
        f"Adapters of rank {adapter.rank}: {adapter.parameters:,} numbers are trained, "
        f"{adapter.parameters / adapter.model_parameters:.1%} of the model's. {_speed(records)}",
        "",
        before_after_table(records),
        "",
        f"- Held-out loss falls in both languages: **{_yes(better)}**",
        f"- The adapter, opened on its base in `peft`, gives the log-probabilities of the merged "
        f"export within {ADAPTER_BOUND:g}: **{_yes(agrees)}** ({adapter.difference:.1e})",
        "",
        "![training loss and held-out loss](sft/loss.png)",
        "",
    ]
    return lines, better and agrees


def _comparing(records: list[dict[str, Any]], findings: Findings) -> tuple[list[str], bool]:
    from megatron_cgn.engine.metrics import before_after_table

    return report_preferences(
        records, findings.preferences, table=before_after_table(records), speed=_speed(records)
    )


def _answers(findings: Findings) -> list[str]:
    """The same greedy answers of all models, beside the one that was written for the sample."""
    lines = ["## Answers in `transformers` (greedy, held-out questions)", ""]
    for place, question in enumerate(findings.asked):
        lines += [f"**{_one_line(question.text)}**", ""]
        for name, said in zip(MODELS, findings.answers, strict=True):
            answer = said.answered[place]
            rest = "" if answer.ended else " … *(cut off)*"
            lines.append(f"- {name}: {_one_line(answer.text)}{rest}")
        lines += [f"- *written for the sample: {_one_line(question.answer)}*", ""]
    lines += ["Texts that the models go on with:", ""]
    for place in range(len(findings.prompts)):
        lines += [
            f"- {name}: {_one_line(said.continued[place])}"
            for name, said in zip(MODELS, findings.answers, strict=True)
        ]
    return [*lines, ""]


def _details(findings: Findings) -> list[str]:
    return [
        "## Data",
        "",
        "| index | documents | tokens | bytes of text |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | {c['documents']} | {c['tokens']:,} | {c['bytes']:,} |"
            for name, c in findings.documents.items()
        ),
        "",
        "| samples | |",
        "| --- | --- |",
        *(f"| {name} | {count} |" for name, count in findings.samples.items()),
        "",
        "## Time",
        "",
        "| step | seconds |",
        "| --- | --- |",
        *(f"| {what} | {seconds:.0f} |" for what, seconds in findings.seconds.items()),
    ]


def _speed(records: list[dict[str, Any]]) -> str:
    steps = [record for record in records if "tokens_per_s" in record]
    speed = sorted(record["tokens_per_s"] for record in steps)[len(steps) // 2]
    last = steps[-1]
    return (
        f"{last['step']} steps, {last['tokens']:,} tokens, {speed:,.0f} tokens/s (median; "
        "validating and saving left out)."
    )


def _change(records: Sequence[dict[str, Any]], name: str) -> float:
    """How a score changed, relative to the first; no number if one of them was none."""
    scores = [record[name] for record in records if name in record]
    first, last = (math.nan if score is None else float(score) for score in (scores[0], scores[-1]))
    return last / first - 1


def _yes(holds: bool) -> str:
    return "yes" if holds else "NO"


def _one_line(text: str) -> str:
    return " ".join(text.split())
