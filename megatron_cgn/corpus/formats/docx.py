"""DOCX to text: headings, paragraphs and tables in their order, as Markdown."""

import re
import zipfile
from collections.abc import Iterator
from typing import Any

from megatron_cgn.corpus.formats.unreadable import Unreadable
from megatron_cgn.errors import ConfigError

_HEADING = re.compile(r"(?:heading|标题)\s*([1-6])", re.IGNORECASE)
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


def read_docx(path: str) -> str:
    """Take the text out of a Word document.

    Args:
        path: The file.

    Returns:
        Markdown.

    Raises:
        Unreadable: If it is damaged or encrypted.
        OSError: If it cannot be read.
        ConfigError: If the library is not installed.
    """
    try:
        import docx
        from docx.opc.exceptions import OpcError
        from lxml.etree import LxmlError
    except ImportError as error:
        raise ConfigError(
            "DOCX needs the package python-docx: install 'megatron-cgn[corpus]'."
        ) from error
    with open(path, "rb") as file:
        # Word wraps an encrypted document, like a .doc of old, into another container.
        if file.read(len(_OLE)) == _OLE:
            raise Unreadable("encrypted", "encrypted with a password, or an old .doc renamed")
        file.seek(0)
        try:
            document = docx.Document(file)
            return "\n\n".join(_blocks(document))
        # The library lets faults of the archive and of its parts through as they come.
        except (
            OpcError,
            LxmlError,
            zipfile.BadZipFile,
            KeyError,
            ValueError,
            AttributeError,
            RecursionError,
            EOFError,
            NotImplementedError,
        ) as error:
            raise Unreadable("damaged", f"no Word document that can be opened ({error})") from error


def _blocks(container: Any) -> Iterator[str]:
    from docx.table import Table

    for block in container.iter_inner_content():
        if isinstance(block, Table):
            if table := _table(block):
                yield table
        elif text := block.text.strip():
            style = block.style.name if block.style is not None else ""
            heading = _HEADING.match(style or "")
            yield f"{'#' * int(heading[1])} {text}" if heading else text


def _table(table: Any) -> str:
    rows = [_cells(row) for row in table.rows]
    rows = [row for row in rows if any(row)]
    if not rows:
        return ""
    width = max(map(len, rows))
    lines = ["| " + " | ".join(row + [""] * (width - len(row))) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * width)
    return "\n".join(lines)


def _cells(row: Any) -> list[str]:
    """Texts of a row's cells; a merged cell counts once."""
    cells: list[str] = []
    last = None
    for cell in row.cells:
        if cell._tc is not last:
            cells.append(" ".join(cell.text.split()).replace("|", "\\|"))
        last = cell._tc
    return cells
