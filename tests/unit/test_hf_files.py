"""Directories that appear whole or not at all, and what is copied beside the weights."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from hf_samples import write_sample

from megatron_cgn.errors import ModelError
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.files import (
    check_free_space,
    copy_side_files,
    new_directory,
    write_json,
    write_side_files,
)


def _write(target: Path, text: str) -> None:
    with new_directory(target, error=ModelError) as work:
        (work / "deep").mkdir()
        (work / "deep" / "file").write_text(text)


def test_what_was_there_returns_if_it_cannot_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "out", "old")
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if ".tmp-" in source.name:
            raise OSError(5, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(ModelError, match="could not be written: Input/output error"):
        _write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "deep" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_has_left_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (".out.tmp-1234abcd", ".other.tmp-1234abcd"):
        (tmp_path / name).mkdir()
    with caplog.at_level(logging.WARNING):
        _write(tmp_path / "out", "new")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path / '.out.tmp-1234abcd'}: unfinished")
    assert (tmp_path / ".out.tmp-1234abcd").is_dir()  # another program may be writing it


def test_an_old_directory_that_cannot_be_removed_is_only_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path / "out", "old")
    remove = os.unlink

    def refuse(path: str, **options: int) -> None:
        if path == "file":
            raise OSError(16, "Device or resource busy", path)
        remove(path, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    with caplog.at_level(logging.WARNING):
        _write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "deep" / "file").read_text() == "new"
    (old,) = tmp_path.glob(".out.old-*")
    assert str(old) in caplog.text


def test_everything_is_durable_before_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), fsync(fd)))

    def check(source: Path, target: Path) -> None:
        needed = {path.stat().st_ino for path in (source, *source.rglob("*"))}
        assert needed <= synced
        rename(source, target)

    monkeypatch.setattr(os, "rename", check)
    write_sample(tmp_path / "hf")
    with new_directory(tmp_path / "out", error=ModelError) as work:
        copy_side_files(tmp_path / "hf", work)
        (work / "deep").mkdir()
        write_json(work / "deep" / "value.json", {})
    assert (tmp_path / "out" / "deep").is_dir()


def test_faults_of_the_source_are_not_the_targets(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught, new_directory(tmp_path / "o", error=ModelError):
        shutil.copyfile(tmp_path / "gone", tmp_path / "o2")
    assert str(caught.value) == (
        f"{tmp_path / 'o'}: not written, because the source could not be read: "
        f"No such file or directory ({tmp_path / 'gone'})"
    )
    with (
        pytest.raises(ModelError, match="could not be written: No such file"),
        new_directory(tmp_path / "o", error=ModelError) as work,
    ):
        (work / "a" / "b").write_text("")


def test_space_is_told_in_a_unit_that_shows_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"needs 1048576\.00 GiB, but only \d+\.\d+ [GM]iB are"):
        check_free_space(tmp_path / "out", 2**50, error=ModelError)


def test_licences_are_copied_however_they_are_spelled(tmp_path: Path) -> None:
    names = {"LICENSE", "license.txt", "LICENCE.md", "Notice", "USE_POLICY.md", "tokenizer.json"}
    (tmp_path / "hf").mkdir()
    for name in (*names, "model.safetensors", "config.json", "README.md"):
        (tmp_path / "hf" / name).touch()
    (tmp_path / "out").mkdir()
    copy_side_files(tmp_path / "hf", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


@pytest.mark.parametrize("fields", [["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"], []])
def test_every_name_of_the_type_is_brought_up_to_date(tmp_path: Path, fields: list[str]) -> None:
    write_sample(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["torch_dtype"]
    (tmp_path / "out").mkdir()
    write_side_files(
        tmp_path / "out",
        tmp_path / "hf",
        config | dict.fromkeys(fields, "float32"),
        read_architecture(tmp_path / "hf"),
        stages=[{"a": (torch.bfloat16, (3,))}],
        plans=[],
    )
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | dict.fromkeys(fields or ["dtype"], "bfloat16")
