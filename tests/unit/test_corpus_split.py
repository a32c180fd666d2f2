"""Which documents are held out."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cgn.config.corpus import CorpusConfig, SplitConfig
from megatron_cgn.corpus.split import Splitter

ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
fractions = st.floats(0, 0.999)

# Of blake2b with the key "held-out documents", 8 bytes big-endian, those below a tenth of 2**64.
HELD_OUT = [13, 15, 39, 44, 51, 58]


@given(st.lists(ids), fractions)
def test_other_documents_make_no_difference(names: list[str], fraction: float) -> None:
    split = Splitter(SplitConfig(validation_fraction=fraction))
    sides = [split(name) for name in names]
    alone = [Splitter(SplitConfig(validation_fraction=fraction))(name) for name in names]
    assert sides == alone


@given(ids, fractions, fractions)
def test_a_larger_fraction_holds_out_all_that_a_smaller_one_does(
    name: str, one: float, other: float
) -> None:
    smaller, larger = (
        Splitter(SplitConfig(validation_fraction=fraction))(name)
        for fraction in sorted((one, other))
    )
    assert not (smaller == "validation" and larger == "train")


@given(ids.filter(lambda name: "\n" not in name), st.lists(st.integers(0, 10**6), min_size=2))
def test_sections_of_a_file_stay_together(name: str, sections: list[int]) -> None:
    split = Splitter(SplitConfig(validation_fraction=0.5))
    assert len({split(f"{name}#{section}") for section in sections}) == 1


def test_lines_without_an_id_of_their_own_are_no_sections() -> None:
    split = Splitter(SplitConfig(validation_fraction=0.5))
    sides = {split(f"domain/a.jsonl#{line}", own_id=False) for line in range(64)}
    assert sides == {"train", "validation"}


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.2])
def test_the_fraction_is_what_is_held_out(fraction: float) -> None:
    split = Splitter(SplitConfig(validation_fraction=fraction, group_by=""))
    total = 20_000
    held_out = sum(split(f"文件 {number}") == "validation" for number in range(total))
    # Five standard deviations of as many independent draws.
    assert abs(held_out - fraction * total) <= 5 * (total * fraction * (1 - fraction)) ** 0.5


def test_the_choice_of_a_document_never_changes() -> None:
    """Another rule would move documents from training to validation between two versions."""
    split = Splitter(SplitConfig(validation_fraction=0.1, group_by=""))
    names = [f"domain/manual-{number}.pdf" for number in range(60)]
    held_out = [int(re.findall(r"\d+", name)[0]) for name in names if split(name) == "validation"]
    assert held_out == HELD_OUT


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (SplitConfig(validation_fraction=1), "split.validation_fraction: 1"),
        (SplitConfig(validation_fraction=float("nan")), "split.validation_fraction: nan"),
        (SplitConfig(group_by="("), "split.group_by"),
        (SplitConfig(group_by="a#"), "no group"),
    ],
)
def test_faults(settings: SplitConfig, text: str) -> None:
    (fault,) = CorpusConfig(split=settings).faults()
    assert text in fault
