"""How much of every source a run reads, or has read: exact counts, as JSON and as a table."""

import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_cgn.data.blend import Blend, BlendFile

ACCOUNT_FILE = "blend.json"
"""Name of the account, in a run's directory as planned and in a checkpoint as consumed."""
MANY_EPOCHS = 4
"""Passes beyond which repeated data teaches little more than none: Muennighoff et al. 2023,
https://arxiv.org/abs/2305.16264."""
_MOST_FILE_ROWS = 20


def account_of(blend: Blend, *, consumed: int | None = None) -> dict[str, Any]:
    """Account for the beginning of a run, or for all of it.

    ``sequences`` and ``tokens`` are exact: counted, not estimated. ``tokens`` are labels, each
    predicted once.

    Args:
        blend: The plan.
        consumed: Sequences read so far; None for all that are planned.

    Returns:
        JSON: in all, by source and file, and the same of every phase that has begun; and the
        plan itself, from which `consumed.py` finds the documents.
    """
    total = blend.sequences if consumed is None else consumed
    return {
        **_amount(blend, total),
        "planned_sequences": blend.sequences,
        "sources": _by_source(blend, 0, total, shares=None),
        "phases": [
            {
                "first_step": phase.start // blend.global_batch_size + 1,
                "last_step": -(-phase.stop // blend.global_batch_size),
                **_amount(blend, phase.stop - phase.start),
                "sources": _by_source(blend, phase.start, phase.stop, shares=phase.shares),
            }
            for phase in blend.clip(total)
        ],
        "plan": blend.to_record(),
    }


def write_account(path: Path, account: Mapping[str, Any]) -> None:
    """Write an account; the file appears only when it is whole.

    Raises:
        OSError: If it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            json.dump(account, stream, ensure_ascii=False, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def describe(blend: Blend) -> Iterator[str]:
    """Say in lines of text what a run will read.

    Args:
        blend: The plan.

    Yields:
        A table, one line a source or file and phase; then a warning a source that is repeated
        too often, and one of sources of which nothing is held out.
    """
    account = account_of(blend)
    yield "\n".join(aligned(_rows(blend, account)))
    for source in account["sources"]:
        yield from _repeated(source)
    unseen = [s["name"] for s in account["sources"] if s["sequences"] and not s["held_out_tokens"]]
    if unseen:
        yield (
            f"warning: nothing is held out of {', '.join(map(repr, unseen))}: nobody will see what "
            "is learned or forgotten of it. Give a validation_path, or set "
            "data.validation_fraction."
        )


def _repeated(source: Mapping[str, Any]) -> Iterator[str]:
    """Warn of a source that is read too often, or else of its files that are."""
    advice = (
        f"beyond about {MANY_EPOCHS} passes repeated text teaches little. Give it more documents "
        "or a smaller share."
    )
    if source["epochs"] > MANY_EPOCHS:
        times = f"{source['epochs']:.1f} times"
        yield f"warning: the source {source['name']!r} is read {times}; {advice}"
        return
    files = [file for file in source["files"] if file["epochs"] > MANY_EPOCHS]
    if files:
        most = max(files, key=lambda file: file["epochs"])
        others = f", and {len(files) - 1:,} other file(s) too often" if files[1:] else ""
        yield (
            f"warning: {most['path']} of the source {source['name']!r} is read "
            f"{most['epochs']:.1f} times{others}; {advice}"
        )


def _rows(blend: Blend, account: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table: phases, all phases together, and what is only held out."""
    rows: list[tuple[str, ...]] = [("mix", "share", "sequences", "tokens", "epochs", "held out")]
    held_out = {source.name: f"{source.held_out_tokens:,}" for source in blend.sources}
    phases = account["phases"]
    for number, phase in enumerate(phases, 1):
        if len(phases) > 1:
            rows.append(_heading(f"phase {number}", phase["first_step"], phase["last_step"]))
        for source in phase["sources"]:
            rows.append((source["name"], *_cells(source), held_out[source["name"]]))
            rows += _file_rows(source["files"])
    if len(phases) > 1:
        rows.append(_heading("all phases", 1, phases[-1]["last_step"]))
    trained = {name for phase in blend.phases for name in phase.shares}
    for source in account["sources"]:
        if len(phases) > 1 or source["name"] not in trained:
            share = source["sequences"] / blend.sequences
            cells = _cells({**source, "share": share})
            rows.append((source["name"], *cells, held_out[source["name"]]))
    return rows


def _file_rows(files: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A line a file, unless there is but one or they would fill the screen."""
    if len(files) > _MOST_FILE_ROWS:
        return [(f"  {len(files):,} files: see {ACCOUNT_FILE}", *[""] * 5)]
    return [(f"  {file['path']}", *_cells(file), "") for file in files if len(files) > 1]


def _heading(text: str, first_step: int, last_step: int) -> tuple[str, ...]:
    return (f"{text}: steps {first_step:,}-{last_step:,}", *[""] * 5)


def _by_source(
    blend: Blend, start: int, stop: int, *, shares: Mapping[str, Fraction] | None
) -> list[dict[str, Any]]:
    drawn = blend.drawn(start, stop)
    result = []
    for place, source in enumerate(blend.sources):
        if shares is not None and source.name not in shares:
            continue
        sequences = [drawn[place, f] for f in range(len(source.files))]
        share = None if shares is None else shares[source.name]
        result.append(
            {
                "name": source.name,
                **_share(share),
                **_drawn(blend, sum(sequences), source.tokens),
                "files": [
                    _of_file(blend, file, number, share)
                    for file, number in zip(source.files, sequences, strict=True)
                ],
                **({"held_out_tokens": source.held_out_tokens} if shares is None else {}),
            }
        )
    return result


def _of_file(blend: Blend, file: BlendFile, number: int, share: Fraction | None) -> dict[str, Any]:
    return {
        "path": file.path,
        "identity": file.identity,
        "documents": file.stop - file.start,
        "tokens_per_epoch": file.tokens,
        **_share(None if share is None else share * file.weight),
        **_drawn(blend, number, file.tokens),
    }


def _share(share: Fraction | None) -> dict[str, float]:
    return {} if share is None else {"share": float(share)}


def _amount(blend: Blend, sequences: int) -> dict[str, int]:
    return {"sequences": sequences, "tokens": sequences * blend.seq_length}


def _drawn(blend: Blend, sequences: int, epoch: int) -> dict[str, int | float]:
    """An amount, also in epochs of so many tokens; those of nothing are 0."""
    amount = _amount(blend, sequences)
    return {**amount, "epochs": amount["tokens"] / max(1, epoch)}


def _cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return (
        f"{row['share']:.1%}",
        f"{row['sequences']:,}",
        f"{row['tokens']:,}",
        f"{row['epochs']:.2f}",
    )


def aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Lines of a table: names to the left, figures to the right."""
    widths = [max(map(text_width, column)) for column in zip(*rows, strict=True)]
    for first, *figures in rows:
        left = first + " " * (widths[0] - text_width(first))
        right = [text.rjust(width) for text, width in zip(figures, widths[1:], strict=True)]
        yield "  ".join([left, *right]).rstrip()


def text_width(text: str) -> int:
    """Columns that a text takes on a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
