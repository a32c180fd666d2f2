"""Lines over the number of new tokens as inline SVG, for a page that needs no network."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 110, 14, 44
_NUM_TICKS = 5
_LEAST_GAP = 46  # pixels between labels of the horizontal axis
_LEAST_LINE = 16  # pixels between labels at the ends of the lines

STYLE = """
.axis { stroke: #d0d7de; } .grid { stroke: #eaeef2; } polyline { fill: none; stroke-width: 2; }
polyline.c0 { stroke: #3b6fb5; } polyline.c1 { stroke: #d98b2b; } polyline.c2 { stroke: #4b9a6a; }
polyline.c0, polyline.c1, polyline.c2 { fill: none; }
.chosen { stroke: #7a7a7a; stroke-dasharray: 4 4; }
svg text.muted { fill: #59636e; }
"""
"""Rules that go with the charts, besides those of `corpus.page`."""


def lines(
    xs: Sequence[int],
    series: Mapping[str, Sequence[float]],
    *,
    label: Callable[[float], str],
    chosen: int | None = None,
) -> str:
    """Draw lines, named at their ends, with a dot at every measurement.

    The horizontal axis is stretched where it begins, by a square root, as sizes are dense there.

    Args:
        xs: Numbers of new tokens, ascending.
        series: Values of each line, one for each of `xs`.
        label: Makes the text of a tick on the vertical axis.
        chosen: The number of new tokens to mark.

    Returns:
        An ``<svg>`` element; a sentence where there is nothing to draw.
    """
    values = [value for line in series.values() for value in line]
    if len(xs) < 2 or not values:
        return "<p>One size alone was tried.</p>"
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room

    def x_of(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.sqrt(x / xs[-1])

    def y_of(y: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - y) / (high - low)

    parts = _frame(xs, x_of, y_of, [low + room, high - room], label)
    if chosen in xs and chosen:
        x = x_of(chosen)
        parts.append(
            f'<line class="chosen" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{_HEIGHT - _BOTTOM}"/>'
        )
    for colour, (_, line) in enumerate(series.items()):
        parts += _line([(x_of(x), y_of(y)) for x, y in zip(xs, line, strict=True)], colour)
    parts += _names({name: y_of(line[-1]) for name, line in series.items()})
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img">'
        + "".join(parts)
        + "</svg>"
    )


def _frame(
    xs: Sequence[int],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    ends: Sequence[float],
    label: Callable[[float], str],
) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in range(_NUM_TICKS):
        value = ends[0] + (ends[1] - ends[0]) * tick / (_NUM_TICKS - 1)
        y = y_of(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(label(value))}</text>'
        )
    last = float("-inf")
    for x in xs:
        place = x_of(x)
        if place - last >= _LEAST_GAP:
            parts.append(
                f'<text x="{place:.1f}" y="{bottom + 18}" text-anchor="middle">{x:,}</text>'
            )
            last = place
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    parts.append(
        f'<text class="muted" x="{(_LEFT + right) / 2}" y="{bottom + 38}" text-anchor="middle">'
        "new tokens (square-root scale)</text>"
    )
    return parts


def _line(points: Sequence[tuple[float, float]], colour: int) -> list[str]:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = [f'<circle class="c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points]
    return [f'<polyline class="c{colour}" points="{joined}"/>', *dots]


def _names(ends: Mapping[str, float]) -> list[str]:
    """Names at the right ends of the lines, moved apart where they would lie on each other."""
    parts = []
    colours = {name: colour for colour, name in enumerate(ends)}
    last = float("-inf")
    for name in sorted(ends, key=lambda name: ends[name]):
        last = max(ends[name], last + _LEAST_LINE)
        parts.append(
            f'<text class="c{colours[name]}" x="{_WIDTH - _RIGHT + 10}" y="{last + 4:.1f}">'
            f"{escape(name)}</text>"
        )
    return parts
