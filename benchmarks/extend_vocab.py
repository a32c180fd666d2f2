"""How fast, and in how much memory, is a vocabulary extended, against `tokenizer-extension`?

python benchmarks/extend_vocab.py --tokenizer models/qwen3-8b --megabytes 100 --num-tokens 10000 \
    --tokenizer-extension-python ../tokenizer-extension-env/bin/python --theirs-megabytes 20

Both choose as many new tokens from the same corpus, in turn, each in processes of its own; their
seconds are those from start to end. Ours reads, cuts and counts the corpus with all cores, chooses
and writes the tokenizer. Theirs (github.com/taidopurason/tokenizer-extension: the toolkit of
arXiv 2512.03989, not in the package index) is pure Python in one process, and is given a part of
the corpus where all of it takes too long: the ratio is then that of both on this part. What the
tokens are worth is counted on held-out text.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from hardware import RESULTS, environment
from preprocess_corpus import write_corpus
from process_tree import Usage, run_measured
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
DEMO = ROOT / ".cache/smollm2-135m-instruct"
OURS, THEIRS = "ours", "tokenizer-extension"

_OURS = """
import sys
from pathlib import Path
from megatron_cgn.vocabulary.count import count_words
from tokenizer.extend import open_extender
from tokenizer.filters import Rules

if __name__ == "__main__":
    source, corpus, output, number, workers = sys.argv[1:]
    extender = open_extender(source)
    words = count_words([corpus], split=extender.splitter(), workers=int(workers))
    extension = extender.extend(words, num_tokens=int(number), rules=Rules())
    Path(output).mkdir()
    extender.write(extension, Path(output))
"""
_THEIRS = """
import json
import sys
from transformers import AutoTokenizer
from tokenizer_extension.extension import extend_tokenizer
from tokenizer_extension.train_vocab_extension import train_vocab_extension

source, corpus, output, number, _ = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
with open(corpus, encoding="utf-8") as lines:
    texts = (json.loads(line)["text"] for line in lines)
    found = train_vocab_extension(tokenizer=tokenizer, corpus=texts, extension_size=int(number))
extend_tokenizer(
    tokenizer,
    new_vocab=found["vocab"],
    new_merges=found["merges"],
    n_tokens=int(number),
    keep_added_token_positions=True,
)
tokenizer.save_pretrained(output)
"""


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokenizer", type=Path, default=DEMO, help="Hugging Face directory")
    parser.add_argument("--tokenizer-extension-python", type=Path, help="python that has it")
    parser.add_argument("--corpus", type=Path, help="JSONL; without it, one is made")
    parser.add_argument("--held-out", type=Path, help="JSONL; without it, one is made")
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--theirs-megabytes", type=float, default=10.0, help="0 for all")
    parser.add_argument("--chinese", type=float, default=0.5, help="share of the documents")
    parser.add_argument("--num-tokens", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--directory", type=Path, default=Path("runs/benchmark-extend-vocab"))
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu", help="name in the file")
    parser.add_argument("--note", default="", help="a line about the circumstances")
    args = parser.parse_args()
    shutil.rmtree(args.directory, ignore_errors=True)
    args.directory.mkdir(parents=True)
    args.directory = args.directory.resolve()
    try:
        text = "\n".join(measure(args))
    finally:
        shutil.rmtree(args.directory, ignore_errors=True)
    month = datetime.date.today().strftime("%Y%m")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"extend_vocab_{args.hardware}_{month}.md").write_text(text)
    print(text)


def measure(args: argparse.Namespace) -> list[str]:
    """Run the contenders in turn; the lines of the report."""
    corpora = {"all": args.directory / "all.jsonl"}
    if args.corpus is not None:
        copy_lines(args.corpus, corpora["all"], args.megabytes)
    else:
        write_corpus(corpora["all"], megabytes=args.megabytes, chinese_share=args.chinese)
    held_out = args.held_out
    if held_out is None:
        # The same seed makes the same words: what comes behind the corpus is of its language.
        longer = args.directory / "longer.jsonl"
        write_corpus(longer, megabytes=args.megabytes + 2, chinese_share=args.chinese)
        held_out = tail(longer, corpora["all"].stat().st_size)
    plan = [("all", OURS)]
    if args.tokenizer_extension_python is not None:
        name = "all"
        if 0 < args.theirs_megabytes < args.megabytes:
            name = "part"
            corpora[name] = args.directory / "part.jsonl"
            copy_lines(corpora["all"], corpora[name], args.theirs_megabytes)
            plan.append((name, OURS))
        plan.append((name, THEIRS))
    results: dict[tuple[str, str], list[Usage]] = {key: [] for key in plan}
    # The first round is the warm-up: programs and libraries come into the page cache.
    for number in range(args.repeats + 1):
        for corpus, contender in plan:
            used = run(args, corpora[corpus], contender, args.directory / f"{corpus}-{contender}")
            print(number, corpus, contender, used, file=sys.stderr, flush=True)
            if number:
                results[corpus, contender].append(used)
    worth = {
        key: count_tokens(args.directory / "-".join(key) / "tokenizer", held_out) for key in plan
    }
    sizes = {name: path.stat().st_size for name, path in corpora.items()}
    return report(args, results, sizes, worth, before=count_tokens(args.tokenizer, held_out))


def run(args: argparse.Namespace, corpus: Path, contender: str, folder: Path) -> Usage:
    """Extend once, in a process of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    script = folder / "extend.py"  # a file, because our processes are spawned
    script.write_text(_OURS if contender == OURS else _THEIRS)
    python = str(args.tokenizer_extension_python.absolute()) if contender == THEIRS else None
    settings = {"PYTHONPATH": str(ROOT)} if contender == OURS else {}
    command = [python or sys.executable, str(script), str(args.tokenizer.resolve()), str(corpus)]
    command += [str(folder / "tokenizer"), str(args.num_tokens), str(args.workers)]
    variables = {**os.environ, **settings, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return run_measured(command, environment=variables, cwd=folder)


def texts_of(path: Path) -> Iterator[str]:
    """Texts of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def count_tokens(directory: Path, held_out: Path) -> int:
    """Tokens of held-out text."""
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.encode_special_tokens = True
    encodings = backend.encode_batch_fast(list(texts_of(held_out)), add_special_tokens=False)
    return sum(len(encoding.ids) for encoding in encodings)


def copy_lines(source: Path, target: Path, megabytes: float) -> None:
    """Copy the first lines of a file."""
    size = 0
    with source.open("rb") as lines, target.open("wb") as stream:
        for line in lines:
            if size + len(line) > megabytes * 1e6:
                break
            size += stream.write(line)


def tail(path: Path, start: int) -> Path:
    """Leave what comes behind the lines that reach to a byte."""
    with path.open("rb") as stream:
        stream.seek(start)
        rest = stream.read()
    path.write_bytes(rest)
    return path


def report(
    args: argparse.Namespace,
    results: dict[tuple[str, str], list[Usage]],
    sizes: dict[str, int],
    worth: dict[tuple[str, str], int],
    *,
    before: int,
) -> list[str]:
    """The result as lines of Markdown."""
    rows = []
    for (corpus, contender), runs in results.items():
        seconds = [run.seconds for run in runs]
        pairs = zip(runs, results[corpus, OURS], strict=True)
        ratios = sorted(run.seconds / ours.seconds for run, ours in pairs)
        saved = 1 - worth[corpus, contender] / before
        rows.append(
            f"| {contender} | {sizes[corpus] / 1e6:.0f} "
            f"| {statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f}) "
            f"| {statistics.median(ratios):.1f} ({ratios[0]:.1f}–{ratios[-1]:.1f}) "
            f"| {statistics.median(run.cpu_s for run in runs):.1f} "
            f"| {max(run.peak_mib for run in runs):.0f} | {saved:.1%} |"
        )
    loads = [run.load for runs in results.values() for run in runs]
    made = f"made by the script (seed 0), {args.chinese:.0%} of the documents Chinese"
    return [
        "# Extending a vocabulary",
        "",
        *environment(("tokenizers", "regex", "numpy")),
        f"- Corpus: JSON lines {f'of {args.corpus.name}' if args.corpus else made}; held out: "
        f"{args.held_out.name if args.held_out else 'what the same seed makes behind it'}, "
        f"{before:,} tokens with the old vocabulary",
        f"- Tokenizer: {args.tokenizer.name}; {args.num_tokens:,} new tokens; {args.workers} cores",
        f"- Runs: one of warm-up, then {args.repeats}, taking turns; median (lowest–highest)",
        f"- Load average meanwhile: {min(loads):.1f} to {max(loads):.1f}",
        *([f"- {args.note}"] if args.note else []),
        "",
        "| | MB | s | times our seconds, same text and round | CPU s | peak MiB | tokens saved |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "Seconds are from start to end of the process, imports and writing included. Peak: the "
        "highest sum of the proportional set sizes (PSS) of all processes of the tree, sampled "
        "every 50 ms. Tokens saved: on held-out text, with as many new tokens. Ours are filtered "
        "(whole characters; no numbers, ruling, markup or punctuation; in three documents at "
        "least), theirs are whatever is frequent.",
        "",
    ]


if __name__ == "__main__":
    main()
