"""Text out of a file that is one document: plain text, HTML, PDF, DOCX.

Every parser takes bytes or a path, gives the text, and raises `Unreadable` for what is no fault of
the program. Nothing is cleaned here beyond what belongs to the format.
"""

from pathlib import Path

from megatron_cgn.corpus.formats.unreadable import Unreadable

__all__ = ["Unreadable", "read_file"]


def read_file(path: str) -> str:
    """Read a document.

    Args:
        path: A file whose suffix tells its kind.

    Returns:
        Its text.

    Raises:
        Unreadable: If it has none that can be read.
    """
    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".pdf":
            from megatron_cgn.corpus.formats.pdf import read_pdf

            return read_pdf(path)
        if suffix == ".docx":
            from megatron_cgn.corpus.formats.docx import read_docx

            return read_docx(path)
        content = Path(path).read_bytes()
    except OSError as error:
        raise Unreadable("damaged", f"cannot be read ({error.strerror})") from error
    if suffix in (".html", ".htm", ".xhtml"):
        from megatron_cgn.corpus.formats.html import read_html

        return read_html(content)
    from megatron_cgn.corpus.formats.plain import decode

    return decode(content)
