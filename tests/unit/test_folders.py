"""Folders of a cache: whole or not at all, and nothing left behind for ever."""

import os
import time
from pathlib import Path

import pytest

from megatron_cgn.data.folders import new_folder

DAY_S = 86_400
HEX = "0123456789abcdef" * 2


def _aged(folder: Path, *, age_s: float, file_age_s: float | None = None) -> Path:
    folder.mkdir(parents=True)
    file = folder / "tokens.bin"
    file.write_bytes(b"x")
    now = time.time()
    for path, age in ((file, file_age_s or age_s), (folder, age_s)):
        os.utime(path, (now - age, now - age))
    return folder


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "chat-1"
    with pytest.raises(ValueError, match="half"), new_folder(folder) as temporary:
        (temporary / "a").write_text("a")
        raise ValueError("half")
    assert list(folder.parent.iterdir()) == []
    with new_folder(folder) as temporary:
        (temporary / "a").write_text("a")
        assert not folder.exists()
    assert [p.name for p in folder.parent.iterdir()] == ["chat-1"]
    assert (folder / "a").read_text() == "a"


def test_the_faster_of_two_stays(tmp_path: Path) -> None:
    folder = tmp_path / "chat-1"
    with new_folder(folder) as slow:
        (slow / "by").write_text("slow")
        with new_folder(folder) as fast:
            (fast / "by").write_text("fast")
    assert (folder / "by").read_text() == "fast"
    assert [p.name for p in tmp_path.iterdir()] == ["chat-1"]


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path: Path) -> None:
    left = _aged(tmp_path / f"chat-1.tmp-{HEX}", age_s=2 * DAY_S)
    at_work = _aged(tmp_path / f"chat-2.tmp-{HEX}", age_s=2 * DAY_S, file_age_s=60)
    young = _aged(tmp_path / f"chat-3.tmp-{HEX}", age_s=60)
    others = _aged(tmp_path / "notes.tmp-old", age_s=9 * DAY_S)
    finished = _aged(tmp_path / "chat-4", age_s=9 * DAY_S)
    with new_folder(tmp_path / "chat-5"):
        pass
    assert not left.exists()
    assert all(path.exists() for path in (at_work, young, others, finished))
