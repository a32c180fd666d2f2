"""Hugging Face directories with a larger vocabulary, read by the reference reader."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hf_samples import read_tensors, write_sample
from resize_samples import PIECES, extension, tokenizer_of
from safetensors.torch import load_file, save_file

from megatron_cgn.errors import DataError, ModelError
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.resize import resize_hf
from megatron_cgn.hf.weights import open_weights
from megatron_cgn.testing import tiny_hf_model
from tokenizer.extension import FILE_NAME, Extension

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def resize(source: Path, target: Path, made: Extension | None = None, **rest: Any) -> Any:
    made = made or extension()
    rest.setdefault("make_vocab_size_divisible_by", 8)
    return resize_hf(source, target, made, write_tokenizer=tokenizer_of(made), **rest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("files", [1, 4])
def test_rows_are_added_and_nothing_else_changes(
    tmp_path: Path, dtype: torch.dtype, tied: bool, files: int
) -> None:
    old = write_sample(tmp_path / "old", dtype=dtype, tied=tied, files=files)
    told: list[int] = []
    summary = resize(tmp_path / "old", tmp_path / "new", progress=told.append)
    new = read_tensors(tmp_path / "new")
    assert new.keys() == old.keys()
    matrices = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    assert (summary.rows, summary.tied, summary.tensors) == (80, tied, tuple(matrices))
    for name, tensor in old.items():
        assert new[name].dtype == dtype
        if name not in matrices:
            assert torch.equal(new[name].view(torch.uint8), tensor.view(torch.uint8)), name
            continue
        mean = np.stack([tensor.float().numpy()[list(ids)].mean(axis=0) for ids in PIECES])
        assert new[name].shape == (80, 24)
        assert torch.equal(new[name][:70], tensor[:70])
        assert torch.equal(new[name][70:73], torch.from_numpy(mean).to(dtype))
        assert torch.equal(new[name][73:77], tensor[73:]), "old padding"
        assert not new[name][77:].any(), "new padding"
    assert sum(told) >= sum(t.nbytes for t in old.values())
    assert summary.written_bytes == sum(
        f.stat().st_size for f in tmp_path.glob("new/*.safetensors")
    )
    assert open_weights(tmp_path / "new", read_architecture(tmp_path / "new"))


def test_files_keep_their_names_tensors_and_order(tmp_path: Path) -> None:
    write_sample(tmp_path / "old", files=4)
    index_file = tmp_path / "old" / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["metadata"] = {"total_size": 1000, "total_parameters": 500, "by": "someone"}
    index_file.write_text(json.dumps(index))
    resize(tmp_path / "old", tmp_path / "new")
    written = json.loads((tmp_path / "new" / index_file.name).read_text())
    assert written["weight_map"] == index["weight_map"]
    # 3 more rows of 24 numbers of 2 bytes, in two matrices.
    grown = {"total_size": 1000 + 288, "total_parameters": 500 + 144, "by": "someone"}
    assert written["metadata"] == grown
    for file in sorted((tmp_path / "old").glob("*.safetensors")):
        copy = tmp_path / "new" / file.name
        assert list(load_file(copy)) == list(load_file(file))
        if not {EMBEDDING, HEAD} & set(load_file(file)):
            assert copy.read_bytes() == file.read_bytes()


def test_configuration_and_side_files(tmp_path: Path) -> None:
    write_sample(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config |= {"bos_token_id": 1, "rope_scaling": {"rope_type": "default"}, "eos_token_id": [2, 77]}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    for name in ("LICENSE", "README.md", "vocab.json", "merges.txt", "pytorch_model.bin"):
        (tmp_path / "old" / name).write_text(name)
    resize(tmp_path / "old", tmp_path / "new")
    assert json.loads((tmp_path / "new/config.json").read_text()) == config | {"vocab_size": 80}
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        FILE_NAME,
    ]
    assert "new" in (tmp_path / "new/tokenizer.json").read_text()


@pytest.mark.parametrize(
    ("multiple", "tensor_parallel", "new_tokens", "rows"),
    [
        (8, 1, 3, 80),
        (8, 4, 3, 96),
        (128, 1, 3, 128),
        (128, 2, 3, 256),
        (1, 1, 3, 77),
        (1, 1, 9, 79),
    ],
)
def test_padding(
    tmp_path: Path, multiple: int, tensor_parallel: int, new_tokens: int, rows: int
) -> None:
    old = write_sample(tmp_path / "old")
    resize(
        tmp_path / "old",
        tmp_path / "new",
        extension([(1,)] * new_tokens),
        make_vocab_size_divisible_by=multiple,
        tensor_parallel=tensor_parallel,
    )
    new = read_tensors(tmp_path / "new")[HEAD]
    assert len(new) == json.loads((tmp_path / "new/config.json").read_text())["vocab_size"] == rows
    assert torch.equal(new[:70], old[HEAD][:70])
    assert torch.equal(new[70 : 70 + new_tokens], old[HEAD][1].expand(new_tokens, -1))


@pytest.mark.parametrize("tied", [False, True])
def test_as_transformers_resizes(tmp_path: Path, tied: bool) -> None:
    source = tiny_hf_model(tmp_path / "old", "qwen3", vocab_size=200, tie_word_embeddings=tied)
    pieces = [(3, 7), (11,), (199, 0, 9)]
    resize(source, tmp_path / "new", extension(pieces, old=200))
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(208, mean_resizing=False)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    for matrix in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
        matrix.data[200:203] = torch.stack([matrix.data[list(ids)].mean(dim=0) for ids in pieces])
        matrix.data[203:] = 0.0
    expected = model.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    same = ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert same is tied


def test_the_two_sides_are_made_from_their_own_rows(tmp_path: Path) -> None:
    old = write_sample(tmp_path / "old", dtype=torch.float32)
    resize(tmp_path / "old", tmp_path / "new", method="weighted")
    new = read_tensors(tmp_path / "new")
    for name, shares in ((EMBEDDING, [1 / 3, 2 / 3]), (HEAD, [2 / 3, 1 / 3])):
        expected = np.average(old[name].numpy()[[3, 7]], axis=0, weights=shares)
        np.testing.assert_allclose(new[name][70], expected, rtol=1e-6, atol=1e-7)


def test_random_rows_have_the_configured_deviation(tmp_path: Path) -> None:
    source = tiny_hf_model(tmp_path / "old", vocab_size=200, initializer_range=0.5)
    resize(source, tmp_path / "new", extension([(1,)] * 500, old=200), method="random", seed=3)
    made = read_tensors(tmp_path / "new")[EMBEDDING][200:700]
    assert abs(float(made.std()) - 0.5) < 0.02
    resize(source, tmp_path / "again", extension([(1,)] * 500, old=200), method="random", seed=3)
    assert torch.equal(read_tensors(tmp_path / "again")[EMBEDDING][200:700], made)


def test_a_second_extension_begins_where_the_first_ended(tmp_path: Path) -> None:
    write_sample(tmp_path / "old")
    resize(tmp_path / "old", tmp_path / "one")
    resize(tmp_path / "one", tmp_path / "two", extension([(72, 1)], old=73))
    one, two = read_tensors(tmp_path / "one")[HEAD], read_tensors(tmp_path / "two")[HEAD]
    assert len(two) == 80
    assert torch.equal(two[:73], one[:73])
    assert torch.equal(two[73], ((one[72].float() + one[1].float()) / 2).to(one.dtype))
    with pytest.raises(ModelError, match=r"extended to 73 ids before, but .* has 70"):
        resize(tmp_path / "one", tmp_path / "three")


def test_a_tied_model_that_holds_its_matrix_twice(tmp_path: Path) -> None:
    old = write_sample(tmp_path / "old", tied=True)
    save_file(old | {HEAD: old[EMBEDDING].clone()}, tmp_path / "old/model.safetensors")
    summary = resize(tmp_path / "old", tmp_path / "new", method="weighted")
    new = read_tensors(tmp_path / "new")
    assert summary.tied
    assert torch.equal(new[EMBEDDING], new[HEAD])
    save_file(old | {HEAD: old[EMBEDDING] + 1}, tmp_path / "old/model.safetensors")
    with pytest.raises(ModelError, match="differs from the embedding"):
        resize(tmp_path / "old", tmp_path / "other")


def test_a_family_that_training_does_not_know(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "old")
    resize(tmp_path / "old", tmp_path / "new", extension(old=200))
    assert "gpt_neox" in caplog.text
    old, new = read_tensors(tmp_path / "old"), read_tensors(tmp_path / "new")
    for name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
        torch.testing.assert_close(new[name][200], (old[name][3] + old[name][7]) / 2)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")


def test_nested_configurations(tmp_path: Path) -> None:
    old = write_sample(tmp_path / "old")
    vision = {"vocab_size": 5, "hidden_size": 8}
    config = {"model_type": "other", "text_config": {"vocab_size": 77}, "vision_config": vision}
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    resize(tmp_path / "old", tmp_path / "new")
    written = json.loads((tmp_path / "new/config.json").read_text())
    assert written == config | {"text_config": {"vocab_size": 80}}
    bias = {"lm_head.bias": torch.zeros(77)}
    save_file(old | bias, tmp_path / "old/model.safetensors")
    with pytest.raises(ModelError, match=r"'lm_head.bias' .* has 77 rows or columns too"):
        resize(tmp_path / "old", tmp_path / "other")


def _smaller(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))


def _quantised(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    quantised = {"quantization_config": {"quant_method": "awq"}}
    (directory / "config.json").write_text(json.dumps(config | quantised))


def _pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _without_head(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, directory / "model.safetensors")


def _without_embedding(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors[EMBEDDING]
    save_file(tensors, directory / "model.safetensors")


def _smaller_head(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {HEAD: tensors[HEAD][:70].clone()}, directory / "model.safetensors")


def _integers(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(24, dtype=torch.int8)
    save_file(tensors, directory / "model.safetensors")


def _cut(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 20_000)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_smaller, r"vocab_size = \[64\], but the embedding has 77 rows"),
        (_quantised, "quantization_config: the weights are quantised"),
        (_pickled, "save the model as safetensors"),
        (_without_head, "'lm_head.weight' is missing"),
        (_without_embedding, "no embedding"),
        (_smaller_head, r"lm_head.weight \(70, 24\) differ"),
        (_integers, "type I8; supported are"),
        (_cut, "truncated"),
        (lambda directory: (directory / "config.json").unlink(), "config.json: not found"),
    ],
)
def test_faulty_models_are_refused_and_nothing_is_left(
    tmp_path: Path, spoil: Any, message: str
) -> None:
    write_sample(tmp_path / "old")
    spoil(tmp_path / "old")
    with pytest.raises(ModelError, match=message):
        resize(tmp_path / "old", tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_a_model_with_fewer_rows_than_the_tokenizer_has_ids(tmp_path: Path) -> None:
    write_sample(tmp_path / "old")
    with pytest.raises(ModelError, match="the model has 77 rows, but .* has 78 ids"):
        resize(tmp_path / "old", tmp_path / "new", extension(old=78))
    with pytest.raises(DataError, match=r"new token 70 .* old ids \(3, 70\)"):
        resize(tmp_path / "old", tmp_path / "new", extension([(3, 70)]))
    with pytest.raises(DataError, match=r"old ids \(\)"):
        resize(tmp_path / "old", tmp_path / "new", extension([()]))


def test_targets(tmp_path: Path) -> None:
    write_sample(tmp_path / "old")
    for inside in (tmp_path / "old", tmp_path / "old/new"):
        with pytest.raises(ModelError, match=r"give another"):
            resize(tmp_path / "old", inside)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="not an empty directory"):
        resize(tmp_path / "old", tmp_path / "full")
    (tmp_path / "empty").mkdir()
    resize(tmp_path / "old", tmp_path / "empty")
    assert (tmp_path / "empty/model.safetensors").exists()


def test_a_tokenizer_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    write_sample(tmp_path / "old")

    def refuse(directory: Path) -> None:
        (directory / "tokenizer.json").write_text("half")
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        resize_hf(tmp_path / "old", tmp_path / "new", extension(), write_tokenizer=refuse)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
