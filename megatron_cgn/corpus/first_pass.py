"""The first pass: a part of the raw input becomes clean, signed documents.

Each part gives a directory of its own::

    documents.jsonl.zst   every document in order: the clean text, or why it is dropped
    ids.npy               uint64 [documents, 2]: hashes of the id, and of id and text
    kept.npy              uint32 [kept]: places of the documents that go on
    names.npy, ends.npy   their ids: see ``names.py``
    signatures/           what deduplication needs to know of them
    tally.json            counts and examples; the latter hold raw text
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cgn.config.corpus import CorpusConfig
from megatron_cgn.corpus import tally as tallies
from megatron_cgn.corpus.document import Document, Outcome
from megatron_cgn.corpus.formats.isolated import FileReader
from megatron_cgn.corpus.names import save_names
from megatron_cgn.corpus.parts import Part
from megatron_cgn.corpus.records import BAD, Raw, parse_part
from megatron_cgn.corpus.sources import Source
from megatron_cgn.corpus.steps import Steps
from megatron_cgn.corpus.tally import Tally
from megatron_cgn.corpus.work import LinesWriter, Work, write_json
from megatron_cgn.data.lineage import content_hash

STAGE = "read"


class FirstPass:
    """Parses, cleans and signs parts."""

    def __init__(self, settings: CorpusConfig, sources: Sequence[Source], root: Path) -> None:
        """Load what the steps need.

        Args:
            settings: Of all steps.
            sources: All sources.
            root: The work directory.
        """
        self._field = settings.read.field
        self._sources = sources
        self._work = Work(root)
        self._read = FileReader(max_parse_s=settings.read.max_parse_s)
        self._steps = Steps(settings)

    def __call__(self, part: Part) -> None:
        """Process a part; see the module's text for what it leaves."""
        with self._work.writing(STAGE, part.index) as target:
            texts: list[str] = []
            marks = _Marks()
            tally: Tally = {}
            with LinesWriter(target / "documents.jsonl.zst") as writer:
                for raw in self._parse(part):
                    row = self._row(raw, self._sources[part.source].name, tally)
                    writer.write(row)
                    marks.add(row)
                    if row["text"] is not None:
                        texts.append(row["text"])
            marks.save(target)
            self._steps.sign(texts, target / "signatures")
            write_json(target / "tally.json", tally)

    def _parse(self, part: Part) -> Iterator[Raw]:
        return parse_part(part, sources=self._sources, field=self._field, read=self._read)

    def _row(self, raw: Raw, source: str, tally: Tally) -> dict[str, Any]:
        outcome = self._outcome(raw)
        row = {
            "id": raw.id,
            "own_id": raw.own_id,
            "source": raw.source,
            "license": raw.license,
            "classification": raw.classification,
            "raw_hash": None if raw.text is None else content_hash(raw.text.encode()),
            "language": outcome.language,
            "text": outcome.text,
            "reason": outcome.reason,
            "evidence": outcome.evidence,
            "changes": dict(outcome.changes),
        }
        _count(tally, raw, outcome, source)
        return row

    def _outcome(self, raw: Raw) -> Outcome:
        if raw.text is None:
            return Outcome(text=None, reason=raw.reason, evidence=raw.evidence)
        document = Document(
            id=raw.id,
            text=raw.text,
            source=raw.source,
            license=raw.license,
            classification=raw.classification,
        )
        outcome = self._steps.clean(document)
        if not raw.repaired:
            return outcome
        changes = {**outcome.changes, "read/lone_surrogates": 1}
        return Outcome(
            text=outcome.text,
            reason=outcome.reason,
            evidence=outcome.evidence,
            language=outcome.language,
            changes=changes,
        )


def _count(tally: Tally, raw: Raw, outcome: Outcome, source: str) -> None:
    tallies.count(tally, "documents", source)
    tallies.count(tally, "characters", source, by=len(raw.text or ""))
    if outcome.reason in BAD:
        tallies.count(tally, "bad")
    for kind, times in outcome.changes.items():
        tallies.count(tally, "changes", kind, "times", by=times)
        tallies.count(tally, "changes", kind, "documents")
    if outcome.text is None:
        assert outcome.reason is not None, "a step drops a document without a reason"
        tallies.count(tally, "dropped", source, outcome.reason)
        key = tallies.key_of(raw.id)
        if tallies.wanted(tally, outcome.reason, key):
            tallies.add_example(
                tally,
                outcome.reason,
                key=key,
                id=raw.id,
                source=source,
                evidence=outcome.evidence,
                excerpt=(raw.text or raw.excerpt)[: tallies.EXCERPT_CHARS],
            )


class _Marks:
    """What the decisions need to know of a part's documents."""

    def __init__(self) -> None:
        self._ids: list[bytes] = []
        self._kept: list[int] = []
        self._names: list[bytes] = []

    def add(self, row: dict[str, Any]) -> None:
        name = row["id"].encode()
        content = (row["raw_hash"] or "").encode()
        self._ids.append(_hash8(name) + _hash8(name + b"\0" + content))
        if row["text"] is not None:
            self._kept.append(len(self._ids) - 1)
            self._names.append(name)

    def save(self, target: Path) -> None:
        ids = np.frombuffer(b"".join(self._ids), dtype="<u8").reshape(-1, 2)
        np.save(target / "ids.npy", ids)
        np.save(target / "kept.npy", np.array(self._kept, dtype=np.uint32))
        save_names(target, self._names)


def _hash8(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()
