"""How fast, and in how much memory, is instruction tuning, against TRL and a bare loop?

python benchmarks/sft.py --trl-site ../trl-site

For each setting (adapters or all weights; BF16 or FP32) four contestants, each a process of its
own, train SmolLM2-135M on the same conversations with the same threads and memory allocator: ours
and a bare loop of `transformers` on rows of whole conversations, TRL's ``SFTTrainer`` padded as it
does by default, and TRL packed. They are all started, and then take one step each in turn, so that
what the machine does meanwhile touches all alike. Tokens that are padding do not count.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hardware import RESULTS, environment
from sft_contestant import MARK, RANK, Settings
from sft_records import write_records

ROOT = Path(__file__).parents[1]
DEMO = ROOT / ".cache/smollm2-135m-instruct"
CONTESTANTS = ("ours", "trl-padded", "trl-packed", "plain")
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
"""glibc keeps freed memory, which makes everybody faster, TRL most of all."""


class Contestant:
    """A process that takes a step when told to."""

    def __init__(self, name: str, settings: Path) -> None:
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

    def step(self) -> dict[str, float]:
        """Take a step; what it took."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(MARK):
                return dict(json.loads(line.removeprefix(MARK)))
        self._log.seek(0)
        raise RuntimeError(self._log.read()[-2000:])

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
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="steps before")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--seq-length", type=int, default=1024, help="tokens of a pack")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu", help="name in the file")
    parser.add_argument("--note", default="", help="a line about the circumstances")
    args = parser.parse_args()
    if args.trl_site is None:
        args.contestants = [name for name in args.contestants if not name.startswith("trl")]
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        facts = write_records(records, tokenizer=args.model, count=1200, seed=args.seed)
        results = {
            (mode, precision): compare(args, records, mode=mode, precision=precision)
            for mode, precision in itertools.product(args.modes, args.precisions)
        }
    text = "\n".join(report(args, facts, results))
    RESULTS.mkdir(exist_ok=True)
    month = datetime.date.today().strftime("%Y%m")
    (RESULTS / f"sft_{args.hardware}_{month}.md").write_text(text)
    print(text)


def compare(
    args: argparse.Namespace, records: Path, *, mode: str, precision: str
) -> dict[str, list[dict[str, float]]]:
    """Steps of every contestant, in turn."""
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
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in args.contestants}
    running: dict[str, Contestant] = {}
    try:
        for name in args.contestants:
            running[name] = Contestant(name, path)
            for _ in range(args.warm_up):
                running[name].step()
        for number in range(args.rounds):
            for name, contestant in running.items():
                steps[name].append(contestant.step())
                print(mode, precision, number, name, steps[name][-1], file=sys.stderr, flush=True)
    finally:
        for contestant in running.values():
            contestant.end()
    return steps


def report(args: argparse.Namespace, facts: dict[str, float], results: Any) -> list[str]:
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
        f"{args.rounds} measured, contestants in turn",
        f"- Allocator of all: {' '.join(f'{k}={v}' for k, v in ALLOCATOR.items())}",
        "- BF16: autocast over FP32 weights for TRL and the bare loop, whose default it is; BF16 "
        "weights with FP32 master copies for ours",
        f"- Command: `python benchmarks/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`",
    ]
    if args.note:
        lines.append(f"- Note: {args.note}")
    lines += ["", *_table(results), ""]
    return lines


def _table(results: Any) -> list[str]:
    """One row for each setting and contestant."""
    rows = [
        "| setting | contestant | tokens/s, median (range) | ours, times as fast | tokens per CPU "
        "second | peak, MiB | ours, share of it |",
        "|---|---|---|---|---|---|---|",
    ]
    for (mode, precision), steps in results.items():
        ours = steps["ours"]
        for name, taken in steps.items():
            speeds = [s["tokens"] / s["seconds"] for s in taken]
            ratios = sorted(
                mine["tokens"] / mine["seconds"] / speed
                for mine, speed in zip(ours, speeds, strict=True)
            )
            peak = max(s["peak_mib"] for s in taken)
            rows.append(
                f"| {mode}, {precision} | {name} | {statistics.median(speeds):.0f} "
                f"({min(speeds):.0f}–{max(speeds):.0f}) "
                f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) "
                f"| {sum(s['tokens'] for s in taken) / sum(s['cpu_s'] for s in taken):.0f} "
                f"| {peak:.0f} | {max(s['peak_mib'] for s in ours) / peak:.2f} |"
            )
    return rows


if __name__ == "__main__":
    main()
