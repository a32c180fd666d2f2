"""Conversations out of files, one by one, with what is wrong with those that cannot be used.

Nothing is passed over in silence: every record of a file comes out, as a conversation or as a
fault. What records look like is in ``conversation_formats.py``; a chat template makes tokens of
conversations, and finds their further faults, in `encode_conversations`.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

from megatron_cgn.data.conversation_formats import FIELDS, read_record
from megatron_cgn.data.readers import check_inputs, read_blocks
from megatron_cgn.errors import DataError
from tokenizer.chat import ChatTemplate, EncodedChat, Message

_BATCH = 256  # conversations tokenised at a time
_TABLE_ROWS = 512  # rows of a table held at a time
_BOM = "\ufeff"
_SPACE = re.compile(r"[ \t\r\n]*")
_EXAMPLE = "conversation. Give instruction, input and output; conversations; or messages."


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation and where it comes from."""

    id: str
    """The record's own ``id``, or the file's name and its line: ``qa.jsonl:17``."""
    messages: tuple[Message, ...]
    """What is said; not yet held against a chat template."""
    path: str
    """The file."""
    line: int
    """Line of a JSON file where the record begins, or row of a table, counted from 1."""
    kind: str
    """What the record looked like: one of `conversation_formats.KINDS`."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A record that cannot be used."""

    path: str
    """The file."""
    line: int
    """As of `Conversation`."""
    reason: str
    """What is wrong with it."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def read_conversations(
    path: str | Path,
    *,
    id_prefix: str = "",
    report: Callable[[int], object] | None = None,
) -> Iterator[Conversation | Fault]:
    """Read a file of conversations.

    Args:
        path: JSON Lines (``.jsonl``, ``.ndjson``, also ``.gz`` and ``.zst``), one JSON array
            (``.json``), Parquet, or a directory saved by Hugging Face `datasets`.
        id_prefix: Put before every id.
        report: Called with how many more bytes of the file are read.

    Yields:
        Each record in order: its conversation, or what is wrong with it. Blank lines are none.

    Raises:
        DataError: If the file is missing, of an unknown kind or damaged, so that records after
            the damage cannot be told.
    """
    path = Path(path)
    for line, row in read_rows(path, fields=FIELDS, example=_EXAMPLE, report=report):
        if isinstance(row, DataError):
            yield Fault(str(path), line, str(row))
            continue
        try:
            record = read_record(row)
        except DataError as fault:
            yield Fault(str(path), line, str(fault))
            continue
        name = record_name(row, path, line)
        yield Conversation(f"{id_prefix}{name}", record.messages, str(path), line, record.kind)


def encode_conversations(
    records: Iterable[Conversation | Fault], *, chat: ChatTemplate
) -> Iterator[tuple[Conversation, EncodedChat] | Fault]:
    """Make tokens of conversations.

    Args:
        records: As `read_conversations` gives them.
        chat: The template.

    Yields:
        Each record in order: the conversation and its tokens, or what is wrong with it.
    """
    for group in batched(records, _BATCH):
        given = [record for record in group if isinstance(record, Conversation)]
        encoded = iter(chat.encode_batch(record.messages for record in given))
        for record in group:
            if isinstance(record, Fault):
                yield record
                continue
            result = next(encoded)
            if isinstance(result, DataError):
                yield Fault(record.path, record.line, str(result))
            else:
                yield record, result


def read_rows(
    path: Path,
    *,
    fields: Sequence[str],
    example: str,
    report: Callable[[int], object] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Read a file record by record.

    Args:
        path: As for `read_conversations`.
        fields: Columns of a table that are read; of a JSON record all are.
        example: What to give instead, for a table that has none of them.
        report: As for `read_conversations`.

    Yields:
        Line and content of each record in order; a DataError for one that cannot be parsed.

    Raises:
        DataError: As `read_conversations`.
    """
    size = check_inputs([path])
    report = report or (lambda size: None)
    if path.is_dir() or path.suffix == ".parquet":
        return _table_rows(path, size, report, lambda names: _known(names, path, fields, example))
    return _json_rows(path, report)


def record_name(row: Mapping[str, Any], path: Path, line: int) -> str:
    """What a record is called: its own ``id``, or its file and line."""
    own = row.get("id")
    return f"{path.name}:{line}" if own is None or own == "" else str(own)


type _Row = tuple[int, Any]


def _json_rows(path: Path, report: Callable[[int], object]) -> Iterator[_Row]:
    inner = Path(path.stem) if path.suffix in (".gz", ".zst") else path
    pieces: list[bytes] = []
    is_array: bool | None = None
    for block in read_blocks([path], field=""):
        report(block.progress_bytes)
        assert isinstance(block.content, bytes)
        if is_array is None:
            text = block.content.removeprefix(_BOM.encode()).lstrip()
            is_array = inner.suffix == ".json" and text.startswith(b"[")
        if is_array:
            pieces.append(block.content)
        else:
            yield from _parse_lines(block.content, block.first)
    if pieces:
        yield from _parse_array(b"".join(pieces), path)


def _parse_lines(content: bytes, first: int) -> Iterator[_Row]:
    for number, line in enumerate(content.split(b"\n"), start=first):
        if number == 1:
            line = line.removeprefix(_BOM.encode())
        if line.strip():
            yield number, _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except ValueError as error:  # both broken JSON and broken UTF-8
        hint = ""
        if line.strip()[:1] in (b"[", b"{") and len(line.strip()) < 3:
            hint = "; give one object a line, or name a file that is one array .json"
        return DataError(f"not valid JSON ({error}){hint}")
    except RecursionError:
        return DataError("JSON nested too deeply")


def _parse_array(content: bytes, path: Path) -> Iterator[_Row]:
    """Elements of an array one by one: as objects, all would take many times the file's size."""
    try:
        text = content.decode().removeprefix(_BOM)
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{line}: not valid UTF-8 ({error}). Mend the file.") from error
    decode = json.JSONDecoder().raw_decode
    place, line, counted = _skip(text, _skip(text, 0) + 1), 1, 0
    more = not text.startswith("]", place)
    while more:
        line, counted = line + text.count("\n", counted, place), place
        try:
            row, place = decode(text, place)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{line}: the array is not valid JSON from the element on that begins here "
                f"({error}). Mend the file; JSON Lines, one object a line, would lose one record."
            ) from error
        yield line, row
        place = _skip(text, place)
        more = text.startswith(",", place)
        if more:
            place = _skip(text, place + 1)
    if not text.startswith("]", place) or text[place + 1 :].strip():
        line += text.count("\n", counted, place)
        raise DataError(
            f"{path}:{line}: the array does not end where it should. The file is damaged or "
            "incomplete: mend it or copy it again."
        )


def _skip(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None  # it matches nothing, too
    return match.end()


type _Choose = Callable[[Sequence[str]], list[str]]
"""Says which of the columns of a table are read."""


def _table_rows(
    path: Path, size: int, report: Callable[[int], object], choose: _Choose
) -> Iterator[_Row]:
    number = 0
    parts = _parquet(path, choose) if path.suffix == ".parquet" else _saved(path, choose)
    for rows, total in parts:
        before = number
        for row in rows:
            number += 1
            yield number, row
        report(size * number // total - size * before // total)


def _parquet(path: Path, choose: _Choose) -> Iterator[tuple[list[Any], int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = choose(file.schema_arrow.names)
            batches = file.iter_batches(batch_size=_TABLE_ROWS, columns=names, use_threads=False)
            for batch in batches:
                yield batch.to_pylist(), file.metadata.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


def _saved(path: Path, choose: _Choose) -> Iterator[tuple[list[Any], int]]:
    import datasets

    try:
        if json.loads((path / "state.json").read_text("utf-8"))["_data_files"] == []:
            return  # saved without a row, which `datasets` cannot open again
        dataset = datasets.load_from_disk(str(path))
        names = choose(dataset.column_names)
        table = dataset.select_columns(names).with_format("arrow")
        for part in table.iter(batch_size=_TABLE_ROWS):
            yield part.to_pylist(), len(dataset)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise _damaged(path, error) from error


def _known(names: Sequence[str], path: Path, fields: Sequence[str], example: str) -> list[str]:
    known = [name for name in fields if name in names]
    if not known:
        raise DataError(
            f"{path}: none of its columns ({', '.join(map(repr, names))}) belongs to a {example}"
        )
    return known


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: cannot be read to its end ({error}). The file is damaged or incomplete: copy it "
        "again."
    )
