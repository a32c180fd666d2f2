"""HTML to text: the content of the page as Markdown, tables kept, navigation left out."""

import logging
import re

from megatron_cgn.corpus.formats.plain import decode
from megatron_cgn.corpus.formats.unreadable import Unreadable
from megatron_cgn.errors import ConfigError

_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([\w.:-]{2,40})", re.IGNORECASE)
_HEAD_BYTES = 4096


def read_html(content: bytes) -> str:
    """Take the text out of a page.

    Args:
        content: Bytes of the page, in the encoding it declares or one that `decode` knows.

    Returns:
        Markdown; the whole visible text where no main content can be told from the rest.

    Raises:
        Unreadable: If the page cannot be decoded or parsed.
        ConfigError: If the library is not installed.
    """
    try:
        import trafilatura
    except ImportError as error:
        raise ConfigError(
            "HTML needs the package trafilatura: install 'megatron-cgn[corpus]'."
        ) from error
    # It warns of every page it finds nothing in; here that is counted.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    declared = _CHARSET.search(content[:_HEAD_BYTES])
    page = decode(content, declared=declared[1].decode("ascii", "ignore") if declared else None)
    if not page.strip():
        return ""
    try:
        text = trafilatura.extract(
            page,
            output_format="markdown",
            include_tables=True,
            include_comments=False,
            include_formatting=True,
            favor_recall=True,
        )
        return text or trafilatura.html2txt(page) or ""
    except (ValueError, RecursionError) as error:
        raise Unreadable("damaged", f"no HTML that can be parsed ({error})") from error
