"""Converted checkpoints with a larger vocabulary, held against the resized Hugging Face model."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_samples import assert_same_bytes, read_tensors, write_sample
from resize_samples import extension, tokenizer_of

from megatron_cgn.config.schema import CheckpointConfig, DataConfig, ModelConfig, RunConfig
from megatron_cgn.errors import CheckpointError, ModelError
from megatron_cgn.hf import to_megatron
from megatron_cgn.hf.checkpoint_layout import read_info
from megatron_cgn.hf.resize import resize_hf
from megatron_cgn.hf.resize_checkpoint import resize_checkpoint
from megatron_cgn.hf.to_hf import convert_to_hf
from megatron_cgn.hf.to_megatron import convert_to_megatron
from megatron_cgn.stages.common import check_start, open_architecture

SETTINGS: dict[str, Any] = {"make_vocab_size_divisible_by": 8}
ROW_BYTES = 24 * 2


def _checkpoint(tmp_path: Path, **rest: Any) -> Path:
    write_sample(tmp_path / "old", **rest)
    convert_to_megatron(tmp_path / "old", tmp_path / "ckpt")
    return tmp_path / "ckpt"


def _resize(source: Path, target: Path, made: Any = None, **rest: Any) -> Any:
    made = made or extension()
    return resize_checkpoint(
        source, target, made, write_tokenizer=tokenizer_of(made), **SETTINGS | rest
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["mean", "weighted", "gaussian"])
@pytest.mark.parametrize("chunk_rows", [1000, 7])
def test_the_same_as_resizing_the_hugging_face_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, method: Any, chunk_rows: int
) -> None:
    monkeypatch.setattr(to_megatron, "BLOCK_BYTES", chunk_rows * ROW_BYTES)
    source = _checkpoint(tmp_path, tied=tied)
    told: list[int] = []
    summary = _resize(source, tmp_path / "new", method=method, progress=told.append)
    convert_to_hf(tmp_path / "new", tmp_path / "export")
    made = extension()
    resize_hf(
        tmp_path / "old", tmp_path / "hf", made, write_tokenizer=tokenizer_of(made),
        method=method, **SETTINGS,
    )  # fmt: skip
    assert_same_bytes(read_tensors(tmp_path / "export"), read_tensors(tmp_path / "hf"))
    assert json.loads((tmp_path / "export/config.json").read_text())["vocab_size"] == 80
    for name in ("tokenizer.json", "vocab_extension.json", "generation_config.json"):
        assert (tmp_path / "export" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    # Rows 0–69 stay in their chunks where a chunk ends at 70.
    anew = 10 if chunk_rows == 7 else 80
    assert sum(told) == anew * ROW_BYTES * (1 if tied else 2)
    assert (summary.rows, summary.tied) == (80, tied)


def _inodes(directory: Path) -> dict[str, int]:
    return {p.name: p.stat().st_ino for p in (directory / "dist").glob("*.distcp")}


def test_files_are_shared_and_outlive_the_source(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path)
    before = {p: p.read_bytes() for p in source.rglob("*") if p.is_file()}
    summary = _resize(source, tmp_path / "new")
    assert {p: p.read_bytes() for p in source.rglob("*") if p.is_file()} == before
    old, new = _inodes(source), _inodes(tmp_path / "new")
    assert old.items() <= new.items()
    assert len(new) == len(old) + 1
    assert summary.linked_bytes == sum(f.stat().st_size for f in source.glob("dist/*.distcp"))
    convert_to_hf(tmp_path / "new", tmp_path / "one")
    for file in before:
        file.unlink()
    convert_to_hf(tmp_path / "new", tmp_path / "two")
    assert_same_bytes(read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two"))


def test_files_are_copied_where_links_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    source = _checkpoint(tmp_path)
    monkeypatch.setattr(os, "link", refuse)
    summary = _resize(source, tmp_path / "new")
    assert summary.linked_bytes == 0
    files = [p.stat().st_size for p in (tmp_path / "new/dist").glob("*.distcp")]
    assert summary.written_bytes >= sum(files)
    convert_to_hf(tmp_path / "new", tmp_path / "one")


def test_what_is_said_of_the_checkpoint(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path)
    content = json.loads((source / "checkpoint.json").read_text())
    content["fit"] = {"model.vocab_size": 77, "tokenizer": "old", "seed": 3}
    content |= {"step": 40, "consumed_sequences": 160, "optimizer_steps": 39}
    (source / "checkpoint.json").write_text(json.dumps(content))
    _resize(source, tmp_path / "new")
    old, new = read_info(source), read_info(tmp_path / "new")
    assert new.fit == {"model.vocab_size": 80, "tokenizer": "new", "seed": 3}
    assert (new.vocab_size, new.padded_vocab_size) == (80, 80)
    same = ("step", "consumed_sequences", "optimizer_steps", "layout", "dtype", "has_optimizer")
    for field in same:
        assert getattr(new, field) == getattr(old, field)
    assert [n for n in new.digests if n.endswith(".distcp")] == ["dist/__vocabulary_0.distcp"]


def test_rows_without_an_update_are_named_where_there_is_an_optimizer(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path)
    _resize(source, tmp_path / "without")
    assert read_info(tmp_path / "without").new_rows == {}
    content = json.loads((source / "checkpoint.json").read_text())
    content |= {"has_optimizer": True, "optimizer_steps": 39}
    (source / "checkpoint.json").write_text(json.dumps(content))
    _resize(source, tmp_path / "none", extension([], old=70))
    assert read_info(tmp_path / "none").new_rows == {}
    _resize(source, tmp_path / "one")
    _resize(tmp_path / "one", tmp_path / "two", extension([(72, 1)], old=73))
    new_rows = {"embedding.word_embeddings.weight": 70, "output_layer.weight": 70}
    assert read_info(tmp_path / "one").new_rows == new_rows
    assert read_info(tmp_path / "two").new_rows == new_rows  # nothing was trained in between


def test_a_second_extension_drops_what_the_first_wrote(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path)
    _resize(source, tmp_path / "one")
    _resize(tmp_path / "one", tmp_path / "two", extension([(72, 1)], old=73))
    names = sorted(_inodes(tmp_path / "two"))
    assert "__vocabulary_1.distcp" in names
    assert "__vocabulary_0.distcp" not in names
    convert_to_hf(tmp_path / "one", tmp_path / "one-hf")
    convert_to_hf(tmp_path / "two", tmp_path / "two-hf")
    one, two = (read_tensors(tmp_path / f"{n}-hf")["lm_head.weight"] for n in ("one", "two"))
    assert torch.equal(two[:73], one[:73])
    assert torch.equal(two[73], ((one[72].float() + one[1].float()) / 2).to(one.dtype))


def _without_info(source: Path) -> None:
    (source / "checkpoint.json").unlink()


def _cut(source: Path) -> None:
    file = sorted(source.glob("dist/*.distcp"))[0]
    os.truncate(file, file.stat().st_size - 10)


def _without_metadata(source: Path) -> None:
    (source / "dist/.metadata").unlink()


def _flipped(source: Path) -> None:
    """Change a byte of the embedding, in a checkpoint that has hashes of its tensors."""
    content = json.loads((source / "checkpoint.json").read_text())
    file = sorted(source.glob("dist/*.distcp"))[0]
    data = bytearray(file.read_bytes())
    data[2000] ^= 1
    file.write_bytes(data)
    content["digests"][f"dist/{file.name}"] = "0" * 64
    (source / "checkpoint.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_info, "holds no checkpoint.json"),
        (_cut, "bytes were written"),
        (_without_metadata, ".metadata is missing"),
        (_flipped, "is not as it was written"),
    ],
)
def test_damaged_checkpoints(tmp_path: Path, spoil: Any, message: str) -> None:
    source = _checkpoint(tmp_path)
    spoil(source)
    with pytest.raises(CheckpointError, match=message):
        _resize(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("pieces", [[(1,)], []])
def test_faults_of_the_user(tmp_path: Path, pieces: Sequence[Sequence[int]]) -> None:
    source = _checkpoint(tmp_path)
    with pytest.raises(ModelError, match="the model has 77 rows"):
        _resize(source, tmp_path / "new", extension(pieces, old=78))
    with pytest.raises(ModelError, match="give another directory"):
        _resize(source, source / "new")
    bad = dataclasses.replace(extension(), old_vocab_size=5)
    with pytest.raises(Exception, match="extend the vocabulary again"):
        _resize(source, tmp_path / "new", bad)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "old"]


def test_a_run_cannot_load_an_optimizer_that_is_not_there(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path)
    _resize(source, tmp_path / "new")
    tokenizer: Any = SimpleNamespace(vocab_size=73)
    for start in (tmp_path / "new", tmp_path / "old"):
        run = RunConfig(
            output_dir=str(tmp_path / "run"),
            model=ModelConfig(hf_path=str(start)),
            data=DataConfig(seq_length=32),
            checkpoint=CheckpointConfig(load_optimizer=True),
        )
        with pytest.raises(
            CheckpointError, match="optimizer state, which checkpoint.load_optimizer"
        ):
            check_start(run, open_architecture(run), tokenizer)
