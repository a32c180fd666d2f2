"""Duels: two contestants, each a process of its own, take steps in turn.

What the machine does meanwhile touches both alike, and only two are in memory at a time. What a
contestant does is in `contestant.py` and in the script that the benchmark names.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from contestant import MARK, Settings
from hardware import RESULTS

BEGAN = time.perf_counter()
ROOT = Path(__file__).parents[1]
DEMO = ROOT / ".cache/smollm2-135m-instruct"
OURS = "ours"
Step = dict[str, float]
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
"""glibc keeps freed memory, which makes everybody faster, TRL most of all."""
COLUMNS = (
    "setting",
    "rival",
    "its tokens/s, median (range)",
    "ours",
    "ours, times as fast",
    "the same by CPU time",
    "its peak, MiB",
    "ours",
    "ours, share of it",
)


class Contestant:
    """A process that takes a step when told to."""

    def __init__(self, script: Path, name: str, settings: Path) -> None:
        """Start it.

        Args:
            script: Takes the contestant's name and the settings.
            name: Of the contestant.
            settings: File with a `Settings`; the log of the process goes beside it.
        """
        self.name = name
        self._log = settings.with_name(f"{name}.log").open("w+")
        threads = str(json.loads(settings.read_text())["threads"])
        self._process = subprocess.Popen(
            [sys.executable, str(script), name, settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={
                **os.environ,
                **ALLOCATOR,
                "OMP_NUM_THREADS": threads,
                "PYTHONPATH": str(ROOT),
                "CUDA_VISIBLE_DEVICES": "",
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
        )

    def step(self) -> Step:
        """Take a step; what it took.

        Raises:
            RuntimeError: If the process has ended, with the end of what it said.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(MARK):
                return dict(json.loads(line.removeprefix(MARK)))
        self._log.seek(0)
        code = self._process.wait()
        raise RuntimeError(f"{self.name} ended with {code}: {self._log.read()[-2000:]}")

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._log.close()


@dataclasses.dataclass(slots=True, kw_only=True)
class Duel:
    """Steps of ours and of a rival, in turn."""

    setting: str
    rival: str
    ours: list[Step] = dataclasses.field(default_factory=list)
    theirs: list[Step] = dataclasses.field(default_factory=list)
    failure: str = ""

    def fight(self, ours: Contestant, rival: Contestant, *, rounds: int) -> None:
        """Let both take this many steps in turn, and keep what these took."""
        for number in range(rounds):
            # Who goes first changes, because a rhythm of the machine's could favour one.
            for contestant in (ours, rival) if number % 2 == 0 else (rival, ours):
                step = contestant.step()
                (self.ours if contestant is ours else self.theirs).append(step)
                print(self.setting, number, contestant.name, step, file=sys.stderr, flush=True)

    def cells(self) -> list[str]:
        """What the duel gave, as cells of `COLUMNS`."""
        if self.failure or not self.theirs:
            filled = [self.setting, self.rival, self.failure or "not measured"]
            return filled + [""] * (len(COLUMNS) - len(filled))
        pairs = list(zip(self.ours, self.theirs, strict=True))
        peak, ours_peak = (max(s["peak_mib"] for s in steps) for steps in (self.theirs, self.ours))
        return [
            self.setting,
            self.rival,
            _spread([_speed(s) for s in self.theirs], 0),
            _spread([_speed(s) for s in self.ours], 0),
            _spread([_speed(a) / _speed(b) for a, b in pairs], 2),
            _spread([_speed(a, "cpu_s") / _speed(b, "cpu_s") for a, b in pairs], 2),
            f"{peak:.0f}",
            f"{ours_peak:.0f}",
            f"{ours_peak / peak:.2f}",
        ]


def started(
    script: Path, name: str, settings: Path, stack: contextlib.ExitStack, *, warm_up: int
) -> Contestant:
    """A contestant that has taken its steps of warm-up, until `stack` ends."""
    contestant = Contestant(script, name, settings)
    stack.callback(contestant.end)
    for _ in range(warm_up):
        contestant.step()
    return contestant


def check_time(minutes: float) -> None:
    """Refuse a duel for which no time is left.

    Raises:
        RuntimeError: If the benchmark began more than so many minutes ago.
    """
    if time.perf_counter() > BEGAN + 60 * minutes:
        raise RuntimeError("not measured: no time was left")


def write_settings(path: Path, settings: Settings) -> Path:
    """Write settings for contestants; returns the path."""
    path.write_text(json.dumps(dataclasses.asdict(settings)))
    return path


def table(duels: Sequence[Duel]) -> list[str]:
    """Markdown, one row for each duel."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(duel.cells() for duel in duels)]
    return [f"| {' | '.join(cells)} |" for cells in rows]


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark of training has."""
    add = parser.add_argument
    add("--model", type=Path, default=DEMO, help="Hugging Face directory")
    add("--modes", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    add("--precisions", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    add("--rounds", type=int, default=3)
    add("--warm-up", type=int, default=1, help="steps before")
    add("--seq-length", type=int, default=1024, help="tokens of a pack")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--seed", type=int, default=1)
    add("--hardware", default=f"{os.cpu_count()}cpu", help="name in the file")
    add("--minutes", type=float, default=60, help="start no duel after these")
    add("--output", type=Path, help="report; else in benchmarks/results")
    add("--note", default="", help="a line about the circumstances")


def writer(
    args: argparse.Namespace, theme: str, report: Callable[[], list[str]]
) -> Callable[[], Path]:
    """What writes a report where it is asked for; called after every duel, so that none is lost."""
    month = datetime.date.today().strftime("%Y%m")
    path: Path = args.output or RESULTS / f"{theme}_{args.hardware}_{month}.md"
    path.parent.mkdir(parents=True, exist_ok=True)

    def write() -> Path:
        path.write_text("\n".join(report()))
        return path

    return write


def command() -> str:
    """The command that is running, as a line of a report."""
    return f"- Command: `python benchmarks/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`"


def _speed(step: Step, clock: str = "seconds") -> float:
    return step["tokens"] / step[clock]


def _spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"
