"""Faulty weights are refused, naming file and tensor; written files are real safetensors."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hf_samples import read_tensors, write_sample
from safetensors.torch import save_file

from megatron_cgn.errors import ModelError
from megatron_cgn.hf import weights
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.safetensors_io import ShardWriter, plan_shards, row_blocks
from megatron_cgn.hf.to_megatron import convert_to_megatron
from megatron_cgn.hf.weights import open_weights


def _open(directory: Path) -> None:
    open_weights(directory, read_architecture(directory))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("files", [1, 3])
def test_accepts_every_family(tmp_path: Path, model_type: str, files: int) -> None:
    write_sample(tmp_path / "m", model_type=model_type, files=files)
    _open(tmp_path / "m")


def test_views_are_the_files_rows(tmp_path: Path) -> None:
    values = write_sample(tmp_path / "m")
    opened = open_weights(tmp_path / "m", read_architecture(tmp_path / "m"))
    name = "model.embed_tokens.weight"
    view = opened.view(name, slice(5, 70))
    assert torch.equal(view, values[name][5:70])
    opened.drop(name, slice(5, 70))
    assert torch.equal(view, values[name][5:70])


def test_names_a_missing_tensor(tmp_path: Path) -> None:
    values = write_sample(tmp_path / "m")
    del values["model.layers.1.mlp.up_proj.weight"]
    save_file(values, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.up_proj.weight' .* is missing"):
        _open(tmp_path / "m")


def test_names_an_unexpected_tensor(tmp_path: Path) -> None:
    values = write_sample(tmp_path / "m")
    values["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(40)
    save_file(values, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ModelError, match=r"'model.layers.0.self_attn.q_proj.bias' does not belong"):
        _open(tmp_path / "m")


def test_lets_redundant_tensors_be(tmp_path: Path) -> None:
    values = write_sample(tmp_path / "m", tied=True)
    values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
    values["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(5)
    save_file(values, tmp_path / "m" / "model.safetensors")
    _open(tmp_path / "m")


@pytest.mark.parametrize("rows_of_a_block", [5, 1000])
def test_a_tied_model_with_another_output_layer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_of_a_block: int
) -> None:
    monkeypatch.setattr(weights, "BLOCK_BYTES", rows_of_a_block * 24 * 2)
    values = write_sample(tmp_path / "m", tied=True)
    architecture = read_architecture(tmp_path / "m")
    head = values["model.embed_tokens.weight"].clone()
    for same, stored in ((True, head), (True, head.float()), (False, head.clone())):
        if not same:
            stored[70, 3] += 1.0
        file = tmp_path / "m" / "model.safetensors"
        save_file(values | {"lm_head.weight": stored}, file)
        opened = open_weights(tmp_path / "m", architecture)
        assert weights.has_tied_copy(opened, architecture)
        fault = weights.tied_copy_fault(opened)
        assert (fault is None) == same
    assert fault is not None and fault.startswith(f"{file}: ")
    assert "'lm_head.weight' differs from the embedding" in fault
    with pytest.raises(ModelError, match="set tie_word_embeddings to false"):
        convert_to_megatron(tmp_path / "m", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_names_a_wrong_shape(tmp_path: Path) -> None:
    values = write_sample(tmp_path / "m")
    values["model.norm.weight"] = torch.zeros(25)
    save_file(values, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ModelError, match=r"'model.norm.weight' has shape \(25,\).*\(24,\)"):
        _open(tmp_path / "m")


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_names_a_truncated_file(tmp_path: Path, keep: int) -> None:
    write_sample(tmp_path / "m", files=2)
    file = tmp_path / "m" / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors: (trunc|not a compl)"):
        _open(tmp_path / "m")


def test_names_missing_files(tmp_path: Path) -> None:
    write_sample(tmp_path / "m", files=2)
    (tmp_path / "m" / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors: missing"):
        _open(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match="holds neither"):
        _open(tmp_path / "m")


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    values = write_sample(tmp_path / "m", files=2)
    save_file(values, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors and model\.safetensors\.index\.json"):
        _open(tmp_path / "m")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "the header is a list"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, r"type \['F32'\]"),
        ({"a": [1]}, "'a' is badly described"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, header: object, message: str) -> None:
    write_sample(tmp_path / "m")
    text = json.dumps(header).encode()
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(ModelError, match=rf"model\.safetensors: .*{message}"):
        _open(tmp_path / "m")


def test_names_a_tensor_that_only_the_index_has(tmp_path: Path) -> None:
    write_sample(tmp_path / "m", files=2)
    path = tmp_path / "m" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00001.*'model.extra'"):
        _open(tmp_path / "m")


def test_refuses_quantised_tensors(tmp_path: Path) -> None:
    values = write_sample(tmp_path / "m")
    values["model.norm.weight"] = torch.zeros(24, dtype=torch.int8)
    save_file(values, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ModelError, match=r"'model.norm.weight' has type I8"):
        _open(tmp_path / "m")


def test_written_files_are_read_by_the_reference_reader(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(7, 3),
        "b": torch.randn(5).to(torch.bfloat16),
        "c": torch.randn(4, 4).to(torch.float16),
    }
    types = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    (plan,) = plan_shards([types], max_shard_bytes=1000)
    writer = ShardWriter(tmp_path, plan)
    # In any order, and in parts.
    writer.write("c", tensors["c"])
    writer.write("a", tensors["a"][4:], start_byte=4 * 12)
    writer.write("a", tensors["a"][:4])
    writer.write("b", tensors["b"])
    writer.close()
    found = read_tensors(tmp_path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_files_never_mix_writers_unless_all_fits_one() -> None:
    groups = [
        {"a": (torch.float32, (10,)), "b": (torch.float32, (10,))},
        {"c": (torch.float32, (30,)), "d": (torch.float32, (1,))},
    ]
    assert [list(p.offsets) for p in plan_shards(groups, max_shard_bytes=204)] == [list("abcd")]
    assert [list(p.offsets) for p in plan_shards(groups, max_shard_bytes=100)] == [
        ["a", "b"],
        ["c"],
        ["d"],
    ]


def test_row_blocks_cover_every_row_once() -> None:
    for num_rows, row_bytes, block_bytes in [(10, 4, 12), (1, 100, 10), (0, 4, 10), (7, 1, 7)]:
        blocks = list(row_blocks(num_rows, row_bytes, block_bytes=block_bytes))
        assert [row for b in blocks for row in range(b.start, b.stop)] == list(range(num_rows))
        assert all((b.stop - b.start) * row_bytes <= max(block_bytes, row_bytes) for b in blocks)
