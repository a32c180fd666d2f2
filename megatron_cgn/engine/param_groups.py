"""Groups of parameters and rows that are trained at a rate or at a time of their own.

How they are read from ``optim.param_groups`` is `group_selection.py`'s, and what the optimizer
does with them `grouped_optimizer.py`'s.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cgn.config.schema import OptimConfig

END = sys.maxsize
"""Row behind the last, whatever the padding of the vocabulary."""

Key = tuple[int | None, str]
"""A parameter: layer and name, as in `Parameter`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters that are trained alike.

    Attributes:
        name: From the configuration; empty for what no group of it has.
        rows: First row and row behind the last, of each parameter in it.
        lr_mult: Learning rate as a multiple of ``optim.lr``.
        weight_decay: Of its matrices; None for ``optim.weight_decay``.
        frozen_until: The last step that leaves it as it is.
        trained_until: The last step that trains it; None for the run's last.
    """

    name: str
    rows: Mapping[Key, tuple[int, int]]
    lr_mult: float = 1.0
    weight_decay: float | None = None
    frozen_until: int = 0
    trained_until: int | None = None

    def trains(self, step: int) -> bool:
        """Whether the step of this number, counted from 1, trains it."""
        return self.frozen_until < step and (
            self.trained_until is None or step <= self.trained_until
        )

    @property
    def differs(self) -> bool:
        """Whether its learning rate is ever another than the run's."""
        return self.lr_mult != 1.0 or self.frozen_until > 0 or self.trained_until is not None


@dataclass(frozen=True, slots=True)
class Grouping:
    """Every parameter of a model by group.

    Attributes:
        groups: Those of the configuration, and one without a name if they leave anything.
    """

    groups: tuple[Group, ...]

    def of(self, key: Key) -> list[tuple[Group, int, int]]:
        """The groups that a parameter's rows are in: group, first row, row behind the last."""
        found = [(group, *group.rows[key]) for group in self.groups if key in group.rows]
        return sorted(found, key=lambda part: part[1])

    def record(self, steps: Mapping[str, int]) -> list[dict[str, Any]]:
        """What a checkpoint keeps: how often each group was updated, and what it is."""
        return [
            {"steps": steps[group.name], "rows": [[*k, *v] for k, v in group.rows.items()]}
            for group in self.groups
        ]

    def restored_steps(
        self, record: Sequence[Mapping[str, Any]] | None, optimizer_steps: int
    ) -> dict[str, int]:
        """How often each group was updated before a checkpoint.

        Exact where the groups hold the same parameters as then. Otherwise the largest number of
        any parameter in it: Adam then corrects its moments too little rather than too much.

        Args:
            record: From `record`, or None if the checkpoint was written without groups.
            optimizer_steps: Updates of what the record does not know.

        Returns:
            Updates by group name.
        """
        known: dict[Key, list[tuple[int, int, int]]] = {}
        for entry in record or ():
            for layer, name, start, stop in entry["rows"]:
                known.setdefault((layer, name), []).append((start, stop, entry["steps"]))
        steps = {}
        for group in self.groups:
            counts = [
                count
                for key, (start, stop) in group.rows.items()
                for low, high, count in known.get(key, [(0, END, optimizer_steps)])
                if start < high and low < stop
            ]
            steps[group.name] = max(counts, default=optimizer_steps)
        return steps

    def describe(self, *, lr: float, weight_decay: float) -> Iterator[str]:
        """Say what each group is, a line for each.

        Args:
            lr: ``optim.lr``.
            weight_decay: ``optim.weight_decay``.

        Yields:
            Lines.
        """
        for group in self.groups:
            decay = weight_decay if group.weight_decay is None else group.weight_decay
            what = [
                f"{len(group.rows):,} parameter(s){_some_rows(group)}",
                f"peak learning rate {lr * group.lr_mult:g}",
                f"weight decay {decay:g}",
            ]
            if group.frozen_until:
                what.append(f"frozen until step {group.frozen_until:,}")
            if group.trained_until == 0:
                what.append("never trained")
            elif group.trained_until is not None:
                what.append(f"trained until step {group.trained_until:,}")
            yield f"group {group.name or 'of all else'}: {', '.join(what)}"


def _some_rows(group: Group) -> str:
    """Which rows, where a group has only some of a parameter's."""
    spans = [span for span in group.rows.values() if span != (0, END)]
    rows = " and ".join(
        f"rows from {low:,} on" if high == END else f"rows {low:,} to {high - 1:,}"
        for low, high in sorted(set(spans))
    )
    some = f" of {len(spans):,} of them" if 0 < len(spans) < len(group.rows) else ""
    return f" ({rows}{some})" if rows else ""


def with_new_rows(
    record: Sequence[Mapping[str, Any]] | None, new_rows: Mapping[str, int], optimizer_steps: int
) -> Sequence[Mapping[str, Any]] | None:
    """Add to a checkpoint's record that some rows did not exist when it was made.

    Padding is counted with the new rows, since both are in one group.

    Args:
        record: From `Grouping.record`, or None.
        new_rows: First row without an update, by parameter outside the layers.
        optimizer_steps: Updates of the rows before, if there is no record of them.

    Returns:
        A record, or None if there is nothing to add to none.
    """
    if not new_rows:
        return record
    if record is None:
        before = [[None, name, 0, END] for name in new_rows]
        record = [{"steps": optimizer_steps, "rows": before}]
    result: list[Mapping[str, Any]] = []
    for entry in record:
        cut = [
            [layer, name, start, min(stop, new_rows.get(name, END))]
            for layer, name, start, stop in entry["rows"]
        ]
        result.append({**entry, "rows": [row for row in cut if row[2] < row[3]]})
    return [*result, {"steps": 0, "rows": [[None, *item, END] for item in new_rows.items()]}]


def uncorrected_moments(
    record: Sequence[Mapping[str, Any]] | None,
    grouping: Grouping | None,
    steps: Mapping[str, int],
    *,
    optim: OptimConfig,
) -> str | None:
    """Find what Adam counts updates for though it never had one.

    Its moments are zero and taken for those of many updates, so that its first update is larger or
    smaller than it should be.

    Args:
        record: From a checkpoint, or None.
        grouping: The run's groups, or None.
        steps: Updates by group that the run counts from; by the empty name without groups.
        optim: Adam's settings.

    Returns:
        What to tell the user, if there is anything.
    """
    everything = [(Group(name="", rows={}), 0, END)]
    counted: list[tuple[int, str, int]] = []
    for entry in record or ():
        for layer, name, start, stop in entry["rows"] if entry["steps"] == 0 else ():
            parts = everything if grouping is None else grouping.of((layer, name))
            counts = [steps[g.name] for g, low, high in parts if low < stop and start < high]
            if any(counts):
                counted.append((max(counts), name, start))
    if not counted:
        return None
    count, name, start = max(counted, key=lambda found: found[0])
    mean = (1 - optim.adam_beta1) / (1 - optim.adam_beta1 ** (count + 1))
    square = (1 - optim.adam_beta2) / (1 - optim.adam_beta2 ** (count + 1))
    return (
        f"{len(counted)} parameter(s), e.g. {name} from row {start:,} on, have never been updated, "
        f"but Adam counts {count:,} updates for them: the first will be {mean / square**0.5:.2f} "
        "of the learning rate instead of 1. Give them a group of their own in optim.param_groups, "
        "such as one with rows: new."
    )
