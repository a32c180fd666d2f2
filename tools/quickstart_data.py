"""What the quickstart trains on: the bundled samples, divided into a part to learn and a rest."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples"
SOURCES = {
    "domain_zh": ("domain_zh.jsonl", 0.4),
    "domain_en": ("domain_en.jsonl", 0.4),
    "general": ("general.jsonl", 0.2),
}
"""Documents: file and share of the training tokens, by the source's name."""
CONVERSATIONS = {"zh": "sft_zh.jsonl", "en": "sft_en.jsonl"}
"""Conversations: file by language, which is the source's name."""
HELD_OUT_CONVERSATIONS = SAMPLES / "sft_held_out.jsonl"
PREFERENCES = {"zh": "preference_zh.jsonl", "en": "preference_en.jsonl"}
"""Pairs of answers: file by language, which is the source's name."""
HELD_OUT_PREFERENCES = SAMPLES / "preference_held_out.jsonl"
_HELD_OUT = 0.1
_ASKED = ("sft-held-out-0001", "sft-held-out-0015", "sft-held-out-0028")
"""A Chinese question, one that only a plant's documents answer, and an English one."""
_ASKED_PAIR = "pref-held-out-0031"
"""One that asks for leave to do something unsafe."""


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out question and the answer written for it."""

    text: str
    answer: str


def index_documents(model: Path, data_dir: Path) -> dict[str, dict[str, Any]]:
    """Divide every file of documents into a part to train on and a held-out one, and index both.

    Args:
        model: Hugging Face directory of the tokenizer.
        data_dir: Where the parts and indexes go; made here.

    Returns:
        Documents, tokens and bytes by the index's name.
    """
    from megatron_cgn.data.preprocess import preprocess

    data_dir.mkdir(parents=True)
    counts: dict[str, dict[str, Any]] = {}
    for name, (file, _) in SOURCES.items():
        lines = (SAMPLES / file).read_text("utf-8").splitlines()
        for part in ("train", "held_out"):
            wanted = part == "held_out"
            chosen = [line for line in lines if _is_held_out(json.loads(line)["id"]) == wanted]
            path = data_dir / f"{name}_{part}.jsonl"
            _write(path, chosen)
            summary = preprocess([path], tokenizer_dir=model, output_prefix=path.with_suffix(""))
            counts[f"{name}_{part}"] = {
                "documents": summary.sidecar.documents,
                "tokens": summary.sidecar.tokens,
                "bytes": summary.sidecar.text_bytes,
            }
    return counts


def document_sources(data_dir: Path) -> str:
    """Write ``data.sources`` of continual pre-training as an override."""
    return ",".join(
        f"{{name:{name},path:'{data_dir}/{name}_train',weight:{weight},"
        f"validation_path:'{data_dir}/{name}_held_out'}}"
        for name, (_, weight) in SOURCES.items()
    )


def divide_held_out(data_dir: Path) -> dict[str, int]:
    """Write held-out conversations and pairs of each language into files of their own.

    Args:
        data_dir: An existing folder.

    Returns:
        How many there are, by what they are: ``sft_zh_train``, ``preference_en_held_out``, ….
    """
    counts: Counter[str] = Counter()
    for kind, files, held_out in (
        ("sft", CONVERSATIONS, HELD_OUT_CONVERSATIONS),
        ("preference", PREFERENCES, HELD_OUT_PREFERENCES),
    ):
        lines = held_out.read_text("utf-8").splitlines()
        for language, file in files.items():
            chosen = [line for line in lines if json.loads(line)["lang"] == language]
            _write(_held_out_path(data_dir, kind, language), chosen)
            known = len((SAMPLES / file).read_text("utf-8").splitlines())
            counts[f"{kind}_{language}_train"] = known
            counts[f"{kind}_{language}_held_out"] = len(chosen)
    return dict(counts)


def conversation_sources(data_dir: Path) -> str:
    """Write ``data.sources`` of instruction tuning as an override."""
    return _sources(data_dir, "sft", CONVERSATIONS)


def preference_sources(data_dir: Path) -> str:
    """Write ``data.sources`` of preference learning as an override."""
    return _sources(data_dir, "preference", PREFERENCES)


def questions() -> list[Question]:
    """Read the held-out questions that the report shows answers to."""
    records = _by_id(HELD_OUT_CONVERSATIONS)
    pair = _by_id(HELD_OUT_PREFERENCES)[_ASKED_PAIR]
    return [
        *(Question(records[i]["instruction"], records[i]["output"]) for i in _ASKED),
        Question(pair["prompt"], pair["chosen"]),
    ]


def _sources(data_dir: Path, kind: str, files: Mapping[str, str]) -> str:
    return ",".join(
        f"{{name:{language},path:'{SAMPLES / file}',"
        f"validation_path:'{_held_out_path(data_dir, kind, language)}'}}"
        for language, file in files.items()
    )


def _held_out_path(data_dir: Path, kind: str, language: str) -> Path:
    return data_dir / f"{kind}_{language}_held_out.jsonl"


def _by_id(path: Path) -> dict[str, dict[str, Any]]:
    records = map(json.loads, path.read_text("utf-8").splitlines())
    return {record["id"]: record for record in records}


def _is_held_out(document_id: str) -> bool:
    """Divide by a hash of the id: a document's side never changes when others are added."""
    digest = hashlib.sha256(document_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < _HELD_OUT * 2**64


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
