"""``loss.png``: what a run did, in one picture."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def plot_losses(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw training loss and held-out scores over steps, source by source.

    The scores are bits per byte, or losses where nobody counted bytes.

    A name that no installed font can show is drawn as ``source N``, and the log says which it is.

    Args:
        records: From `metrics.read_records`.
        path: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trained = _sources(records, "train/", "/loss")
    score, meaning = "bits_per_byte", "held-out bits per byte"
    if not (held_out := _sources(records, "val/", f"/{score}")):
        score, meaning = "loss", "held-out loss (nats per token)"
        held_out = _sources(records, "val/", f"/{score}")
    names = list(dict.fromkeys((*trained, *held_out)))
    labels, families = _labels(names)
    colours = {name: f"C{place % 10}" for place, name in enumerate(names)}
    width = 10 if held_out else 6
    with matplotlib.rc_context({"font.family": families}):
        figure, axes = pyplot.subplots(
            1, 2 if held_out else 1, figsize=(width, 4), squeeze=False, layout="constrained"
        )
        left, right = axes[0][0], axes[0][-1]
        for name in trained:
            points = _points(records, f"train/{name}/loss")
            left.plot(*points, **_line(points), color=colours[name], label=labels[name], alpha=0.8)
        points = _points(records, "loss")
        left.plot(*points, **_line(points), color="black" if trained else "C0", label="all sources")
        left.set(xlabel="step", ylabel="training loss (nats per token)")
        for name in held_out:
            points = _points(records, f"val/{name}/{score}")
            right.plot(*points, marker="o", color=colours[name], label=labels[name])
        if held_out:
            right.set(xlabel="step", ylabel=meaning)
        for axis, several in ((left, trained), (right, held_out)):
            axis.grid(alpha=0.3)
            if several:
                _explain(axis, len(several))
        partial = path.with_suffix(".partial.png")
        try:
            figure.savefig(partial, dpi=120)
            partial.replace(path)
        finally:
            pyplot.close(figure)
            partial.unlink(missing_ok=True)


def _sources(records: Sequence[dict[str, Any]], prefix: str, suffix: str) -> list[str]:
    """Sources with a metric, in the order in which they first appear."""
    found = dict.fromkeys(name for record in records for name in record)
    return [
        name.removeprefix(prefix).removesuffix(suffix)
        for name in found
        if name.startswith(prefix) and name.endswith(suffix)
    ]


def _points(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[Any]]:
    """Steps and values; a source that gave nothing to a step has no value there."""
    found = [record for record in records if name in record]
    return [record["step"] for record in found], [record[name] for record in found]


def _line(points: tuple[list[int], list[Any]]) -> dict[str, Any]:
    """How to draw it: a line through few points shows them, one through many does not."""
    return {"linewidth": 1, "marker": "." if len(points[0]) <= 20 else None}


def _explain(axis: Any, count: int) -> None:
    """Add a legend; names are no mathematics, whatever dollar signs they hold."""
    legend = axis.legend(fontsize="small", ncols=1 + count // 8)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _labels(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What each name is drawn as, and the font families that show it.

    Matplotlib's own font has no Chinese characters, and its list of installed fonts may be older
    than the fonts, so the files themselves are looked into.
    """
    from matplotlib import font_manager, rcParams

    families = list(rcParams["font.family"])
    # In a list: as a plain text, a family would be read as a pattern.
    own = [font_manager.FontProperties(family=[family]) for family in families]
    fonts = [font_manager.get_font(font_manager.findfont(properties)) for properties in own]
    labels = {}
    for number, name in enumerate(names, start=1):
        labels[name] = name
        missing = [c for c in name if not any(font.get_char_index(ord(c)) for font in fonts)]
        if not missing:
            continue
        path = _font_with(missing)
        if path is not None:
            font_manager.fontManager.addfont(path)
            fonts.append(font_manager.get_font(path))
            families.append(fonts[-1].family_name)
            continue
        labels[name] = f"source {number}"
        logger.warning(
            "loss.png: no installed font shows %r, so it is drawn as %r; a Chinese font, such as "
            "the package fonts-noto-cjk, would do",
            name,
            labels[name],
        )
    return labels, families


def _font_with(characters: Sequence[str]) -> str | None:
    """An installed font file with these characters; one without serifs if there is one."""
    from matplotlib import font_manager

    files = font_manager.findSystemFonts()
    for path in sorted(files, key=lambda p: ("Sans" not in p, "Regular" not in p, p)):
        try:
            font = font_manager.get_font(path)
        except (OSError, RuntimeError):  # not every file in a font directory is a font
            continue
        if all(font.get_char_index(ord(c)) for c in characters):
            return path
    return None
