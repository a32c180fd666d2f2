"""Reads evaluation files: the questions, passages and choices that must not be trained on.

An *item* is a line of JSONL, an element of a JSON list, a row of a table, or a paragraph of plain
text. Its texts become *passages*: each field one, but choices (A to E, or a list) together one,
because a single choice is often a plain fact that any good document may state.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cgn.errors import DataError

_SUFFIXES = ".jsonl, .json, .csv, .tsv, .parquet, .txt or .md"
_CHOICES = re.compile(
    "[a-f]|(?:choices?|options?|candidates?|endings?|answer_choices?|op[at]?|选项|备选项?)"
    "[ _-]?[a-f0-9]?"
)
# What names an item or its origin, and is no part of what is asked.
_NOT_CONTENT = frozenset(
    "id idx index uid uuid key hash md5 url link source src dataset split subset subject category "
    "domain topic level difficulty type license date author 编号 序号 来源 科目 类别 难度".split()
)
_HEADER_WORDS = frozenset(
    "question query prompt problem text content input instruction passage context sentence stem "
    "题目 问题 题干 文本 内容".split()
)


@dataclass(frozen=True, slots=True)
class Passage:
    """A text of an item, and where it stands."""

    file: str
    """Path of the evaluation file."""
    item: int
    """Number of the item in it, from 1."""
    field: str
    """Name of the field."""
    texts: tuple[str, ...]
    """The text; several where they are choices."""


def read_passages(path: str | Path, *, fields: Sequence[str] = ()) -> Iterator[Passage]:
    """Read the passages of an evaluation file.

    Args:
        path: The file.
        fields: Names of the fields to read; none means all that are content.

    Yields:
        Passages in order.

    Raises:
        DataError: If the file is missing, of an unknown kind, damaged, empty, or lacks the fields.
    """
    path = Path(path)
    names: set[str] = set()
    number = 0
    try:
        for number, item in enumerate(_items(path), start=1):
            names |= item.keys()
            yield from _passages(str(path), number, item, fields)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}. Correct "
            "decontaminate.evaluation_files."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not UTF-8 (byte {error.start}). Convert it to UTF-8."
        ) from error
    if not number:
        raise DataError(
            f"{path}: holds no items. Correct it, or take it out of decontaminate.evaluation_files."
        )
    if fields and not names & set(fields):
        raise DataError(
            f"{path}: has none of the fields in decontaminate.fields ({', '.join(fields)}); it has "
            f"{', '.join(sorted(names))}."
        )


def _items(path: Path) -> Iterator[Mapping[str, Any]]:
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            with path.open(encoding="utf-8-sig") as file:
                yield from (
                    _item(_parse(line, path, i)) for i, line in enumerate(file, 1) if line.strip()
                )
        case ".json":
            parsed = _parse(path.read_text(encoding="utf-8-sig"), path, 1)
            yield from map(_item, parsed if isinstance(parsed, list) else [parsed])
        case ".csv" | ".tsv":
            delimiter = "," if path.suffix.lower() == ".csv" else "\t"
            yield from _rows(path.read_text(encoding="utf-8-sig"), delimiter, path)
        case ".parquet":
            yield from _parquet(path)
        case ".txt" | ".md":
            paragraphs = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n\n")
            yield from ({"text": each} for each in paragraphs if each.strip())
        case _:
            raise DataError(f"{path}: is of an unknown kind; evaluation files are {_SUFFIXES}.")


def _item(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {"text": value}


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}:{line}: is not JSON: {error}. Correct the line.") from error


def _rows(text: str, delimiter: str, path: Path) -> Iterator[Mapping[str, Any]]:
    """Read a table, with or without a row of names (C-Eval and CMMLU have one, MMLU has none)."""
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if any(row)]
    except csv.Error as error:
        raise DataError(f"{path}: is not a table of the kind its name says: {error}.") from error
    if rows and any(cell.strip().lower() in _HEADER_WORDS for cell in rows[0]):
        names = [cell.strip() or f"column {i}" for i, cell in enumerate(rows.pop(0), 1)]
    else:
        names = _names(rows[0] if rows else [])
    for row in rows:
        yield dict(zip(names, row, strict=False))


def _names(row: Sequence[str]) -> list[str]:
    """Name the columns of a table without names: a question, choices and a letter, or numbers."""
    if len(row) > 3 and row[-1].strip() in tuple("ABCDEF"):
        return ["question", *"ABCDEF"[: len(row) - 2], "answer"]
    return [f"column {i}" for i in range(1, len(row) + 1)]


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{path}: is no Parquet file, or damaged: {error}.") from error


def _passages(
    file: str, number: int, item: Mapping[str, Any], fields: Sequence[str]
) -> Iterator[Passage]:
    choices: list[str] = []
    for name, value in item.items():
        key = name.strip().lower()
        if fields and name not in fields or not fields and key in _NOT_CONTENT:
            continue
        texts = tuple(_texts(value))
        if _CHOICES.fullmatch(key):
            choices += texts
        elif isinstance(value, str):
            yield Passage(file, number, name, texts)
        else:
            # Turns of a conversation, or documents beside a question: each stands for itself.
            yield from (Passage(file, number, name, (text,)) for text in texts)
    if choices:
        yield Passage(file, number, "choices", tuple(choices))


def _texts(value: Any) -> Iterator[str]:
    """Give every string inside a value."""
    match value:
        case str():
            yield value
        case dict():
            for key, each in value.items():
                if str(key).strip().lower() not in _NOT_CONTENT:
                    yield from _texts(each)
        case list() | tuple():
            for each in value:
                yield from _texts(each)
