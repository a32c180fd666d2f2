"""Documents out of blocks of raw lines or table rows, exact about where a fault lies.

Reading the blocks is cheap and lives in ``readers.py``; parsing them is not, so it may run in
another process. What a document says of itself (``id``, ``source``, ``license``,
``classification``, ``hash``) is taken here; how an index keeps it is in ``lineage.py``.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from megatron_cgn.data.lineage import Columns, content_hash
from megatron_cgn.errors import DataError

LINEAGE_FIELDS = ("id", "source", "license", "licence", "classification", "hash")
"""Fields of a raw document that are kept; both spellings mean the column ``license``."""

_BOM = b"\xef\xbb\xbf"
_ONE_A_LINE = "Give JSON Lines, one object a line: not one array, nor objects over several lines."


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Consecutive lines or rows of one input."""

    source: int
    """Place of the input among the inputs."""
    path: str
    """The input, for messages."""
    first: int
    """Number of the first line or row, counted from 1."""
    content: bytes | list[Any]
    """Whole lines of JSON, or the values of the field, one per row."""
    extra: Mapping[str, list[Any]] = field(default_factory=dict)
    """Of a table, the values of those of `LINEAGE_FIELDS` that it has, one per row."""
    progress_bytes: int
    """Bytes of the input used up by this block, as they lie on the disk."""

    @property
    def size(self) -> int:
        """Bytes of the lines or characters of the rows: what it takes to hold the block."""
        if isinstance(self.content, bytes):
            return len(self.content)
        return sum(len(value) for value in self.content if isinstance(value, str))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """Documents of a block: texts, and what is known of them."""

    texts: list[str]
    """Documents that are not empty; valid Unicode."""
    utf8: list[bytes]
    """The same in UTF-8."""
    lineage: Columns
    """What is known of each: see ``lineage.py``."""
    empty: int
    """Documents that were empty or white space alone."""
    repaired: int
    """Documents in which lone surrogates, which no encoding can hold, became U+FFFD."""


class _Loads(Protocol):
    def __call__(self, text: bytes, /) -> Any: ...


def parse_block(block: Block, *, field: str) -> Parsed:
    """Turn a block into texts and their lineage.

    A document without an id gets the input's name and its line or row as one, and one without a
    hash that of its text. Values that are no text are kept as the JSON that says them.

    Args:
        block: Lines or rows.
        field: Name of the text's field.

    Returns:
        The documents, with empty ones left out and counted.

    Raises:
        DataError: If a line is not a JSON object with a string in ``field``; names the line.
    """
    if isinstance(block.content, bytes):
        documents = _parse_lines(block, block.content, field)
    else:
        documents = _parse_rows(block, block.content, field)
    name = Path(block.path).name
    texts: list[str] = []
    encoded: list[bytes] = []
    ids: list[str | None] = []
    sources: list[str | None] = []
    licenses: list[str | None] = []
    classifications: list[str | None] = []
    hashes: list[str | None] = []
    empty = repaired = 0
    for number, text, says in documents:
        if not text or text.isspace():
            empty += 1
            continue
        try:
            utf8 = text.encode()
        except UnicodeEncodeError:
            text = _without_surrogates(text)
            utf8 = text.encode()
            repaired += 1
        texts.append(text)
        encoded.append(utf8)
        get = says.get
        ids.append(_as_text(get("id")) or f"{name}#{number}")
        sources.append(_as_text(get("source")))
        licenses.append(_as_text(get("license")) or _as_text(get("licence")))
        classifications.append(_as_text(get("classification")))
        hashes.append(_as_text(get("hash")) or content_hash(utf8))
    return Parsed(
        texts=texts,
        utf8=encoded,
        lineage={
            "id": ids,
            "source": sources,
            "license": licenses,
            "classification": classifications,
            "hash": hashes,
            "text_bytes": [len(utf8) for utf8 in encoded],
        },
        empty=empty,
        repaired=repaired,
    )


def _as_text(value: Any) -> str | None:
    """A value of the lineage as valid text; None stays, anything but a text becomes JSON."""
    if value is None:
        return None
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, default=str)
    if value.isascii():
        return str(value)
    return _without_surrogates(value)


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parse_lines(
    block: Block, content: bytes, field: str
) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    loads = _fast_loads()
    for number, line in enumerate(content.split(b"\n"), start=block.first):
        if number == 1:
            line = line.removeprefix(_BOM)
        try:
            row = loads(line)
            if type(row) is dict and type(row.get("id")) is float:
                row = json.loads(line)  # a whole number beyond 64 bits
        except ValueError:
            if not line.strip():
                continue  # not a document; a file's last line often is blank
            row = _exact_loads(line, block.path, number)
        if type(row) is dict and type(text := row.get(field)) is str:
            yield number, text, row
        else:
            place = f"{block.path}, line {number}"
            yield number, _text_of(row, place, field), row


@cache
def _fast_loads() -> _Loads:
    """The fastest parser there is. What it refuses is for `_exact_loads` to judge."""
    try:
        import orjson
    except ImportError:

        def refuse(text: bytes, /) -> Any:
            raise ValueError

        return refuse
    return orjson.loads


def _exact_loads(line: bytes, path: str, number: int) -> Any:
    """Parse what JSON's strict readers refuse but Python's writer makes: NaN, lone surrogates."""
    try:
        return json.loads(line.decode())
    except ValueError as error:  # both broken JSON and broken UTF-8
        remedy = "Mend or remove the line."
        if line.strip()[:1] == b"[" or line.strip() == b"{":
            remedy = _ONE_A_LINE
        raise DataError(f"{path}, line {number}: not valid JSON ({error}). {remedy}") from error
    except RecursionError as error:
        raise DataError(
            f"{path}, line {number}: JSON nested too deeply. Mend or remove the line."
        ) from error


def _text_of(row: Any, place: str, field: str) -> str:
    if not isinstance(row, dict):
        raise DataError(
            f"{place}: expected a JSON object with the field {field!r}, found a "
            f"{type(row).__name__}. {_ONE_A_LINE}"
        )
    if field not in row:
        raise DataError(
            f"{place}: no field {field!r}; the fields are {', '.join(map(repr, row)) or 'none'}. "
            "Name the text's field with --field."
        )
    return _checked(row[field], place, field)


def _parse_rows(
    block: Block, rows: list[Any], field: str
) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    for index, value in enumerate(rows):
        number = block.first + index
        text = _checked(value, f"{block.path}, row {number}", field)
        yield number, text, {name: values[index] for name, values in block.extra.items()}


def _checked(value: Any, place: str, field: str) -> str:
    if not isinstance(value, str):
        found = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{place}: the field {field!r} is {found}, not a text. Mend or remove it.")
    return value
