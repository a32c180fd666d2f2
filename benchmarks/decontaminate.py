"""How many planted questions does `megatron_cgn.corpus.decontaminate` find, and what does it cost?

python benchmarks/decontaminate.py --questions guides.jsonl --documents manuals.jsonl --seed 1123

Questions are sentences drawn from one set of texts; every second document of another set gets one,
disguised. Counts the documents found by disguise, and those wrongly found among the rest. Then
measures time and memory with as many invented items as `--items` says.
"""

import argparse
import json
import random
import re
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_cgn.config.corpus import DecontaminateConfig
from megatron_cgn.corpus import characters, ngrams
from megatron_cgn.corpus.decontaminate import Decontaminator
from megatron_cgn.corpus.document import Document

_SENTENCE = re.compile(r"[^。！？!?\n]{20,300}[。！？!?]|[A-Z][^.!?]{40,400}[.!?](?=\s)")


def _wide(_: random.Random, text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text).upper()


def _bare(_: random.Random, text: str) -> str:
    return re.sub(r"[\W_]+", " ", text)


def _glued(_: random.Random, text: str) -> str:
    return re.sub(r"[^\w\s]", "", text)


def _wrapped(rng: random.Random, text: str) -> str:
    places = (c + ("\n" if rng.random() < 0.1 and not c.isascii() else "") for c in text)
    return "".join(places).replace(" ", "\n  ")


def _traditional(_: random.Random, text: str) -> str:
    import opencc

    converted: str = opencc.OpenCC("s2t").convert(text)
    return converted


def _edited(every: int) -> Callable[[random.Random, str], str]:
    """Replace one word or ideograph in so many."""

    def edit(rng: random.Random, text: str) -> str:
        tokens = ngrams.tokens(characters.code_points(text))
        pieces, last = [], 0
        for start, end in zip(tokens.starts.tolist(), tokens.ends.tolist(), strict=True):
            pieces += [text[last:start], "某" if rng.random() < 1 / every else text[start:end]]
            last = end
        return "".join(pieces) + text[last:]

    return edit


DISGUISES: dict[str, Callable[[random.Random, str], str]] = {
    "as it is": lambda _, text: text,
    "full width, capitals": _wide,
    "without punctuation": _bare,
    "without punctuation, its words run together": _glued,
    "wrapped lines": _wrapped,
    "traditional characters": _traditional,
    "1 token in 40 replaced": _edited(40),
    "1 token in 20 replaced": _edited(20),
    "1 token in 10 replaced": _edited(10),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=Path, required=True, metavar="JSONL")
    parser.add_argument("--documents", type=Path, required=True, metavar="JSONL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=100_000)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    questions = list(_questions(arguments.questions, rng))
    texts = [json.loads(line)["text"] for line in arguments.documents.open(encoding="utf-8")]
    print(f"{len(questions)} questions, {len(texts)} documents")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "questions.jsonl"
        _write(path, questions)
        _planted(path, questions, texts, rng)
        _write(path, _invented(questions, arguments.items, rng))
        _cost(path, texts)


def _questions(path: Path, rng: random.Random) -> Iterator[str]:
    """Draw sentences of 20 to 80 tokens, one a text."""
    for line in path.open(encoding="utf-8"):
        found = [match[0].strip() for match in _SENTENCE.finditer(json.loads(line)["text"])]
        fit = [each for each in found if 20 <= _num_tokens(each) <= 80]
        if fit:
            yield rng.choice(fit)


def _num_tokens(text: str) -> int:
    return len(ngrams.tokens(characters.code_points(text)))


def _write(path: Path, questions: list[str]) -> None:
    rows = (json.dumps({"question": each}, ensure_ascii=False) for each in questions)
    path.write_text("\n".join(rows), encoding="utf-8")


def _planted(path: Path, questions: list[str], texts: list[str], rng: random.Random) -> None:
    step = Decontaminator(DecontaminateConfig(evaluation_files=(str(path),)))
    found: Counter[str] = Counter()
    planted: Counter[str] = Counter()
    for i, text in enumerate(texts):
        if i % 2:
            planted["nothing"] += 1
            found["nothing"] += _is_dropped(step, text)
            continue
        for name, disguise in DISGUISES.items():
            place = rng.randrange(len(text) + 1)
            question = disguise(rng, rng.choice(questions))
            planted[name] += 1
            found[name] += _is_dropped(step, f"{text[:place]}\n{question}\n{text[place:]}")
    print("| planted | documents | dropped |\n|---|---:|---:|")
    for name, number in planted.items():
        print(f"| {name} | {number} | {found[name]} ({found[name] / number:.1%}) |")


def _is_dropped(step: Decontaminator, text: str) -> bool:
    return step(Document(id="", text=text, source="")).text is None


def _invented(questions: list[str], number: int, rng: random.Random) -> list[str]:
    """Make items as long as questions are, out of their characters in any order."""
    characters = "".join(questions)
    return ["".join(rng.choices(characters, k=len(rng.choice(questions)))) for _ in range(number)]


def _cost(path: Path, texts: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    step = Decontaminator(DecontaminateConfig(evaluation_files=(str(path),)))
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    items = sum(each.items for each in step.files)
    print(f"{items} items: read in {seconds:.1f} s, peak {peak / 1024:.0f} MiB, of them here "
          f"{(peak - before) / 1024:.0f} MiB")  # fmt: skip
    start = time.process_time()
    dropped = sum(_is_dropped(step, text) for text in texts)
    seconds = time.process_time() - start
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{megabytes / seconds:.1f} MB/s on one core; {dropped} of {len(texts)} dropped")


if __name__ == "__main__":
    main()
