"""How much junk does `megatron_cgn.corpus.clean` drop, how many good documents, and how fast?

python benchmarks/clean.py --good manuals.jsonl pages.jsonl --seed 20261123

Good documents are yours: JSONL with `text`, one set a file. Junk is drawn from a seed and from them
(junk.py). Prints the tables of docs/corpus-cleaning.md.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import junk

from megatron_cgn.config.corpus import CleanConfig
from megatron_cgn.corpus.clean import Cleaner
from megatron_cgn.corpus.document import Document, Outcome


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--good", type=Path, nargs="+", required=True, metavar="JSONL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=50, help="pages of every kind of junk")
    arguments = parser.parse_args()
    cleaner = Cleaner(CleanConfig())
    good = {path.stem: _texts(path) for path in arguments.good}
    print("| good documents | MB | dropped | why | MB/s |\n|---|---:|---:|---|---:|")
    for name, texts in good.items():
        _clean(cleaner, texts[:20])  # tables and the model are loaded
        start = time.process_time()
        outcomes = _clean(cleaner, texts)
        seconds = time.process_time() - start
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        dropped, why = _dropped(outcomes)
        print(
            f"| {name} ({len(texts)}) | {megabytes:.1f} | {dropped} | {why} "
            f"| {megabytes / seconds:.1f} |"
        )
    chinese, english = _by_language(cleaner, [text for texts in good.values() for text in texts])
    print("\n| junk | dropped | why |\n|---|---:|---|")
    pages: dict[str, list[str]] = {}
    for kind, text in junk.pages(chinese, english, seed=arguments.seed, each=arguments.each):
        pages.setdefault(kind, []).append(text)
    for kind, texts in pages.items():
        dropped, why = _dropped(_clean(cleaner, texts))
        print(f"| {kind} | {dropped / len(texts):.0%} | {why} |")


def _texts(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def _clean(cleaner: Cleaner, texts: Iterable[str]) -> list[Outcome]:
    return [cleaner(Document(id="", text=text, source="")) for text in texts]


def _dropped(outcomes: Iterable[Outcome]) -> tuple[int, str]:
    reasons = Counter(each.reason for each in outcomes if each.text is None)
    return sum(reasons.values()), ", ".join(f"{name} {n}" for name, n in reasons.most_common())


def _by_language(cleaner: Cleaner, texts: Iterable[str]) -> tuple[list[str], list[str]]:
    cleaned = [each for each in _clean(cleaner, texts) if each.text and len(each.text) > 1000]
    return (
        [each.text for each in cleaned if each.text and each.language == "zh"],
        [each.text for each in cleaned if each.text and each.language == "en"],
    )


if __name__ == "__main__":
    main()
