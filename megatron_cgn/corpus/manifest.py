"""``manifest.json``: what a corpus was made from, how, and what it holds.

Nothing in it depends on when, where or by how many workers it was made: the same input gives the
same bytes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_cgn.corpus.shards import Written
from megatron_cgn.corpus.sources import Inputs, Source
from megatron_cgn.corpus.tally import Tally

FORMAT = 1


def make_manifest(
    *,
    plan: dict[str, Any],
    sources: Sequence[Source],
    inputs: Inputs,
    digests: Sequence[str],
    tally: Tally,
    files: Sequence[Written],
) -> dict[str, Any]:
    """Describe a corpus.

    Args:
        plan: What was to be done.
        sources: All sources.
        inputs: All files read.
        digests: Their digests, in order.
        tally: Counts of both passes.
        files: What was written.

    Returns:
        Plain JSON.
    """
    return {
        "format": FORMAT,
        "versions": plan["versions"],
        "settings": plan["settings"],
        "files_of_settings": plan["files"],
        "sources": [
            {
                "name": source.name,
                "license": source.license,
                "classification": source.classification,
                "skipped": inputs.skipped.get(source.name, {}),
                "inputs": [
                    {"name": file.name, "bytes": file.size_bytes, "digest": digest}
                    for file, digest in zip(inputs.files, digests, strict=True)
                    if file.source == place
                ],
            }
            for place, source in enumerate(sources)
        ],
        "counts": counts(tally),
        "files": [
            {
                "name": file.name,
                "documents": file.num_rows,
                "bytes": file.num_bytes,
                "digest": file.digest,
            }
            for file in files
        ],
    }


def counts(tally: Tally) -> dict[str, Any]:
    """The numbers of a tally, in an order of their own."""
    names = (
        *("documents", "characters", "dropped", "renamed", "train", "validation"),
        *("languages", "lengths", "changes"),
    )
    numbers = {name: _sorted(tally.get(name, {})) for name in names}
    return numbers | {"crowded": tally["crowded"]}


def one_sided(manifest: dict[str, Any]) -> Iterator[str]:
    """Say which sources have nothing to validate on, or nothing to train on.

    Args:
        manifest: What is in ``manifest.json``.

    Yields:
        A sentence a source, with the remedy.
    """
    split = manifest["settings"]["split"]
    fraction, group_by = split["validation_fraction"], split["group_by"]
    for name in (source["name"] for source in manifest["sources"]):
        train, held_out = (
            manifest["counts"][piece].get(name, {}).get("documents", 0)
            for piece in ("train", "validation")
        )
        if train and not held_out and fraction:
            yield (
                f"{name}: nothing is held out: of its {train:,} documents none falls below "
                f"split.validation_fraction={fraction}. Raise that to validate on it"
                + (
                    f", or see which documents split.group_by={group_by!r} joins."
                    if group_by
                    else "."
                )
            )
        elif held_out and not train:
            yield (
                f"{name}: nothing is left to train on: all of its {held_out:,} documents are held "
                f"out. Lower split.validation_fraction={fraction}, or see which documents "
                f"split.group_by={group_by!r} joins."
            )


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return value
