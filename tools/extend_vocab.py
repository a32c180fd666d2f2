r"""Add the words of a domain to a tokenizer and its model, or say that it is not worth it.

    python tools/extend_vocab.py --model models/qwen3-8b --corpus domain.jsonl \
        --general wiki.jsonl --num-tokens auto --output models/qwen3-8b-nuclear

continues the tokenizer's merges on the corpus, measures on held-out text what sizes are worth,
writes tokenizer and model with the rows of new tokens, and proves that nothing old was lost.
``--model`` is a Hugging Face directory, a tokenizer alone, or a checkpoint of ours; a copy is
written, the original stays. ``--report-only`` measures and writes nothing but report.html and
report.json. Then index the documents again, with the new tokenizer: docs/guide-vocab.md.
When models were trained with the old and with the new vocabulary,

    python tools/extend_vocab.py compare --report models/qwen3-8b-nuclear \
        --before runs/old/metrics.jsonl --after runs/new/metrics.jsonl

adds their held-out bits per byte to the report.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from tqdm import tqdm

from megatron_cgn.command_line import natural_int, positive_int
from megatron_cgn.errors import UserError
from megatron_cgn.quiet import quiet_dependencies

# Worker processes import this file again and need no PyTorch: what does is imported in functions.
if TYPE_CHECKING:
    from megatron_cgn.vocabulary.settings import Settings

AUTO = "auto"
_stopped = threading.Event()
"""Set by a signal, so that the threads that write stop too."""
_FILES = {
    "--corpus": "documents of the domain",
    "--held-out": "documents to measure on, no part of the corpus (default: one in ten of it, "
    "which is then not counted)",
    "--general": "other documents, which must not become longer",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        words: Its words; None for those of this process.

    Returns:
        0; 2 after a fault that the user can mend; 1 if a proof failed; 130 if interrupted.
    """
    _quiet()
    from megatron_cgn.vocabulary.report import HTML_FILE, add_bits_per_byte
    from megatron_cgn.vocabulary.run import ProofFailed

    words = sys.argv[1:] if words is None else words
    compares = list(words[:1]) == ["compare"]
    arguments = _compare_parser().parse_args(words[1:]) if compares else _parser().parse_args(words)
    logging.basicConfig(format="extend_vocab: %(message)s")
    logging.getLogger("megatron_cgn").setLevel(logging.INFO)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    try:
        if compares:
            add_bits_per_byte(arguments.report, before=arguments.before, after=arguments.after)
            print(f"wrote {arguments.report / HTML_FILE}")
        else:
            _extend(arguments)
    except (UserError, ProofFailed) as error:
        print(f"extend_vocab: {error}", file=sys.stderr)
        return UserError.exit_code if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("extend_vocab: interrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0


def _extend(arguments: argparse.Namespace) -> None:
    from megatron_cgn.vocabulary.run import extend_vocabulary

    outcome = extend_vocabulary(_settings(arguments), console=_Terminal())
    if not outcome.is_written:
        print("nothing was written: --report-only writes the report, --num-tokens N insists.")
        return
    print(f"wrote {arguments.output}")
    if outcome.num_tokens:
        print(f"next: index again with --tokenizer {arguments.output}; see docs/guide-vocab.md")


class _Terminal:
    """Results on standard output; bars on standard error, if that is a terminal."""

    def say(self, text: str) -> None:
        """Print."""
        print(text, flush=True)

    @contextlib.contextmanager
    def bar(self, title: str, *, total: int, unit: str) -> Iterator[Callable[[int], object]]:
        """Show how far one step has come."""
        divisor = 1024 if unit == "B" else 1000
        with tqdm(
            total=total,
            desc=title,
            unit=unit,
            unit_scale=True,
            unit_divisor=divisor,
            leave=False,
            disable=None,
        ) as shown:

            def advance(count: int) -> None:
                if _stopped.is_set():
                    raise KeyboardInterrupt
                shown.update(count)

            yield advance


def _quiet() -> None:
    """Leave out what transformers says while it proves something; it must not be imported yet."""
    quiet_dependencies()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Unwind, so that the unfinished directory is removed; only once, so that it is."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    _stopped.set()
    raise KeyboardInterrupt


def _settings(arguments: argparse.Namespace) -> "Settings":
    from megatron_cgn.vocabulary.settings import Settings
    from tokenizer.filters import Rules

    number = arguments.num_tokens
    return Settings(
        model=arguments.model,
        corpus=tuple(arguments.corpus),
        output=arguments.output,
        num_tokens=None if number == AUTO else number,
        report_only=arguments.report_only,
        held_out=tuple(arguments.held_out),
        general=tuple(arguments.general),
        terms=arguments.terms,
        deny=arguments.deny,
        rules=Rules(
            min_frequency=arguments.min_frequency,
            min_spread=arguments.min_spread,
            max_characters=arguments.max_characters,
            marks=not arguments.words_only,
            particles=not arguments.words_only,
        ),
        init=arguments.init,
        seed=arguments.seed,
        sizes=tuple(arguments.sweep),
        text_field=arguments.field,
        workers=arguments.workers,
        max_corpus_mb=arguments.max_corpus_mb,
        make_vocab_size_divisible_by=arguments.make_vocab_size_divisible_by,
        tensor_parallel=arguments.tensor_parallel,
        planned_training_mb=arguments.planned_training_mb,
        domain_share=arguments.domain_share,
        seq_length=arguments.seq_length,
        overwrite=arguments.overwrite,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --model DIR --corpus F... --output DIR [--num-tokens N|auto] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_inputs(parser)
    _add_choice(parser)
    _add_rows(parser)
    return parser


def _compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="extend_vocab.py compare",
        description="Add held-out bits per byte of two runs to a report that was written.",
    )
    for name, text in (("before", "the old"), ("after", "the new")):
        parser.add_argument(
            f"--{name}", type=Path, required=True, metavar="F",
            help=f"metrics.jsonl of a run with {text} vocabulary",
        )  # fmt: skip
    parser.add_argument("--report", type=Path, required=True, metavar="DIR", help="an --output")
    return parser


def _defaults() -> "Settings":
    from megatron_cgn.vocabulary.settings import Settings

    return Settings(model=Path(), corpus=(), output=Path())


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    defaults = _defaults()
    group = parser.add_argument_group("what is read and written")
    group.add_argument("--model", type=Path, required=True, metavar="DIR", help="what to extend")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="where to write")
    for name, text in _FILES.items():
        group.add_argument(
            name, nargs="+", action="extend", type=Path, default=[], required=name == "--corpus",
            metavar="F", help=text,
        )  # fmt: skip
    group.add_argument("--field", default="text", help="field of the text (default: %(default)s)")
    group.add_argument(
        "--max-corpus-mb", type=positive_int, default=defaults.max_corpus_mb, metavar="MB",
        help="of a corpus with more text, count a sample of so many; each MB takes some 9 MB of "
        "memory (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--workers", type=positive_int, default=len(os.sched_getaffinity(0)), metavar="N",
        help="processes that count (default: as many as usable cores, here %(default)s)",
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace an --output of this tool")


def _add_choice(parser: argparse.ArgumentParser) -> None:
    from tokenizer.filters import Rules

    rules, defaults = Rules(), _defaults()
    group = parser.add_argument_group("which tokens")
    group.add_argument(
        "--num-tokens",
        type=_number,
        default=AUTO,
        metavar="N|auto",
        help="new ids; auto takes what is recommended, which may be none (default)",
    )
    group.add_argument(
        "--terms", type=Path, metavar="FILE", help="terms to be one token, a line each"
    )
    group.add_argument("--deny", type=Path, metavar="FILE", help="what shall be none, a line each")
    group.add_argument(
        "--min-frequency", type=positive_int, default=rules.min_frequency, metavar="N",
        help="times a token must be met in the corpus (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--min-spread", type=positive_int, default=rules.min_spread, metavar="N",
        help="documents it must be in (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--max-characters", type=positive_int, default=rules.max_characters, metavar="N",
        help="its length at most (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--sweep", type=natural_int, nargs="+", default=defaults.sizes, metavar="N",
        help=f"sizes to measure (default: {' '.join(map(str, defaults.sizes))})",
    )  # fmt: skip
    group.add_argument(
        "--words-only", action="store_true",
        help="none with a punctuation mark, or with a particle at an end (的反应)",
    )  # fmt: skip
    group.add_argument(
        "--planned-training-mb", type=positive_int, metavar="MB",
        help="text that will be trained on, for the advice (default: the corpus once)",
    )  # fmt: skip
    group.add_argument(
        "--domain-share", type=_share, default=defaults.domain_share, metavar="X",
        help="share of it that is of the domain (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--seq-length", type=positive_int, default=defaults.seq_length, metavar="N",
        help="tokens of its sequences, for the FLOPs (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--report-only", action="store_true", help="measure, and write nothing but the report"
    )


def _add_rows(parser: argparse.ArgumentParser) -> None:
    from megatron_cgn.model.resize import METHODS

    group = parser.add_argument_group("the model's new rows")
    group.add_argument("--init", choices=METHODS, help="how they begin (default: mean)")
    group.add_argument("--seed", type=int, default=1234, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--make-vocab-size-divisible-by", type=positive_int, default=128, metavar="N",
        help="rows of a tensor-parallel rank are a multiple of this (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--tensor-parallel", type=positive_int, default=1, metavar="N",
        help="ranks that will share the rows (default: %(default)s)",
    )  # fmt: skip


def _number(text: str) -> int | str:
    return AUTO if text == AUTO else positive_int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0, at most 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
