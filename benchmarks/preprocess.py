"""How fast, and in how much memory, are documents indexed, against the field's own tools?

python benchmarks/preprocess.py --tokenizer models/qwen3-8b --megabytes 500 \
    --megatron-lm ../Megatron-LM --datatrove-python ../datatrove-env/bin/python

Contenders take turns on one corpus, with one tokenizer and the same cores: our
``tools/preprocess_data.py``, Megatron-LM's, its ``preprocess_data_fast.py`` and datatrove's
tokenizer; those whose path is not given are left out. Each is a process of its own, and its
seconds are those from its start to its end. The index must equal Megatron-LM's byte for byte. With
``--grow`` ours alone indexes larger and larger corpora: its memory must not follow.
"""

import argparse
import datetime
import filecmp
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

from hardware import RESULTS, environment
from preprocess_corpus import write_corpus
from process_tree import Usage, run_measured

ROOT = Path(__file__).parents[1]
DEMO = ROOT / ".cache/smollm2-135m-instruct"
OURS, THEIRS, FAST, DATATROVE = "ours", "Megatron-LM", "Megatron-LM fast", "datatrove"
_WARM_UP_MEGABYTES = 2
_DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

if __name__ == "__main__":
    source, tokenizer, output, end, tasks = sys.argv[1:]
    steps = [
        JsonlReader(source),
        DocumentTokenizer(output, tokenizer, eos_token=end, shuffle_documents=False),
    ]
    LocalPipelineExecutor(
        steps, tasks=int(tasks), workers=int(tasks), logging_dir=output + "/logs"
    ).run()
"""


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokenizer", type=Path, default=DEMO, help="Hugging Face directory")
    parser.add_argument("--megatron-lm", type=Path, help="checkout of Megatron-LM")
    parser.add_argument("--datatrove-python", type=Path, help="python that has datatrove")
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--chinese", type=float, default=0.5, help="share of the documents")
    parser.add_argument("--samples", type=Path, nargs="*", default=[], help="JSONL mixed in")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--grow", type=float, nargs="*", default=[], help="megabytes, ascending")
    parser.add_argument("--directory", type=Path, default=Path("runs/benchmark-preprocess"))
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu", help="name in the file")
    parser.add_argument("--note", default="", help="a line about the circumstances")
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    args.directory = args.directory.resolve()
    try:
        text = "\n".join([*compare(args), *grow(args)])
    finally:
        shutil.rmtree(args.directory, ignore_errors=True)
    month = datetime.date.today().strftime("%Y%m")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"preprocess_{args.hardware}_{month}.md").write_text(text)
    print(text)


def compare(args: argparse.Namespace) -> list[str]:
    """Run the contenders in turn; the lines of the report."""
    corpus = args.directory / "corpus" / "corpus.jsonl"
    num_bytes = write_corpus(
        corpus, megabytes=args.megabytes, chinese_share=args.chinese, samples=args.samples
    )
    tokenizer = copy_tokenizer(args.tokenizer, args.directory / "tokenizer")
    # The first round, on little, brings programs and libraries into the page cache.
    little = args.directory / "little" / "corpus.jsonl"
    write_corpus(little, megabytes=_WARM_UP_MEGABYTES, chinese_share=args.chinese)
    run_round(contenders(args, little, tokenizer), args.directory, number=0)
    commands = contenders(args, corpus, tokenizer)
    rounds = [
        run_round(commands, args.directory, number=number) for number in range(1, args.repeats + 1)
    ]
    tokens = check_same(args.directory, commands)
    results = {name: [used[name] for used in rounds] for name in commands}
    return report(args, results, num_bytes, tokens)


def run_round(
    commands: dict[str, tuple[list[str], dict[str, str]]], directory: Path, *, number: int
) -> dict[str, Usage]:
    """Run every contender once; what each used."""
    results = {}
    for name, (command, settings) in commands.items():
        output = directory / name.replace(" ", "-")
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        used = run_measured(command, environment={**os.environ, **settings}, cwd=output)
        print(number, name, used, file=sys.stderr, flush=True)
        results[name] = used
    return results


def contenders(
    args: argparse.Namespace, corpus: Path, tokenizer: Path
) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Commands, and the environment variables they need, by name."""
    workers = str(args.workers)
    ours = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(corpus)]
    ours += ["--tokenizer", str(tokenizer), "--output-prefix", "index", "--workers", workers]
    found: dict[str, tuple[list[str], dict[str, str]]] = {
        OURS: (ours, {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""})
    }
    if args.megatron_lm is not None:
        folder = args.megatron_lm.resolve()
        common = ["--input", str(corpus), "--tokenizer-type", "HuggingFaceTokenizer"]
        common += ["--tokenizer-model", str(tokenizer), "--append-eod", "--output-prefix", "index"]
        settings = {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
        script = str(folder / "tools/preprocess_data.py")
        found[THEIRS] = ([sys.executable, script, *common, "--workers", workers], settings)
        script = str(folder / "tools/preprocess_data_fast.py")
        threads = {**settings, "RAYON_NUM_THREADS": workers}
        found[FAST] = ([sys.executable, script, *common, "--use-gigatoken"], threads)
    if args.datatrove_python is not None:
        parts = split_lines(corpus, corpus.parent / "parts", args.workers)
        command = [str(args.datatrove_python.absolute()), "-c", _DATATROVE, str(parts)]
        command += [str(tokenizer / "tokenizer.json"), "output", end_of(tokenizer), workers]
        script = args.directory / "run_datatrove.py"
        script.write_text(_DATATROVE)  # its processes are spawned, so it must be a file
        found[DATATROVE] = ([command[0], str(script), *command[3:]], {})
    return found


def copy_tokenizer(source: Path, target: Path) -> Path:
    """Copy a tokenizer, with the end of documents as its end of sequence, as the others want it."""
    target.mkdir()
    for path in source.glob("*token*"):
        shutil.copy(path, target)
    config = target / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": end_of(source)}))
    return target


def end_of(source: Path) -> str:
    """Text of the token with which ours ends documents."""
    from tokenizer.wrapper import Tokenizer

    tokenizer = Tokenizer.from_pretrained(source)
    return tokenizer.decode([tokenizer.eod_id])


def split_lines(corpus: Path, folder: Path, count: int) -> Path:
    """Deal the lines of a corpus out to files: datatrove has one process a file."""
    folder.mkdir()
    streams = [(folder / f"{i}.jsonl").open("wb") for i in range(count)]
    with corpus.open("rb") as lines:
        for number, line in enumerate(lines):
            streams[number % count].write(line)
    for stream in streams:
        stream.close()
    return folder


def check_same(directory: Path, commands: dict[str, tuple[list[str], dict[str, str]]]) -> int:
    """Hold the indexes equal, byte for byte; the number of tokens."""
    ours = directory / OURS
    sidecar = json.loads((ours / "index.json").read_text())
    for name in (THEIRS, FAST):
        for suffix in (".bin", ".idx") if name in commands else ():
            theirs = directory / name.replace(" ", "-") / f"index_text_document{suffix}"
            assert filecmp.cmp(ours / f"index{suffix}", theirs, shallow=False), (name, suffix)
    if DATATROVE in commands:
        files = (directory / DATATROVE / "output").glob("*.ds")
        size = sum(path.stat().st_size for path in files)
        width = 2 if sidecar["vocab_size"] <= 2**16 else 4
        assert size == width * sidecar["tokens"], "datatrove's tokens differ in number"
    return int(sidecar["tokens"])


def grow(args: argparse.Namespace) -> list[str]:
    """Index larger and larger corpora with ours; the lines of the report."""
    rows = []
    for megabytes in args.grow:
        corpus = args.directory / "grow.jsonl"
        write_corpus(corpus, megabytes=megabytes, chinese_share=args.chinese, seed=1)
        command, settings = contenders(
            argparse.Namespace(**{**vars(args), "megatron_lm": None, "datatrove_python": None}),
            corpus,
            args.directory / "tokenizer",
        )[OURS]
        used = run_measured(
            [*command, "--overwrite"], environment={**os.environ, **settings}, cwd=args.directory
        )
        print("grow", megabytes, used, file=sys.stderr, flush=True)
        rows.append(f"| {megabytes:g} | {used.seconds:.1f} | {used.peak_mib:.0f} |")
    if not rows:
        return []
    return [
        "## Memory over growing inputs",
        "",
        "| MB | s | peak MiB |",
        "|---|---|---|",
        *rows,
        "",
    ]


def report(
    args: argparse.Namespace, results: dict[str, list[Usage]], num_bytes: int, tokens: int
) -> list[str]:
    """The result as lines of Markdown."""
    rows = []
    for name, runs in results.items():
        seconds = [run.seconds for run in runs]
        middle = statistics.median(seconds)
        ratios = sorted(
            run.seconds / ours.seconds for run, ours in zip(runs, results[OURS], strict=True)
        )
        rows.append(
            f"| {name} | {middle:.1f} ({min(seconds):.1f}–{max(seconds):.1f}) "
            f"| {tokens / middle / 1e6:.2f} | {num_bytes / middle / 1e6:.1f} "
            f"| {statistics.median(ratios):.1f} ({ratios[0]:.1f}–{ratios[-1]:.1f}) "
            f"| {statistics.median(run.cpu_s for run in runs):.1f} "
            f"| {max(run.peak_mib for run in runs):.0f} |"
        )
    loads = [run.load for runs in results.values() for run in runs]
    packages = ("tokenizers", "gigatoken", "orjson", "pyarrow", "megatron-core")
    return [
        "# Indexing documents, against the field's own tools",
        "",
        *environment(packages),
        f"- Corpus: {num_bytes / 1e6:.0f} MB of JSON lines made by the script (seed 0), "
        f"{args.chinese:.0%} of the documents Chinese, the others English"
        f"{', and samples' if args.samples else ''}; {tokens:,} tokens",
        f"- Tokenizer: {args.tokenizer.name}; {args.workers} cores for each",
        f"- Runs: one of warm-up on {_WARM_UP_MEGABYTES} MB, then {args.repeats}, taking turns; "
        "median (lowest–highest)",
        f"- Load average meanwhile: {min(loads):.1f} to {max(loads):.1f}",
        "- `.bin` and `.idx` equal Megatron-LM's byte for byte where it took part",
        *([f"- {args.note}"] if args.note else []),
        "",
        "| | s | million tokens/s | MB/s | times our seconds, same round | CPU s | peak MiB |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "Seconds are from start to end of the process, imports included. Peak: the highest sum of "
        "the proportional set sizes (PSS) of all processes of the tree, sampled every 50 ms. "
        "CPU leaves out processes that nobody waited for, as datatrove's.",
        "",
    ]


if __name__ == "__main__":
    main()
