r"""Turn documents into an indexed dataset for training, and indexes into others.

    python tools/preprocess_data.py --input corpus.jsonl --tokenizer models/qwen3-8b \
        --output-prefix data/domain --workers 8

writes ``data/domain.bin``, ``.idx`` (Megatron's format), ``.json`` (which tokenizer made them,
from what) and ``.documents.parquet`` (where each document comes from: its fields ``id``,
``source``, ``license``, ``classification`` and ``hash``). Inputs: JSONL, plain or compressed with
gzip or zstd; Parquet; a directory saved by Hugging Face `datasets`. The output does not depend on
``--workers``. While it runs, ``data/.domain.lock`` keeps other runs from the same prefix; a killed
run's stops nobody. Indexes are looked into, merged and split by

    python tools/preprocess_data.py info --input data/domain --tokenizer models/qwen3-8b --sample 3
    python tools/preprocess_data.py merge --input data/a data/b --output-prefix data/both
    python tools/preprocess_data.py split --input data/domain \
        --output-prefix data/train data/valid --hold-out 0.01

and made again with another tokenizer, such as an extended one, without the documents' files by

    python tools/preprocess_data.py retokenize --input data/domain \
        --old-tokenizer models/qwen3-8b --tokenizer models/qwen3-8b-nuclear \
        --output-prefix data/domain-nuclear

Conversations for instruction tuning are tokenised by the training run itself. Here they are checked
and looked at before: which tokens count, how long they are, and every fault by file and line.

    python tools/preprocess_data.py --sft --input qa.jsonl --tokenizer models/qwen3-8b --show 3
    python tools/preprocess_data.py --sft --input qa.jsonl --tokenizer models/qwen3-8b \
        --seq-length 4096 --validate

So are answers for preference learning, which are compared or have labels:

    python tools/preprocess_data.py --preference --input pairs.jsonl --tokenizer models/qwen3-8b \
        --seq-length 4096 --validate
"""

import argparse
import functools
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from preprocess_arguments import (
    index_parser,
    info_parser,
    merge_parser,
    preference_parser,
    retokenize_parser,
    sft_parser,
    split_parser,
)
from preprocess_sft import check_conversations, check_preferences, progress
from tqdm import tqdm

from megatron_cgn.data.describe import Description, describe
from megatron_cgn.data.indexed import Sidecar, check_index
from megatron_cgn.data.preprocess import Summary, preprocess
from megatron_cgn.data.readers import check_inputs
from megatron_cgn.data.reindex import merge, split
from megatron_cgn.data.retokenize import retokenize
from megatron_cgn.errors import UserError

_MOST_SHOWN = 10


def main() -> int:
    """Run the command line; returns the exit code."""
    given = sys.argv[1:]
    if given and given[0] in _COMMANDS:
        command, given = given[0], given[1:]
    else:
        asked = (name for name in ("sft", "preference") if f"--{name}" in given)
        command = next(asked, "index")
    parser, run = _COMMANDS[command]
    arguments = parser().parse_args(given)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Texts may hold what the terminal's encoding, or any, cannot write: half a surrogate pair.
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _interrupt)
    logging.basicConfig(format="preprocess_data: %(message)s")
    logging.getLogger("megatron_cgn").setLevel(logging.INFO)
    try:
        return run(arguments) or 0
    except UserError as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:
        print("preprocess_data: interrupted; nothing was written.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _index(arguments: argparse.Namespace) -> None:
    # What is left to the original tokenizer goes to its library's threads: no more than asked for.
    os.environ["RAYON_NUM_THREADS"] = str(arguments.workers)
    # This process is copied while it runs, and a copy lacks all threads but one: have none that
    # libraries start for themselves. (NumPy's end before the copy is made and begin anew after. One
    # that Arrow reads tables with stays: it is idle then, and no copy reads tables.)
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # Arrow's allocator
    tqdm.monitor_interval = 0
    with progress("indexing", total=check_inputs(arguments.input), unit="B") as bar:
        summary = preprocess(
            arguments.input,
            tokenizer_dir=arguments.tokenizer,
            output_prefix=arguments.output_prefix,
            field=arguments.field,
            append_eod=arguments.append_eod,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            report=bar.update,
        )
    _print_summary(arguments.output_prefix, summary)


def _merge(arguments: argparse.Namespace) -> None:
    tokens = sum(check_index(prefix).tokens for prefix in arguments.input)
    with progress("merging", total=tokens, unit=" tokens") as bar:
        sidecar = merge(
            arguments.input,
            output_prefix=arguments.output_prefix,
            overwrite=arguments.overwrite,
            report=bar.update,
        )
    _print_sizes(arguments.output_prefix, sidecar)


def _split(arguments: argparse.Namespace) -> None:
    tokens = check_index(arguments.input).tokens
    with progress("splitting", total=tokens, unit=" tokens") as bar:
        sidecars = split(
            arguments.input,
            output_prefixes=arguments.output_prefix,
            hold_out=arguments.hold_out,
            overwrite=arguments.overwrite,
            report=bar.update,
        )
    for prefix, sidecar in zip(arguments.output_prefix, sidecars, strict=True):
        _print_sizes(prefix, sidecar)


def _retokenize(arguments: argparse.Namespace) -> None:
    tokens = check_index(arguments.input).tokens
    with progress("retokenizing", total=tokens, unit=" tokens") as bar:
        done = retokenize(
            arguments.input,
            old_tokenizer=arguments.old_tokenizer,
            tokenizer=arguments.tokenizer,
            output_prefix=arguments.output_prefix,
            overwrite=arguments.overwrite,
            report=bar.update,
        )
    _print_sizes(arguments.output_prefix, done.sidecar)
    change = 100 * (done.sidecar.tokens / done.old_tokens - 1)
    print(f"  tokens before    {done.old_tokens:>15,} ({change:+.1f} %)")


def _info(arguments: argparse.Namespace) -> None:
    if arguments.sample and not arguments.tokenizer:
        arguments.parser.error("--sample needs --tokenizer, to turn ids into text")
    described = describe(
        arguments.input, tokenizer_dir=arguments.tokenizer, sample=arguments.sample
    )
    _print_description(arguments.input, described)


_COMMANDS: dict[
    str, tuple[Callable[[], argparse.ArgumentParser], Callable[[argparse.Namespace], int | None]]
] = {
    "sft": (sft_parser, check_conversations),
    "preference": (preference_parser, check_preferences),
    "index": (functools.partial(index_parser, __doc__), _index),
    "merge": (merge_parser, _merge),
    "split": (split_parser, _split),
    "retokenize": (retokenize_parser, _retokenize),
    "info": (info_parser, _info),
}


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Let a termination unwind like Ctrl-C, so that temporary files are removed."""
    raise KeyboardInterrupt


def _print_sizes(prefix: str, facts: Sidecar) -> None:
    print(f"{prefix} ({facts.dtype}, tokenizer {facts.tokenizer_name})")
    print(f"  documents        {facts.documents:>15,}")
    print(f"  tokens           {facts.tokens:>15,}")
    print(f"  bytes of text    {facts.text_bytes:>15,}")
    if facts.text_bytes:
        print(f"  tokens per byte  {facts.tokens / facts.text_bytes:>15.4f}")


def _print_summary(prefix: str, summary: Summary) -> None:
    _print_sizes(prefix, summary.sidecar)
    seconds = max(summary.seconds, 1e-9)
    if summary.empty:
        print(f"  empty, skipped   {summary.empty:>15,}")
    if summary.repaired:
        print(f"  lone surrogates  {summary.repaired:>15,} (documents in which they became U+FFFD)")
    speed = summary.sidecar.text_bytes / seconds / 1e6
    print(f"  seconds          {seconds:>15.1f} ({speed:.1f} MB/s)")


def _print_description(prefix: str, described: Description) -> None:
    _print_sizes(prefix, described.sidecar)
    print(f"  median document  {described.median_tokens:>15,.0f} tokens")
    longest = f"{described.longest_tokens:>15,} tokens (document {described.longest_document})"
    print(f"  longest document {longest}")
    _print_counts(
        "documents of each input", [(s.name, s.documents) for s in described.sidecar.sources]
    )
    for column, counter in described.counts.items():
        known = [(name or "not said", count) for name, count in counter.most_common()]
        _print_counts(f"documents of each {column}", known)
    if not described.counts:
        print("  no .documents.parquet: it does not say where its documents come from")
    for number, text in described.sample:
        print(f"--- document {number}\n{text}")


def _print_counts(title: str, counts: Sequence[tuple[str, int]]) -> None:
    print(f"  {title}")
    for name, count in counts[:_MOST_SHOWN]:
        print(f"    {count:>14,}  {name}")
    if len(counts) > _MOST_SHOWN:
        rest = sum(count for _, count in counts[_MOST_SHOWN:])
        print(f"    {rest:>14,}  {len(counts) - _MOST_SHOWN} others")


if __name__ == "__main__":
    sys.exit(main())
