"""Tokens a second of greedy generation, against `transformers` with its cache.

python benchmarks/generate.py --model .cache/smollm2-135m-instruct --rounds 5

Both sides get the same prompts, of unequal length, the same number of new tokens and the same
threads, in turns: ours, theirs, ours, theirs, …, so that a busy machine slows both. Told are the
median of each side's seconds and the median of the rounds' ratios. Seconds include the prompts.
"""

import argparse
import datetime
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hardware import RESULTS, environment

from megatron_cgn.quiet import quiet_dependencies

quiet_dependencies()

import torch  # noqa: E402

from megatron_cgn.config.schema import ParallelConfig, Precision  # noqa: E402
from megatron_cgn.parallel.state import initialize_parallel, shutdown_parallel  # noqa: E402
from megatron_cgn.rollout.generate import generate  # noqa: E402
from megatron_cgn.rollout.open import find_model, open_engine  # noqa: E402
from megatron_cgn.rollout.sampling import Sampling  # noqa: E402

_TYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--model", default=".cache/smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu", help="name in the file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for precision in _TYPES:
        sides = (_ours(args, precision), _theirs(args, precision))
        rows += [_compare(sides, args, batch, precision) for batch in args.batches]
        shutdown_parallel()
    text = _report(rows, args)
    RESULTS.mkdir(exist_ok=True)
    month = datetime.date.today().strftime("%Y%m")
    (RESULTS / f"generate_{args.hardware}_{month}.md").write_text(text)
    print(text)


def _prompts(batch: int) -> list[list[int]]:
    """Prompts of 16 to 72 tokens."""
    generator = torch.Generator().manual_seed(batch)
    lengths = [16 + 8 * (i % 8) for i in range(batch)]
    return [torch.randint(1000, 40000, (n,), generator=generator).tolist() for n in lengths]


_Side = Callable[[list[list[int]]], list[list[int]]]


def _ours(args: argparse.Namespace, precision: Precision) -> _Side:
    state = initialize_parallel(ParallelConfig())
    engine = open_engine(find_model(args.model), state, precision=precision)
    sampling = Sampling(max_new_tokens=args.new_tokens)
    return lambda prompts: generate(engine, prompts, sampling=sampling)


def _theirs(args: argparse.Namespace, precision: Precision) -> _Side:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=_TYPES[precision]).eval()

    def run(prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(p)) + p for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        out = model.generate(
            torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            max_new_tokens=args.new_tokens,
            min_new_tokens=args.new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers: list[list[int]] = out[:, longest:].tolist()
        return answers

    return run


def _compare(
    sides: tuple[_Side, _Side], args: argparse.Namespace, batch: int, precision: str
) -> dict[str, Any]:
    """Run both in turns, after one round to warm up."""
    prompts = _prompts(batch)
    answers = [side(prompts) for side in sides]
    equal = sum(a == b for a, b in zip(*answers, strict=True))
    seconds: list[tuple[float, ...]] = []
    for _ in range(args.rounds):
        times = []
        for side in sides:
            start = time.perf_counter()
            side(prompts)
            times.append(time.perf_counter() - start)
        seconds.append(tuple(times))
    tokens = batch * args.new_tokens
    ratios = [theirs / ours for ours, theirs in seconds]
    return {
        "precision": precision,
        "batch": batch,
        "ours": tokens / statistics.median(ours for ours, _ in seconds),
        "theirs": tokens / statistics.median(theirs for _, theirs in seconds),
        "ratio": statistics.median(ratios),
        "spread": f"{min(ratios):.2f} to {max(ratios):.2f}",
        "equal": f"{equal} of {batch}",
    }


def _report(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    lines = [
        "# Greedy generation against transformers",
        "",
        *environment(("torch", "transformers", "megatron-core")),
        f"- Load of the machine during the run: {os.getloadavg()[1]:.1f} (5 minutes)",
        f"- Model: {Path(args.model).name}; {args.threads} thread(s); {args.new_tokens} new "
        f"tokens; {args.rounds} rounds after one to warm up; prompts of 16 to 72 tokens, whose "
        "reading is in the time",
        "",
        "| precision | batch | ours, tokens/s | transformers, tokens/s | ratio | of rounds | "
        "equal answers |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['precision']} | {r['batch']} | {r['ours']:.1f} | {r['theirs']:.1f} | "
        f"{r['ratio']:.2f} | {r['spread']} | {r['equal']} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
