"""How much personal data does `megatron_cgn.corpus.redact` find, and how much else does it take?

python benchmarks/redact.py --seed 20261126

Draws invented documents from templates, with what has to be found marked, and counts. A marked
passage is found if findings of its kind cover it whole; a finding is right if it touches only
marked passages; a look-alike is kept if no finding touches it. The published figures come from a
seed not used while developing; the templates have all been seen by then. What each set of them gave
before it had been seen is in `docs/redaction.md`.
"""

import argparse
import datetime
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from redact_templates import DEVELOPMENT, FOURTH, KINDS, LOOK_ALIKES, SECOND, THIRD, UNANNOUNCED
from redact_values import Values

from megatron_cgn.config.corpus import RedactConfig
from megatron_cgn.corpus.document import Document
from megatron_cgn.corpus.redact import Redactor

_SLOT = re.compile(r"\{(\w+)\}")
TEMPLATES = {"development": DEVELOPMENT, "second": SECOND, "third": THIRD, "fourth": FOURTH}
TEMPLATES["all"] = tuple(one for templates in TEMPLATES.values() for one in templates)
ROOT = Path(__file__).parents[1]
CHECKSUMMED = ("id_card", "credit_code", "bank_card")


@dataclass(frozen=True, slots=True)
class Sample:
    """A document with marks: slot, first character, end."""

    text: str
    marks: tuple[tuple[str, int, int], ...]


@dataclass(slots=True)
class Score:
    """Counts over a set of documents."""

    marked: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    covered: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    look_alikes: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def draw(templates: Sequence[str], *, seed: int, documents: int) -> Iterator[Sample]:
    """Draw documents.

    Args:
        templates: Texts with slots.
        seed: Of everything drawn.
        documents: How many.

    Yields:
        Documents of one to four templates.
    """
    values, chance = Values(seed), random.Random(seed)
    for _ in range(documents):
        pieces: list[str] = []
        marks: list[tuple[str, int, int]] = []
        length = 0
        for template in chance.choices(templates, k=chance.randint(1, 4)):
            for number, piece in enumerate(_SLOT.split(template + "\n")):
                text = values.draw(piece) if number % 2 else piece
                if number % 2:
                    if "|" in template or "\t" in template:
                        # A line end inside a cell would end the table.
                        text = text.replace("\n", "")
                    marks.append((piece, length, length + len(text)))
                pieces.append(text)
                length += len(text)
        yield Sample("".join(pieces), tuple(marks))


def score(redactor: Redactor, samples: Sequence[Sample]) -> Score:
    """Compare what is found with what is marked.

    Args:
        redactor: What is measured.
        samples: Documents with marks.

    Returns:
        The counts.
    """
    result = Score()
    for sample in samples:
        kinds: list[str | None] = [None] * len(sample.text)
        for finding in redactor.find(sample.text):
            kinds[finding.start : finding.end] = [finding.kind] * (finding.end - finding.start)
        marked = bytearray(len(sample.text))
        for slot, start, end in sample.marks:
            touched = [kinds[i] for i in range(start, end)]
            context = sample.text[max(0, start - 25) : end + 8].replace("\n", "⏎")
            if slot in KINDS:
                marked[start:end] = b"\1" * (end - start)
                result.marked[slot] += 1
                result.covered[slot] += all(kind is not None for kind in touched)
                hit = all(kind == KINDS[slot].partition(",")[0] for kind in touched)
                result.found[slot] += hit
                if not hit:
                    result.missed.append(f"{slot}: {sample.text[start:end]!r} in {context!r}")
            elif slot in LOOK_ALIKES:
                result.look_alikes[slot] += 1
                result.kept[slot] += not any(touched)
        for finding in redactor.find(sample.text):
            span = slice(finding.start, finding.end)
            right = any(marked[span])
            result.findings[finding.kind] += 1
            result.right[finding.kind] += right
            if not right:
                context = sample.text[max(0, finding.start - 25) : finding.end + 8]
                result.wrong.append(f"{finding.kind}: {sample.text[span]!r} in {context!r}")
    return result


def speed(redactor: Redactor, texts: Sequence[str]) -> float:
    """Speed of redaction in MB (10^6 bytes of UTF-8) a second of one core, best of five."""
    num_bytes = sum(len(text.encode()) for text in texts)
    best = float("inf")
    for _ in range(5):
        started = time.process_time()
        for text in texts:
            redactor(Document(id="", text=text, source=""))
        best = min(best, time.process_time() - started)
    return num_bytes / best / 1e6


def speeds(redactor: Redactor, samples: Sequence[Sample]) -> Iterator[str]:
    """Speed on the bundled ordinary texts and on this set."""
    for name in ("domain_zh", "domain_en"):
        lines = (ROOT / "samples" / f"{name}.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        yield f"samples/{name}.jsonl {speed(redactor, texts):.1f} MB/s"
    texts = [sample.text for sample in samples]
    yield f"this set, which is nothing but findings, {speed(redactor, texts):.1f} MB/s"


def report(result: Score) -> list[str]:
    """Tables in Markdown: recall, precision, look-alikes kept."""
    lines = [
        "| kind | marked | recall | found under any kind | precision |",
        "|---|---|---|---|---|",
    ]
    kinds = list(dict.fromkeys(KINDS.values()))
    for kind in [*kinds, "all"]:
        promised = [slot for slot in KINDS if KINDS[slot] != UNANNOUNCED]
        slots = promised if kind == "all" else [slot for slot in KINDS if KINDS[slot] == kind]
        marked, found, covered = (
            sum(counter[slot] for slot in slots)
            for counter in (result.marked, result.found, result.covered)
        )
        findings = sum(result.findings[k] for k in kinds if kind in (k, "all"))
        right = sum(result.right[k] for k in kinds if kind in (k, "all"))
        lines.append(
            f"| {kind} | {marked} | {_share(found, marked)} | {_share(covered, marked)} "
            f"| {_share(right, findings)} |"
        )
    lines += ["", "| look-alike | number | kept |", "|---|---|---|"]
    for slot in LOOK_ALIKES:
        number = result.look_alikes[slot]
        lines.append(f"| {slot} | {number} | {_share(result.kept[slot], number)} |")
    number = result.look_alikes.total()
    return [*lines, f"| all | {number} | {_share(result.kept.total(), number)} |"]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.4f}" if whole else "—"


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=20261126)
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--templates", choices=tuple(TEMPLATES), default="all")
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu", help="name in the file")
    parser.add_argument("--show", type=int, default=0, help="print so many errors, write nothing")
    args = parser.parse_args()
    templates = TEMPLATES[args.templates]
    samples = list(draw(templates, seed=args.seed, documents=args.documents))
    redactor = Redactor(RedactConfig())
    result = score(redactor, samples)
    if args.show:
        print("\n".join(report(result)))
        for title, errors in (("missed", result.missed), ("wrong", result.wrong)):
            print(f"\n{title}: {len(errors)}", *errors[: args.show], sep="\n  ")
        return
    # Imports torch, which the tests that use this file do without.
    from hardware import RESULTS, environment

    text = "\n".join(
        [
            "# What redaction finds\n",
            *environment(("python-stdnum", "faker", "regex")),
            f"- Set: {args.documents} invented documents, templates `{args.templates}`, seed "
            f"{args.seed}",
            f"- Load average meanwhile: {os.getloadavg()[0]:.1f}",
            f"- CPU speed of one core, best of five: {', '.join(speeds(redactor, samples))}",
            "",
            *report(result),
            "",
        ]
    )
    RESULTS.mkdir(exist_ok=True)
    month = datetime.date.today().strftime("%Y%m")
    (RESULTS / f"redact_{args.hardware}_{month}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
