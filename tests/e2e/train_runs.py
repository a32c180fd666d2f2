"""Starts train.py's ranks, waits for them, and reads what they left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_chats import TinyChats
from tiny_files import TinyFiles

from megatron_cgn.testing import free_port

ZYGOTE = Path(__file__).with_name("train_zygote.py")
VALIDATION_KEYS = ("val/domain/loss", "val/general/bits_per_byte")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A run that is over."""

    codes: list[int]
    """Exit codes by rank; minus the number of the signal that ended a rank."""
    stderr: str
    """What all ranks wrote to standard error."""


class Run:
    """A run that was started: one process a rank."""

    def __init__(self, zygote: "Zygote", pids: list[int], stderr: Path) -> None:
        self.pids = pids
        self._zygote = zygote
        self._stderr = stderr
        self._codes: dict[int, int] = {}

    def running(self) -> bool:
        """Whether any rank still runs."""
        for pid in self.pids:
            if pid not in self._codes:
                code = self._zygote.ask({"poll": pid})["code"]
                if code is not None:
                    self._codes[pid] = code
        return len(self._codes) < len(self.pids)

    def wait(self, *, timeout_s: float = 240.0) -> Ended:
        """Wait for every rank; those still running after the timeout are killed, and it fails."""
        deadline = time.monotonic() + timeout_s
        while self.running():
            if time.monotonic() > deadline:
                self.kill_rest()
                raise TimeoutError(f"{timeout_s} s are over:\n{self.text()[-4000:]}")
            time.sleep(0.02)
        return Ended(codes=[self._codes[pid] for pid in self.pids], stderr=self.text())

    def kill_rest(self) -> None:
        """End what still runs, with the processes that it started."""
        for pid in self.pids:
            if pid not in self._codes:
                os.killpg(pid, signal.SIGKILL)

    def text(self) -> str:
        """What all ranks have written to standard error so far."""
        return self._stderr.read_text("utf-8", errors="replace")


class Zygote:
    """Starts runs; see ``train_zygote.py``."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, str(ZYGOTE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(
        self,
        overrides: Sequence[str],
        *,
        stderr: Path,
        ranks: int = 1,
        limit_bytes: int | None = None,
        record_ids: Path | None = None,
        signal_at: tuple[int, int] | None = None,
    ) -> Run:
        """Start train.py on so many ranks, as torchrun would.

        Args:
            overrides: Its arguments.
            stderr: File that all ranks append their standard error to.
            ranks: Number of processes.
            limit_bytes: Largest file they may write; None for no limit.
            record_ids: File that each rank adds the ids of what it reads to, behind a dot and its
                number; None for none.
            signal_at: With `record_ids`, a training sequence and the signal that the rank that
                has just read it sends to itself; None for none.
        """
        stderr.parent.mkdir(parents=True, exist_ok=True)
        stderr.write_bytes(b"")
        port = free_port()
        pids = []
        for rank in range(ranks):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            request = {
                "argv": list(overrides),
                "env": (environment if ranks > 1 else {})
                | ({} if record_ids is None else {"RECORD_IDS": f"{record_ids}.{rank}"})
                | ({} if signal_at is None else {"SIGNAL_AT": "{}:{}".format(*signal_at)}),
                "stderr": str(stderr),
                "limit_bytes": limit_bytes,
            }
            pids.append(self.ask(request)["pid"])
        return Run(self, pids, stderr)

    def run(self, overrides: Sequence[str], *, stderr: Path, ranks: int = 1) -> Ended:
        """Start train.py and wait for its end."""
        return self.start(overrides, stderr=stderr, ranks=ranks).wait()

    def close(self) -> None:
        """End the zygote."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


def overrides(tiny: TinyFiles, output: Path, *more: str) -> list[str]:
    """Arguments of a tiny run of eight steps that saves at every second."""
    base = {
        "model.hf_path": tiny.model,
        "precision": "fp32",
        "data.seq_length": 32,
        "data.validation_fraction": 0.2,
        "train.micro_batch_size": 2,
        "train.global_batch_size": 4,
        "train.train_iters": 8,
        "train.validation_interval_steps": 3,
        "optim.lr": "1e-3",
        "optim.warmup_steps": 2,
        "checkpoint.interval_steps": 2,
        "output_dir": output,
    }
    given = [text for text in more if text.partition("=")[0] in base]
    kept = {k: v for k, v in base.items() if not any(t.startswith(f"{k}=") for t in given)}
    return ["+stage=cpt", tiny.sources(), *(f"{k}={v}" for k, v in kept.items()), *more]


def sft_overrides(chats: TinyChats, output: Path, *more: str) -> list[str]:
    """Arguments of a tiny run of instruction tuning of eight steps."""
    base = {
        "model.hf_path": chats.model,
        "precision": "fp32",
        "data.seq_length": 96,
        "data.validation_fraction": 0.2,
        "train.micro_batch_size": 2,
        "train.global_batch_size": 4,
        "train.train_iters": 8,
        "train.validation_interval_steps": 4,
        "optim.lr": "1e-3",
        "samples.count": 2,
        "samples.max_new_tokens": 6,
        "output_dir": output,
    }
    given = {text.partition("=")[0] for text in more}
    kept = [f"{key}={value}" for key, value in base.items() if key not in given]
    sources = [] if "data.sources" in given else [chats.sources()]
    return ["+stage=sft", *sources, *kept, *more]


def records(output: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` of a run, without what a clock or a machine decides."""
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    varying = ("tokens_per_s", "step_time_s")
    return [{k: v for k, v in json.loads(line).items() if k not in varying} for line in lines]


def checkpoints(output: Path) -> list[str]:
    """Names below ``checkpoints/``, in order."""
    directory = output / "checkpoints"
    return sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []


def wait_for(condition: Any, run: Run, *, timeout_s: float = 240.0) -> None:
    """Wait until `condition()` holds while a run goes on; fails if the run ends first."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if not run.running():
            raise AssertionError(f"the run ended early:\n{run.text()[-4000:]}")
        assert time.monotonic() < deadline, run.text()[-4000:]
        time.sleep(0.005)
