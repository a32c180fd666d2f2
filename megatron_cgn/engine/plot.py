"""``loss.png``: what a run did, in one picture."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_REWARDS = (
    ("rewards/chosen", "chosen", "C2"),
    ("rewards/rejected", "rejected", "C3"),
    ("rewards/margins", "margin", "black"),
    ("margin", "margin", "black"),
)
_ACCURACIES = ("rewards/accuracies", "accuracy")
MARGINS = ("rewards/margins", "margin")
"""The mean margin of rewards, by the stage."""
_ORDERED = 0.01


def ordered(margin: float | None) -> bool:
    """Whether rewards are ordered by more than rounding.

    A policy that is its own reference has margins of 0. How many of them are above says nothing.
    """
    return margin is None or abs(margin) >= _ORDERED


def plot_losses(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw training loss and held-out scores over steps, source by source.

    The scores are bits per byte, or losses where nobody counted bytes. Where answers are compared,
    held-out losses are dots beside the training loss, and rewards and their accuracy follow.

    A name that no installed font can show is drawn as ``source N``, and the log says which it is.

    Args:
        records: From `metrics.read_records`.
        path: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    trained = _sources(records, "train/", "/loss")
    compares = any(name in record for record in records for name, _, _ in _REWARDS)
    score, meaning = "bits_per_byte", "held-out bits per byte"
    if not (held_out := _sources(records, "val/", f"/{score}")):
        score, meaning = "loss", "held-out loss (nats per token)"
        held_out = _sources(records, "val/", f"/{score}")
    labels, families = _labels(list(dict.fromkeys((*trained, *held_out))))
    styles = {
        name: {"color": f"C{place % 10}", "label": label}
        for place, (name, label) in enumerate(labels.items())
    }
    judged = any(name in record for record in records for name in _ACCURACIES)
    count = 2 + judged if compares else 1 + bool(held_out)
    with matplotlib.rc_context({"font.family": families}):
        figure, axes = pyplot.subplots(
            1,
            count,
            figsize=(max(6, 5 * count), 4),
            squeeze=False,
            layout="constrained",
        )
        left, right = axes[0][0], axes[0][-1]
        _draw_training(left, records, {name: styles[name] for name in trained})
        if compares:
            unseen = {n: styles[n] | {"label": "_" * (n in trained) + labels[n]} for n in held_out}
            _draw_held_out(left, records, unseen, "loss")
            left.set(ylabel="loss: training (lines), held out (dots)")
            _draw_rewards(axes[0][1], records)
            if judged:
                _draw_accuracy(right, records, {name: styles[name] for name in held_out})
        else:
            left.set(ylabel="training loss (nats per token)")
            if held_out:
                _draw_held_out(right, records, {name: styles[name] for name in held_out}, score)
                right.set(ylabel=meaning)
        for axis in axes[0]:
            axis.set(xlabel="step")
            axis.grid(alpha=0.3)
            if trained or axis is not left:
                _explain(axis)
        partial = path.with_suffix(".partial.png")
        try:
            figure.savefig(partial, dpi=120)
            partial.replace(path)
        finally:
            pyplot.close(figure)
            partial.unlink(missing_ok=True)


def _draw_training(axis: Any, records: Sequence[dict[str, Any]], styles: dict[str, Any]) -> None:
    for name, style in styles.items():
        points = _points(records, f"train/{name}/loss")
        axis.plot(*points, **_line(points), **style, alpha=0.8)
    points = _points(records, "loss")
    axis.plot(*points, **_line(points), color="black" if styles else "C0", label="all sources")


def _draw_held_out(
    axis: Any, records: Sequence[dict[str, Any]], styles: dict[str, Any], score: str
) -> None:
    for name, style in styles.items():
        points = _points(records, f"val/{name}/{score}")
        if points[0]:
            axis.plot(*points, marker="o", **style)


def _draw_rewards(axis: Any, records: Sequence[dict[str, Any]]) -> None:
    for name, label, colour in _REWARDS:
        points = _points(records, name)
        if points[0]:
            axis.plot(*points, **_line(points), color=colour, label=label)
    axis.set(ylabel="rewards")


def _draw_accuracy(axis: Any, records: Sequence[dict[str, Any]], styles: dict[str, Any]) -> None:
    for metric, margin in zip(_ACCURACIES, MARGINS, strict=True):
        points = _points([r for r in records if ordered(r.get(margin))], metric)
        if points[0]:
            axis.plot(*points, **_line(points), color="0.6", label="training")
        for name, style in styles.items():
            shown = [r for r in records if ordered(r.get(f"val/{name}/{margin}"))]
            _draw_held_out(axis, shown, {name: style}, metric)
    axis.set(ylabel="share of pairs the right way round", ylim=(-0.02, 1.02))


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


def _explain(axis: Any) -> None:
    """Add a legend; names are no mathematics, whatever dollar signs they hold."""
    lines = axis.get_legend_handles_labels()[0]
    if not lines:
        return
    legend = axis.legend(fontsize="small", ncols=1 + len(lines) // 8)
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
