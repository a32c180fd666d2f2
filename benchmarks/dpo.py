"""How fast, and in how much memory, is DPO, against TRL with its reference precomputed or not?

python benchmarks/dpo.py

For each setting (adapters or all weights; answers of one length or of many; BF16 or FP32) ours and
TRL's ``DPOTrainer``, each a process of its own, train SmolLM2-135M on the same pairs with the same
threads and memory allocator: one step each in turn, so that what the machine does meanwhile
touches both alike. Before that both score the reference, likewise in turn; TRL without precomputed
log-probabilities scores it anew in every step. The report is written after every duel, so that a
run that is stopped has lost nothing. Tokens that are padding do not count.
"""

import argparse
import contextlib
import itertools
import sys
import tempfile
from pathlib import Path

from contestant import RANK, Settings
from dpo_records import write_pairs
from duel import (
    ALLOCATOR,
    OURS,
    Duel,
    check_time,
    command,
    common_arguments,
    started,
    table,
    write_settings,
    writer,
)
from hardware import environment

CONTESTANT = Path(__file__).with_name("dpo_contestant.py")
PRECOMPUTED, REFERENCE = "trl-precomputed", "trl-reference"
BATCH = 2
"""Pairs of a micro-batch of TRL's: as many as a pack has, four answers."""
Facts = dict[str, dict[str, float]]


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    common_arguments(parser)
    parser.add_argument(
        "--lengths", nargs="+", default=["variable", "fixed"], choices=["variable", "fixed"]
    )
    parser.add_argument(
        "--rivals",
        nargs="+",
        default=[PRECOMPUTED, REFERENCE],
        choices=[PRECOMPUTED, REFERENCE],
    )
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    args = parser.parse_args()
    # Two batches, or packs, for every step of scoring.
    args.pairs = 2 * BATCH * (args.warm_up + args.rounds)
    facts: Facts = {}
    scoring: list[Duel] = []
    training: list[Duel] = []
    write = writer(args, "dpo", lambda: report(args, facts, scoring, training))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for lengths in args.lengths:
            facts[lengths] = write_pairs(
                folder / f"{lengths}.jsonl",
                tokenizer=args.model,
                count=args.pairs,
                seed=args.seed,
                seq_length=args.seq_length,
                variable=lengths == "variable",
                batch=BATCH,
            )
        # What everybody uses first, in case there is no time for the other.
        for precision, rival, mode, lengths in itertools.product(
            args.precisions, args.rivals, args.modes, args.lengths
        ):
            scores, steps = compare(
                args, folder, rival=rival, mode=mode, precision=precision, lengths=lengths
            )
            scoring += [scores] if rival == PRECOMPUTED else []
            training.append(steps)
            path = write()
    print(path.read_text())


def compare(
    args: argparse.Namespace, folder: Path, *, rival: str, mode: str, precision: str, lengths: str
) -> tuple[Duel, Duel]:
    """Duels of ours with a rival: scoring the reference, if it does that before, and training."""
    precomputed = rival == PRECOMPUTED
    settings = Settings(
        model=str(args.model.resolve()),
        records=str(folder / f"{lengths}.jsonl"),
        mode=mode,
        precision=precision,
        threads=args.threads,
        seq_length=args.seq_length,
        padded_batch=BATCH,
        accumulation=args.accumulation,
        scored_steps=args.warm_up + args.rounds if precomputed else 0,
    )
    path = write_settings(folder / "settings.json", settings)
    setting = f"{mode}, {precision}, {lengths}"
    duels = Duel(setting=setting, rival=rival), Duel(setting=setting, rival=rival)
    with contextlib.ExitStack() as stack:
        try:
            check_time(args.minutes)
            ours, theirs = (
                started(CONTESTANT, name, path, stack, warm_up=0) for name in (OURS, rival)
            )
            for duel in duels if precomputed else duels[1:]:
                for contestant in (ours, theirs):
                    for _ in range(args.warm_up):
                        contestant.step()
                duel.fight(ours, theirs, rounds=args.rounds)
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            for duel in duels:
                if len(duel.theirs) < args.rounds:  # the one before may be over
                    duel.failure = str(error).split("\n", 1)[0]
    return duels


def report(
    args: argparse.Namespace, facts: Facts, scoring: list[Duel], training: list[Duel]
) -> list[str]:
    """The result as lines of Markdown."""
    lines = [
        "# DPO against TRL",
        "",
        *environment(("torch", "megatron-core", "transformers", "peft", "trl")),
        "- Contestant: TRL's `DPOTrainer`, its defaults but for gradient checkpointing, which "
        "nobody does here",
        f"- Model: {args.model.name}; adapters of rank {RANK} on all seven matrices, or all "
        "weights; loss `sigmoid` with the default beta of both",
    ]
    lines += [
        f"- Pairs, {name}: {args.pairs} of answers that with their prompts have "
        f"{f['tokens']:.0f} tokens on average, of which {f['counted']:.0f} count; "
        f"{f['padding']:.0%} padding to expect in TRL's batches of {BATCH} pairs"
        for name, f in facts.items()
    ]
    lines += [
        f"- Step: {args.accumulation} micro-batch(es), of one pack of up to {args.seq_length} "
        f"tokens or of {BATCH} pairs; {args.threads} threads; {args.warm_up} step(s) of warm-up, "
        f"{args.rounds} measured of each, ours and TRL in turn",
        f"- Scoring: all pairs once, in {args.warm_up + args.rounds} steps, of which the first "
        f"{args.warm_up} are warm-up; TRL's batches are again of {BATCH} pairs, its default",
        f"- Allocator of both: {' '.join(f'{k}={v}' for k, v in ALLOCATOR.items())}",
        "- BF16: autocast over FP32 weights for TRL, whose default it is; BF16 weights with FP32 "
        "master copies for ours, the base of adapters in BF16 alone",
        "- Peak: the most resident memory of the process since its start (VmHWM), libraries, "
        "reading the model and scoring the reference included. Ratios are of ours by the rival in "
        "the same round, median (range); peaks are after the same duel",
        "- Targets: training 2 times TRL's speed with its precomputed reference on answers of "
        "variable length, 1.3 times on those of fixed length, at most 0.7 of its peak; scoring "
        "1.5 times",
        command(),
    ]
    if args.note:
        lines.append(f"- Note: {args.note}")
    lines += ["", "## Scoring the reference", "", *table(scoring)]
    lines += ["", "## Training", "", *table(training), ""]
    return lines


if __name__ == "__main__":
    main()
