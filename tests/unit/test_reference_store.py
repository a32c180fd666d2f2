"""Scores on disk: found again, torn by kills, refused by disks, and never taken for others."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cgn.data.reference_store import ENTRY, ReferenceStore, reading_of
from megatron_cgn.errors import DataError

FACTS: dict[str, Any] = {"content": "preference-1", "weights": "abc", "adapter": None}
COUNTED = np.array([3, 5, 2, 7, 4, 9], dtype=np.int32)
BEGIN, STOP = np.zeros(6, dtype=np.int32), np.arange(10, 16, dtype=np.int32)
EVERY = np.arange(6)
LOGPS = -np.array([1.5, 2.25, 1e-9, 40.0, 7.0, 3.0])
HEADER_BYTES = 12


def opened(
    cache: Path, facts: dict[str, Any] = FACTS, *, stop: np.ndarray = STOP, **about: str
) -> ReferenceStore:
    return ReferenceStore.open_or_start(
        cache, facts, about=about, readings=reading_of(BEGIN, stop, COUNTED), counted=COUNTED
    )


def fill(cache: Path, *parts: list[int]) -> Path:
    """Score answers part by part; returns the file they are in."""
    with opened(cache) as store:
        before = set(cache.rglob("scores-*.bin"))
        for part in parts:
            store.put(np.array(part), LOGPS[part])
    (path,) = set(cache.rglob("scores-*.bin")) - before
    return path


def known(store: ReferenceStore) -> list[int]:
    found = np.flatnonzero(~np.isnan(store.logps))
    assert np.array_equal(store.logps[found], LOGPS[found])
    assert store.missing(EVERY).tolist() == sorted(set(range(6)) - set(found.tolist()))
    return found.tolist()


def test_scores_are_found_again_bit_for_bit(tmp_path: Path) -> None:
    fill(tmp_path, [4, 0], [2])
    assert known(opened(tmp_path)) == [0, 2, 4]
    fill(tmp_path, [1, 3, 5])
    assert known(opened(tmp_path)) == list(range(6))


def test_nothing_is_written_where_nothing_is_scored(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    assert [p.name for p in tmp_path.rglob("*.*")] == ["facts.json"]


def test_a_file_cut_anywhere_keeps_its_whole_blocks(tmp_path: Path) -> None:
    parts = [[4, 0], [2], [1, 3, 5]]
    path = fill(tmp_path, *parts)
    content = path.read_bytes()
    ends = np.cumsum([HEADER_BYTES + len(part) * ENTRY.itemsize for part in parts])
    assert ends[-1] == len(content)
    for size in range(len(content)):
        path.write_bytes(content[:size])
        whole = int((ends <= size).sum())
        assert known(opened(tmp_path)) == sorted(sum(parts[:whole], []))


def test_a_changed_byte_is_never_believed(tmp_path: Path) -> None:
    path = fill(tmp_path, [4, 0], [2])
    content = path.read_bytes()
    first = HEADER_BYTES + 2 * ENTRY.itemsize
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x10
        path.write_bytes(bytes(changed))
        assert known(opened(tmp_path)) == ([] if place < first else [0, 4])


def test_what_is_read_differently_is_scored_anew(tmp_path: Path) -> None:
    fill(tmp_path, list(range(6)))
    longer = STOP.copy()
    longer[[1, 4]] += 3
    store = opened(tmp_path, stop=longer)
    assert known(store) == [0, 2, 3, 5]
    assert store.num_other == 2
    with store:
        store.put(np.array([1, 4]), LOGPS[[1, 4]])
    # Both readings are kept: going back costs nothing.
    assert known(opened(tmp_path, stop=longer)) == known(opened(tmp_path)) == list(range(6))


@pytest.mark.parametrize("fact", ["content", "weights", "adapter", "more"])
def test_other_facts_are_another_store(tmp_path: Path, fact: str) -> None:
    fill(tmp_path, list(range(6)))
    assert known(opened(tmp_path, {**FACTS, fact: "other"})) == []
    assert known(opened(tmp_path, dict(reversed(FACTS.items())))) == list(range(6))


def test_a_folder_that_was_renamed_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, [0])
    (right,) = tmp_path.glob("reference-*")
    facts = {**FACTS, "weights": "other"}
    with opened(tmp_path, facts):
        pass
    (wrong,) = set(tmp_path.glob("reference-*")) - {right}
    (wrong / "facts.json").unlink()
    wrong.rmdir()
    right.rename(wrong)
    with pytest.raises(DataError, match="renamed or edited.* other weights .*Delete this folder"):
        opened(tmp_path, facts)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"facts": 3}'])
def test_damaged_facts_are_told(tmp_path: Path, text: str) -> None:
    fill(tmp_path, [0])
    (folder,) = tmp_path.glob("reference-*")
    (folder / "facts.json").write_text(text)
    with pytest.raises(DataError, match=f"{folder}.*Delete this folder"):
        opened(tmp_path)


def test_scores_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    path = fill(tmp_path, [0])
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="Is a directory.*Delete this folder.*data.cache_dir"):
        opened(tmp_path)


def test_a_cache_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match="data.cache_dir"):
        opened(tmp_path / "cache")


def test_a_full_disk_ends_with_a_message_and_loses_nothing_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    space = HEADER_BYTES + ENTRY.itemsize + 20

    def limited(descriptor: int, data: Any) -> int:
        nonlocal space
        if not space:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = write(descriptor, data[:space])
        space -= done
        return done

    monkeypatch.setattr(os, "write", limited)
    with (
        pytest.raises(DataError, match="No space left.*Make room there and start the run again"),
        opened(tmp_path) as store,
    ):
        store.put(np.array([3]), LOGPS[[3]])
        store.put(np.array([1, 2]), LOGPS[[1, 2]])
    monkeypatch.undo()
    assert known(opened(tmp_path)) == [3]
    fill(tmp_path, [1, 2])
    assert known(opened(tmp_path)) == [1, 2, 3]


def test_runs_at_the_same_time_add_up_and_the_older_score_stays(tmp_path: Path) -> None:
    with opened(tmp_path) as one, opened(tmp_path) as other:
        one.put(np.array([0, 1]), LOGPS[[0, 1]])
        other.put(np.array([1, 2]), np.array([-77.0, LOGPS[2]]))
        one.put(np.array([3]), LOGPS[[3]])
        assert other.missing(EVERY).tolist() == [0, 3, 4, 5]
    assert known(opened(tmp_path)) == [0, 1, 2, 3]


def test_numbers_of_another_file_are_passed_over(tmp_path: Path) -> None:
    fill(tmp_path, list(range(6)))
    store = ReferenceStore.open_or_start(
        tmp_path,
        FACTS,
        about={},
        readings=reading_of(BEGIN, STOP, COUNTED)[:4],
        counted=COUNTED[:4],
    )
    assert np.array_equal(store.logps, LOGPS[:4])


def test_facts_are_for_people_too(tmp_path: Path) -> None:
    with opened(tmp_path, model="/models/base"):
        pass
    (path,) = tmp_path.rglob("facts.json")
    assert json.loads(path.read_text()) == {"facts": FACTS, "about": {"model": "/models/base"}}


def test_readings_tell_rows_apart() -> None:
    draw = np.random.default_rng(0)
    columns = draw.integers(-3, 40, size=(3, 20_000))
    rows = len(np.unique(columns, axis=1).T)
    assert len(np.unique(reading_of(*columns))) == rows < 20_000
    first, second = np.array([1, 2]), np.array([2, 1])
    assert len(set(reading_of(first, second).tolist())) == 2
