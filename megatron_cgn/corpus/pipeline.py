"""Raw documents to a corpus, in three passes over parts; resumable at any moment.

1. Every part by itself: parse, clean, sign (``first_pass.py``).
2. All documents at once, by their hashes: which are duplicates (``decisions.py``).
3. Every part by itself: redact, decontaminate, split (``second_pass.py``).

Then the pieces are joined to shards, and moved into place all at once. Each result is a file or
directory that appears whole, so a kill costs what was under way and nothing else; and none depends
on how many processes make them.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_cgn.config.corpus import CorpusConfig
from megatron_cgn.corpus import decisions, first_pass, second_pass
from megatron_cgn.corpus import tally as tallies
from megatron_cgn.corpus.decisions import Decisions
from megatron_cgn.corpus.first_pass import FirstPass
from megatron_cgn.corpus.kept import write_kept
from megatron_cgn.corpus.manifest import make_manifest
from megatron_cgn.corpus.parts import Part, describe, read_parts
from megatron_cgn.corpus.place import claimed
from megatron_cgn.corpus.plan import (
    check_prior_place,
    describe_plan,
    is_published,
    open_work,
    publish,
)
from megatron_cgn.corpus.records import COLUMNS
from megatron_cgn.corpus.report import write_report
from megatron_cgn.corpus.second_pass import PIECES, SecondPass
from megatron_cgn.corpus.shards import ShardWriter, Written, plan_shards, write_documents
from megatron_cgn.corpus.sources import Inputs, Source, digest, find_inputs
from megatron_cgn.corpus.steps import Steps
from megatron_cgn.corpus.tally import Tally
from megatron_cgn.corpus.threshold import check_bad
from megatron_cgn.corpus.work import Work, read_json, sync, write_json
from megatron_cgn.data.lineage import file_digest
from megatron_cgn.data.pool import map_in_order
from megatron_cgn.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_cgn.corpus.decontaminate import EvaluationFile

Progress = Callable[[str, int, int], None]
"""Called with the name of a pass, what has been done of it since the last call, and the total."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything a run knows from its start."""

    sources: tuple[Source, ...]
    """In order of priority."""
    inputs: Inputs
    """Their files."""
    settings: CorpusConfig
    """Of all steps."""
    plan: dict[str, Any]
    """What is to be done, as it is remembered."""
    output: Path
    """The output directory."""
    work: Work
    """The work directory."""
    evaluation_files: "tuple[EvaluationFile, ...]"
    """What became of each evaluation file."""
    workers: int
    """Processes."""
    progress: Progress
    """Told what has been done."""


def prepare_corpus(
    sources: Sequence[Source],
    *,
    output: str | Path,
    settings: CorpusConfig,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress = lambda name, done, total: None,
) -> dict[str, Any]:
    """Make a corpus, or go on making it where an earlier run was interrupted.

    Args:
        sources: In order of priority: of equal documents that of an earlier source is kept.
        output: Directory to write.
        settings: Of all steps.
        workers: Processes; the output does not depend on it.
        overwrite: Replace a corpus that is there.
        progress: Told what has been done.

    Returns:
        What is in ``manifest.json``.

    Raises:
        ConfigError: If a setting is wrong.
        DataError: If an input or the output is unusable, or too much of the input is bad. What was
            done stays done: the next run with the same inputs and settings goes on.
    """
    if faults := list(settings.faults()):
        raise ConfigError("\n".join(faults))
    steps = Steps(settings)
    steps.build()
    steps.check_prior()
    output = Path(output)
    check_prior_place(output, settings)
    inputs = find_inputs(sources, output=output)
    plan = describe_plan(settings, sources, inputs, steps=steps)
    with claimed(output):
        work = open_work(output, plan, overwrite=overwrite)
        job = Job(
            sources=tuple(sources),
            inputs=inputs,
            settings=settings,
            plan=plan,
            output=output,
            work=work,
            evaluation_files=steps.evaluation_files,
            workers=workers,
            progress=progress,
        )
        if not is_published(output, work):
            _run(job)
        work.discard()
        manifest: dict[str, Any] = read_json(output / "manifest.json")
        return manifest


def _run(job: Job) -> None:
    digests = _digest_inputs(job)
    num_parts, names = _first_pass(job)
    if not job.work.done(decisions.STAGE):
        job.progress("comparing", 0, 1)
        decisions.decide(job.work, num_parts=num_parts, settings=job.settings)
        job.progress("comparing", 1, 1)
    _second_pass(job, names)
    _assemble(job, names, digests)
    publish(job.output, job.work)


def _digest_inputs(job: Job) -> list[str]:
    """Digests of all inputs: what exactly was read, for the manifest."""
    path = job.work.path("digests.json")
    if not path.exists():
        with ThreadPoolExecutor(job.workers) as threads:  # hashing lets other threads run
            found = threads.map(digest, [file.path for file in job.inputs.files])
            digests = []
            for file, value in zip(job.inputs.files, found, strict=True):
                digests.append(value)
                job.progress("hashing", file.size_bytes, job.inputs.total_bytes)
        write_json(path, digests)
    known: list[str] = read_json(path)
    return known


def _first_pass(job: Job) -> tuple[int, tuple[str, ...]]:
    """Returns the number of parts, and the name of each part's source."""
    finished = job.work.path("parts.json")
    if not finished.exists():
        sources: list[int] = []
        done = _Done(job)
        make = partial(FirstPass, job.settings, job.sources, job.work.root)
        tasks = _parts_to_do(job, sources)
        for _ in map_in_order(make, tasks, workers=job.workers, describe=describe):
            done.check()
        done.check(final=True)
        if not done.num_documents:
            given = ", ".join(path for source in job.sources for path in source.paths)
            raise DataError(f"{given}: no documents: nothing but empty files. Check the paths.")
        _check_unchanged(job.inputs)
        write_json(finished, sources)
    names = tuple(job.sources[place].name for place in read_json(finished))
    return len(names), names


def _parts_to_do(job: Job, sources: list[int]) -> Iterator[Part]:
    columns = (job.settings.read.field, *COLUMNS)
    part_bytes = int(job.settings.read.part_mib * 2**20)
    for part in read_parts(job.inputs.files, columns=columns, part_bytes=part_bytes):
        sources.append(part.source)
        job.progress("reading", part.progress_bytes, job.inputs.total_bytes)
        if not job.work.done(first_pass.STAGE, part.index):
            yield part


class _Done:
    """Adds up the tallies of the first pass in the order of the parts, and stops a bad run.

    In order, so that whether a run stops does not depend on the number of workers.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._next = 0
        self._tally: Tally = {}

    @property
    def num_documents(self) -> int:
        """Lines and files so far."""
        return sum(self._tally.get("documents", {}).values())

    def check(self, *, final: bool = False) -> None:
        while self._job.work.done(first_pass.STAGE, self._next):
            folder = self._job.work.path(first_pass.STAGE, self._next)
            tallies.add(self._tally, read_json(folder / "tally.json"))
            self._next += 1
            check_bad(self._tally, limit=self._job.settings.read.max_bad, final=False)
        if final:
            check_bad(self._tally, limit=self._job.settings.read.max_bad, final=True)


def _check_unchanged(inputs: Inputs) -> None:
    """What was read is what the digests are of."""
    for file in inputs.files:
        about = Path(file.path).stat()
        if (about.st_size, about.st_mtime_ns) != (file.size_bytes, file.modified_ns):
            raise DataError(
                f"{file.path}: was changed while it was read. Run the same command again when "
                "nobody writes to it."
            )


def _second_pass(job: Job, names: tuple[str, ...]) -> None:
    make = partial(SecondPass, job.settings, names, job.work.root)
    left = [part for part in range(len(names)) if not job.work.done(second_pass.STAGE, part)]
    if not left:
        return
    job.progress("writing", len(names) - len(left), len(names))
    for _ in map_in_order(make, left, workers=job.workers):
        job.progress("writing", 1, len(names))


def _assemble(job: Job, names: Sequence[str], digests: Sequence[str]) -> None:
    """Make the output beside its place."""
    num_parts = len(names)
    out = job.work.path("out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    shards = []
    for piece in PIECES:
        (out / piece).mkdir(mode=0o700 if piece == "dropped" else 0o777)
        shards += plan_shards(
            job.work,
            stage=second_pass.STAGE,
            piece=piece,
            sources=names,
            suffix="jsonl.zst" if piece == "dropped" else job.settings.write.format,
            shard_bytes=job.settings.write.shard_mib << 20,
        )
    files = []
    for written in map_in_order(partial(ShardWriter, out), shards, workers=job.workers):
        files.append(written)
        job.progress("joining", 1, len(shards))
    table = out / "documents.parquet"
    write_documents(table, job.work, stage=second_pass.STAGE, num_parts=num_parts, shards=shards)
    sync(table)
    files.append(_written(out, table))
    write_kept(out / "signatures", job.work, num_parts=num_parts, settings=job.settings)
    tally = _total(job.work, num_parts)
    manifest = make_manifest(
        plan=job.plan,
        sources=job.sources,
        inputs=job.inputs,
        digests=digests,
        tally=tally,
        files=files,
    )
    write_report(
        out / "report.html",
        manifest=manifest,
        tally=tally,
        clusters=Decisions(job.work, prior=job.settings.deduplicate.prior).clusters(),
        redact=job.settings.redact,
        evaluation_files=job.evaluation_files,
    )
    write_json(out / "manifest.json", manifest)


def _written(out: Path, path: Path) -> Written:
    import pyarrow.parquet as pq

    return Written(
        name=path.name,
        num_rows=pq.read_metadata(path).num_rows,
        num_bytes=path.stat().st_size,
        digest=file_digest(path),
    )


def _total(work: Work, num_parts: int) -> Tally:
    total: Tally = read_json(work.path(decisions.STAGE) / "tally.json")
    for stage in (first_pass.STAGE, second_pass.STAGE):
        for part in range(num_parts):
            tallies.add(total, read_json(work.path(stage, part) / "tally.json"))
    return total
