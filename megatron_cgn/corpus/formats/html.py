"""HTML to text: the content of the page as Markdown, tables kept, navigation left out."""

import logging
import re
from typing import TYPE_CHECKING

from megatron_cgn.corpus.formats.plain import decode
from megatron_cgn.corpus.formats.unreadable import Unreadable
from megatron_cgn.errors import ConfigError

_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([\w.:-]{2,40})", re.IGNORECASE)
_HEAD_BYTES = 4096

# In a page a line end is a blank, but Chinese has none between words: it is nothing there.
_CJK = r"[\u2e80-\u303f\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]"
_CJK_LINE_END = re.compile(rf"(?<={_CJK})[ \t]*\r?\n\s*(?={_CJK})")
_AS_TYPED = frozenset(("pre", "code", "textarea", "script", "style"))
# Sphinx, MkDocs and others put a mark to copy the address behind every heading.
_PERMALINKS = "//a[@class='headerlink' or @class='headeranchor-link' or @title='Permanent link']"

_FENCE = re.compile(r"^(?:```|~~~)", re.MULTILINE)
_CODE_SPAN = re.compile(r"(`+[^`\n]+`+)")
_ESCAPE = re.compile(r"\\([*_`~\[\]<])")

if TYPE_CHECKING:
    from lxml.html import HtmlElement


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
        from lxml.etree import LxmlError
    except ImportError as error:
        raise ConfigError(
            f"HTML needs the package trafilatura ({error}): install 'megatron-cgn[corpus]'."
        ) from error
    # It warns of every page it finds nothing in; here that is counted.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    declared = _CHARSET.search(content[:_HEAD_BYTES])
    page = decode(content, declared=declared[1].decode("ascii", "ignore") if declared else None)
    if not page.strip():
        return ""
    try:
        tree = trafilatura.load_html(page)
        if tree is None:
            return trafilatura.html2txt(page) or ""
        _tidy(tree)
        text = trafilatura.extract(
            tree,
            output_format="markdown",
            include_tables=True,
            include_comments=False,
            include_formatting=True,
            favor_recall=True,
        )
        return unescape(text) if text else trafilatura.html2txt(page) or ""
    except (ValueError, RecursionError, LxmlError) as error:
        raise Unreadable("damaged", f"no HTML that can be parsed ({error})") from error


def _tidy(tree: "HtmlElement") -> None:
    """Take out of a page what its reader does not see."""
    for link in tree.xpath(_PERMALINKS):
        link.drop_tree()
    for element in tree.iter("*"):
        if element.text and element.tag not in _AS_TYPED:
            element.text = _CJK_LINE_END.sub("", element.text)
        if element.tail and not any(a.tag in _AS_TYPED for a in element.iterancestors()):
            element.tail = _CJK_LINE_END.sub("", element.tail)


def unescape(markdown: str) -> str:
    r"""Undo the escapes that keep Markdown's signs from being read as such.

    A model would learn to write ``nr\_virtfn``. Code has no escapes and stays as it is.

    Args:
        markdown: Text with escapes.

    Returns:
        The text without.
    """
    blocks = _FENCE.split(markdown)
    fences = _FENCE.findall(markdown)
    for place in range(0, len(blocks), 2):  # every second one is inside a fence
        spans = _CODE_SPAN.split(blocks[place])
        spans[::2] = [_ESCAPE.sub(r"\1", text) for text in spans[::2]]
        blocks[place] = "".join(spans)
    return "".join(x for pair in zip(blocks, [*fences, ""], strict=True) for x in pair)
