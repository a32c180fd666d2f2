"""How much memory does loading a model cost each rank beyond its own share of the weights?

python benchmarks/load.py --gigabytes 3 --directory /scratch

For every layout the ranks build their empty model, touch all of its memory, have the kernel
forget their peak (``/proc/self/clear_refs``), and load. What the peak then exceeds the memory
before by is the cost; the goal is at most 1 GiB.
"""

import argparse
import datetime
import os
import shutil
import time
from pathlib import Path
from typing import Any

from hardware import RESULTS, environment, memory_kib, write_llama

from megatron_cgn.config.schema import ModelConfig, ParallelConfig
from megatron_cgn.testing import run_distributed

LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--directory", type=Path, default=Path("runs/benchmark-load"))
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu", help="name in the file")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    source = args.directory / "hf"
    num_bytes = write_llama(source, gigabytes=args.gigabytes)
    try:
        results = {
            (tp, pp): run_distributed(measure, tp * pp, str(source), tp, pp) for tp, pp in LAYOUTS
        }
    finally:
        shutil.rmtree(source)
    text = report(results, num_bytes, args)
    RESULTS.mkdir(exist_ok=True)
    month = datetime.date.today().strftime("%Y%m")
    (RESULTS / f"load_{args.hardware}_{month}.md").write_text(text)
    print(text)


def measure(source: str, tp: int, pp: int) -> dict[str, float]:
    """Load on one rank; its share, its cost in MiB, and seconds."""
    import torch

    from megatron_cgn.hf.config import read_architecture
    from megatron_cgn.hf.load import load_weights
    from megatron_cgn.model.build import build_model, transformer_config
    from megatron_cgn.parallel.state import initialize_parallel
    from megatron_cgn.quiet import quiet_dependencies

    quiet_dependencies()
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    groups = initialize_parallel(parallel).groups
    architecture = read_architecture(source)
    config = transformer_config(
        architecture, parallel=parallel, model=ModelConfig(backend="native"), precision="bf16"
    )
    chunks = build_model(
        architecture,
        config=config,
        groups=groups,
        seq_length=128,
        make_vocab_size_divisible_by=128,
        backend="native",
    )
    weights = [parameter.detach() for chunk in chunks for parameter in chunk.parameters()]
    for weight in weights:
        weight.fill_(1.0)
    torch.distributed.barrier()
    before = memory_kib()
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    load_weights(chunks, source, architecture=architecture, groups=groups)
    seconds = time.perf_counter() - started
    after = memory_kib()
    torch.distributed.barrier()
    return {
        "share_mib": sum(weight.nbytes for weight in weights) / 2**20,
        "before_mib": before["VmRSS"] / 1024,
        "peak_mib": after["VmHWM"] / 1024,
        "cost_mib": (after["VmHWM"] - before["VmRSS"]) / 1024,
        "anon_mib": (after["RssAnon"] - before["RssAnon"]) / 1024,
        "seconds": seconds,
    }


def report(
    results: dict[tuple[int, int], list[dict[str, Any]]], num_bytes: int, args: argparse.Namespace
) -> str:
    """The result as Markdown."""
    rows = [
        f"| TP{tp} × PP{pp} | {rank} | {run['share_mib']:.0f} | {run['before_mib']:.0f} "
        f"| {run['peak_mib']:.0f} | {run['cost_mib']:.0f} | {run['anon_mib']:.0f} "
        f"| {run['seconds']:.1f} |"
        for (tp, pp), runs in results.items()
        for rank, run in enumerate(runs)
    ]
    return "\n".join(
        [
            "# Memory of loading a model, by rank",
            "",
            *environment(),
            f"- Data: synthetic BF16 Llama with the shapes of Llama 3 8B, {num_bytes / 1e9:.2f} GB",
            f"- Command: `python benchmarks/load.py --gigabytes {args.gigabytes:g}`",
            "",
            "| layout | rank | own share, MiB | before loading, MiB | peak, MiB | cost, MiB "
            "| anonymous kept, MiB | seconds |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            "“Before” has the built model with all of its memory touched; the peak is `VmHWM` of "
            "loading alone, with the mapped file pages; the cost is their difference (goal: at "
            "most 1024 MiB).",
            "",
        ]
    )


if __name__ == "__main__":
    main()
