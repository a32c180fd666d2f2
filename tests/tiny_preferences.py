"""Files of preference data for tests of whole runs: pairs, rankings, and answers with a label."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_files import WORDS

PAIRS, RANKINGS = 30, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyPreferences:
    """Answers in words of one kind that are better than those in words of another; read only."""

    pairs: Path
    """30 pairs: a text prompt, and two texts."""
    rankings: Path
    """12 rankings of three messages, two of them of equal rank."""
    labels: Path
    """40 answers with a label."""

    def sources(self) -> str:
        """``data.sources`` with pairs and rankings."""
        return (
            f"data.sources=[{{name: pairs, path: {self.pairs}}},"
            f"{{name: rankings, path: {self.rankings}}}]"
        )

    def unpaired(self) -> str:
        """``data.sources`` with answers that have labels."""
        return f"data.sources=[{{name: labels, path: {self.labels}}}]"


def write_lines(path: Path, rows: list[Any]) -> Path:
    """Write JSON Lines."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), "utf-8")
    return path


def write_tiny_preferences(root: Path, *, seed: int = 11) -> TinyPreferences:
    """Write the files; prompts differ, so that none is on both sides."""
    draw = random.Random(seed)

    def said(kind: str) -> str:
        return " ".join(draw.choices(WORDS[kind], k=draw.randint(2, 6)))

    pairs = [
        {
            "id": f"p{i}",
            "prompt": f"{i} {said('domain')}?",
            "chosen": said("domain") + " MPa",
            "rejected": said("general") + " book",
        }
        for i in range(PAIRS)
    ]
    rankings = [
        {
            "id": f"r{i}",
            "prompt": [{"role": "user", "content": f"{i} {said('general')}!"}],
            "answers": [
                {"text": said("domain") + " one", "rank": 1},
                {"text": said("general") + " two", "rank": 2},
                {"text": said("general") + " three", "rank": 2},
            ],
        }
        for i in range(RANKINGS)
    ]
    labels = [
        {
            "id": f"l{i}",
            "prompt": f"{i}, {said('domain')}?",
            "completion": said("domain" if i % 2 else "general") + " end",
            "label": bool(i % 2),
        }
        for i in range(40)
    ]
    return TinyPreferences(
        pairs=write_lines(root / "pairs.jsonl", pairs),
        rankings=write_lines(root / "rankings.jsonl", rankings),
        labels=write_lines(root / "labels.jsonl", labels),
    )
