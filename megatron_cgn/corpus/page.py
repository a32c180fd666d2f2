"""A page that needs no network and runs no script: its frame, its style and its tables."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "Microsoft YaHei", sans-serif;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d0d7de; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #eaeef2; text-align: left;
         vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f6f8fa; padding: .5rem .75rem; white-space: pre-wrap; word-break: break-word;
      margin: .25rem 0 1rem; max-height: 14rem; overflow: auto; }
code { font-size: .9em; word-break: break-all; } summary { cursor: pointer; }
.warning { border-left: .25rem solid #d98b2b; padding-left: .75rem; }
.id { font-weight: 600; word-break: break-all; } .muted { color: #59636e; }
svg text { font-size: 13px; fill: currentColor; }
.c0 { fill: #3b6fb5; } .c1 { fill: #d98b2b; } .c2 { fill: #4b9a6a; }
.c3 { fill: #a4508b; } .c4 { fill: #7a7a7a; } .c5 { fill: #2aa1a1; }
"""


def page(title: str, sections: Iterable[str], *, style: str = "") -> str:
    """Put sections into a page.

    Args:
        title: Its title; escaped here.
        sections: HTML, safe to show.
        style: More rules after `STYLE`.

    Returns:
        The whole page.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Draw a table.

    Args:
        heads: Of the columns; one that starts with ``#`` is that of figures.
        rows: A value for each column, escaped here.

    Returns:
        A ``<table>`` element.
    """
    figures = [head.startswith("#") for head in heads]
    kinds = [' class="n"' if figure else "" for figure in figures]
    lines = [
        "".join(
            f"<th{kind}>{head.removeprefix('#')}</th>"
            for kind, head in zip(kinds, heads, strict=True)
        )
    ]
    for row in rows:
        cells = (f"{value:,}" if isinstance(value, int) else str(value) for value in row)
        lines.append(
            "".join(
                f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, cells, strict=True)
            )
        )
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
