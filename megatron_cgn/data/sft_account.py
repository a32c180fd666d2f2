"""How much of every source of conversations a run reads, or has read, and whether it may go on."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_cgn.data.account import aligned
from megatron_cgn.data.packed_plan import PackedData, PackedPlan
from megatron_cgn.data.sft_files import SftFile
from megatron_cgn.data.sft_selection import Tally
from megatron_cgn.data.sft_sources import SftSource

ACCOUNT_FILE = "sft.json"
"""Name of the account, in a run's directory as planned and in a checkpoint as consumed."""
FORMAT = 1
"""Version of the record."""
_MUCH = 0.05
"""Share of a file's conversations whose loss is a warning."""


def account_of(data: PackedData[Any], *, consumed: int | None = None) -> dict[str, Any]:
    """Account for the beginning of a run, or for all of it.

    All figures are counted, not estimated. ``tokens`` are places in rows, of which
    ``counted_tokens`` have a label that counts.

    Args:
        data: What the run reads.
        consumed: Sequences read so far; None for all that are planned.

    Returns:
        JSON: in all, and by source and file.
    """
    plan = data.plan
    sequences = plan.sequences if consumed is None else min(consumed, plan.sequences)
    tallies = plan.planned if consumed is None else data.consumed(sequences)
    total = sum(tallies, Tally())
    return {
        "format": FORMAT,
        "sequences": sequences,
        "planned_sequences": plan.sequences,
        **_amount(total, plan.unit),
        "utilisation": total.tokens / max(1, sequences * plan.reading.seq_length),
        "settings": plan.settings(),
        **plan.facts(),
        "sources": [_of_source(s, drawn, plan) for s, drawn in _by_source(plan.sources, tallies)],
    }


def describe(plan: PackedPlan) -> Iterator[str]:
    """Say in lines of text what a run will read.

    Args:
        plan: The plan.

    Yields:
        A table, a line a source; how full sequences are; what was left out or truncated; and
        warnings of questions that are asked on both sides and of sources without held-out ones.
    """
    rows: list[tuple[str, ...]] = [
        ("source", "share", plan.unit, "tokens", "counted", "epochs", "held out")
    ]
    total = sum(plan.planned, Tally())
    for source, drawn in _by_source(plan.sources, plan.planned):
        read = sum(drawn, Tally())
        rows.append(
            (
                source.name,
                f"{read.tokens / total.tokens:.1%}",
                f"{read.conversations:,}",
                f"{read.tokens:,}",
                f"{read.counted:,}",
                f"{_epochs(read, source.training):.2f}",
                f"{source.held_out.conversations:,}",
            )
        )
    yield "\n".join(aligned(rows))
    yield (
        f"{plan.sequences:,} sequences of at most {plan.reading.seq_length:,} tokens, "
        f"{plan.utilisation:.1%} full: {plan.total_steps:,} steps of {plan.global_batch_size:,}"
        + ("" if plan.packing else f" (one {plan.unit.removesuffix('s')} each: data.packing=false)")
    )
    yield from plan.remarks()
    for source in plan.sources:
        yield from _left_out(source, plan)
    unseen = [s.name for s in plan.sources if not s.held_out.conversations]
    if unseen:
        yield (
            f"warning: nothing is held out of {', '.join(map(repr, unseen))}: nobody will see what "
            "is learned or forgotten of it. Give a validation_path, or set "
            "data.validation_fraction."
        )


class SftHistory(dict[str, Any]):
    """A plan as a checkpoint records it, with a rule for what may change.

    A run may become longer or shorter. What it reads, and in which order, may not change.
    """

    def __init__(self, plan: PackedPlan, *, encoding: str = "") -> None:
        """Record a plan.

        Args:
            plan: The plan.
            encoding: Stands for tokenizer and template, which a checkpoint tells of by themselves:
                where they differ, all that is read does, and need not be told of too.
        """
        self._unit = plan.unit
        super().__init__(
            encoding=encoding,
            order=plan.order_key,
            sequences=plan.sequences,
            global_batch_size=plan.global_batch_size,
            settings=plan.settings(),
            sources=[
                {
                    "name": source.name,
                    "files": [_content(file) for file in source.files],
                    "held_out": [_content(file) for file in source.all_files],
                }
                for source in sorted(plan.sources, key=lambda source: source.name)
            ],
        )

    def conflict(self, written: object, *, consumed_sequences: int) -> str | None:
        """Compare with a checkpoint's record.

        Args:
            written: The record in the checkpoint.
            consumed_sequences: What the checkpoint has consumed.

        Returns:
            What differs and what to do, or None if this plan begins as the other did.
        """
        try:
            assert isinstance(written, Mapping)
            if written["global_batch_size"] != self["global_batch_size"]:
                return None  # told by a field of its own
            if written["encoding"] != self["encoding"]:
                return None  # likewise
            found = [
                *_length(written, self, consumed_sequences),
                *_changes(written, self, self._unit),
            ]
            if not found and written["order"] != self["order"]:
                found = ["files have other weights, or another version made the order; restore it"]
        except (AssertionError, KeyError, TypeError, AttributeError):
            return f"the checkpoint does not say which {self._unit} it read; start anew from it"
        return "; ".join(found) or None


def _length(before: Mapping[str, Any], now: Mapping[str, Any], consumed: int) -> Iterator[str]:
    batch = now["global_batch_size"]
    steps = -(-now["sequences"] // batch)
    if consumed > steps * batch:
        yield (
            f"the checkpoint has done {consumed // batch:,} steps and this run has only {steps:,}; "
            "raise train.train_iters or train.epochs"
        )
    elif before["sequences"] < min(consumed, now["sequences"]):
        blank = min(consumed, now["sequences"]) - before["sequences"]
        yield (
            f"the checkpoint is the end of a run whose last step was filled with blank sequences, "
            f"in the place of {blank:,} that this longer run would read: they would be skipped. "
            "Start a new run from it: give it as model.hf_path"
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], unit: str) -> Iterator[str]:
    """Say what changed of what is read."""
    for name, value in now["settings"].items():
        if before["settings"].get(name) != value:
            yield f"{name} was {before['settings'].get(name)!r} and is {value!r}; restore it"
    old = {source["name"]: source for source in before["sources"]}
    new = {source["name"]: source for source in now["sources"]}
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield f"the source {name!r} is gone; restore it"
        elif name not in old:
            yield f"the source {name!r} is new; train on it in another run, from this checkpoint"
        elif _keys(old[name]["files"]) != _keys(new[name]["files"]):
            yield (
                f"the {unit} of the source {name!r} have changed; restore its files, and "
                "train on new ones in another run, from this checkpoint"
            )
        elif _keys(old[name]["held_out"]) != _keys(new[name]["held_out"]):
            yield (
                f"the source {name!r} has other held-out {unit}, with which its scores "
                "could not be compared; restore them"
            )
        elif old[name] != new[name]:
            yield f"the source {name!r} is divided or read in another way; restore its settings"


def _keys(files: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted(file["content"] for file in files)


def _content(file: SftFile) -> dict[str, Any]:
    return {
        "content": file.folder.name,
        "training": dataclasses.asdict(file.training),
        "held_out": dataclasses.asdict(file.held_out),
    }


def _by_source(
    sources: Sequence[SftSource], tallies: Sequence[Tally]
) -> Iterator[tuple[SftSource, list[Tally]]]:
    """Each source with what is read of its files, the one held out whole left out."""
    begin = 0
    for source in sources:
        yield source, list(tallies[begin : begin + len(source.files)])
        begin += len(source.all_files)


def _of_source(source: SftSource, drawn: Sequence[Tally], plan: PackedPlan) -> dict[str, Any]:
    read = sum(drawn, Tally())
    share = None if plan.shares is None else float(plan.shares.get(source.name, 0))
    files = [
        {
            **_of_file(file, plan.unit),
            **_amount(tally, plan.unit),
            "epochs": _epochs(tally, file.training),
        }
        for file, tally in zip(source.files, drawn, strict=True)
    ]
    return {
        "name": source.name,
        **({} if share is None else {"share": share}),
        **_amount(read, plan.unit),
        "epochs": _epochs(read, source.training),
        "training": _amount(source.training, plan.unit),
        "held_out": _amount(source.held_out, plan.unit),
        "files": files,
        **(
            {}
            if source.validation is None
            else {"validation": _of_file(source.validation, plan.unit)}
        ),
    }


def _of_file(file: SftFile, unit: str) -> dict[str, Any]:
    return {
        "path": file.path,
        "content": file.folder.name,
        "records": file.records,
        "truncated": file.truncated,
        "left_out_too_long": file.too_long,
        "left_out_nothing_counted": file.nothing_counted,
        "training": _amount(file.training, unit),
        "held_out": _amount(file.held_out, unit),
        "held_out_questions_trained_on": file.known_questions,
    }


def _amount(tally: Tally, unit: str) -> dict[str, int]:
    return {
        unit: tally.conversations,
        "tokens": tally.tokens,
        "counted_tokens": tally.counted,
    }


def _epochs(read: Tally, epoch: Tally) -> float:
    return read.tokens / max(1, epoch.tokens)


def _left_out(source: SftSource, plan: PackedPlan) -> Iterator[str]:
    """Say what is read of a source in part or not at all."""
    for file in source.all_files:
        what = []
        if file.too_long:
            what.append(f"{file.too_long:,} left out, longer than data.seq_length")
        if file.truncated:
            what.append(f"{file.truncated:,} truncated (chat.truncation={plan.reading.truncation})")
        if file.nothing_counted:
            what.append(f"{file.nothing_counted:,} left out, {plan.void}")
        if what:
            much = file.too_long + file.nothing_counted > _MUCH * file.records
            yield (
                f"{'warning: ' if much else ''}{file.path}: of {file.records:,} {plan.unit} "
                f"{', '.join(what)}"
            )
        if file.known_questions:
            yield (
                f"warning: {file.path}: {file.known_questions:,} of "
                f"{file.held_out.conversations:,} held-out {plan.unit} ask what is also trained "
                "on: their loss says little about new questions"
            )
