"""The second pass: a part of the clean documents becomes pieces of the output.

Each part gives a directory of its own::

    train.jsonl.zst, validation.jsonl.zst   lines of the shards
    dropped.jsonl.zst                       id, source, reason and evidence
    documents.jsonl.zst                     every document, without its text
    kept.npy                                which of those that were signed are in the output
    names.npy, ends.npy                     the ids of these: see ``names.py``
    tally.json                              counts and examples, and the size of each piece
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cgn.config.corpus import CorpusConfig
from megatron_cgn.corpus import first_pass
from megatron_cgn.corpus import tally as tallies
from megatron_cgn.corpus.decisions import Decisions
from megatron_cgn.corpus.document import Document, Outcome
from megatron_cgn.corpus.names import save_names
from megatron_cgn.corpus.split import Splitter
from megatron_cgn.corpus.steps import Steps
from megatron_cgn.corpus.tally import Tally
from megatron_cgn.corpus.work import LinesWriter, Work, read_rows, write_json
from megatron_cgn.data.lineage import content_hash

STAGE = "write"
PIECES = ("train", "validation", "dropped")

_CONTEXT_CHARS = 40
_CUT = "decontaminate/cut"


class SecondPass:
    """Deduplicates, redacts, decontaminates and splits parts."""

    def __init__(self, settings: CorpusConfig, names: tuple[str, ...], root: Path) -> None:
        """Load what the steps need.

        Args:
            settings: Of all steps.
            names: Name of the source of each part.
            root: The work directory.
        """
        self._names = names
        self._work = Work(root)
        self._steps = Steps(settings)
        self._split = Splitter(settings.split)
        self._decisions = Decisions(self._work, prior=settings.deduplicate.prior)

    def __call__(self, part: int) -> None:
        """Process a part; see the module's text for what it leaves."""
        with self._work.writing(STAGE, part) as target:
            writer = _PartWriter(target, source=self._names[part])
            duplicates = self._decisions.duplicates(part)
            names: list[bytes] = []
            place = 0
            with writer:
                for row in self._rows(part):
                    outcome = _first_outcome(row)
                    if outcome.text is not None:
                        outcome = self._process(row, duplicates.get(place), writer.tally)
                        writer.signed.append(outcome.text is not None)
                        place += 1
                        if outcome.text is not None:
                            names.append(row["id"].encode())
                    writer.write(row, outcome, split=self._split)
            save_names(target, names)
            np.save(target / "kept.npy", np.array(writer.signed, dtype=np.bool_))
            write_json(target / "tally.json", writer.tally)

    def _rows(self, part: int) -> list[dict[str, Any]]:
        path = self._work.path(first_pass.STAGE, part) / "documents.jsonl.zst"
        rows = list(read_rows(path))
        ids = self._decisions.ids(part, [row["id"] for row in rows])
        return [row | {"name": row["id"], "id": new} for row, new in zip(rows, ids, strict=True)]

    def _process(
        self, row: dict[str, Any], duplicate: tuple[str, str] | None, tally: Tally
    ) -> Outcome:
        if duplicate is not None:
            return Outcome(text=None, reason=duplicate[0], evidence=duplicate[1])
        document = _document(row, row["text"])
        redacted = self._steps.redact(document)
        self._show_redaction(document, redacted, tally)
        if redacted.text is None:
            return redacted
        cut = self._steps.decontaminate(_document(row, redacted.text))
        key = tallies.key_of(document.id)
        if cut.text is not None and cut.evidence is not None and tallies.wanted(tally, _CUT, key):
            tallies.add_example(
                tally,
                _CUT,
                key=key,
                id=document.id,
                source=document.source,
                evidence=cut.evidence,
                excerpt="",
            )
        return Outcome(
            text=cut.text,
            reason=cut.reason,
            evidence=cut.evidence,
            changes={**redacted.changes, **cut.changes},
        )

    def _show_redaction(self, document: Document, redacted: Outcome, tally: Tally) -> None:
        """Make examples of what was replaced, out of the text after redaction."""
        key = tallies.key_of(document.id)
        kinds = [kind for kind in redacted.changes if tallies.wanted(tally, kind, key)]
        if not kinds or redacted.text is None or self._steps.redactor is None:
            return
        for finding in self._steps.redactor.find(document.text):
            kind = f"redact/{finding.kind}"
            if kind in kinds:
                kinds.remove(kind)
                before = self._steps.redact(_with_text(document, document.text[: finding.start]))
                start = max(0, len(before.text or "") - _CONTEXT_CHARS)
                tallies.add_example(
                    tally,
                    kind,
                    key=key,
                    id=document.id,
                    source=document.source,
                    evidence=finding.masked,
                    excerpt=redacted.text[start : start + 3 * _CONTEXT_CHARS],
                )


def _with_text(document: Document, text: str) -> Document:
    return dataclasses.replace(document, text=text)


def _document(row: dict[str, Any], text: str) -> Document:
    return Document(
        id=row["id"],
        text=text,
        source=row["source"],
        license=row["license"],
        classification=row["classification"],
        language=row["language"],
    )


def _first_outcome(row: dict[str, Any]) -> Outcome:
    """What the first pass did; its changes are counted already."""
    return Outcome(text=row["text"], reason=row["reason"], evidence=row["evidence"])


class _PartWriter:
    """Writes the pieces of a part and counts."""

    def __init__(self, target: Path, *, source: str) -> None:
        self._source = source
        self._pieces = {name: LinesWriter(target / f"{name}.jsonl.zst") for name in PIECES}
        self._documents = LinesWriter(target / "documents.jsonl.zst")
        self.signed: list[bool] = []
        self.tally: Tally = {}

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        for name, piece in self._pieces.items():
            piece.__exit__()
            tallies.count(self.tally, "pieces", name, "rows", by=piece.num_rows)
            tallies.count(self.tally, "pieces", name, "bytes", by=piece.num_bytes)
        self._documents.__exit__()

    def write(self, row: dict[str, Any], outcome: Outcome, *, split: Splitter) -> None:
        hashed, piece = None, "dropped"
        if outcome.text is not None:
            hashed = content_hash(outcome.text.encode())
            piece = split(row["name"], own_id=row["own_id"])
        place = self._pieces[piece].num_rows
        self._pieces[piece].write(_line(row, outcome, hashed))
        changes = {**row["changes"], **outcome.changes}
        self._documents.write(
            {
                "id": row["id"],
                "source": row["source"],
                "license": row["license"],
                "classification": row["classification"],
                "language": row["language"],
                "raw_hash": row["raw_hash"],
                "hash": hashed,
                "status": piece,
                "reason": outcome.reason,
                "changes": json.dumps(changes, sort_keys=True) if changes else None,
                "row": place,
            }
        )
        self._count(row, outcome, piece)

    def _count(self, row: dict[str, Any], outcome: Outcome, piece: str) -> None:
        tally, source = self.tally, self._source
        if row["id"] != row["name"]:
            tallies.count(tally, "renamed", source)
        for kind, times in outcome.changes.items():
            tallies.count(tally, "changes", kind, "times", by=times)
            tallies.count(tally, "changes", kind, "documents")
        if outcome.text is not None:
            num_characters = len(outcome.text)
            tallies.count(tally, piece, source, "documents")
            tallies.count(tally, piece, source, "characters", by=num_characters)
            tallies.count(tally, "languages", source, row["language"] or "und")
            tallies.count(tally, "lengths", source, str(num_characters.bit_length()))
        elif row["text"] is not None:  # else the first pass has counted it
            assert outcome.reason is not None, "a step drops a document without a reason"
            tallies.count(tally, "dropped", source, outcome.reason)
            key = tallies.key_of(row["id"])
            if tallies.wanted(tally, outcome.reason, key):
                tallies.add_example(
                    tally,
                    outcome.reason,
                    key=key,
                    id=row["id"],
                    source=source,
                    evidence=outcome.evidence,
                    excerpt=row["text"][: tallies.EXCERPT_CHARS],
                )


def _line(row: dict[str, Any], outcome: Outcome, hashed: str | None) -> dict[str, Any]:
    if outcome.text is None:
        return {
            "id": row["id"],
            "source": row["source"],
            "reason": outcome.reason,
            "evidence": outcome.evidence,
        }
    return {
        "id": row["id"],
        "text": outcome.text,
        "source": row["source"],
        "license": row["license"],
        "classification": row["classification"],
        "hash": hashed,
        "language": row["language"],
    }
