r"""Make a corpus from raw documents: clean, deduplicate, redact, decontaminate, split.

    python tools/prepare_corpus.py --input domain=records/ general=web.jsonl.zst \
        --output corpus/ decontaminate.evaluation_files=[ceval.jsonl]

writes shards for ``preprocess_data.py`` into ``corpus/train`` and ``corpus/validation``, what was
left out and why into ``corpus/dropped``, and ``corpus/report.html`` to look at. Inputs: JSON Lines,
plain or compressed with gzip or zstd; Parquet and Arrow; text, Markdown, HTML, PDF and DOCX files;
folders of these; directories saved by `datasets`. Of equal documents, that of the source named
first is kept. Settings follow as ``step.name=value``; megatron_cgn/config/corpus.py has all of
them. An interrupted run goes on when the same command is given again. The output does not depend
on ``--workers``.

    python tools/prepare_corpus.py trace --document ID --in corpus/ indexes/ runs/
    python tools/prepare_corpus.py trace --checkpoint runs/cpt/checkpoints/step_0000100

say what became of a document, down to the checkpoints that consumed it, and what a checkpoint
consumed.
"""

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from megatron_cgn.command_line import positive_int
from megatron_cgn.config.corpus import CorpusConfig
from megatron_cgn.corpus.manifest import one_sided
from megatron_cgn.corpus.pipeline import prepare_corpus
from megatron_cgn.corpus.sources import Source
from megatron_cgn.errors import ConfigError, UserError

_OVERRIDE = re.compile(r"[a-z_]+\.[\w.]+=")
_DEFAULT_SOURCE = "domain"
_NAMED = re.compile(r"([\w-]+)=(.+)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="prepare_corpus: %(message)s")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if words[:1] == ["trace"]:
            return _trace(words[1:])
        return _prepare(_parser().parse_args(words))
    except UserError as error:
        print(f"prepare_corpus: {error}", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:
        print(
            "prepare_corpus: interrupted; the same command goes on where it stopped.",
            file=sys.stderr,
        )
        return 130


def _prepare(arguments: argparse.Namespace) -> int:
    inputs, overrides = _sorted_words(arguments.input, arguments.override)
    for option in ("license", "classification", "against"):  # these take what follows them too
        words, overrides = _sorted_words(getattr(arguments, option), overrides)
        setattr(arguments, option, words)
    settings = _settings(arguments, overrides)
    sources = _sources(inputs, arguments)
    with _Bars() as bars:
        manifest = prepare_corpus(
            sources,
            output=arguments.output,
            settings=settings,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            progress=bars.update,
        )
    _say(_summary(arguments.output, manifest))
    return 0


def _trace(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="prepare_corpus.py trace",
        description="Follow a document from the corpus to checkpoints, or a checkpoint back.",
        epilog="examples: prepare_corpus.py trace --document 'domain/manual.pdf' --in corpus/ "
        "indexes/ runs/; prepare_corpus.py trace --checkpoint runs/cpt/checkpoints/step_0000100 "
        "--output consumed.jsonl",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--document", metavar="ID", help="say what became of a document")
    what.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="say what a checkpoint has consumed (a run's directory: what it plans to)",
    )
    parser.add_argument(
        "--in",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        dest="places",
        help="corpora, and directories with indexes and runs; with --checkpoint only indexes that "
        "have been moved since",
    )
    parser.add_argument(
        "--output", type=Path, metavar="F", help="with --checkpoint: list its documents there"
    )
    arguments = parser.parse_args(words)
    # Here, because every worker imports this file too, and these take long.
    from megatron_cgn.corpus.trace import trace_document
    from megatron_cgn.data.taught import trace_checkpoint

    if arguments.document is None:
        lines = trace_checkpoint(
            arguments.checkpoint, output=arguments.output, directories=arguments.places
        )
    elif not arguments.places or arguments.output:
        parser.error("--document needs --in and takes no --output")
    else:
        lines = trace_document(arguments.document, arguments.places)
    _say(lines)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="[NAME=]F",
        help="files and folders, each with the name of its source or that of --source",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--source",
        metavar="NAME",
        help="source of inputs without a name (default: domain, or what a document says itself)",
    )
    parser.add_argument(
        "--license",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]L",
        help="where a document has none",
    )
    parser.add_argument(
        "--classification",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]C",
        help="where a document has none",
    )
    parser.add_argument("--field", metavar="F", help="field of the text (default: text)")
    parser.add_argument(
        "--max-bad-lines",
        metavar="N",
        help="unreadable lines and files that stop the run: a number, or a share below 1 "
        "(default: 0.01)",
    )
    parser.add_argument("--format", choices=("jsonl.zst", "parquet"), help="of the shards")
    parser.add_argument(
        "--against",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR",
        help="earlier corpora: drop what they hold",
    )
    parser.add_argument("--config", metavar="FILE", help="settings, a YAML file")
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: one a core)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus that is there")
    parser.add_argument("override", nargs="*", metavar="step.name=value", help="settings")
    return parser


def _sorted_words(inputs: list[str], overrides: list[str]) -> tuple[list[str], list[str]]:
    """Tell settings that follow an option from its values: a source's name has no dot."""
    paths = [word for word in inputs if os.path.exists(word) or not _OVERRIDE.match(word)]
    return paths, [word for word in inputs if word not in paths] + overrides


def _settings(arguments: argparse.Namespace, overrides: list[str]) -> CorpusConfig:
    """Options are settings by another name."""
    options = {
        "read.field": arguments.field,
        "read.max_bad": arguments.max_bad_lines,
        "write.format": arguments.format,
        "deduplicate.prior": [str(Path(path) / "signatures") for path in arguments.against] or None,
    }
    given = {key: value for key, value in options.items() if value is not None}
    for word in overrides:
        if (key := word.partition("=")[0]) in given:
            raise ConfigError(f"{key}: is given twice, as an option and as {word}. Give it once.")
    from megatron_cgn.config.load import load_corpus_config  # not in workers: it takes long

    return load_corpus_config(overrides, file=arguments.config, values=given)


def _sources(inputs: list[str], arguments: argparse.Namespace) -> list[Source]:
    """Group inputs by the names of their sources, in the order in which those first appear."""
    paths: dict[str, list[str]] = {}
    unnamed = arguments.source or _DEFAULT_SOURCE
    named = {arguments.source}
    for word in inputs:
        match = None if os.path.exists(word) else _NAMED.fullmatch(word)
        name, path = (match[1], match[2]) if match else (unnamed, word)
        paths.setdefault(name, []).append(path)
        named |= {name} if match else set()
    licenses = _by_source(arguments.license, list(paths), "--license")
    classes = _by_source(arguments.classification, list(paths), "--classification")
    return [
        Source(
            name=name,
            paths=tuple(found),
            named=name in named,
            license=licenses.get(name),
            classification=classes.get(name),
        )
        for name, found in paths.items()
    ]


def _by_source(words: list[str], names: list[str], option: str) -> dict[str, str]:
    """Values of sources, from ``NAME=VALUE`` for one and ``VALUE`` for all others."""
    values: dict[str, str] = {}
    rest: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            rest.append(word)
        elif name not in names:
            raise ConfigError(
                f"{option} {word}: there is no source {name}; the sources are {', '.join(names)}."
            )
        else:
            values[name] = value
    if len(rest) > 1:
        raise ConfigError(f"{option}: {' and '.join(rest)} are given for all sources. Give one.")
    return {name: rest[0] for name in names if rest} | values


class _Bars:
    """A progress bar for each pass, one after another."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._name = ""

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, name: str, done: int, total: int) -> None:
        if name != self._name or self._bar is None:
            self.__exit__()
            in_bytes = name in ("hashing", "reading")
            self._bar = tqdm(
                total=total,
                desc=name,
                unit="B" if in_bytes else "",
                unit_scale=in_bytes,
                disable=not sys.stderr.isatty(),
            )
            self._name = name
        self._bar.update(done)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Let a termination unwind like Ctrl-C."""
    raise KeyboardInterrupt


def _summary(output: str, manifest: dict[str, Any]) -> Iterator[str]:
    counts = manifest["counts"]
    yield f"{output}: {len(manifest['files'])} files; look at {Path(output) / 'report.html'}"
    yield f"  {'source':<16}{'read':>12}{'dropped':>12}{'train':>12}{'validation':>12}"
    for source in manifest["sources"]:
        name = source["name"]
        numbers = (
            counts["documents"].get(name, 0),
            sum(counts["dropped"].get(name, {}).values()),
            counts["train"].get(name, {}).get("documents", 0),
            counts["validation"].get(name, {}).get("documents", 0),
        )
        yield f"  {name:<16}" + "".join(f"{number:>12,}" for number in numbers)
    reasons: dict[str, int] = {}
    for dropped in counts["dropped"].values():
        for reason, number in dropped.items():
            reasons[reason] = reasons.get(reason, 0) + number
    for reason in sorted(reasons, key=lambda reason: -reasons[reason]):
        yield f"  {reason:<40}{reasons[reason]:>12,}"
    yield from one_sided(manifest)


def _say(lines: Iterable[str]) -> None:
    """Print; who has read enough, such as ``head``, may close the pipe."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # What is left in the buffer goes nowhere, else Python complains of it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
