"""Proofs hold for what the tools make, and each fails for what it is there to find."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from resize_samples import extension, tokenizer_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from megatron_cgn.hf.resize import resize_hf
from megatron_cgn.hf.resize_checkpoint import resize_checkpoint
from megatron_cgn.hf.to_megatron import convert_to_megatron
from megatron_cgn.testing import tiny_hf_model
from megatron_cgn.vocabulary.proof_model import prove_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXTENSION = extension(old=256)
TEXTS = ["some text to run on, again and again", "一回路冷却剂", ""]


def _model(directory: Path, *, tied: bool = False) -> Path:
    tiny_hf_model(directory, "qwen3", vocab_size=260, num_hidden_layers=2, tie_word_embeddings=tied)
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!"}
    (directory / "tokenizer_config.json").write_text(json.dumps(content))
    return directory


def _resized(tmp_path: Path, *, tied: bool = False) -> tuple[Path, Path]:
    old = _model(tmp_path / "old", tied=tied)
    resize_hf(old, tmp_path / "new", EXTENSION, write_tokenizer=tokenizer_of(EXTENSION))
    return old, tmp_path / "new"


def _failed(old: Path, new: Path, **rest: int) -> list[str]:
    return [p.name for p in prove_model(old, new, EXTENSION, texts=TEXTS, **rest) if not p.ok]


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_model_has_lost_nothing(tmp_path: Path, tied: bool) -> None:
    proofs = prove_model(*_resized(tmp_path, tied=tied), EXTENSION, texts=TEXTS)
    assert [p.name for p in proofs if p.ok] == [
        "old rows", "other tensors", "new rows", "transformers", "hidden states", "old logits",
    ]  # fmt: skip
    assert len(proofs) == 6
    assert "all 2 layers" in proofs[4].text


def test_a_large_model_is_not_run_and_the_proof_says_so(tmp_path: Path) -> None:
    proofs = prove_model(*_resized(tmp_path), EXTENSION, texts=TEXTS, run_bytes=1000)
    assert [p.name for p in proofs][-1] == "hidden states"
    assert all(p.ok for p in proofs)
    assert "not run" in proofs[-1].text


def _changed(name: str, change: Callable[[Tensor], object]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors[name])
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return spoil


def _without(name: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        del tensors[name]
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return spoil


NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "failed"),
    [
        (_changed(EMBEDDING, lambda t: t[65:].mul_(1.01)), {"old rows", "hidden states"}),
        (_changed(EMBEDDING, lambda t: t[255, 0].add_(1e-7)), {"old rows"}),
        (_changed(HEAD, lambda t: t[:100].mul_(1.001)), {"old rows", "old logits"}),
        (_changed(GATE, lambda t: t.mul_(1.01)), {"other tensors", "hidden states"}),
        (_changed(NORM, lambda t: t[0].copy_(-t[0])), {"other tensors", "hidden states"}),
        (_changed(EMBEDDING, lambda t: t[257].fill_(torch.nan)), {"new rows"}),
        (_without(NORM), {"other tensors", "transformers", "hidden states"}),
    ],
)
def test_each_loss_is_found(
    tmp_path: Path, spoil: Callable[[Path], None], failed: set[str]
) -> None:
    old, new = _resized(tmp_path)
    spoil(new)
    assert failed <= set(_failed(old, new))


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """A converted checkpoint and what resizing made of it."""
    convert_to_megatron(_model(tmp_path / "hf"), tmp_path / "old")
    resize_checkpoint(
        tmp_path / "old", tmp_path / "new", EXTENSION, write_tokenizer=tokenizer_of(EXTENSION)
    )
    shutil.copy(tmp_path / "hf/tokenizer.json", tmp_path / "old/hf/tokenizer.json")
    return tmp_path / "old", tmp_path / "new"


def test_a_resized_checkpoint_has_lost_nothing(checkpoints: tuple[Path, Path]) -> None:
    proofs = prove_model(*checkpoints, EXTENSION, texts=TEXTS)
    assert all(p.ok for p in proofs), [str(p) for p in proofs]
    assert len(proofs) == 6
    assert "not run" in prove_model(*checkpoints, EXTENSION, texts=TEXTS, run_bytes=1)[-1].text
    assert sorted(p.name for p in checkpoints[0].parent.iterdir()) == ["hf", "new", "old"]


def _flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.unlink()
    file.write_bytes(data)


def test_losses_of_checkpoints_are_found(checkpoints: tuple[Path, Path]) -> None:
    old, new = checkpoints
    # The new file begins with the embedding; its old rows are 256 × 64 numbers of 4 bytes.
    _flip(new / "dist/__vocabulary_0.distcp", 20_000)
    assert "old rows" in _failed(old, new, run_bytes=1)
    linked = max((new / "dist").glob("__0_*.distcp"), key=lambda f: f.stat().st_size)
    _flip(linked, linked.stat().st_size // 2)
    assert {"old rows", "other tensors"} <= set(_failed(old, new, run_bytes=1))
