"""How often the optimizer has updated which rows: what a checkpoint keeps of it.

Adam corrects its moments by the number of updates, which differs where some parameters or rows
were frozen for a time, or did not exist yet. Without a record everything has as many updates as
``checkpoint.json`` counts. The engine's `param_groups.py` writes and reads these records; here one
is changed with the checkpoint that it belongs to.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

KEY = "group_steps"
"""Where the record is in a checkpoint's common state: a list of ``{"steps": n, "rows": [[layer,
name, first row, row behind the last], ...]}``."""
END = sys.maxsize
"""Row behind the last, whatever the padding of the vocabulary."""

_COMMON = "common.pt"


def count_new_rows_from_zero(
    directory: Path, names: Iterable[str], *, first_new: int, optimizer_steps: int
) -> None:
    """Record that some rows have never been updated; those before keep their numbers.

    Padding is counted with the new rows, since both are trained in one group.

    Args:
        directory: An unpublished ``torch_dist`` directory, whose record is written anew.
        names: Parameters outside the layers, as Megatron names them.
        first_new: First row without an update.
        optimizer_steps: Updates of the others, if there is no record of them.
    """
    common = torch.load(directory / _COMMON, map_location="cpu", weights_only=False)
    common[KEY] = _with_new_rows(
        common.get(KEY), list(names), first_new=first_new, optimizer_steps=optimizer_steps
    )
    torch.save(common, directory / _COMMON)


def _with_new_rows(
    record: Sequence[dict[str, Any]] | None,
    names: Sequence[str],
    *,
    first_new: int,
    optimizer_steps: int,
) -> list[dict[str, Any]]:
    if record is None:
        before = [[None, name, 0, END] for name in names]
        record = [{"steps": optimizer_steps, "rows": before}]
    result = []
    for entry in record:
        cut = [
            [layer, name, start, min(stop, first_new) if name in names else stop]
            for layer, name, start, stop in entry["rows"]
        ]
        result.append({**entry, "rows": [row for row in cut if row[2] < row[3]]})
    return [*result, {"steps": 0, "rows": [[None, name, first_new, END] for name in names]}]
