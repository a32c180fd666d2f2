"""Arguments of tools/preprocess_data.py: a parser for each of its commands."""

import argparse
import os

from megatron_cgn.command_line import positive_int
from tokenizer.chat import bundled_templates


def index_parser(description: str) -> argparse.ArgumentParser:
    """Of the command without a name, which makes an index.

    Args:
        description: What ``--help`` says of the whole tool.
    """
    parser = _parser(description)
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
        type=positive_int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that encode (default: as many as usable cores, here %(default)s)",
    )
    _add_overwrite(parser)
    return parser


def merge_parser() -> argparse.ArgumentParser:
    """Of ``merge``."""
    parser = _parser("Write the documents of several indexes, in their order, as one index.")
    parser.add_argument(
        "--input", nargs="+", action="extend", required=True, metavar="P", help="indexes"
    )
    parser.add_argument("--output-prefix", required=True, metavar="P", help="output, no suffix")
    _add_overwrite(parser)
    return parser


def split_parser() -> argparse.ArgumentParser:
    """Of ``split``."""
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


def retokenize_parser() -> argparse.ArgumentParser:
    """Of ``retokenize``."""
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


def info_parser() -> argparse.ArgumentParser:
    """Of ``info``."""
    parser = _parser("Say what an index holds.")
    parser.add_argument("--input", required=True, metavar="P", help="index")
    parser.add_argument("--tokenizer", metavar="DIR", help="the tokenizer that made it")
    parser.add_argument(
        "--sample",
        type=positive_int,
        default=0,
        metavar="N",
        help="documents to show, evenly spread",
    )
    parser.set_defaults(parser=parser)
    return parser


def sft_parser() -> argparse.ArgumentParser:
    """Of ``--sft``."""
    parser = _parser(
        "Check conversations for instruction tuning and say what they hold. Records may be alpaca "
        "(instruction, input,\noutput, system, history), ShareGPT (conversations), OpenAI "
        "(messages) or prompt and completion.\nExits with 2 if a record is faulty, or listed by "
        "--validate as too long."
    )
    parser.add_argument("--sft", action="store_true", help="conversations, not documents")
    _add_look(parser, "conversations")
    counted = parser.add_mutually_exclusive_group()
    counted.add_argument(
        "--train-on-prompt", action="store_true", help="count as chat.train_on_prompt does"
    )
    counted.add_argument(
        "--last-turn-only", action="store_true", help="count as chat.last_turn_only does"
    )
    return parser


def preference_parser() -> argparse.ArgumentParser:
    """Of ``--preference``."""
    parser = _parser(
        "Check answers for preference learning and say what they hold. Records may be pairs "
        "(prompt, chosen, rejected;\nthe prompt may be part of both), rankings (prompt, answers) "
        "or single answers with a label (prompt,\ncompletion, label). Exits with 2 if a record is "
        "faulty, or listed by --validate as too long."
    )
    parser.add_argument(
        "--preference", action="store_true", help="answers that are compared, not documents"
    )
    _add_look(parser, "records")
    counted = parser.add_mutually_exclusive_group()
    counted.add_argument(
        "--last-turn-only", action="store_true", help="count as chat.last_turn_only does"
    )
    counted.add_argument(
        "--reward",
        action="store_true",
        help="measure lengths as stage rm reads answers: to their very last token",
    )
    return parser


def _add_look(parser: argparse.ArgumentParser, unit: str) -> None:
    """Add what is common to the commands that look at data before a run reads them."""
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
        "--seq-length", type=positive_int, metavar="N", help="count, and list, longer ones"
    )
    parser.add_argument(
        "--validate", action="store_true", help="list every faulty record with file, line, reason"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="faults and figures, an object a line")
    output.add_argument(
        "--show", type=positive_int, default=0, metavar="N", help=f"{unit} to show, marked"
    )


def _parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an existing index")
