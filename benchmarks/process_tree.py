"""Runs a command and measures it with all processes it starts."""

import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Usage:
    """What a command took."""

    seconds: float
    """From its start to its end."""
    cpu_s: float
    """Of it and of those it waited for."""
    peak_mib: float
    """Highest sum of the proportional set sizes of the tree."""
    load: float
    """Load average of the machine at its end."""


def run_measured(command: Sequence[str], *, environment: Mapping[str, str], cwd: Path) -> Usage:
    """Run a command to its end.

    Raises:
        RuntimeError: If it fails; shows the end of what it printed.
    """
    log = cwd / "output.log"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("wb") as stream:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=dict(environment), cwd=cwd, stdout=stream, stderr=subprocess.STDOUT
        )
        peaks: list[int] = [0]
        watcher = threading.Thread(target=_watch, args=(process.pid, peaks))
        watcher.start()
        code = process.wait()
        seconds = time.perf_counter() - started
        watcher.join()
    if code:
        raise RuntimeError(f"{command[:2]} ended with {code}:\n{log.read_text()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Usage(seconds, cpu, peaks[0] / 2**20, os.getloadavg()[0])


def _watch(pid: int, peaks: list[int]) -> None:
    while total := sum(_proportional_bytes(p) for p in _tree(pid)):
        peaks[0] = max(peaks[0], total)
        time.sleep(_PAUSE_S)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        yield from (child.pid for child in psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return


def _proportional_bytes(pid: int) -> int:
    """PSS of a process, 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
