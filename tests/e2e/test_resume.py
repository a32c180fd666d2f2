"""A run that is killed or stopped and goes on gives every figure of the run that was not.

Losses, gradient norms, rates and held-out scores are compared as the exact numbers that
``metrics.jsonl`` holds; only speeds are left out. 24 steps read the source ``domain`` 1.9 times,
so an epoch ends on the way.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_files import TinyFiles
from train_runs import Run, Zygote, checkpoints, overrides, records, wait_for

STEPS = 24
LONG = (f"train.train_iters={STEPS}", "train.validation_interval_steps=5")
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "one-worker": (1, ("data.num_workers=1",)),
    "dp2-worker-bf16": (2, ("data.num_workers=1", "precision=bf16")),
    "tp2-sp": (2, ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")),
    "pp2-interleaved": (
        2,
        (
            "parallel.pipeline_model_parallel_size=2",
            "parallel.virtual_pipeline_model_parallel_size=2",
        ),
    ),
}


def _steps_done(output: Path) -> int:
    """The last step that ``metrics.jsonl`` has a loss of."""
    path = output / "metrics.jsonl"
    if not path.is_file():
        return 0
    lines = path.read_text("utf-8").splitlines()
    return max([0, *(int(line.split(":")[1].split(",")[0]) for line in lines if '"loss"' in line)])


def _kill(run: Run, rank: int = 0) -> None:
    os.kill(run.pids[rank], signal.SIGKILL)
    run.wait(timeout_s=60)


@pytest.fixture(scope="module")
def unbroken(
    tiny: TinyFiles, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Records of the uninterrupted run of every case."""
    result = {}
    for name, (ranks, more) in CASES.items():
        output = tmp_path_factory.mktemp(name)
        ended = zygote.run(
            overrides(tiny, output, *LONG, *more, "checkpoint.interval_steps=null"),
            stderr=output / "stderr",
            ranks=ranks,
        )
        assert ended.codes == [0] * ranks, ended.stderr
        result[name] = records(output)
    return result


@pytest.mark.parametrize("name", CASES)
def test_killed_twice_it_goes_on_bit_for_bit(
    tiny: TinyFiles,
    zygote: Zygote,
    unbroken: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
    name: str,
) -> None:
    ranks, more = CASES[name]
    arguments = overrides(tiny, tmp_path, *LONG, *more, "checkpoint.interval_steps=4")
    for step in (6, 15):  # in the first epoch and in the second, neither just after a checkpoint
        run = zygote.start(arguments, stderr=tmp_path / "stderr", ranks=ranks)
        wait_for(lambda step=step: _steps_done(tmp_path) >= step, run)
        _kill(run, rank=ranks - 1)
    ended = zygote.run(arguments, stderr=tmp_path / "stderr", ranks=ranks)
    assert ended.codes == [0] * ranks, ended.stderr
    assert "resumed from" in ended.stderr
    assert records(tmp_path) == unbroken[name]


@pytest.mark.parametrize("name", ["one-worker", "dp2-worker-bf16"])
def test_sigterm_to_every_process_saves_and_goes_on_bit_for_bit(
    tiny: TinyFiles,
    zygote: Zygote,
    unbroken: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
    name: str,
) -> None:
    """Slurm signals loader processes too; they must not end before the run has."""
    ranks, more = CASES[name]
    arguments = overrides(tiny, tmp_path, *LONG, *more, "checkpoint.interval_steps=null")
    run = zygote.start(arguments, stderr=tmp_path / "stderr", ranks=ranks)
    wait_for(lambda: _steps_done(tmp_path) >= 7, run)
    for pid in run.pids:
        os.killpg(pid, signal.SIGTERM)
    ended = run.wait()
    assert ended.codes == [75] * ranks, ended.stderr
    assert ended.stderr.count("stopped by a signal") == 1
    assert "Traceback" not in ended.stderr
    done = _steps_done(tmp_path)
    assert checkpoints(tmp_path) == ["latest", f"step_{done:07d}"]
    ended = zygote.run(arguments, stderr=tmp_path / "stderr", ranks=ranks)
    assert ended.codes == [0] * ranks, ended.stderr
    assert records(tmp_path) == unbroken[name]


def test_sigterm_to_one_rank_during_validation(
    tiny: TinyFiles,
    zygote: Zygote,
    unbroken: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    """All ranks stop after the step whose validation the signal interrupts, and it is complete."""
    ranks, more = CASES["tp2-sp"]
    arguments = overrides(tiny, tmp_path, *LONG, *more, "checkpoint.interval_steps=null")
    run = zygote.start(arguments, stderr=tmp_path / "stderr", ranks=ranks)

    def last() -> dict[str, Any]:
        return records(tmp_path)[-1] if (tmp_path / "metrics.jsonl").is_file() else {}

    wait_for(lambda: _steps_done(tmp_path) >= 10, run)
    os.kill(run.pids[1], signal.SIGTERM)
    interrupted = last()
    ended = run.wait()
    assert ended.codes == [75, 75], ended.stderr
    # Validation of step 10 had not been recorded when the signal had been delivered.
    assert (interrupted["step"], "loss" in interrupted) == (10, True)
    assert checkpoints(tmp_path) == ["latest", "step_0000010"]
    assert "val/domain/loss" in last() and last()["step"] == 10
    ended = zygote.run(arguments, stderr=tmp_path / "stderr", ranks=ranks)
    assert ended.codes == [0, 0], ended.stderr
    assert records(tmp_path) == unbroken["tp2-sp"]


def test_another_layout_goes_on_within_the_tolerance(
    tiny: TinyFiles,
    zygote: Zygote,
    unbroken: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    """From one process to two pipeline stages; 1e-4 relative over the 14 steps that are left."""
    _, more = CASES["one"]
    arguments = overrides(tiny, tmp_path, *LONG, "checkpoint.interval_steps=10")
    run = zygote.start(arguments, stderr=tmp_path / "stderr")
    wait_for(lambda: _steps_done(tmp_path) >= 12, run)
    _kill(run)
    more = ("parallel.pipeline_model_parallel_size=2",)
    ended = zygote.run([*arguments, *more], stderr=tmp_path / "stderr", ranks=2)
    assert ended.codes == [0, 0], ended.stderr
    assert "another layout" in ended.stderr
    for found, expected in zip(records(tmp_path), unbroken["one"], strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-4), (expected["step"], key)


def test_keep_last_latest_and_the_modes_of_resuming(
    tiny: TinyFiles, zygote: Zygote, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    arguments = overrides(tiny, output, "checkpoint.keep_last=2", "checkpoint.interval_steps=3")
    ended = zygote.run([*arguments, "checkpoint.resume=required"], stderr=tmp_path / "stderr")
    assert ended.codes == [2] and "no complete checkpoint" in ended.stderr
    assert checkpoints(output) == [] and not (output / "metrics.jsonl").exists()

    ended = zygote.run([*arguments, "checkpoint.resume=never"], stderr=tmp_path / "stderr")
    assert ended.codes == [0], ended.stderr
    assert checkpoints(output) == ["latest", "step_0000006", "step_0000008"]
    assert os.readlink(output / "checkpoints" / "latest") == "step_0000008"

    before = _snapshot(output)
    for more in (
        ["checkpoint.resume=never"],
        ["seed=7", "data.seq_length=16"],  # does not fit
    ):
        ended = zygote.run([*arguments, *more], stderr=tmp_path / "stderr")
        assert ended.codes == [2], ended.stderr
        after = {k: v for k, v in _snapshot(output).items() if not k.startswith("cache")}
        assert after == {k: v for k, v in before.items() if not k.startswith("cache")}
    for text in (
        "seed: checkpoint 1234, this run 7",
        "data.seq_length: checkpoint 32, this run 16",
    ):
        assert text in ended.stderr

    found = records(output)
    ended = zygote.run([*arguments, "checkpoint.resume=required"], stderr=tmp_path / "stderr")
    assert ended.codes == [0], ended.stderr
    assert records(output) == found


def _snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file() and "tensorboard" not in p.parts
    }


def test_torchrun_passes_the_signal_on(tiny: TinyFiles, tmp_path: Path) -> None:
    """The command as users type it, and SIGTERM to torchrun alone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"]
    arguments = overrides(
        tiny, tmp_path, *LONG, "train.train_iters=400", "parallel.tensor_model_parallel_size=2"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).resolve().parents[2]
    with (tmp_path / "stderr").open("w") as errors:
        started = subprocess.Popen([*command, *arguments], stderr=errors, cwd=root, env=environment)
        deadline = time.monotonic() + 240
        while _steps_done(tmp_path) < 3:
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        started.send_signal(signal.SIGTERM)
        started.wait(timeout=120)
    text = (tmp_path / "stderr").read_text("utf-8")
    done = _steps_done(tmp_path)
    assert f"stopped by a signal after step {done}" in text, text
    assert f"step_{done:07d}" in checkpoints(tmp_path)
    assert not [name for name in checkpoints(tmp_path) if name.endswith(".partial")]
