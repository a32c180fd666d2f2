"""Preference data: what a run reads of answers that are compared, or are good or bad.

A *record* is a prompt with its answers: a pair, a ranking, or one answer with a label. All its
answers share a sequence, so ``data.seq_length`` is the places of a whole record. Order, shares,
epochs and what is held out are those of instruction tuning (``sft.py``), with records in the place
of conversations; a record is as long as its answers together.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist

from megatron_cgn.config.schema import RunConfig
from megatron_cgn.data.collective import on_first_rank, together
from megatron_cgn.data.packed_plan import PackedData, PackedPlan, make_plan
from megatron_cgn.data.preference_formats import Kind
from megatron_cgn.data.preference_rows import (
    PreferenceRow,
    Preferences,
    PreferenceSequences,
    ReadPreferences,
)
from megatron_cgn.data.preference_selection import RecordSelection, select_records
from megatron_cgn.data.preference_store import (
    Comparisons,
    PreferenceStore,
    build_preferences,
    count,
    open_preferences,
)
from megatron_cgn.data.sft_files import OpenedFile
from megatron_cgn.data.sft_packs import open_packs
from megatron_cgn.data.sft_selection import Reading
from megatron_cgn.data.sft_sources import open_files
from megatron_cgn.data.store_folder import Report
from megatron_cgn.errors import DataError
from tokenizer.chat import ChatTemplate
from tokenizer.wrapper import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceFile:
    """A file of preference data."""

    path: str
    """Where it was."""
    folder: Path
    """Its records, encoded."""
    source: int
    """Place of its source."""
    store_key: str
    """Stands for its records, the tokenizer and the chat template."""
    first_answer: int
    """Number of its first answer over all files of the run."""
    num_answers: int
    """Answers that it holds, those of records that are left out among them."""
    training: Comparisons
    """What is trained on, once."""
    held_out: Comparisons
    """What is not."""
    repeated: int
    """Answers of its rankings that were left out, being given twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePlan(PackedPlan):
    """What a run of preference learning will read."""

    kind: Kind
    """Whether answers are compared or have labels."""
    files: tuple[PreferenceFile, ...]
    """All files, in the order in which their answers are numbered."""

    unit: ClassVar[str] = "records"
    """What is packed, for messages and accounts."""
    void: ClassVar[str] = "with an answer of which no token counts, or answers read alike"
    """What is said of those that are left out for having nothing to learn."""

    @property
    def num_answers(self) -> int:
        """Answers of all files, numbered through."""
        return sum(file.num_answers for file in self.files)

    @property
    def has_margins(self) -> bool:
        """Whether any record that is trained on says by how much one answer is better."""
        return self.training.margins > 0

    @property
    def training(self) -> Comparisons:
        """What is trained on, once."""
        return sum((file.training for file in self.files), Comparisons())

    def settings(self) -> dict[str, Any]:
        """What decides how records are read, under the names of the configuration."""
        # Not `super()`, which a dataclass with slots does not have.
        return {**PackedPlan.settings(self), "read to the last token": self.reading.whole}

    def facts(self) -> dict[str, Any]:
        """What is compared, for the account."""
        held_out = sum((file.held_out for file in self.files), Comparisons())
        return {
            "kind": self.kind,
            "training": dataclasses.asdict(self.training),
            "held_out": dataclasses.asdict(held_out),
            "repeated_answers_left_out": sum(file.repeated for file in self.files),
        }

    def remarks(self) -> Iterator[str]:
        """Say in lines of text what is compared."""
        found = self.training
        if self.kind == "unpaired":
            bad = found.answers - found.desirable
            yield f"{found.desirable:,} good answers, {bad:,} bad ones"
            if not bad or not found.desirable:
                which = "good" if found.desirable else "bad"
                yield f"warning: all answers are {which}: there is nothing to tell them apart from"
            return
        yield (
            f"{found.answers:,} answers in {found.records:,} records: {found.pairs:,} pairs"
            + (f", {found.ties:,} more of equal rank are not compared" if found.ties else "")
            + (f"; {found.margins:,} records have a margin" if found.margins else "")
        )
        if repeated := sum(file.repeated for file in self.files):
            yield f"{repeated:,} answers that rankings give twice are read once"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceData(PackedData[PreferenceRow]):
    """What a run of preference learning reads."""

    plan: PreferencePlan
    """What was planned."""
    records: Preferences
    """The records of all files, and their answers."""

    @property
    def kind(self) -> Kind:
        """Whether answers are compared or have labels."""
        return self.plan.kind


def plan_preference(
    run: RunConfig,
    *,
    chat: ChatTemplate,
    tokenizer: Tokenizer,
    cache: Path,
    whole: bool = False,
    report: Report | None = None,
    group: dist.ProcessGroup | None = None,
) -> PreferencePlan:
    """Encode the answers and plan what the run reads of them.

    Collective over ``group`` where torch.distributed is up; every rank must call, and gets the
    same plan: see `sft.plan_sft`.

    Args:
        run: The validated configuration. ``loss.type=kto`` reads answers with labels, every other
            loss answers that are compared.
        chat: Encodes prompts and answers.
        tokenizer: The model's tokenizer.
        cache: Directory that every rank sees.
        whole: Whether answers are read to their very last token, at which a reward is; else to
            the one in front of the last that counts, which predicts it.
        report: Told of the progress, on the first rank.
        group: The ranks that call, global rank 0 among them; None for all.

    Returns:
        The plan.

    Raises:
        ConfigError: If settings contradict each other.
        DataError: If a file is unusable, has faulty records, of which the first are named, or is
            of the other kind than the loss.
    """
    reading = dataclasses.replace(Reading.of(run), whole=whole)
    kind: Kind = "unpaired" if run.loss.type == "kto" else "pairs"

    def open_file(path: str) -> tuple[PreferenceStore, RecordSelection]:
        folder = build_preferences(path, chat=chat, tokenizer=tokenizer, cache=cache, report=report)
        store = open_preferences(folder)
        _check_kind(path, store, kind, run)
        return store, select_records(store, reading)

    def plan() -> PreferencePlan:
        files = open_files(run.data, reading, open_file)
        numbered = Preferences(
            [ReadPreferences(f.store, f.selection, f.source) for f in files], reading, kind=kind
        )
        return make_plan(
            PreferencePlan,
            run,
            reading=reading,
            opened=files,
            numbered=numbered,
            cache=cache,
            kind=kind,
            files=_describe(files, numbered),
        )

    return on_first_rank(plan, group)


def build_preference_data(
    plan: PreferencePlan, *, group: dist.ProcessGroup | None = None
) -> PreferenceData:
    """Open what was planned. Collective over ``group`` where torch.distributed is up.

    Takes 21 bytes of memory an answer and 17 a record; tokens are mapped.

    Args:
        plan: Equal on all ranks.
        group: The ranks that call; None for all.

    Returns:
        The data.

    Raises:
        DataError: If the cache cannot be read.
    """
    return together(lambda: _open(plan), group)


def _check_kind(path: str, store: PreferenceStore, kind: Kind, run: RunConfig) -> None:
    if store.kind == kind:
        return
    if kind == "unpaired":
        raise DataError(
            f"{path}: holds answers to compare, and loss.type=kto learns from single answers with "
            "a label. Give files of prompt, completion and label, or choose another loss.type."
        )
    raise DataError(
        f"{path}: holds single answers with a label, and loss.type={run.loss.type or 'sigmoid'} "
        "learns from answers that are compared. Choose loss.type=kto with +stage=dpo, or give "
        "files of prompt, chosen and rejected."
    )


def _describe(
    files: list[OpenedFile[PreferenceStore, RecordSelection]], numbered: Preferences
) -> tuple[PreferenceFile, ...]:
    """What is known of the files once they are divided."""
    return tuple(
        PreferenceFile(
            path=file.config.path,
            folder=file.store.folder,
            source=file.source,
            store_key=file.store.key,
            first_answer=first,
            num_answers=len(file.store.answers),
            training=count(file.store, file.training),
            held_out=count(file.store, file.held_out),
            repeated=file.store.repeated,
        )
        for file, first in zip(files, numbered.answers.bases.tolist(), strict=False)
    )


def _open(plan: PreferencePlan) -> PreferenceData:
    files = []
    for file in plan.files:
        store = open_preferences(file.folder)
        files.append(ReadPreferences(store, select_records(store, plan.reading), file.source))
    records = Preferences(files, plan.reading, kind=plan.kind)
    return PreferenceData(
        train=PreferenceSequences(
            records, open_packs(plan.packs), multiple_of=plan.global_batch_size
        ),
        validation={
            name: PreferenceSequences(records, open_packs(folder), multiple_of=1)
            for name, folder in plan.held_out.items()
        },
        plan=plan,
        records=records,
    )
