"""Documents out of blocks of raw lines or table rows, exact about where a fault lies.

Reading the blocks is cheap and lives in ``readers.py``; parsing them is not, so it may run in
another process.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_cgn.errors import DataError

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
    """Texts of a block."""

    texts: list[str]
    """Documents that are not empty; valid Unicode."""
    empty: int
    """Documents that were empty or white space alone."""
    repaired: int
    """Documents in which lone surrogates, which no encoding can hold, became U+FFFD."""


def parse_block(block: Block, *, field: str) -> Parsed:
    """Turn a block into texts.

    Args:
        block: Lines or rows.
        field: Name of the text's field.

    Returns:
        The texts, with empty ones left out and counted.

    Raises:
        DataError: If a line is not a JSON object with a string in ``field``; names the line.
    """
    if isinstance(block.content, bytes):
        values = _parse_lines(block, block.content, field)
    else:
        values = _parse_rows(block, block.content, field)
    texts, empty, repaired = [], 0, 0
    for text in values:
        if not text or text.isspace():
            empty += 1
            continue
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            repaired += 1
        texts.append(text)
    return Parsed(texts=texts, empty=empty, repaired=repaired)


def _parse_lines(block: Block, content: bytes, field: str) -> Iterator[str]:
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=block.first):
        if number == 1:
            line = line.removeprefix(_BOM)
        if not line.strip():
            continue  # not a document; a file's last line often is blank
        try:
            row = json.loads(line.decode())
        except ValueError as error:  # both broken JSON and broken UTF-8
            remedy = "Mend or remove the line."
            if line.strip()[:1] == b"[" or line.strip() == b"{":
                remedy = _ONE_A_LINE
            raise DataError(
                f"{block.path}, line {number}: not valid JSON ({error}). {remedy}"
            ) from error
        except RecursionError as error:
            raise DataError(
                f"{block.path}, line {number}: JSON nested too deeply. Mend or remove the line."
            ) from error
        yield _text_of(row, f"{block.path}, line {number}", field)


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


def _parse_rows(block: Block, rows: list[Any], field: str) -> Iterator[str]:
    for number, value in enumerate(rows, start=block.first):
        yield _checked(value, f"{block.path}, row {number}", field)


def _checked(value: Any, place: str, field: str) -> str:
    if not isinstance(value, str):
        found = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{place}: the field {field!r} is {found}, not a text. Mend or remove it.")
    return value
