"""Tallies add up to the same however they are grouped; ids become unique."""

import copy
from functools import reduce

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_cgn.corpus.decisions import number_copies, unique_id
from megatron_cgn.corpus.names import Names, join_names, save_names
from megatron_cgn.corpus.tally import MAX_EXAMPLES, Tally, add, add_example, count, key_of, wanted


def _tally(documents: list[tuple[int, str]]) -> Tally:
    tally: Tally = {}
    for number, reason in documents:
        count(tally, "dropped", "domain", reason)
        key = key_of(str(number))
        if wanted(tally, reason, key):
            add_example(tally, reason, key=key, id=str(number))
    return tally


documents = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["a", "b"])), unique_by=lambda each: each[0]
)


@given(documents, st.lists(st.integers(0, 50)))
def test_grouping_makes_no_difference(found: list[tuple[int, str]], cuts: list[int]) -> None:
    bounds = sorted({0, len(found), *(cut for cut in cuts if cut < len(found))})
    groups = [found[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    total: Tally = {}
    for group in groups:
        add(total, _tally(group))
    assert total == _tally(found)
    for reason in ("a", "b"):
        numbers = [number for number, its in found if its == reason]
        smallest = sorted(numbers, key=lambda number: key_of(str(number)))[:MAX_EXAMPLES]
        shown = total.get("examples", {}).get(reason, [])
        assert [example["id"] for example in shown] == [str(number) for number in smallest]


@given(documents)
def test_adding_leaves_what_is_added(found: list[tuple[int, str]]) -> None:
    more = _tally(found)
    before = copy.deepcopy(more)
    reduce(lambda total, _: add(total, more) or total, range(2), {})
    assert more == before


def _ids(pairs: list[tuple[int, int]]) -> list[str]:
    """Ids that documents of these ids and texts get."""
    marks = [(name, name * 1000 + text) for name, text in pairs]
    copies = number_copies(np.array(marks, dtype=np.uint64).reshape(-1, 2))
    return [
        unique_id(str(name), mark=mark, copy=int(number))
        for (name, mark), number in zip(marks, copies, strict=True)
    ]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=40))
def test_ids_become_unique_and_the_first_keeps_its_own(pairs: list[tuple[int, int]]) -> None:
    found = _ids(pairs)
    assert len(set(found)) == len(found)
    seen = set()
    for (name, _), new in zip(pairs, found, strict=True):
        assert (new == str(name)) == (name not in seen)
        assert new.startswith(str(name))
        seen.add(name)


def test_a_suffix_comes_from_the_text() -> None:
    one, other = _ids([(1, 0), (1, 7)]), _ids([(1, 0), (2, 0), (1, 5), (1, 7)])
    assert one[1] == other[3]


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))))
def test_names(tmp_path_factory, groups: list[list[str]]) -> None:  # type: ignore[no-untyped-def]
    folders = []
    for group in groups:
        folders.append(tmp_path_factory.mktemp("part"))
        save_names(folders[-1], [name.encode() for name in group])
    whole = tmp_path_factory.mktemp("whole")
    join_names(whole, [Names.load(folder) for folder in folders])
    names = Names.load(whole)
    assert [names[place] for place in range(len(names))] == sum(groups, [])
