"""Does an extended vocabulary learn more from the same compute, and does it matter how it begins?

python benchmarks/extend_vocab_training.py --domain domain.jsonl --domain-held-out held_out.jsonl \
    --general general.jsonl --general-held-out general_held_out.jsonl --num-tokens 1000

Continual pre-training of one model on one blend (80 % domain, 20 % general) for the same number of
training FLOPs: with its own vocabulary, with an extended one whose new rows begin as means of their
pieces' rows, and with one whose new rows begin at random. Held-out bits per byte, which does not
depend on the tokenizer, over training FLOPs. Finished runs are kept in ``--directory``: the same
command goes on where it was stopped.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hardware import RESULTS, environment

from megatron_cgn.hf.config import read_architecture
from megatron_cgn.model.size import parameter_count

ROOT = Path(__file__).parent.parent
ARMS = {"own": "own vocabulary", "mean": "extended, mean", "random": "extended, random"}
MIX = {"domain": 0.8, "general": 0.2}


def main() -> None:
    """Train what is missing, and write the result and its picture."""
    args = _parse()
    models = {arm: _model(arm, args) for arm in args.arms}
    runs = [_run(arm, models[arm], seed, args) for seed in args.seeds for arm in args.arms]
    name = f"extend_vocab_training_{args.hardware}_{datetime.date.today():%Y%m}"
    RESULTS.mkdir(exist_ok=True)
    _plot(runs, RESULTS / f"{name}.png")
    text = _report(runs, models, args, picture=f"{name}.png")
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training run."""

    arm: str
    seed: int
    flops: list[float]
    """Training FLOPs at each validation."""
    bits: dict[str, list[float]]
    """Held-out bits per byte at each, by source."""
    steps: int
    text_bytes: float
    """Bytes of training text that its tokens stand for, on average."""


def flops_per_token(model: Path, *, seq_length: int) -> float:
    """Training FLOPs of a token: 6 a matrix parameter, and causal attention scores.

    The convention of Megatron-LM: a sequence attends to half of its square. The output matrix
    counts in, the embedding (a lookup) does not.
    """
    a = read_architecture(model)
    attention = 6 * a.num_layers * a.num_attention_heads * a.head_dim * seq_length
    return float(6 * parameter_count(a).matmul + attention)


def _model(arm: str, args: argparse.Namespace) -> Path:
    """The model an arm starts from; its data are indexed beside it."""
    directory: Path = args.directory / arm
    model: Path = args.model
    if arm != "own":
        model = directory / "model"
        if not model.exists():
            _call(
                "tools/extend_vocab.py", "--model", args.model, "--corpus", *args.domain,
                "--held-out", *args.domain_held_out, "--num-tokens", args.num_tokens,
                "--init", arm, "--output", model, "--sweep", 0, args.num_tokens,
            )  # fmt: skip
    for name, files in _inputs(args).items():
        if not (directory / f"{name}.idx").exists():
            directory.mkdir(parents=True, exist_ok=True)
            _call(
                "tools/preprocess_data.py", "--input", *files, "--tokenizer", model,
                "--output-prefix", directory / name,
            )  # fmt: skip
    return model


def _run(arm: str, model: Path, seed: int, args: argparse.Namespace) -> Run:
    data, output = args.directory / arm, args.directory / arm / f"seed{seed}"
    step_tokens = args.sequences * args.seq_length
    per_step = flops_per_token(model, seq_length=args.seq_length) * step_tokens
    steps = int(args.petaflops * 1e15 / per_step)
    if not (output / "done").exists():
        sources = ",".join(
            f"{{name:{name},path:{data}/{name},validation_path:{data}/{name}_held_out}}"
            for name in MIX
        )
        mix = ",".join(f"{name}:{share}" for name, share in MIX.items())
        _call(
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", args.processes,
            "train.py", "+stage=cpt", f"model.hf_path={model}", f"data.sources=[{sources}]",
            f"data.mix={{{mix}}}",
            f"output_dir={output}", "precision=fp32", f"seed={seed}",
            f"data.seq_length={args.seq_length}", f"train.micro_batch_size={args.micro_batch}",
            f"train.global_batch_size={args.sequences}", f"train.train_iters={steps}",
            f"train.validation_interval_steps={-(-steps // args.validations)}",
            f"optim.lr={args.lr}", f"optim.min_lr={args.lr / 10}",
            f"optim.warmup_steps={max(1, steps // 10)}", "checkpoint.resume=never",
            "checkpoint.save_optimizer=false", "checkpoint.keep_last=1", "export.enabled=false",
        )  # fmt: skip
        (output / "done").touch()
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [r for r in map(json.loads, lines) if "val/domain/bits_per_byte" in r]
    sidecars = {n: json.loads((data / f"{n}.json").read_text(encoding="utf-8")) for n in MIX}
    token_bytes = sum(
        MIX[name] * car["text_bytes"] / car["tokens"] for name, car in sidecars.items()
    )
    return Run(
        arm=arm,
        seed=seed,
        flops=[record["step"] * per_step for record in records],
        bits={n: [r[f"val/{n}/bits_per_byte"] for r in records] for n in MIX},
        steps=steps,
        text_bytes=steps * step_tokens * token_bytes,
    )


def _inputs(args: argparse.Namespace) -> dict[str, list[Path]]:
    names = (f"{name}{part}" for name in MIX for part in ("", "_held_out"))
    return {name: getattr(args, name) for name in names}


def _call(*command: object) -> None:
    environment_ = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment_, check=True)


def _plot(runs: Sequence[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(MIX), figsize=(11, 4), layout="constrained")
    for axis, source in zip(axes, MIX, strict=True):
        for place, (arm, label) in enumerate(ARMS.items()):
            chosen = [run for run in runs if run.arm == arm]
            for number, run in enumerate(chosen):
                axis.plot(
                    [f / 1e15 for f in run.flops], run.bits[source], color=f"C{place}",
                    marker="o", markersize=3, alpha=0.7, label=None if number else label,
                )  # fmt: skip
        axis.set(xlabel="training PFLOP", ylabel=f"held-out bits per byte, {source} text")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _report(
    runs: Sequence[Run], models: dict[str, Path], args: argparse.Namespace, *, picture: str
) -> str:
    described = ", ".join(
        f"{name.replace('_', ' ')} {sum(path.stat().st_size for path in files) / 1e6:.2f} MB"
        for name, files in _inputs(args).items()
    )
    lines = [
        "# Training with an extended vocabulary, at equal compute",
        "",
        *environment(),
        f"- Model: {args.model.name}; {args.num_tokens} new tokens; data (JSONL): {described}",
        f"- {args.petaflops:g} PFLOP of training each, sequences of {args.seq_length} tokens, "
        f"{args.sequences} a step, FP32, peak rate {args.lr:g}, cosine to a tenth; seeds "
        f"{', '.join(map(str, args.seeds))} (order of the data)",
        "- FLOPs a token: 6 a matrix parameter (output matrix in, embedding out), and causal "
        "attention",
        "",
        f"![bits per byte over training FLOPs]({picture})",
        "",
        "| | steps | MB of text | domain: before | after | general: before | after |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in models:
        chosen = [run for run in runs if run.arm == arm]
        cells = [
            _mean_and_range([run.bits[source][place] for run in chosen])
            for source in MIX
            for place in (0, -1)
        ]
        lines.append(
            f"| {ARMS[arm]} | {chosen[0].steps} | {chosen[0].text_bytes / 1e6:.3f} | "
            + " | ".join(cells)
            + " |"
        )
    lines += ["", "Bits per byte: mean over seeds (lowest–highest).", ""]
    return "\n".join(lines)


def _mean_and_range(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f} ({min(values):.4f}–{max(values):.4f})"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    model = ROOT / ".cache" / "smollm2-135m-instruct"
    add: Any = parser.add_argument
    add("--model", type=Path, default=model, help="Hugging Face directory")
    for name in MIX:
        add(f"--{name}", type=Path, nargs="+", required=True, help="documents to train on")
        add(f"--{name}-held-out", type=Path, nargs="+", required=True, help="others like them")
    add("--num-tokens", type=int, default=1000)
    add("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--petaflops", type=float, default=0.05, help="training compute of a run, in 10^15 FLOP")
    add("--seq-length", type=int, default=512)
    add("--sequences", type=int, default=4, help="of a step")
    add("--micro-batch", type=int, default=2)
    add("--validations", type=int, default=3, help="besides that before the first step")
    add("--lr", type=float, default=2e-4)
    add("--processes", type=int, default=2)
    add("--directory", type=Path, default=Path("runs/benchmark-extend-vocab"))
    add("--hardware", default=f"{os.cpu_count()}cpu", help="name in the file")
    args = parser.parse_args()
    for name in ("model", "directory"):
        setattr(args, name, getattr(args, name).resolve())
    for name in _inputs(args):
        setattr(args, name, [path.resolve() for path in getattr(args, name)])
    return args


if __name__ == "__main__":
    main()
