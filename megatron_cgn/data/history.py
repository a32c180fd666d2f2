"""Whether a run may go on from a checkpoint: what was consumed must be how the new plan begins."""

import itertools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from megatron_cgn.data.blend import Blend, BlendSource, Phase


class BlendHistory(dict[str, Any]):
    """A plan as a checkpoint records it: the plan's JSON, with a rule for what may change.

    What is still to come may change: phases appended or altered, sources added, a longer or
    shorter run. What has been consumed may not.
    """

    def __init__(self, blend: Blend) -> None:
        """Record a plan."""
        super().__init__(blend.to_record())
        self._blend = blend

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
            before = Blend.from_record(written)
        except (AssertionError, KeyError, TypeError, ValueError):
            return "the checkpoint does not say which sequences it consumed; start anew from it"
        if before.global_batch_size != self._blend.global_batch_size:
            return None  # told by a field of its own
        differences = [
            *_length(before, self._blend, consumed_sequences),
            *_shares(before, self._blend, consumed_sequences),
            *_files(before, self._blend, consumed_sequences),
        ]
        return "; ".join(differences) or None


def _length(before: Blend, now: Blend, consumed: int) -> list[str]:
    if now.sequences >= consumed:
        return []
    batch = now.global_batch_size
    return [
        f"the checkpoint has done {consumed // batch:,} steps and this run has only "
        f"{now.sequences // batch:,}; raise train.train_iters or train.epochs"
    ]


def _shares(before: Blend, now: Blend, consumed: int) -> list[str]:
    """Compare the phases, as far as both have them."""
    reached = min(consumed, now.sequences)
    old, new = before.clip(reached), now.clip(reached)
    if old == new:
        return []
    batch = now.global_batch_size
    return [
        f"the checkpoint read {_steps(old, batch)}; this run would have read {_steps(new, batch)}. "
        + _remedy(before.clip(consumed), batch)
    ]


def _remedy(consumed: tuple[Phase, ...], batch: int) -> str:
    if consumed[0].stop == batch:
        return (
            "A phase cannot end at step 1 (until=1 is the whole run), so keep the old plan, or "
            "start anew in another output_dir"
        )
    kept = ", ".join(f"{{until: {phase.stop // batch}, mix: {_mix(phase)}}}" for phase in consumed)
    return (
        "To change the mix from here on, keep what was consumed as the first phase(s): "
        f"data.phases=[{kept}, {{mix: …}}]"
    )


def _steps(phases: tuple[Phase, ...], batch: int) -> str:
    return ", then ".join(
        f"{_mix(p)} in steps {p.start // batch + 1:,} to {p.stop // batch:,}" for p in phases
    )


def _mix(phase: Phase) -> str:
    """A mix as a setting that gives exactly these shares."""
    shares = phase.shares
    if not all(Fraction(str(float(share))) == share for share in shares.values()):
        scale = math.lcm(*(share.denominator for share in shares.values()))
        shares = {name: share * scale for name, share in shares.items()}
        return "{" + ", ".join(f"{name}: {share}" for name, share in shares.items()) + "}"
    return "{" + ", ".join(f"{name}: {float(share)}" for name, share in shares.items()) + "}"


def _files(before: Blend, now: Blend, consumed: int) -> list[str]:
    """Compare the documents of every source that has been read."""
    read = {name for phase in before.clip(consumed) for name in phase.shares}
    sources = {source.name: source for source in now.sources}
    found = []
    for old in before.sources:
        if old.name not in read:
            continue
        new = sources.get(old.name)
        if new is None:
            found.append(f"the source {old.name!r} is gone, of which it has read; restore it")
        elif _content(old) != _content(new):
            found.append(f"the source {old.name!r} {_difference(old, new)}")
        elif old.held_out and old.held_out != new.held_out:
            found.append(
                f"the source {old.name!r} has other held-out documents, with which its scores "
                "could not be compared; restore them"
            )
    return found


def _content(source: BlendSource) -> list[tuple[str, Fraction]]:
    return [(file.identity, file.weight) for file in source.files]


def _difference(old: BlendSource, new: BlendSource) -> str:
    for a, b in itertools.zip_longest(old.files, new.files):
        if a is not None and b is not None and a.digest == b.digest and a.identity != b.identity:
            return (
                f"trains on other documents of {b.path}: the checkpoint on {a.start:,} to "
                f"{a.stop - 1:,}, this run on {b.start:,} to {b.stop - 1:,}; restore "
                "data.validation_fraction"
            )
        if a is None or b is None or a.identity != b.identity:
            had = "one file less" if a is None else f"{a.path} of {a.tokens:,} tokens, {a.identity}"
            has = "one file less" if b is None else f"{b.path} of {b.tokens:,} tokens, {b.identity}"
            return (
                f"has changed: the checkpoint read {had}; now it is {has}. Restore it, and add new "
                "documents as a source of their own in a new phase"
            )
    return "has other weights for its files; restore them"
