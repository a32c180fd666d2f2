"""Bits per byte before and after an extension, from the records of two training runs.

A loss per token depends on how a tokenizer cuts text, so losses before and after an extension say
nothing of each other. Bits per byte of the same held-out text do: the bits a model needs for a
text, divided by the text's bytes.
"""

import json
import math
from pathlib import Path
from typing import Any

from megatron_cgn.errors import DataError

_PREFIX, _SUFFIX = "val/", "/bits_per_byte"


def carried_over(before: Path, after: Path) -> list[dict[str, Any]]:
    """Set two runs side by side.

    Args:
        before: Figures with the old vocabulary: see `read_bits_per_byte`.
        after: Figures with the new one.

    Returns:
        A row for each source that both have: ``source``, ``before`` (the last figure of the first
        run), ``first`` and ``after`` (the first and the last of the second run).

    Raises:
        DataError: If a file is missing or damaged, or there is no common source.
    """
    old, new = read_bits_per_byte(before), read_bits_per_byte(after)
    common = [source for source in old if source in new]
    if not common:
        raise DataError(
            f"{before} and {after}: no held-out source in common ({', '.join(old)}; "
            f"{', '.join(new)}). Validate both runs on the same texts, under the same names."
        )
    return [
        {
            "source": source,
            "before": old[source][-1],
            "first": new[source][0],
            "after": new[source][-1],
        }
        for source in common
    ]


def read_bits_per_byte(path: Path) -> dict[str, list[float]]:
    """Read held-out bits per byte.

    Args:
        path: ``metrics.jsonl`` of a run, with ``val/<source>/bits_per_byte`` on some steps; or a
            JSON file with an object of such names, or of sources, and one figure each.

    Returns:
        Figures by source, in the order of the steps.

    Raises:
        DataError: If the file cannot be read or holds none.
    """
    found: dict[str, list[float]] = {}
    for record in _records(path):
        for name, value in record.items():
            is_full = name.startswith(_PREFIX) and name.endswith(_SUFFIX)
            if not is_full and path.suffix == ".jsonl":
                continue
            # A score that was no number is null in the file.
            if isinstance(value, int | float) and math.isfinite(value):
                source = name.removeprefix(_PREFIX).removesuffix(_SUFFIX) if is_full else name
                found.setdefault(source, []).append(float(value))
    if not found:
        raise DataError(
            f"{path}: holds no bits per byte. Give the metrics.jsonl of a run that was validated "
            "(val/<source>/bits_per_byte), or a JSON object with a figure for each source."
        )
    return found


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Check the path.") from error
    records: list[Any] = []
    parts = text.splitlines() if path.suffix == ".jsonl" else [text]
    for number, part in enumerate(parts, start=1):
        try:
            records.append(json.loads(part))
        except ValueError as error:
            if number == len(parts) > 1:
                break  # a last line that was cut short when the run was killed
            raise DataError(f"{path}, line {number}: not valid JSON ({error}).") from error
    return [record for record in records if isinstance(record, dict)]
