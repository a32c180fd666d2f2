"""What does deduplication find, what does it drop wrongly, and how fast is it?

python benchmarks/dedup.py --english docs.jsonl --man-pages usr/share/man --documents 1000000

English text is JSONL with a field ``text``. Chinese text are the manual pages of Debian's package
``manpages-zh``, unpacked (``apt-get download manpages-zh && dpkg -x manpages-zh*.deb .``).
"""

import argparse
import datetime
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from hardware import RESULTS, environment
from planted import EDITS, FORMS, TOLERANCE, plant, records, substitute

from megatron_cgn.config.corpus import DeduplicateConfig
from megatron_cgn.corpus.dedup import Kind, Signer, banding, find_duplicates

LEVELS = (0.95, 0.85, 0.7)
SETTINGS = DeduplicateConfig()
VARIANTS = {
    "default (similarity_threshold=0.7)": SETTINGS,
    **{
        f"similarity_threshold={threshold}": replace(SETTINGS, similarity_threshold=threshold)
        for threshold in (0.6, 0.75, 0.8, 0.9)
    },
    "number_weight=0": replace(SETTINGS, number_weight=0),
    "protect_numbers=all": replace(SETTINGS, protect_numbers="all"),
}
_MACRO = re.compile(r"^[.'](SH|SS|TP|IP|[BIR]|[BIR]{2}|Sh|Ss|Nm|Nd|Fl|Ar|It|Xr|Pp|Dq)\b ?")
_ESCAPE = re.compile(r"\\f[A-Z]|\\f\([A-Z]{2}|\\&|\\s[+-]?\d|\\\(..|\\[-|c]")


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--english", type=Path, required=True)
    parser.add_argument("--man-pages", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=100, help="of each language, edit and level")
    parser.add_argument("--documents", type=int, nargs="*", default=[10**6], help="to decide on")
    parser.add_argument("--directory", type=Path, default=Path("runs/benchmark-dedup"))
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu", help="name in the file")
    args = parser.parse_args()
    english = [json.loads(line)["text"] for line in args.english.read_text().splitlines()]
    chinese, taiwan = (man_pages(args.man_pages / name) for name in ("zh_CN", "zh_TW"))
    corpora = {"English": english, "Chinese": list(chinese.values())}
    cut = banding(SETTINGS.num_permutations, SETTINGS.similarity_threshold)
    lines = [
        "# Deduplication: recall, false positives, speed and memory",
        "",
        *environment(("numpy", "rensa", "opencc")),
        f"- Settings: {SETTINGS}; {cut.bands} bands of {cut.rows}",
        f"- English: {args.english.name}, {len(english)} documents. Chinese: manpages-zh, "
        f"{len(chinese)} pages of zh_CN and {len(taiwan)} of zh_TW without roff requests",
        *planted(corpora, args.copies),
        *sizes(corpora),
        *layouts(corpora, chinese, taiwan),
        *look_alikes(),
        *real_text(corpora),
        *signing(corpora),
        *scale(args.documents, args.directory),
    ]
    RESULTS.mkdir(exist_ok=True)
    month = datetime.date.today().strftime("%Y%m")
    text = "\n".join(lines) + "\n"
    (RESULTS / f"dedup_{args.hardware}_{month}.md").write_text(text)
    print(text)


def man_pages(directory: Path) -> dict[str, str]:
    """Read manual pages with at least 300 Chinese characters, without comments and requests."""
    pages = {}
    for path in sorted(directory.glob("man*/*.gz")):
        source = gzip.open(path).read().decode("utf-8", "replace")
        source = re.sub(r"^[.']\s*de\b.*?^\.\.$", "", source, flags=re.S | re.M)
        kept = [
            _ESCAPE.sub(lambda m: "-" if m.group() == r"\-" else "", _MACRO.sub("", line))
            for line in source.splitlines()
            if line[:1] not in (".", "'") or _MACRO.match(line)
        ]
        text = "\n".join(kept)
        if len(re.findall(r"[\u4e00-\u9fff]", text)) >= 300:
            pages[path.name] = text
    return pages


def sets(texts: Sequence[str], settings: DeduplicateConfig) -> list[set[int]]:
    """The sets that signatures stand for."""
    elements, offsets = Signer(settings).elements(texts)
    return [set(part.tolist()) for part in np.split(elements, offsets[1:-1])]


def jaccard(left: set[int], right: set[int]) -> float:
    """Jaccard similarity; 0 of two empty sets."""
    return len(left & right) / max(1, len(left | right))


def decide(
    texts: Sequence[str], settings: DeduplicateConfig = SETTINGS
) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """Kinds of these documents."""
    return find_duplicates([Signer(settings).sign(texts)], settings).kinds


def sample(texts: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Documents of ordinary length that are unlike any other, and others of them."""
    kinds = decide(texts, replace(SETTINGS, similarity_threshold=0.5))
    usable = [t for t, k in zip(texts, kinds, strict=True) if k == 0 and 600 <= len(t) <= 8000]
    random.Random(0).shuffle(usable)
    return usable[:count], usable[count:] or usable[:count]


def planted(corpora: dict[str, list[str]], count: int) -> Iterator[str]:
    """Recall by language, edit and similarity, and by threshold."""
    heads = " | ".join(f"{level:.0%}" for level in LEVELS)
    yield from (
        "",
        "## Planted duplicates",
        "",
        f"Copies edited until the true Jaccard similarity of their {SETTINGS.ngram_tokens}-grams "
        f"(numbers not weighted) is within {TOLERANCE} of the level. Recall, of as many copies.",
        "",
        f"| language | edit | {heads} |",
        "|---|---|" + "---|" * len(LEVELS),
    )
    samples = {language: sample(texts, count)[0] for language, texts in corpora.items()}
    copies = {
        (language, name): edited
        for language, texts in corpora.items()
        for name, edited in copies_of(texts, count).items()
    }
    for (language, name), levels in copies.items():
        cells = [
            f"{num_found(samples[language], made, SETTINGS) / len(made):.3f} of {len(made)}"
            for made in (levels[level] for level in LEVELS)
        ]
        yield f"| {language} | {name} | " + " | ".join(cells) + " |"
    yield from (
        "",
        "All edits together, and the documents dropped of the real text:",
        "",
        f"| language | settings | {heads} | real text dropped |",
        "|---|---|" + "---|" * (len(LEVELS) + 1),
    )
    for name, settings in VARIANTS.items():
        for language, texts in corpora.items():
            cells = []
            for level in LEVELS:
                batches = [levels[level] for key, levels in copies.items() if key[0] == language]
                found = sum(num_found(samples[language], made, settings) for made in batches)
                cells.append(f"{found / sum(map(len, batches)):.3f}")
            near = int((decide(texts, settings) == Kind.NEAR).sum())
            yield f"| {language} | {name} | " + " | ".join(cells) + f" | {near} of {len(texts)} |"


def copies_of(texts: Sequence[str], count: int) -> dict[str, dict[float, list[str]]]:
    """Edited copies of a sample, by edit and level."""
    plain = replace(SETTINGS, number_weight=0)

    def similarity(left: str, right: str) -> float:
        return jaccard(*sets([left, right], plain))

    originals, others = sample(texts, count)
    return {
        name: {
            level: [
                made[0]
                for seed, text in enumerate(originals)
                if (
                    made := plant(
                        text, edit, target=level, similarity=similarity, seed=seed, others=others
                    )
                )
            ]
            for level in LEVELS
        }
        for name, edit in EDITS.items()
    }


def num_found(originals: Sequence[str], copies: Sequence[str], settings: DeduplicateConfig) -> int:
    """How many copies, each of another original, are dropped; none of the originals may be."""
    kinds = decide([*originals, *copies], settings)
    assert (kinds[: len(originals)] == Kind.KEPT).all()
    return int((kinds[len(originals) :] != Kind.KEPT).sum())


def sizes(corpora: dict[str, list[str]]) -> Iterator[str]:
    """What the size of the n-grams does."""
    yield from (
        "",
        "## Size of the n-grams",
        "",
        "Median similarity of copies with a share of their tokens replaced, and the largest "
        "similarity of two documents of which neither is a copy of the other.",
        "",
        "| language | n | 1 % | 2 % | 5 % | 10 % | unrelated, largest | 99.9th percentile |",
        "|---|---|---|---|---|---|---|---|",
    )
    for language, texts in corpora.items():
        originals, others = sample(texts, 150)
        for size in (3, 5, 7):
            settings = replace(SETTINGS, ngram_tokens=size, number_weight=0)
            whole = sets(originals, settings)
            cells = []
            for share in (0.01, 0.02, 0.05, 0.1):
                edited = [
                    substitute(t, share, random.Random(i), others) for i, t in enumerate(originals)
                ]
                pairs = zip(whole, sets(edited, settings), strict=True)
                cells.append(f"{np.median([jaccard(*pair) for pair in pairs]):.2f}")
            apart = sorted(jaccard(a, b) for i, a in enumerate(whole) for b in whole[:i])
            cells += [f"{apart[-1]:.2f}", f"{apart[int(0.999 * len(apart))]:.3f}"]
            yield f"| {language} | {size} | " + " | ".join(cells) + " |"


def layouts(
    corpora: dict[str, list[str]], chinese: dict[str, str], taiwan: dict[str, str]
) -> Iterator[str]:
    """Copies that differ in layout and script only."""
    import opencc

    convert = opencc.OpenCC("s2t").convert
    edits = {
        "upper case": str.upper,
        "lines joined, blank lines": lambda t: re.sub(r"\n+", " \n\n  ", t),
        "full width": lambda t: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t),
        "traditional": convert,
    }
    yield from (
        "",
        "## Layout and script",
        "",
        "| copies | equal | nearly equal | missed |",
        "|---|---|---|---|",
    )
    for language, texts in corpora.items():
        originals, _ = sample(texts, 100)
        for name, edit in edits.items():
            kinds = decide([*originals, *map(edit, originals)])[len(originals) :]
            shares = [float((kinds == k).mean()) for k in (Kind.EXACT, Kind.NEAR, Kind.KEPT)]
            yield f"| {language}, {name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |"
    names = sorted(chinese.keys() & taiwan.keys())
    kinds = decide([*chinese.values(), *(taiwan[name] for name in names)])[len(chinese) :]
    shares = [float((kinds == k).mean()) for k in (Kind.EXACT, Kind.NEAR, Kind.KEPT)]
    yield (
        f"| {len(names)} pages of zh_TW against zh_CN | "
        + " | ".join(f"{share:.2f}" for share in shares)
        + " |"
    )


def look_alikes() -> Iterator[str]:
    """Records of one form, all of which are to be kept."""
    yield from (
        "",
        "## Records of one form",
        "",
        "Share of 500 records dropped; all of them should be kept.",
        "",
        "| records | protect_numbers=none, number_weight=0 | none | form (default) | all |",
        "|---|---|---|---|---|",
    )
    for kind in FORMS:
        texts = records(kind, 500, seed=1)
        cells = [
            f"{(decide(texts, settings) != Kind.KEPT).mean():.3f}"
            for settings in (
                replace(SETTINGS, protect_numbers="none", number_weight=0),
                replace(SETTINGS, protect_numbers="none"),
                SETTINGS,
                replace(SETTINGS, protect_numbers="all"),
            )
        ]
        yield f"| {kind} | " + " | ".join(cells) + " |"


def real_text(corpora: dict[str, list[str]]) -> Iterator[str]:
    """What is dropped of real text, and how similar it truly is."""
    yield from (
        "",
        "## Real text",
        "",
        "A false positive is a document whose true similarity with the one it is said to "
        "duplicate is below the threshold.",
        "",
        "| corpus | documents | equal | nearly equal | false positives | least true similarity |",
        "|---|---|---|---|---|---|",
    )
    for language, texts in corpora.items():
        decisions = find_duplicates([Signer(SETTINGS).sign(texts)], SETTINGS)
        elements = sets(texts, SETTINGS)
        near = np.flatnonzero(decisions.kinds == Kind.NEAR)
        true = [jaccard(elements[i], elements[int(decisions.of[i])]) for i in near]
        false = sum(value < SETTINGS.similarity_threshold for value in true)
        equal = int((decisions.kinds == Kind.EXACT).sum())
        least = f"{min(true):.2f}" if true else "none"
        yield f"| {language} | {len(texts)} | {equal} | {len(near)} | {false} | {least} |"


def signing(corpora: dict[str, list[str]]) -> Iterator[str]:
    """Megabytes signed a second on one core, against n-grams as Python strings."""
    import rensa

    def as_strings(texts: Sequence[str]) -> None:
        size = SETTINGS.ngram_tokens
        grams = []
        for text in texts:
            tokens = re.findall(r"[\u3400-\u9fff]|[^\W_]+", text.casefold())
            grams.append(["\0".join(tokens[i : i + size]) for i in range(len(tokens) - size + 1)])
        rensa.RMinHash.digest_matrix_from_token_sets(grams, SETTINGS.num_permutations, 0).to_rows()

    yield from (
        "",
        "## Signing",
        "",
        "MB of UTF-8 a second, median of 5 runs in turns; CPU time, so of one core.",
        "",
        "| corpus | MB | `Signer.sign` | n-grams as Python strings, no number weights |",
        "|---|---|---|---|",
    )
    signer = Signer(SETTINGS)
    for language, texts in corpora.items():
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(5):
            for way, taken in zip((signer.sign, as_strings), seconds, strict=True):
                started = time.process_time()
                way(texts)
                taken.append(time.process_time() - started)
        speeds = [f"{megabytes / float(np.median(taken)):.1f}" for taken in seconds]
        yield f"| {language} | {megabytes:.1f} | " + " | ".join(speeds) + " |"


def scale(counts: Sequence[int], directory: Path) -> Iterator[str]:
    """Time and memory of deciding, each in a process of its own."""
    if not counts:
        return
    yield from (
        "",
        "## Deciding",
        "",
        "Synthetic signatures (see `dedup_scale.py`). Own memory is the peak without mapped file "
        "pages, which the kernel drops when it needs the room; resident is the peak with them.",
        "",
        "| documents | signatures, GB | seconds | CPU seconds | own memory, MiB | resident, MiB | "
        "kept | equal | near | crowded |",
        "|---|---|---|---|---|---|---|---|---|---|",
    )
    for count in counts:
        command = [sys.executable, str(Path(__file__).parent / "dedup_scale.py")]
        command += ["--documents", str(count), "--directory", str(directory)]
        try:
            subprocess.run([*command, "--make"], check=True)
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        yield scale_row(json.loads(done.stdout))


def scale_row(found: dict[str, float]) -> str:
    """Format what ``dedup_scale.py`` printed."""
    return (
        f"| {found['documents']:,} | {found['bytes'] / 1e9:.2f} | {found['seconds']:.0f} | "
        f"{found['cpu_seconds']:.0f} | {found['anonymous_mib']:.0f} | {found['peak_mib']:.0f} | "
        + " | ".join(f"{found[name]:,}" for name in ("kept", "exact", "near", "crowded"))
        + " |"
    )


if __name__ == "__main__":
    main()
