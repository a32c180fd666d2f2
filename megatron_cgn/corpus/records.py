"""Documents out of the items of a part, tolerant of single faults and exact about where they lie.

A broken line or file never stops the others: it comes out as a `Raw` without a text and with a
reason. What counts as bad, towards ``read.max_bad``, is in `BAD`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cgn.corpus.formats import Unreadable, read_file
from megatron_cgn.corpus.parts import Item, Lines, Part, Rows
from megatron_cgn.corpus.sources import InputFile, Source

COLUMNS = ("id", "source", "license", "licence", "classification")
"""Fields that go with a document, beside its text."""

BAD = frozenset(
    (
        *("read/broken_line", "read/no_field", "read/undecodable", "read/damaged"),
        *("read/encrypted", "read/too_slow"),
    )
)
"""Reasons that mean the input is not what it should be, unlike an empty text."""

_BOM = b"\xef\xbb\xbf"
_ONE_A_LINE = "give JSON Lines, one object a line: not one array, nor objects over several lines"
_EXCERPT_CHARS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """A document as it was found, or what was found in its place."""

    id: str
    """Its own id, or ``<source>/<file>[#<line>]``."""
    own_id: bool
    """Whether the id is the document's own."""
    source: str
    """Name of the source."""
    license: str | None
    """Licence, as stated."""
    classification: str | None
    """Confidentiality class, as stated."""
    text: str | None
    """The text; None if there is none."""
    reason: str | None = None
    """Why there is none, starting with ``read/``."""
    evidence: str | None = None
    """Where, and what is wrong."""
    excerpt: str = ""
    """The beginning of what is wrong, where it can be shown."""
    repaired: bool = False
    """Whether lone surrogates, which no encoding can hold, became U+FFFD."""


def parse_part(
    part: Part, *, sources: Sequence[Source], field: str, read: Callable[[str], str] = read_file
) -> Iterator[Raw]:
    """Parse a part.

    Args:
        part: What to parse.
        sources: All sources.
        field: Name of the text's field.
        read: Gives the text of a file that is one document, or raises `Unreadable`.

    Yields:
        A `Raw` for every line, row and file; blank lines are none.
    """
    for item in part.items:
        maker = _Maker(file=item.file, source=sources[part.source], field=field, read=read)
        yield from _parse_item(item, maker)


def _parse_item(item: Item, maker: "_Maker") -> Iterator[Raw]:
    if isinstance(item, Lines):
        for number, line in enumerate(item.content.split(b"\n"), start=item.first):
            if number == 1:
                line = line.removeprefix(_BOM)
            if line and not line.isspace():
                yield maker.from_line(line, number)
    elif isinstance(item, Rows):
        for number, row in enumerate(_rows(item), start=item.first):
            yield maker.from_object(row, number)
    else:
        yield maker.from_file()


def _rows(item: Rows) -> Iterator[Any]:
    try:
        yield from item.batch.to_pylist()
    except UnicodeDecodeError:
        for place in range(item.batch.num_rows):
            try:
                yield item.batch.slice(place, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


class _Maker:
    """Makes the documents of one file."""

    def __init__(
        self, *, file: InputFile, source: Source, field: str, read: Callable[[str], str]
    ) -> None:
        self._file = file
        self._source = source
        self._field = field
        self._read = read

    def from_line(self, line: bytes, number: int) -> Raw:
        try:
            row = _loads(line)
        except (ValueError, RecursionError) as error:
            problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            if line.strip()[:1] == b"[" or line.strip() == b"{":
                problem += f"; {_ONE_A_LINE}"
            excerpt = line[: 4 * _EXCERPT_CHARS].decode("utf-8", "replace")
            return self._fault(number, "read/broken_line", f"not valid JSON: {problem}", excerpt)
        return self.from_object(row, number)

    def from_object(self, row: Any, number: int) -> Raw:
        if isinstance(row, UnicodeDecodeError):
            return self._fault(number, "read/undecodable", f"not valid UTF-8: {row.reason}")
        if not isinstance(row, dict):
            problem = f"a JSON {type(row).__name__} and no object; {_ONE_A_LINE}"
            return self._fault(number, "read/broken_line", problem)
        text = row.get(self._field)
        if not isinstance(text, str):
            if self._field in row:
                problem = f"the field {self._field!r} is {_kind(text)}, not a text"
            else:
                names = ", ".join(map(repr, list(row)[:12])) or "none"
                problem = f"no field {self._field!r}; the fields are {names}"
            return self._fault(number, "read/no_field", problem, fields=row)
        return self._raw(number, text, fields=row)

    def from_file(self) -> Raw:
        try:
            text = self._read(self._file.path)
        except Unreadable as fault:
            return self._fault(None, f"read/{fault.reason}", fault.evidence)
        return self._raw(None, text, fields={})

    def _raw(self, number: int | None, text: str, *, fields: dict[str, Any]) -> Raw:
        if not text or text.isspace():
            return self._fault(number, "read/empty", "the text is empty", fields=fields)
        whole = _without_surrogates(text)
        return self._make(number, fields, text=whole, repaired=whole is not text)

    def _fault(
        self,
        number: int | None,
        reason: str,
        problem: str,
        excerpt: str = "",
        *,
        fields: dict[str, Any] | None = None,
    ) -> Raw:
        # The name and not the path: the same input gives the same output wherever it lies.
        place = self._file.name
        if number is not None:
            place += f", {'line' if self._file.kind == 'lines' else 'row'} {number}"
        return self._make(
            number,
            fields or {},
            text=None,
            reason=reason,
            evidence=_without_surrogates(f"{place}: {problem}"),
            excerpt=excerpt[:_EXCERPT_CHARS],
        )

    def _make(self, number: int | None, fields: dict[str, Any], **rest: Any) -> Raw:
        own = _text(fields.get("id"))
        license = _text(fields.get("license")) or _text(fields.get("licence"))
        named = self._source.name if self._source.named else None
        place = self._file.name if number is None else f"{self._file.name}#{number}"
        return Raw(
            id=own or place,
            own_id=own is not None,
            source=named or _text(fields.get("source")) or self._source.name,
            license=license or self._source.license,
            classification=_text(fields.get("classification")) or self._source.classification,
            **rest,
        )


def _text(value: Any) -> str | None:
    """A field as a text; None if it is missing, empty or of no simple kind."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return _without_surrogates(str(value)).strip() or None


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _without_surrogates(text: str) -> str:
    """The text itself where it can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _json_loads(line: bytes) -> Any:
    return json.loads(line.decode())


def _fast_loads() -> Callable[[bytes], Any]:
    try:
        import orjson
    except ImportError:
        return _json_loads

    def loads(line: bytes) -> Any:
        try:
            return orjson.loads(line)
        except orjson.JSONDecodeError:
            return _json_loads(line)  # which takes lone surrogates, and says better what is wrong

    return loads


_loads = _fast_loads()
