"""How fast, and in how much memory, is instruction tuning, against TRL and a bare loop?

python benchmarks/sft.py --trl-site ../trl-site

For each setting (adapters or all weights; BF16 or FP32) four contestants, each a process of its
own, train SmolLM2-135M on the same conversations with the same threads and memory allocator: ours
and a bare loop of `transformers` on rows of whole conversations, TRL's ``SFTTrainer`` padded as it
does by default, and TRL packed. Ours meets one rival after the other: both take one step each in
turn, so that what the machine does meanwhile touches both alike, and only two are in memory at a
time. The report is written after every duel, so that a run that is stopped has lost nothing.
Tokens that are padding do not count.
"""

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hardware import RESULTS, environment
from sft_contestant import MARK, RANK, Settings
from sft_records import write_records

BEGAN = time.perf_counter()
ROOT = Path(__file__).parents[1]
DEMO = ROOT / ".cache/smollm2-135m-instruct"
OURS, RIVALS = "ours", ("plain", "trl-padded", "trl-packed")
Step = dict[str, float]
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
"""glibc keeps freed memory, which makes everybody faster, TRL most of all."""


class Contestant:
    """A process that takes a step when told to."""

    def __init__(self, name: str, settings: Path) -> None:
        self.name = name
        self._log = settings.with_name(f"{name}.log").open("w+")
        threads = str(json.loads(settings.read_text())["threads"])
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("sft_contestant.py")), name, settings],
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


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO, help="Hugging Face directory")
    parser.add_argument("--trl-site", type=Path, help="folder with trl, from pip install --target")
    parser.add_argument("--modes", nargs="+", default=["lora", "full"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=RIVALS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="steps before")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--seq-length", type=int, default=1024, help="tokens of a pack")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu", help="name in the file")
    parser.add_argument("--minutes", type=float, default=60, help="start no duel after these")
    parser.add_argument("--output", type=Path, help="report; else in benchmarks/results")
    parser.add_argument("--note", default="", help="a line about the circumstances")
    args = parser.parse_args()
    if args.trl_site is None:
        args.rivals = [name for name in args.rivals if not name.startswith("trl")]
    args.output = args.output or RESULTS / f"sft_{args.hardware}_{_month()}.md"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    duels: list[Duel] = []
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        facts = write_records(records, tokenizer=args.model, count=1200, seed=args.seed)
        # The type that everybody uses first, in case there is no time for the other.
        for precision, mode in itertools.product(args.precisions, args.modes):
            for duel in compare(args, records, mode=mode, precision=precision):
                duels.append(duel)
                args.output.write_text("\n".join(report(args, facts, duels)))
    print(args.output.read_text())


def _month() -> str:
    return datetime.date.today().strftime("%Y%m")


@dataclasses.dataclass(slots=True, kw_only=True)
class Duel:
    """Steps of ours and of a rival, in turn."""

    setting: str
    rival: str
    ours: list[Step] = dataclasses.field(default_factory=list)
    theirs: list[Step] = dataclasses.field(default_factory=list)
    failure: str = ""


def compare(
    args: argparse.Namespace, records: Path, *, mode: str, precision: str
) -> Iterator[Duel]:
    """Duels of ours, which lives through all of them, with every rival."""
    settings = Settings(
        model=str(args.model.resolve()),
        records=str(records),
        mode=mode,
        precision=precision,
        threads=args.threads,
        seq_length=args.seq_length,
        padded_batch=4,
        accumulation=args.accumulation,
        trl_site=str(args.trl_site.resolve()) if args.trl_site else "",
    )
    path = records.with_name("settings.json")
    path.write_text(json.dumps(dataclasses.asdict(settings)))
    with contextlib.ExitStack() as stack:
        ours: Contestant | None = None
        for name in args.rivals:
            duel = Duel(setting=f"{mode}, {precision}", rival=name)
            try:
                if time.perf_counter() > BEGAN + 60 * args.minutes:
                    raise RuntimeError("not measured: no time was left")
                ours = ours or _started(OURS, path, args, stack)
                _fight(duel, ours, path, args)
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                duel.failure = str(error).split("\n", 1)[0]
            yield duel


def _fight(duel: Duel, ours: Contestant, settings: Path, args: argparse.Namespace) -> None:
    """Let ours and a rival take steps in turn."""
    with contextlib.ExitStack() as stack:
        rival = _started(duel.rival, settings, args, stack)
        for number in range(args.rounds):
            # Who goes first changes, because a rhythm of the machine's could favour one.
            for contestant in (ours, rival) if number % 2 == 0 else (rival, ours):
                step = contestant.step()
                (duel.ours if contestant is ours else duel.theirs).append(step)
                print(duel.setting, number, contestant.name, step, file=sys.stderr, flush=True)


def _started(
    name: str, settings: Path, args: argparse.Namespace, stack: contextlib.ExitStack
) -> Contestant:
    """A contestant that has taken its steps of warm-up, until `stack` ends."""
    contestant = Contestant(name, settings)
    stack.callback(contestant.end)
    for _ in range(args.warm_up):
        contestant.step()
    return contestant


def report(args: argparse.Namespace, facts: dict[str, float], duels: list[Duel]) -> list[str]:
    """The result as lines of Markdown."""
    from importlib.metadata import version

    lines = [
        "# Instruction tuning against TRL and a bare loop",
        "",
        *environment(("torch", "megatron-core", "transformers", "peft")),
    ]
    if args.trl_site is not None:
        sys.path.append(str(args.trl_site.resolve()))
        lines.append(f"- Contestants: TRL {version('trl')}, its defaults but for gradient "
                     "checkpointing, which nobody does here")  # fmt: skip
    lines += [
        f"- Model: SmolLM2-135M; adapters of rank {RANK} on all seven matrices, or all weights",
        f"- Data: conversations of {facts['tokens']:.0f} tokens on average, of which "
        f"{facts['counted']:.0f} count; {facts['padding']:.0%} padding in TRL's batches of 4",
        f"- Step: {args.accumulation} micro-batches, of one pack of {args.seq_length} tokens or "
        f"of 4 conversations; {args.threads} threads; {args.warm_up} step(s) of warm-up, "
        f"{args.rounds} measured of each, ours and one rival in turn",
        f"- Allocator of all: {' '.join(f'{k}={v}' for k, v in ALLOCATOR.items())}",
        "- BF16: autocast over FP32 weights for TRL and the bare loop, whose default it is; BF16 "
        "weights with FP32 master copies for ours, the base of adapters in BF16 alone",
        "- Attention: of ours and of TRL packed ends at the conversation; the bare loop's tokens "
        "see the whole row before them, which is its fastest way",
        "- Peak: the most resident memory of the process since its start (VmHWM), libraries and "
        "reading the model included. Ratios are of ours by the rival in the same round, median "
        "(range); peaks are after the same duel",
        f"- Command: `python benchmarks/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`",
    ]
    if args.note:
        lines.append(f"- Note: {args.note}")
    lines += ["", *_table(duels), ""]
    return lines


def _table(duels: list[Duel]) -> list[str]:
    """One row for each duel."""
    rows = [
        "| setting | rival | its tokens/s, median (range) | ours | ours, times as fast | "
        "the same by CPU time | its peak, MiB | ours | ours, share of it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for duel in duels:
        if duel.failure:
            rows.append(f"| {duel.setting} | {duel.rival} | {duel.failure} |  |  |  |  |  |  |")
            continue
        pairs = list(zip(duel.ours, duel.theirs, strict=True))
        peak, ours_peak = (max(s["peak_mib"] for s in steps) for steps in (duel.theirs, duel.ours))
        cells = (
            duel.setting,
            duel.rival,
            _spread([_speed(s) for s in duel.theirs], 0),
            _spread([_speed(s) for s in duel.ours], 0),
            _spread([_speed(a) / _speed(b) for a, b in pairs], 2),
            _spread([_speed(a, "cpu_s") / _speed(b, "cpu_s") for a, b in pairs], 2),
            f"{peak:.0f}",
            f"{ours_peak:.0f}",
            f"{ours_peak / peak:.2f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _speed(step: Step, clock: str = "seconds") -> float:
    return step["tokens"] / step[clock]


def _spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


if __name__ == "__main__":
    main()
