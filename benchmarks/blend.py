"""What does it cost to put the training order of an index together, and does it grow with its size?

python benchmarks/blend.py --tokens 1e7 1e8 1e9 --directory /scratch

For every size an index of synthetic documents is written, without tokens (its ``.bin`` is a hole).
Ours and Megatron-Core's ``GPTDataset`` then take turns, each in a new process that has imported
everything: building the order of two epochs with an empty cache, and reading samples of it in the
order of training. The peak is what the process needs beyond what it had before. At the end, what
questions to a blend of 10^9 sequences cost.
"""

import argparse
import datetime
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from hardware import RESULTS, environment, memory_kib

from megatron_cgn.data.account import account_of
from megatron_cgn.data.blend import Blend, BlendFile, BlendSource, phases_of
from megatron_cgn.data.blocks import SampleReader, fill_cache, reading_order
from megatron_cgn.data.indexed import HEADER, MAGIC, IndexInfo, Sidecar
from megatron_cgn.data.sources import Documents
from megatron_cgn.quiet import quiet_dependencies

SEED = 1
READ = 2000
"""Samples that are read to measure a sample's time."""
Measured = dict[str, float]


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--tokens", type=float, nargs="+", default=[1e7, 1e8, 1e9])
    parser.add_argument("--document-tokens", type=int, default=500, help="mean length")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("runs/benchmark-blend"))
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu", help="name in the file")
    args = parser.parse_args()
    results = {int(tokens): list(take_turns(int(tokens), args)) for tokens in args.tokens}
    text = report(results, questions(), args)
    RESULTS.mkdir(exist_ok=True)
    month = datetime.date.today().strftime("%Y%m")
    (RESULTS / f"blend_{args.hardware}_{month}.md").write_text(text)
    print(text)


def take_turns(tokens: int, args: argparse.Namespace) -> Iterator[tuple[str, Measured]]:
    """Measure both builders in turn on an index of so many tokens."""
    folder = args.directory / str(tokens)
    folder.mkdir(parents=True)
    try:
        write_lengths(folder / "index", tokens=tokens, mean=args.document_tokens)
        for turn in range(args.repeats):
            for name in sorted(BUILDERS, reverse=bool(turn % 2)):
                cache = folder / "cache"
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found = pool.apply(
                        measure, (name, str(folder / "index"), args.seq_length, str(cache))
                    )
                shutil.rmtree(cache)
                yield name, found
    finally:
        shutil.rmtree(folder)


def write_lengths(prefix: Path, *, tokens: int, mean: int) -> None:
    """Write the ``.idx`` of documents of log-normal length, and a ``.bin`` that is a hole."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(np.log(mean) - 0.5, 1.0, tokens // mean)).astype("<i4")
    starts = 2 * np.concatenate([[0], np.cumsum(lengths[:-1], dtype="<i8")])
    with prefix.with_suffix(".idx").open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, 8, len(lengths), len(lengths) + 1))
        for array in (lengths, starts, np.arange(len(lengths) + 1, dtype="<i8")):
            stream.write(array.tobytes())
    with prefix.with_suffix(".bin").open("wb") as stream:
        stream.truncate(2 * int(lengths.sum(dtype=np.int64)))


def open_documents(prefix: str) -> Documents:
    """All documents of an index of `write_lengths`."""
    with Path(prefix + ".idx").open("rb") as stream:
        *_, count, _ = HEADER.unpack(stream.read(HEADER.size))
    lengths = np.memmap(prefix + ".idx", "<i4", "r", HEADER.size, (count,))
    sidecar = Sidecar(
        tokenizer_fingerprint="",
        tokenizer_name="",
        vocab_size=1000,
        eod_id=0,
        documents=count,
        tokens=int(lengths.sum(dtype=np.int64)),
        text_bytes=0,
        dtype="uint16",
        digest=str(count),
    )
    index = IndexInfo(prefix=prefix, sidecar=sidecar, lengths=lengths)
    return Documents(index=index, start=0, stop=count)


def build_ours(documents: Documents, samples: int, seq_length: int, cache: Path) -> Any:
    """Our order; returns what reads a sample."""
    order = reading_order(documents, seq_length=seq_length, seed=SEED)
    fill_cache(order, documents, samples=samples, cache=cache)
    return SampleReader(documents, order, samples=samples, cache=cache).read


def build_megatron(documents: Documents, samples: int, seq_length: int, cache: Path) -> Any:
    """Megatron-Core's order; returns what reads a sample."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    prefix = documents.index.prefix
    tokenizer = type("NoTokenizer", (), {"vocab_size": None, "eod": None, "unique_identifiers": {}})
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=seq_length,
        blend=([prefix], None),
        split="1",
        path_to_cache=str(cache),
        tokenizer=tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    numbers = np.arange(len(documents), dtype=np.int32)
    dataset = GPTDataset(IndexedDataset(prefix), prefix, numbers, samples, Split.train, config)
    return dataset._query_document_sample_shuffle_indices


Builder = Callable[[Documents, int, int, Path], Any]
BUILDERS: dict[str, Builder] = {"ours": build_ours, "Megatron-Core": build_megatron}


def measure(name: str, prefix: str, seq_length: int, cache: str) -> Measured:
    """Build two epochs' order and read some of it, in a process of its own."""
    quiet_dependencies()
    from megatron.core.datasets import gpt_dataset  # noqa: F401  # imported before measuring

    documents = open_documents(prefix)
    samples = (2 * documents.tokens - 1) // seq_length
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_kib()
    started = time.perf_counter()
    read = BUILDERS[name](documents, samples, seq_length, Path(cache))
    built = time.perf_counter()
    after = memory_kib()
    for sample in range(min(READ, samples)):
        read(sample)
    ended = time.perf_counter()
    files = (file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
    return {
        "tokens": 2 * documents.tokens,
        "documents": 2 * len(documents),
        "seconds": built - started,
        "peak_mib": (after["VmHWM"] - before["VmRSS"]) / 1024,
        "read_us": 1e6 * (ended - built) / min(READ, samples),
        "disk_mib": sum(files) / 2**20,
    }


def questions() -> dict[str, float]:
    """Microseconds of questions to a blend of 10^9 sequences of ten files in two phases."""
    sources = tuple(
        BlendSource(
            name=name,
            files=tuple(
                BlendFile(
                    path=f"{name}{place}",
                    identity=f"{name}{place}[0:9]",
                    start=0,
                    stop=9,
                    tokens=10**12 + place,
                    weight=Fraction(1, 5),
                )
                for place in range(5)
            ),
            held_out_tokens=0,
            held_out=(),
        )
        for name in ("domain", "general")
    )
    mixes = [{"domain": Fraction(8), "general": Fraction(2)}, {"domain": Fraction(1)}]
    blend = Blend(
        sources=sources,
        phases=phases_of(mixes, [9 * 10**5, 10**6], global_batch_size=1000),
        seq_length=4096,
        global_batch_size=1000,
        seed=SEED,
    )
    account_of(blend)
    consumed = 123_456_789
    asked: dict[str, Callable[[], object]] = {
        "the account of 123,456,789 consumed sequences": lambda: account_of(
            blend, consumed=consumed
        ),
        "where a sequence comes from": lambda: blend.locate(consumed),
    }
    return {text: _microseconds(question) for text, question in asked.items()}


def _microseconds(question: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(1000):
        question()
    return 1e3 * (time.perf_counter() - started)


def report(
    results: dict[int, list[tuple[str, Measured]]], asked: dict[str, float], args: Any
) -> str:
    """The result as Markdown."""
    rows = []
    for runs in results.values():
        for name in BUILDERS:
            mine = [found for builder, found in runs if builder == name]
            seconds = [found["seconds"] for found in mine]
            middle, tokens = statistics.median(seconds), mine[0]["tokens"]
            peak = max(found["peak_mib"] for found in mine)
            rows.append(
                f"| {tokens:,.0f} | {mine[0]['documents']:,.0f} | {name} | {middle:.3f} "
                f"({min(seconds):.3f}-{max(seconds):.3f}) | {1e9 * middle / tokens:.2f} "
                f"| {peak:.0f} | {peak * 2**20 / tokens:.3f} | {mine[0]['disk_mib']:.1f} "
                f"| {statistics.median(found['read_us'] for found in mine):.0f} |"
            )
    sizes = " ".join(f"{tokens:g}" for tokens in args.tokens)
    return "\n".join(
        [
            "# Building the training order of an index",
            "",
            *environment(("numpy", "megatron-core")),
            f"- Data: synthetic documents of {args.document_tokens} tokens on average, log-normal; "
            f"two epochs in sequences of {args.seq_length:,} tokens",
            f"- Command: `python benchmarks/blend.py --tokens {sizes} --document-tokens "
            f"{args.document_tokens} --seq-length {args.seq_length} --repeats {args.repeats}`; "
            f"medians and ranges of {args.repeats} runs in turn",
            "",
            "| tokens of both epochs | documents visited | builder | seconds | ns a token "
            "| peak beyond before, MiB | bytes a token | on disk, MiB | reading a sample, µs |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            "Questions to a blend of 10^9 sequences, ten files in two phases:",
            "",
            *(f"- {text}: {microseconds:.0f} µs" for text, microseconds in asked.items()),
            "",
        ]
    )


if __name__ == "__main__":
    main()
