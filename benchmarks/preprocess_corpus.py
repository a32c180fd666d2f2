"""A corpus in Chinese and English to measure with: words with the frequencies of language."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from faker.providers.lorem.en_US import Provider as English
from faker.providers.lorem.zh_CN import Provider as Chinese

_HAN_WORDS = 30_000
_LONGEST_WORDS = 20_000

Words = tuple[npt.NDArray[np.object_], npt.NDArray[np.float64]]
"""Words, and the running sum of their probabilities."""


def write_corpus(
    path: Path,
    *,
    megabytes: float,
    chinese_share: float = 0.5,
    samples: Sequence[Path] = (),
    seed: int = 0,
) -> int:
    """Write JSON lines: ``id``, ``text``, ``source``, ``license``.

    Lengths are log-normal. Word frequencies fall with rank as in language, so that no two documents
    are alike and a cache of words helps about as much as on real text. Chinese words are
    Faker's and as many more, made of ideographs of such frequencies; they are written without
    spaces, with a mark every few words.

    Args:
        path: The file to write.
        megabytes: Its size, in 10^6 bytes.
        chinese_share: Share of the documents that are Chinese.
        samples: JSONL files with a ``text``, whose documents are mixed in, each once.
        seed: Same seed, same bytes.

    Returns:
        Bytes written.
    """
    rng = np.random.default_rng(seed)
    english = _ranked([*English.word_list, *_invented_english(rng)])
    chinese = _ranked([*Chinese.word_list, *_invented_chinese(rng)])
    given = [line for file in samples for line in file.read_bytes().splitlines(keepends=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    size = number = 0
    with path.open("wb") as stream:
        while size < megabytes * 1e6:
            length = int(np.clip(rng.lognormal(5.5, 1.0), 20, _LONGEST_WORDS))
            if rng.random() < chinese_share:
                text = _chinese_text(rng, _draw(rng, chinese, 2 * length))
            else:
                text = " ".join(_draw(rng, english, length))
            row = {"id": f"{number}", "text": text, "source": "generated", "license": "CC0-1.0"}
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            if given and number % 3 == 0:
                line += given.pop()
            size += stream.write(line)
            number += 1
    return size


def _ranked(words: list[str]) -> Words:
    """Words with Zipf's frequencies, by their place."""
    chances = 1 / np.arange(1, len(words) + 1)
    return np.array(words, dtype=object), np.cumsum(chances / chances.sum())


def _draw(rng: np.random.Generator, words: Words, count: int) -> list[str]:
    places = np.searchsorted(words[1], rng.random(count))
    drawn: list[str] = words[0][np.minimum(places, len(words[0]) - 1)].tolist()
    return drawn


def _chinese_text(rng: np.random.Generator, words: list[str]) -> str:
    every = int(rng.integers(3, 8))
    pieces = ["".join(words[i : i + every]) for i in range(0, len(words), every)]
    return "".join(p + ("。\n" if i % 9 == 8 else "，") for i, p in enumerate(pieces))


def _invented_chinese(rng: np.random.Generator) -> list[str]:
    # The 3,755 characters of GB 2312's first level: those in daily use.
    rows = ((row, cell) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF))
    common = [c for pair in rows if (c := bytes(pair).decode("gb2312", "ignore"))]
    ranked = _ranked([common[i] for i in rng.permutation(len(common))])
    return ["".join(_draw(rng, ranked, int(rng.integers(1, 4)))) for _ in range(_HAN_WORDS)]


def _invented_english(rng: np.random.Generator) -> list[str]:
    parts = [word[: int(rng.integers(2, 5))] for word in English.word_list]
    return ["".join(rng.choice(parts, int(rng.integers(1, 4)))) for _ in range(_HAN_WORDS)]
