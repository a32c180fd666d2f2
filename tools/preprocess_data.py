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
    python tools/preprocess_data.py --sft --input qa.jsonl --tokenizer models/qwen3-8b \\
        --seq-length 4096 --validate
"""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import FrameType
from typing import Any

from tqdm import tqdm

from megatron_cgn.data.conversation_report import Counting, show, summary, survey
from megatron_cgn.data.conversations import Conversation, Fault
from megatron_cgn.data.describe import Description, describe
from megatron_cgn.data.indexed import Sidecar, check_index
from megatron_cgn.data.preprocess import Summary, preprocess
from megatron_cgn.data.readers import check_inputs
from megatron_cgn.data.reindex import merge, split
from megatron_cgn.data.retokenize import retokenize
from megatron_cgn.errors import UserError
from tokenizer.chat import ChatTemplate, EncodedChat, bundled_templates

_MOST_SHOWN = 10


def main() -> int:
    """Run the command line; returns the exit code."""
    given = sys.argv[1:]
    if given and given[0] in _COMMANDS:
        command, given = given[0], given[1:]
    else:
        command = "sft" if "--sft" in given else "index"
    parser, run = _COMMANDS[command]
    arguments = parser().parse_args(given)
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
    with _progress("indexing", total=check_inputs(arguments.input), unit="B") as bar:
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
    with _progress("merging", total=tokens, unit=" tokens") as bar:
        sidecar = merge(
            arguments.input,
            output_prefix=arguments.output_prefix,
            overwrite=arguments.overwrite,
            report=bar.update,
        )
    _print_sizes(arguments.output_prefix, sidecar)


def _split(arguments: argparse.Namespace) -> None:
    tokens = check_index(arguments.input).tokens
    with _progress("splitting", total=tokens, unit=" tokens") as bar:
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
    with _progress("retokenizing", total=tokens, unit=" tokens") as bar:
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


def _sft(arguments: argparse.Namespace) -> int:
    chat = ChatTemplate.open(arguments.tokenizer, template=arguments.chat_template)
    counting = Counting(
        train_on_prompt=arguments.train_on_prompt,
        last_turn_only=arguments.last_turn_only,
        seq_length=arguments.seq_length,
    )
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    shown = 0

    with _progress("reading", total=check_inputs(arguments.input), unit="B") as bar:

        def on_fault(fault: Fault) -> None:
            if arguments.validate:
                line = json.dumps(asdict(fault), ensure_ascii=False) if arguments.json else fault
                bar.write(str(line), file=sys.stdout)

        def on_conversation(conversation: Conversation, encoded: EncodedChat) -> None:
            nonlocal shown
            if shown < arguments.show:
                shown += 1
                text = show(conversation, encoded, chat=chat, counting=counting, colour=colour)
                bar.write(text, file=sys.stdout)

        found = survey(
            arguments.input,
            chat=chat,
            counting=counting,
            on_fault=on_fault,
            on_conversation=on_conversation,
            report=bar.update,
        )
    if arguments.json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        print(f"{', '.join(arguments.input)} (chat template {chat.name})")
        print("\n".join(summary(found, counting=counting)))
        if found.faults and not arguments.validate:
            print("--validate names every faulty record by file and line.")
    faulty = found.faults.total() + (found.too_long if arguments.validate else 0)
    return UserError.exit_code if faulty else 0


def _index_parser() -> argparse.ArgumentParser:
    parser = _parser(__doc__)
    parser.add_argument(
        "--input", nargs="+", action="extend", required=True, metavar="F", help="what to read"
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face directory")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="output, no suffix")
    parser.add_argument("--field", default="text", help="field of the text (default: %(default)s)")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the end-of-document token",
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that encode (default: as many as usable cores, here %(default)s)",
    )
    _add_overwrite(parser)
    return parser


def _merge_parser() -> argparse.ArgumentParser:
    parser = _parser("Write the documents of several indexes, in their order, as one index.")
    parser.add_argument(
        "--input", nargs="+", action="extend", required=True, metavar="P", help="indexes"
    )
    parser.add_argument("--output-prefix", required=True, metavar="P", help="output, no suffix")
    _add_overwrite(parser)
    return parser


def _split_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "Deal the documents of an index out to several: cut, in their order, into parts of about "
        "as many tokens each; or, with --hold-out, held out by a hash of their ids, so that a "
        "document stays on its side when others are added."
    )
    parser.add_argument("--input", required=True, metavar="P", help="index")
    parser.add_argument(
        "--output-prefix", nargs="+", required=True, metavar="Q", help="two outputs or more"
    )
    parser.add_argument(
        "--hold-out", type=float, metavar="SHARE", help="of the documents, for the second output"
    )
    _add_overwrite(parser)
    return parser


def _retokenize_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "Write the documents of an index with the ids of another tokenizer: each is turned back "
        "into its text, which must give the old ids again, and encoded anew. Order and lineage "
        "stay."
    )
    parser.add_argument("--input", required=True, metavar="P", help="index")
    parser.add_argument(
        "--old-tokenizer", required=True, metavar="DIR", help="the tokenizer that made it"
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="the other one")
    parser.add_argument("--output-prefix", required=True, metavar="Q", help="output, no suffix")
    _add_overwrite(parser)
    return parser


def _info_parser() -> argparse.ArgumentParser:
    parser = _parser("Say what an index holds.")
    parser.add_argument("--input", required=True, metavar="P", help="index")
    parser.add_argument("--tokenizer", metavar="DIR", help="the tokenizer that made it")
    parser.add_argument(
        "--sample", type=_positive, default=0, metavar="N", help="documents to show, evenly spread"
    )
    parser.set_defaults(parser=parser)
    return parser


def _sft_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "Check conversations for instruction tuning and say what they hold. Records may be alpaca "
        "(instruction, input,\noutput, system, history), ShareGPT (conversations), OpenAI "
        "(messages) or prompt and completion.\nExits with 2 if a record is faulty, or listed by "
        "--validate as too long."
    )
    parser.add_argument("--sft", action="store_true", help="conversations, not documents")
    parser.add_argument(
        "--input", nargs="+", action="extend", required=True, metavar="F", help="what to read"
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face directory")
    parser.add_argument(
        "--chat-template",
        metavar="T",
        help=f"the tokenizer's own if not given; a .jinja file or {', '.join(bundled_templates())}",
    )
    parser.add_argument(
        "--seq-length", type=_positive, metavar="N", help="count, and list, longer ones"
    )
    parser.add_argument(
        "--validate", action="store_true", help="list every faulty record with file, line, reason"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="faults and figures, an object a line")
    output.add_argument(
        "--show", type=_positive, default=0, metavar="N", help="conversations to show, marked"
    )
    counted = parser.add_mutually_exclusive_group()
    counted.add_argument(
        "--train-on-prompt", action="store_true", help="count as chat.train_on_prompt does"
    )
    counted.add_argument(
        "--last-turn-only", action="store_true", help="count as chat.last_turn_only does"
    )
    return parser


def _parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an existing index")


_COMMANDS: dict[
    str, tuple[Callable[[], argparse.ArgumentParser], Callable[[argparse.Namespace], int | None]]
] = {
    "sft": (_sft_parser, _sft),
    "index": (_index_parser, _index),
    "merge": (_merge_parser, _merge),
    "split": (_split_parser, _split),
    "retokenize": (_retokenize_parser, _retokenize),
    "info": (_info_parser, _info),
}


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return value


def _progress(title: str, *, total: int, unit: str) -> "tqdm[Any]":
    return tqdm(
        total=total, unit=unit, unit_scale=True, desc=title, disable=not sys.stderr.isatty()
    )


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
