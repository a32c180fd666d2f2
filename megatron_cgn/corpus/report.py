"""``report.html``: one page to judge a corpus by, before anybody trains on it.

It needs no network and runs no script. Whatever comes from a document is escaped, and redacted
before it is shown, also where the corpus itself is not.
"""

import json
import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cgn.config.corpus import RedactConfig
from megatron_cgn.corpus.charts import bars
from megatron_cgn.corpus.document import Document
from megatron_cgn.corpus.manifest import one_sided
from megatron_cgn.corpus.page import page, table
from megatron_cgn.corpus.redact import Redactor
from megatron_cgn.corpus.tally import Tally

if TYPE_CHECKING:
    from megatron_cgn.corpus.decontaminate import EvaluationFile

# Shorter than what was kept: a number that is cut at the end is no number a redactor knows.
_SHOWN_CHARS = 300


def write_report(
    path: Path,
    *,
    manifest: dict[str, Any],
    tally: Tally,
    clusters: Sequence[dict[str, Any]],
    redact: RedactConfig,
    evaluation_files: "Sequence[EvaluationFile]" = (),
) -> None:
    """Write the report.

    Args:
        path: The file.
        manifest: What is in ``manifest.json``.
        tally: Counts and examples of both passes.
        clusters: The documents with most duplicates: ``id``, ``duplicates``, ``members``.
        redact: Settings of redaction.
        evaluation_files: What became of each evaluation file.
    """
    redactor = Redactor(redact if redact.enabled else RedactConfig())
    content = _Page(
        manifest, tally, clusters, evaluation_files, lambda text: _redacted(redactor, text)
    )
    path.write_text(content.html(), encoding="utf-8", errors="replace")


def _redacted(redactor: Redactor, text: str) -> str:
    outcome = redactor(Document(id="", text=text, source=""))
    return (outcome.text or "")[:_SHOWN_CHARS]


class _Page:
    def __init__(
        self,
        manifest: dict[str, Any],
        tally: Tally,
        clusters: Sequence[dict[str, Any]],
        evaluation_files: "Sequence[EvaluationFile]",
        safe: Callable[[str], str],
    ) -> None:
        self._manifest = manifest
        self._counts = manifest["counts"]
        self._tally = tally
        self._clusters = clusters
        self._evaluation_files = evaluation_files
        self._safe = safe

    def html(self) -> str:
        sections = (
            self._overview(),
            self._sources(),
            self._dropped(),
            self._evaluation(),
            self._changes(),
            self._charts(),
            self._duplicates(),
            self._details(),
        )
        return page("Corpus report", sections)

    def _overview(self) -> str:
        read = sum(self._counts["documents"].values())
        dropped = sum(sum(reasons.values()) for reasons in self._counts["dropped"].values())
        kept = {piece: _sum(self._counts[piece], "documents") for piece in ("train", "validation")}
        characters = _sum(self._counts["train"], "characters")
        return (
            "<h1>Corpus report</h1>"
            f"<p>{read:,} documents were read and {dropped:,} ({_share(dropped, read)}) left out. "
            f"{kept['train']:,} are for training ({characters:,} characters), and "
            f"{kept['validation']:,} are held out.</p>"
        )

    def _sources(self) -> str:
        rows = []
        for source in self._manifest["sources"]:
            name = source["name"]
            read = self._counts["documents"].get(name, 0)
            dropped = sum(self._counts["dropped"].get(name, {}).values())
            train = self._counts["train"].get(name, {})
            held_out = self._counts["validation"].get(name, {})
            rows.append(
                [
                    name,
                    len(source["inputs"]),
                    f"{sum(file['bytes'] for file in source['inputs']) / 1e6:,.1f}",
                    read,
                    f"{dropped:,} ({_share(dropped, read)})",
                    train.get("documents", 0),
                    held_out.get("documents", 0),
                    train.get("characters", 0) + held_out.get("characters", 0),
                    self._counts["renamed"].get(name, 0),
                ]
            )
        heads = (
            *("source", "#files", "#MB", "#documents", "#left out", "#training", "#held out"),
            *("#characters", "#renamed"),
        )
        skipped = "".join(
            f"<p>{escape(source['name'])}: files not read: "
            + escape(", ".join(f"{n} {kind}" for kind, n in source["skipped"].items()))
            + "</p>"
            for source in self._manifest["sources"]
            if source["skipped"]
        )
        note = (
            '<p class="muted">Renamed: documents whose id another one had already; a hash was '
            "added to it.</p>"
        )
        warnings = "".join(
            f'<p class="warning">{escape(text)}</p>' for text in one_sided(self._manifest)
        )
        return "<h2>Sources</h2>" + table(heads, rows) + warnings + note + skipped

    def _dropped(self) -> str:
        reasons: dict[str, int] = {}
        for dropped in self._counts["dropped"].values():
            for reason, number in dropped.items():
                reasons[reason] = reasons.get(reason, 0) + number
        if not reasons:
            return "<h2>What was left out</h2><p>Nothing.</p>"
        ordered = sorted(reasons, key=lambda reason: (-reasons[reason], reason))
        read = sum(self._counts["documents"].values())
        drawn = table(
            ("reason", "#documents", "#share"),
            [[reason, reasons[reason], _share(reasons[reason], read)] for reason in ordered],
        )
        examples = "".join(self._examples(reason, reasons[reason]) for reason in ordered)
        return "<h2>What was left out</h2>" + drawn + examples

    def _evaluation(self) -> str:
        if not self._evaluation_files:
            return ""
        rows = [
            [os.path.basename(file.path), file.items, file.unmatched_items]
            for file in self._evaluation_files
        ]
        note = (
            '<p class="muted">Not looked for: items too short, or nothing but stock phrases '
            "(<code>decontaminate.min_item_tokens</code>, <code>max_shared_items</code>). That no "
            "document holds them is not known.</p>"
        )
        drawn = table(("file", "#items", "#not looked for"), rows)
        return "<h2>Evaluation files</h2>" + drawn + note

    def _examples(self, kind: str, total: int) -> str:
        shown = self._tally.get("examples", {}).get(kind, [])
        if not shown:
            return ""
        return (
            f"<details><summary><code>{escape(kind)}</code>: {len(shown)} of {total:,}</summary>"
            + "".join(map(self._example, shown))
            + "</details>"
        )

    def _example(self, example: dict[str, Any]) -> str:
        excerpt = self._safe(example["excerpt"])
        evidence = self._safe(example["evidence"] or "")
        return (
            f'<p><span class="id">{escape(example["id"])}</span> '
            f'<span class="muted">({escape(example["source"])})</span><br>{escape(evidence)}</p>'
            + (f"<pre>{escape(excerpt)}</pre>" if excerpt.strip() else "")
        )

    def _changes(self) -> str:
        changes = self._counts["changes"]
        rows = [[kind, changes[kind]["times"], changes[kind]["documents"]] for kind in changes]
        drawn = table(("kind", "#times", "#documents"), rows) if rows else "<p>Nothing.</p>"
        examples = "".join(self._examples(kind, changes[kind]["documents"]) for kind in changes)
        note = (
            '<p class="muted">Examples show the text after redaction, and of the value that was '
            "there at most its first characters.</p>"
        )
        return "<h2>What was changed</h2>" + drawn + (examples + note if examples else "")

    def _charts(self) -> str:
        names = [source["name"] for source in self._manifest["sources"]]
        lengths, languages = self._counts["lengths"], self._counts["languages"]
        bins = sorted({int(bits) for counts in lengths.values() for bits in counts})
        length_rows = [
            (_range(bits), [lengths.get(name, {}).get(str(bits), 0) for name in names])
            for bits in (range(bins[0], bins[-1] + 1) if bins else ())
        ]
        found = sorted({code for counts in languages.values() for code in counts})
        language_rows = [
            (code, [languages.get(name, {}).get(code, 0) for name in names]) for code in found
        ]
        language_rows.sort(key=lambda row: -sum(row[1]))
        return (
            "<h2>Lengths</h2><p>Documents in the corpus by their characters.</p>"
            + bars(length_rows, series=names)
            + "<h2>Languages</h2><p>Documents in the corpus; <code>und</code> is unknown.</p>"
            + bars(language_rows, series=names)
        )

    def _duplicates(self) -> str:
        rows = [
            [cluster["id"], cluster["duplicates"], ", ".join(cluster["members"])]
            for cluster in self._clusters
        ]
        if not rows:
            return ""
        crowded = self._counts["crowded"]
        note = (
            f"<p>{crowded:,} documents have so many near-duplicates that they were not compared "
            "with every one of them: some may be left.</p>"
        )
        drawn = table(("kept", "#duplicates", "some of them"), rows)
        return "<h2>Most duplicated</h2>" + drawn + (note if crowded else "")

    def _details(self) -> str:
        facts = {name: self._manifest[name] for name in ("settings", "versions")}
        text = json.dumps(facts, ensure_ascii=False, indent=2)
        return (
            "<h2>How it was made</h2><details><summary>settings and versions</summary>"
            f"<pre>{escape(text)}</pre></details>"
        )


def _sum(counts: dict[str, dict[str, int]], name: str) -> int:
    return sum(values[name] for values in counts.values())


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0 %"


def _range(bits: int) -> str:
    """Lengths that have so many binary digits."""
    return f"{1 << (bits - 1):,} – {(1 << bits) - 1:,}" if bits > 1 else "1"
