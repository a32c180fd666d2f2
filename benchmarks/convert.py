"""How fast, and in how much memory, does a checkpoint convert, against copying its files?

python benchmarks/convert.py --gigabytes 6 --directory /scratch

Every repetition copies the Hugging Face directory and converts it in both directions, each in a
process of its own, after asking the kernel to forget the source's pages. All three make their
files durable (``fsync``) before the clock stops. The ratio is the copy's seconds over the
conversion's: 1.0 is the disk's own speed.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hardware import RESULTS, drop_page_cache, environment, memory_kib, write_llama

TASKS = ("copy", "to-megatron", "to-hf")


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--directory", type=Path, default=Path("runs/benchmark-convert"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu", help="name in the file")
    parser.add_argument("--note", default="", help="a line about the circumstances")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    source, checkpoint, output = (args.directory / name for name in ("hf", "ckpt", "out"))
    if args.task is not None:
        # The parent process asks for one measurement.
        inputs = checkpoint if args.task == "to-hf" else source
        print(json.dumps(measure(args.task, inputs, output)))
        return
    args.directory.mkdir(parents=True, exist_ok=True)
    num_bytes = write_llama(source, gigabytes=args.gigabytes)
    try:
        results = repeat(args, source, checkpoint, output)
    finally:
        for path in (source, checkpoint, output):
            shutil.rmtree(path, ignore_errors=True)
    text = report(results, num_bytes, args)
    month = datetime.date.today().strftime("%Y%m")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"convert_{args.hardware}_{month}.md").write_text(text)
    print(text)


def repeat(
    args: argparse.Namespace, source: Path, checkpoint: Path, output: Path
) -> dict[str, list[dict[str, float]]]:
    """Run every task `repeats` times, taking turns, and check the round trip once."""
    results: dict[str, list[dict[str, float]]] = {task: [] for task in TASKS}
    # The first round is the warm-up: programs and libraries come into the page cache.
    for number in range(args.repeats + 1):
        for task in TASKS:
            shutil.rmtree(output, ignore_errors=True)
            subprocess.run(["sync"], check=True)
            drop_page_cache(checkpoint if task == "to-hf" else source)
            command = [sys.executable, __file__, "--directory", args.directory, "--task", task]
            started = time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            answer = json.loads(done.stdout.splitlines()[-1])
            answer["process_s"] = time.perf_counter() - started
            answer["load"] = os.getloadavg()[0]
            if number:
                results[task].append(answer)
            print(number, task, answer, file=sys.stderr, flush=True)
            if task == "to-megatron":
                shutil.rmtree(checkpoint, ignore_errors=True)
                output.rename(checkpoint)
        if number == 0:
            check_same(source, output)
    return results


def measure(task: str, source: Path, target: Path) -> dict[str, float]:
    """Do one task in this process; seconds, and memory in MiB."""
    work: Callable[[], None]
    if task == "copy":

        def work() -> None:
            copy(source, target)
    elif task == "to-megatron":
        from megatron_cgn.hf.to_megatron import convert_to_megatron

        def work() -> None:
            convert_to_megatron(source, target)
    else:
        from megatron_cgn.hf.to_hf import convert_to_hf

        def work() -> None:
            convert_to_hf(source, target, max_shard_bytes=2 * 10**9)

    before = memory_kib()
    peaks = {"RssAnon": 0, "RssFile": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for name, value in memory_kib().items():
                if name in peaks:
                    peaks[name] = max(peaks[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    cpu = time.process_time()
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    cpu = time.process_time() - cpu
    done.set()
    watcher.join()
    return {
        "seconds": seconds,
        "cpu_s": cpu,
        "peak_mib": memory_kib()["VmHWM"] / 1024,
        "peak_anon_mib": peaks["RssAnon"] / 1024,
        "peak_file_mib": peaks["RssFile"] / 1024,
        "before_mib": before["VmRSS"] / 1024,
    }


def copy(source: Path, target: Path) -> None:
    """Copy a directory as ``cp`` does, and make it durable."""
    subprocess.run(["cp", "-r", source, target], check=True)
    for file in target.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def check_same(source: Path, output: Path) -> None:
    """Hold the bytes of the round trip equal to the source's."""
    from megatron_cgn.hf.config import read_architecture
    from megatron_cgn.hf.weights import open_weights

    architecture = read_architecture(source)
    ours, theirs = open_weights(output, architecture), open_weights(source, architecture)
    for name, place in theirs.places.items():
        rows = slice(0, place.shape[0])
        # As integers: random bits are sometimes NaN, which equals nothing.
        same = (
            ours.view(name, rows).view(torch.int16).equal(theirs.view(name, rows).view(torch.int16))
        )
        assert same, name
        ours.drop(name, rows)
        theirs.drop(name, rows)


def report(
    results: dict[str, list[dict[str, float]]], num_bytes: int, args: argparse.Namespace
) -> str:
    """The result as Markdown."""
    baseline = statistics.median(run["seconds"] for run in results["copy"])
    rows = []
    for task in TASKS:
        runs = results[task]
        seconds = [run["seconds"] for run in runs]
        middle = statistics.median(seconds)
        ratios = sorted(
            copied["seconds"] / run["seconds"]
            for copied, run in zip(results["copy"], runs, strict=True)
        )
        memory = (
            "—"
            if task == "copy"
            else " / ".join(
                f"{max(run[key] for run in runs):.0f}"
                for key in ("peak_mib", "peak_anon_mib", "peak_file_mib", "before_mib")
            )
        )
        cpu = "—" if task == "copy" else f"{statistics.median(run['cpu_s'] for run in runs):.1f}"
        rows.append(
            f"| {task} | {middle:.1f} ({min(seconds):.1f}–{max(seconds):.1f}) "
            f"| {num_bytes / middle / 1e6:.0f} | {baseline / middle:.2f} "
            f"({ratios[0]:.2f}–{ratios[-1]:.2f}) | {cpu} "
            f"| {statistics.median(run['process_s'] for run in runs):.1f} | {memory} |"
        )
    loads = [run["load"] for runs in results.values() for run in runs]
    return "\n".join(
        [
            "# Converting a checkpoint, against copying its files",
            "",
            *environment(),
            f"- Data: synthetic BF16 Llama with the shapes of Llama 3 8B, {num_bytes / 1e9:.2f} GB "
            "in safetensors files of 2 GB",
            f"- Runs: one of warm-up, then {args.repeats}, tasks taking turns, each in a process "
            "of its own; median (lowest–highest)",
            "- Page cache: the source's pages are given up (`POSIX_FADV_DONTNEED`) before each "
            "run; all three tasks end with `fsync`",
            f"- Load average meanwhile: {min(loads):.1f} to {max(loads):.1f}",
            *([f"- {args.note}"] if args.note else []),
            f"- Command: `python benchmarks/convert.py --gigabytes {args.gigabytes:g} "
            f"--repeats {args.repeats}`",
            "",
            "| task | seconds | MB/s | ratio to the copy of the same round | CPU s "
            "| whole process, s | peak / anonymous / file / before, MiB |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "The ratio is the median copy over the median conversion, and the range over the "
            "rounds. Memory is the highest of all runs: `VmHWM`; the highest `RssAnon` and "
            "`RssFile` seen (sampled every 20 ms); `VmRSS` after imports and before the work. "
            "File pages are the kernel's to take back.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
