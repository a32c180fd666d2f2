"""SIGKILL of any rank at any moment loses no completed checkpoint.

A run of two ranks saves after every step and keeps three. Its ranks are killed again and again,
at moments drawn from a seed; some are aimed at a save, as told by the directory being written.
After every kill all that has a checkpoint's name must be whole, what was complete just before
must still be there, and the same command must go on from the newest.
"""

import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tiny_files import TinyFiles
from train_runs import Run, Zygote, checkpoints, overrides, records, wait_for

from megatron_cgn.engine.checkpoint import read_info

KEEP = 3
STEPS = 4000
"""More than any of these tests lives to see."""


@dataclass
class Tally:
    """What the kills hit."""

    kills: int = 0
    during_save: int = 0
    steps: list[int] = field(default_factory=list)
    """The newest checkpoint after each kill."""


def _names(output: Path) -> list[str]:
    """Completed checkpoints, oldest first."""
    return [n for n in checkpoints(output) if n.startswith("step_") and n[5:].isdigit()]


def _writing(output: Path) -> bool:
    """Whether a checkpoint is being written or deleted."""
    return any(name.endswith(".partial") for name in checkpoints(output))


def _check(output: Path, before: list[str]) -> int:
    """Hold the checkpoints after a kill against those before it; the newest one's step."""
    names = _names(output)
    for name in names:
        info = read_info(output / "checkpoints" / name)
        assert f"step_{info.step:07d}" == name
    # Those that the newer ones have pushed out may be gone; no other.
    assert set(before[-KEEP:]) & set(names) >= set(sorted({*before, *names})[-KEEP:]) & set(before)
    assert len(names) >= min(KEEP, len(before))
    latest = output / "checkpoints" / "latest"
    # The link is moved right after the rename; a kill in between leaves it on the one before.
    assert os.readlink(latest) in names[-2:] and (latest / "checkpoint.json").is_file()
    return int(names[-1][5:])


def _aim(draw: random.Random, run: Run, output: Path) -> None:
    """Wait for the moment of the next kill: any, or while a checkpoint is written."""
    if draw.random() < 0.5:
        time.sleep(draw.uniform(0.0, 0.3))
        return
    wait_for(lambda: _writing(output), run)
    time.sleep(draw.uniform(0.0, 0.02))


def _kill_and_go_on(
    tiny: TinyFiles, zygote: Zygote, output: Path, *, kills: int, seed: int
) -> Tally:
    draw = random.Random(seed)
    tally = Tally()
    errors = output.with_suffix(".stderr")
    layouts = (
        "parallel.tensor_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=2",
        "parallel.distributed_optimizer=true",
    )
    settings = (
        f"train.train_iters={STEPS}",
        "train.validation_interval_steps=null",
        "train.validation_sequences=2",
        "checkpoint.interval_steps=1",
        f"checkpoint.keep_last={KEEP}",
    )
    newest = 0
    for number in range(kills):
        arguments = overrides(tiny, output, *settings, layouts[number % len(layouts)])
        run = zygote.start(arguments, stderr=errors, ranks=2)
        wait_for(
            lambda goal=newest + KEEP: bool(_names(output)) and int(_names(output)[-1][5:]) >= goal,
            run,
        )
        if number:
            assert f"resumed from {output / 'checkpoints' / f'step_{newest:07d}'}" in run.text()
        _aim(draw, run, output)
        before, victim = _names(output), draw.choice(run.pids)
        os.kill(victim, signal.SIGKILL)
        tally.during_save += _writing(output)
        tally.kills += 1
        # The other rank notices by itself: its connection is gone.
        ended = run.wait(timeout_s=120)
        assert -signal.SIGKILL in ended.codes and 0 not in ended.codes
        newest = _check(output, before)
        tally.steps.append(newest)
    _finish(tiny, zygote, output, settings, newest)
    return tally


def _finish(
    tiny: TinyFiles, zygote: Zygote, output: Path, settings: tuple[str, ...], newest: int
) -> None:
    """Go on once more, stop on request, and see that every step was recorded exactly once."""
    run = zygote.start(
        overrides(tiny, output, *settings), stderr=output.with_suffix(".stderr"), ranks=2
    )
    wait_for(lambda: _names(output)[-1] > f"step_{newest + 2:07d}", run)
    os.kill(run.pids[0], signal.SIGTERM)
    assert run.wait().codes == [75, 75]
    losses: list[dict[str, Any]] = [r for r in records(output) if "loss" in r]
    assert [r["step"] for r in losses] == list(range(1, len(losses) + 1))
    assert _names(output)[-1] == f"step_{len(losses):07d}"
    assert not _writing(output)


def test_three_kills(tiny: TinyFiles, zygote: Zygote, tmp_path: Path) -> None:
    tally = _kill_and_go_on(tiny, zygote, tmp_path / "run", kills=3, seed=11)
    assert tally.kills == 3


@pytest.mark.soak
def test_twenty_kills(tiny: TinyFiles, zygote: Zygote, tmp_path: Path) -> None:
    begin = time.monotonic()
    tally = _kill_and_go_on(tiny, zygote, tmp_path / "run", kills=20, seed=12)
    print(
        f"{tally.kills} kills, {tally.during_save} during a save, newest checkpoints {tally.steps},"
        f" {time.monotonic() - begin:.0f} s"
    )
    assert tally.kills == 20
    assert tally.during_save >= 5
