"""``loss.png``: which lines it has, and names in any script."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from megatron_cgn.engine.plot import plot_losses

RECORDS: list[dict[str, Any]] = [
    {"step": 0, "val/领域/bits_per_byte": 2.0, "val/领域/loss": 5.0, "val/$x$/bits_per_byte": 1.0},
    {"step": 1, "loss": 4.0, "lr": 0.1, "train/领域/loss": 4.5, "train/$x$/loss": 3.0},
    {"step": 2, "loss": 3.0, "lr": 0.1, "train/领域/loss": 3.0},
    {"step": 2, "val/领域/bits_per_byte": 1.5, "val/$x$/bits_per_byte": None},
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def spy(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as a glyph that no font has
            save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


def _lines(axis: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {x.get_label(): (list(x.get_xdata()), list(x.get_ydata())) for x in axis.get_lines()}


def _legend(axis: Any) -> list[str] | None:
    legend = axis.get_legend()
    return None if legend is None else [text.get_text() for text in legend.get_texts()]


def test_every_source_has_a_line_and_one_colour(tmp_path: Path, figures: list[Figure]) -> None:
    plot_losses(RECORDS, tmp_path / "loss.png")
    left, right = figures[0].axes
    domain, _ = _legend(right) or []  # a number where the test runs without a Chinese font
    assert _lines(left) == {
        domain: ([1, 2], [4.5, 3.0]),
        "$x$": ([1], [3.0]),
        "all sources": ([1, 2], [4.0, 3.0]),
    }
    assert _legend(left) == [domain, "$x$", "all sources"]
    assert _lines(right)[domain] == ([0, 2], [2.0, 1.5])
    colours = [{x.get_label(): x.get_color() for x in axis.get_lines()} for axis in (left, right)]
    assert colours[0][domain] == colours[1][domain] != colours[0]["$x$"] == colours[1]["$x$"]
    with Image.open(tmp_path / "loss.png") as picture:
        picture.load()
        assert picture.size == (1200, 480)
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_a_name_that_no_font_shows_becomes_a_number(
    tmp_path: Path,
    figures: list[Figure],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    with caplog.at_level(logging.WARNING):
        plot_losses(RECORDS, tmp_path / "loss.png")
    assert _legend(figures[0].axes[1]) == ["source 1", "$x$"]
    assert "'领域'" in caplog.text and "'source 1'" in caplog.text


def test_a_font_with_the_characters_is_found_in_its_file(
    tmp_path: Path, figures: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    # DejaVu Sans Mono plays the Chinese font; the search is given no other.
    own = font_manager.findfont("DejaVu Sans")
    mono = font_manager.findfont("DejaVu Sans Mono")
    broken = tmp_path / "Sans Regular.ttf"
    broken.write_bytes(b"no font")
    real = font_manager.get_font

    class Without:
        """The default font, but for one letter."""

        family_name = "DejaVu Sans"

        def get_char_index(self, code: int) -> int:
            return 0 if code == ord("q") else 1

    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [mono, str(broken)])
    monkeypatch.setattr(
        font_manager, "get_font", lambda path: Without() if path == own else real(path)
    )
    plot_losses([{"step": 1, "loss": 1.0, "train/q/loss": 1.0}], tmp_path / "loss.png")
    assert _legend(figures[0].axes[0]) == ["q", "all sources"]
    (text, _) = figures[0].axes[0].get_legend().get_texts()
    assert "DejaVu Sans Mono" in text.get_fontfamily()


def test_a_run_without_sources_has_one_line_and_no_legend(
    tmp_path: Path, figures: list[Figure]
) -> None:
    plot_losses([{"step": 1, "loss": 2.0}], tmp_path / "narrow.png")
    (axis,) = figures[0].axes
    assert list(_lines(axis).values()) == [([1], [2.0])]
    assert _legend(axis) is None
    with Image.open(tmp_path / "narrow.png") as picture:
        assert picture.size == (720, 480)


COMPARED: list[dict[str, Any]] = [
    {"step": 0, "val/a/loss": 0.69, "val/a/rewards/margins": 0.0, "val/a/rewards/accuracies": 0.0},
    {
        "step": 1,
        "loss": 0.69,
        "train/a/loss": 0.69,
        "rewards/chosen": 0.001,
        "rewards/rejected": -0.001,
        "rewards/margins": 0.002,
        "rewards/accuracies": 1.0,
    },
    {
        "step": 2,
        "loss": 0.6,
        "train/a/loss": 0.6,
        "rewards/chosen": 0.1,
        "rewards/rejected": -0.2,
        "rewards/margins": 0.3,
        "rewards/accuracies": 0.75,
    },
    {"step": 2, "val/a/loss": 0.65, "val/a/rewards/margins": 0.2, "val/a/rewards/accuracies": 0.5},
]


def test_comparisons_are_drawn_with_rewards_and_accuracy(
    tmp_path: Path, figures: list[Figure]
) -> None:
    plot_losses(COMPARED, tmp_path / "loss.png")
    losses, rewards, accuracy = figures[0].axes
    assert "nats" not in losses.get_ylabel()
    # Training and held-out loss of a source have one colour, and one line in the legend.
    assert _lines(losses) == {
        "a": ([1, 2], [0.69, 0.6]),
        "all sources": ([1, 2], [0.69, 0.6]),
        "_a": ([0, 2], [0.69, 0.65]),
    }
    assert _legend(losses) == ["a", "all sources"]
    assert len({x.get_color() for x in losses.get_lines() if x.get_label().endswith("a")}) == 1
    assert _lines(rewards) == {
        "chosen": ([1, 2], [0.001, 0.1]),
        "rejected": ([1, 2], [-0.001, -0.2]),
        "margin": ([1, 2], [0.002, 0.3]),
    }
    # Where margins are 0 but for rounding, how many are above says nothing.
    assert _lines(accuracy) == {"training": ([2], [0.75]), "a": ([2], [0.5])}


def test_answers_with_labels_have_rewards_and_no_accuracy(
    tmp_path: Path, figures: list[Figure]
) -> None:
    records = [{k: v for k, v in r.items() if "accuracies" not in k} for r in COMPARED]
    plot_losses(records, tmp_path / "loss.png")
    _, rewards = figures[0].axes
    assert set(_lines(rewards)) == {"chosen", "rejected", "margin"}


def test_a_reward_model_is_drawn_by_its_own_names(tmp_path: Path, figures: list[Figure]) -> None:
    records = [
        {"step": 0, "val/a/loss": 0.7, "val/a/margin": 0.1, "val/a/accuracy": 0.5},
        {"step": 1, "loss": 0.7, "rewards/chosen": 0.2, "margin": 0.1, "accuracy": 0.6},
    ]
    plot_losses(records, tmp_path / "loss.png")
    _, rewards, accuracy = figures[0].axes
    assert _lines(rewards) == {"chosen": ([1], [0.2]), "margin": ([1], [0.1])}
    assert _lines(accuracy) == {"training": ([1], [0.6]), "a": ([0], [0.5])}
