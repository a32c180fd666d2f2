"""How fast, and in how much memory, is instruction tuning, against TRL and a bare loop?

python benchmarks/sft.py

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
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from contestant import RANK, Settings
from duel import (
    ALLOCATOR,
    OURS,
    Contestant,
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
from sft_records import write_conversations

CONTESTANT = Path(__file__).with_name("sft_contestant.py")
RIVALS = ("plain", "trl-padded", "trl-packed")
BATCH = 4
"""Conversations of a padded micro-batch."""


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    common_arguments(parser)
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=RIVALS)
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    args = parser.parse_args()
    duels: list[Duel] = []
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        facts = write_conversations(
            records, tokenizer=args.model, count=1200, seed=args.seed, batch=BATCH
        )
        write = writer(args, "sft", lambda: report(args, facts, duels))
        # The type that everybody uses first, in case there is no time for the other.
        for precision, mode in itertools.product(args.precisions, args.modes):
            for duel in compare(args, records, mode=mode, precision=precision):
                duels.append(duel)
                path = write()
    print(path.read_text())


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
        padded_batch=BATCH,
        accumulation=args.accumulation,
    )
    path = write_settings(records.with_name("settings.json"), settings)
    with contextlib.ExitStack() as stack:
        ours: Contestant | None = None
        for name in args.rivals:
            duel = Duel(setting=f"{mode}, {precision}", rival=name)
            try:
                check_time(args.minutes)
                ours = ours or started(CONTESTANT, OURS, path, stack, warm_up=args.warm_up)
                with contextlib.ExitStack() as until_decided:
                    rival = started(CONTESTANT, name, path, until_decided, warm_up=args.warm_up)
                    duel.fight(ours, rival, rounds=args.rounds)
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                duel.failure = str(error).split("\n", 1)[0]
            yield duel


def report(args: argparse.Namespace, facts: dict[str, float], duels: list[Duel]) -> list[str]:
    """The result as lines of Markdown."""
    lines = [
        "# Instruction tuning against TRL and a bare loop",
        "",
        *environment(("torch", "megatron-core", "transformers", "peft", "trl")),
        "- Contestants: TRL with its defaults but for gradient checkpointing, which nobody does "
        "here",
        f"- Model: {args.model.name}; adapters of rank {RANK} on all seven matrices, or all "
        "weights",
        f"- Data: conversations of {facts['tokens']:.0f} tokens on average, of which "
        f"{facts['counted']:.0f} count; {facts['padding']:.0%} padding in TRL's batches of {BATCH}",
        f"- Step: {args.accumulation} micro-batches, of one pack of {args.seq_length} tokens or "
        f"of {BATCH} conversations; {args.threads} threads; {args.warm_up} step(s) of warm-up, "
        f"{args.rounds} measured of each, ours and one rival in turn",
        f"- Allocator of all: {' '.join(f'{k}={v}' for k, v in ALLOCATOR.items())}",
        "- BF16: autocast over FP32 weights for TRL and the bare loop, whose default it is; BF16 "
        "weights with FP32 master copies for ours, the base of adapters in BF16 alone",
        "- Attention: of ours and of TRL packed ends at the conversation; the bare loop's tokens "
        "see the whole row before them, which is its fastest way",
        "- Peak: the most resident memory of the process since its start (VmHWM), libraries and "
        "reading the model included. Ratios are of ours by the rival in the same round, median "
        "(range); peaks are after the same duel",
        command(),
    ]
    if args.note:
        lines.append(f"- Note: {args.note}")
    lines += ["", *table(duels), ""]
    return lines


if __name__ == "__main__":
    main()
