"""Bar charts as inline SVG, for a page that needs no network."""

from collections.abc import Sequence
from html import escape

_ROW = 22
_LABEL = 150
_BAR = 420
_WIDTH = 720


def bars(
    rows: Sequence[tuple[str, Sequence[int]]],
    *,
    series: Sequence[str],
    label_width: int = _LABEL,
) -> str:
    """Draw horizontal stacked bars, one a row.

    Args:
        rows: Label and a value for each series.
        series: Names of the series, for the legend; colours are by place.
        label_width: Room for the labels, in pixels.

    Returns:
        An ``<svg>`` element, with the figures as text beside the bars.
    """
    if not rows:
        return "<p>None.</p>"
    most = max(sum(values) for _, values in rows) or 1
    top = _ROW if len(series) > 1 else 0
    parts = _legend(series, x=label_width) if top else []
    scale = (_BAR + _LABEL - label_width) / most
    for place, (label, values) in enumerate(rows):
        parts += _bar(label, values, x=label_width, y=top + place * _ROW, scale=scale)
    height = top + len(rows) * _ROW
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img">'
        + "".join(parts)
        + "</svg>"
    )


def _bar(label: str, values: Sequence[int], *, x: float, y: int, scale: float) -> list[str]:
    text = y + 15
    parts = [f'<text x="{x - 8}" y="{text}" text-anchor="end">{escape(label)}</text>']
    for colour, value in enumerate(values):
        width = value * scale
        parts.append(
            f'<rect class="c{colour % 6}" x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="16"/>'
        )
        x += width
    parts.append(f'<text x="{x + 6:.1f}" y="{text}">{sum(values):,}</text>')
    return parts


def _legend(series: Sequence[str], *, x: int) -> list[str]:
    parts: list[str] = []
    for colour, name in enumerate(series):
        parts.append(f'<rect class="c{colour % 6}" x="{x}" y="4" width="10" height="10"/>')
        parts.append(f'<text x="{x + 14}" y="14">{escape(name)}</text>')
        # Wide characters take about twice the room.
        x += 34 + sum(14 if char > "\u2e7f" else 8 for char in name)
    return parts
