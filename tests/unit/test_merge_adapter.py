"""Adapters are added to weights in FP32 and rounded once, file by file, or nothing is written."""

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import ALPHA, RANK, write_adapter
from hf_samples import assert_same_bytes, read_tensors, write_sample
from safetensors.torch import save_file
from torch import Tensor

from megatron_cgn.errors import ModelError
from megatron_cgn.hf import merge
from megatron_cgn.hf.adapter_to_hf import merge_checkpoint
from megatron_cgn.hf.checkpoint_layout import CheckpointInfo, write_info
from megatron_cgn.hf.fingerprint import weights_fingerprint
from megatron_cgn.hf.merge import merge_adapter, merged_bytes

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
FP64_ATOL = 1e-5
"""FP32 products of rank 4 and rows of 40, of size 10, against FP64."""


def _expected(
    base: dict[str, Tensor], adapter: dict[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """The merged model in FP64, by the equations of LoRA and DoRA."""
    result = {name: tensor.double() for name, tensor in base.items()}
    for name, tensor in adapter.items():
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        if part == "A.weight":
            other = adapter[name.replace("lora_A", "lora_B")].double()
            result[f"{module}.weight"] += scale * other @ tensor.double()
        elif not part:
            result[module] = tensor.double()
    for name, tensor in adapter.items():
        if name.endswith(".lora_magnitude_vector"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
            weight = result[f"{module}.weight"]
            lengths = weight.square().sum(1).sqrt()
            result[f"{module}.weight"] = weight * (tensor.double() / lengths)[:, None]
    return result


@pytest.mark.parametrize("block_bytes", [300, 2**25])
@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True, "whole": ("embed_tokens", "lm_head")}, ALPHA / RANK**0.5),
        ({"dora": True, "whole": ("lm_head",)}, ALPHA / RANK),
    ],
)
def test_merges_as_the_equations_say(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block_bytes: int,
    fields: dict[str, Any],
    scale: float,
) -> None:
    monkeypatch.setattr(merge, "BLOCK_BYTES", block_bytes)
    base = write_sample(tmp_path / "m", dtype=torch.float32, files=2)
    adapter = write_adapter(tmp_path / "a", **fields)
    told: list[int] = []
    merge_adapter(
        tmp_path / "m", tmp_path / "a", tmp_path / "o", max_shard_bytes=9000, progress=told.append
    )
    ours, expected = read_tensors(tmp_path / "o"), _expected(base, adapter, scale)
    assert ours.keys() == expected.keys()
    changed = 0
    for name, tensor in expected.items():
        assert (ours[name].double() - tensor).abs().max() < FP64_ATOL, name
        changed += not torch.equal(ours[name], base[name])
    assert changed == 9 + len(fields.get("whole", ()))
    assert sum(told) == merged_bytes(tmp_path / "m") == sum(t.nbytes for t in base.values())
    index = json.loads((tmp_path / "o" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == base.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_the_fp32_result_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_sample(tmp_path / "m", dtype=dtype)
    write_adapter(tmp_path / "a", dora=True)
    merge_adapter(tmp_path / "m", tmp_path / "a", tmp_path / "low")
    merge_adapter(tmp_path / "m", tmp_path / "a", tmp_path / "high", dtype=torch.float32)
    low, high = read_tensors(tmp_path / "low"), read_tensors(tmp_path / "high")
    assert_same_bytes(low, {name: tensor.to(dtype) for name, tensor in high.items()})
    assert merged_bytes(tmp_path / "m", dtype=torch.float32) == 2 * sum(
        tensor.nbytes for tensor in base.values()
    )
    config = json.loads((tmp_path / "high" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"


def test_a_tied_matrix_is_replaced_once(tmp_path: Path) -> None:
    write_sample(tmp_path / "m", dtype=torch.float32, tied=True)
    adapter = write_adapter(tmp_path / "a", whole=("embed_tokens",), tied=True)
    merge_adapter(tmp_path / "m", tmp_path / "a", tmp_path / "o")
    tensors = read_tensors(tmp_path / "o")
    assert "lm_head.weight" not in tensors
    expected = adapter["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(tensors["model.embed_tokens.weight"], expected)
    # Two that differ are refused.
    write_adapter(tmp_path / "a", whole=("embed_tokens", "lm_head"))
    with pytest.raises(ModelError, match="differs from the embedding"):
        merge_adapter(tmp_path / "m", tmp_path / "a", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_the_adapter_was_trained_with_goes_along(tmp_path: Path) -> None:
    write_sample(tmp_path / "m")
    for name in ("chat_template.json", "LICENSE", "merges.txt"):
        (tmp_path / "m" / name).write_text("the base's")
    write_adapter(tmp_path / "a")
    for name in ("chat_template.jinja", "generation_config.json", "README.md"):
        (tmp_path / "a" / name).write_text("the adapter's")
    merge_adapter(tmp_path / "m", tmp_path / "a", tmp_path / "o")
    texts = {
        p.name: p.read_text() for p in (tmp_path / "o").iterdir() if p.suffix != ".safetensors"
    }
    assert texts.keys() == {
        "config.json",
        "tokenizer.json",
        "LICENSE",
        "merges.txt",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert texts["chat_template.jinja"] == texts["generation_config.json"] == "the adapter's"
    assert texts["merges.txt"] == "the base's"


def test_nothing_is_written_of_an_adapter_of_another_model(tmp_path: Path) -> None:
    write_sample(tmp_path / "m", model_type="qwen2")
    write_adapter(tmp_path / "a")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ModelError, match="is missing"):
        merge_adapter(tmp_path / "m", tmp_path / "a", tmp_path / "o")
    write_sample(tmp_path / "m2")
    write_adapter(tmp_path / "a", r=5)
    with pytest.raises(ModelError, match=r"has shape \(4, 24\), but the model needs \(5, 24\)"):
        merge_adapter(tmp_path / "m2", tmp_path / "a", tmp_path / "o")
    assert {path.name for path in tmp_path.iterdir()} == {"m", "m2", "a"}


def test_weights_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    write_sample(tmp_path / "m")
    tensors = write_adapter(tmp_path / "a")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    tensors[name][3, 1] = float("nan")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.v_proj\.weight gives weights"):
        merge_adapter(tmp_path / "m", tmp_path / "a", tmp_path / "out")
    # Finite in FP32, and beyond what FP16 holds.
    write_adapter(tmp_path / "large", lora_alpha=1e6)
    with pytest.raises(ModelError, match="infinite or not a number in float16; .*--dtype fp32"):
        merge_adapter(tmp_path / "m", tmp_path / "large", tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["m", "."])
def test_a_checkpoints_adapters_never_replace_their_base(tmp_path: Path, output: str) -> None:
    write_sample(tmp_path / "m")
    (tmp_path / "checkpoint").mkdir()
    adapter = {"base_fingerprint": weights_fingerprint(tmp_path / "m"), "base": "elsewhere"}
    info = CheckpointInfo(
        step=1,
        consumed_sequences=1,
        has_optimizer=False,
        vocab_size=77,
        padded_vocab_size=128,
        dtype="fp32",
        adapter=adapter,
    )
    write_info(tmp_path / "checkpoint", info)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ModelError, match="would replace the model that the adapters belong to"):
        merge_checkpoint(tmp_path / "checkpoint", tmp_path / output, base=str(tmp_path / "m"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    write_sample(tmp_path / "m")
    write_adapter(tmp_path / "a")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(ModelError, match="could not be written: File too large"):
            merge_adapter(tmp_path / "m", tmp_path / "a", tmp_path / "o")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert {path.name for path in tmp_path.iterdir()} == {"m", "a"}


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line in this process, because importing torch anew takes seconds."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return int(ended.value.code or 0)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    base = write_sample(tmp_path / "m")
    adapter = write_adapter(tmp_path / "a")
    where = ("--model", tmp_path / "m", "--adapter", tmp_path / "a", "--output")
    assert _run(monkeypatch, "merge-adapter", *where, tmp_path / "o", "--dtype", "fp32") == 0
    assert capfd.readouterr().out == f"wrote {tmp_path / 'o'}\n"
    expected = _expected(base, adapter, ALPHA / RANK)
    for name, tensor in read_tensors(tmp_path / "o").items():
        assert (tensor.double() - expected[name]).abs().max() < FP64_ATOL
    for output, message in (
        (tmp_path / "a", "would replace the --adapter"),
        (tmp_path, "would replace the --model"),
        (tmp_path / "o", "exists already"),
    ):
        assert _run(monkeypatch, "merge-adapter", *where, output) == 2
        assert message in capfd.readouterr().err
    # An adapter directory is what a conversion may replace.
    write_adapter(tmp_path / "b")
    assert _run(monkeypatch, "merge-adapter", *where, tmp_path / "b", "--overwrite") == 0
    assert (tmp_path / "b" / "config.json").exists()
    assert not (tmp_path / "b" / "adapter_config.json").exists()


def test_a_killed_merge_leaves_no_directory_under_the_name(tmp_path: Path) -> None:
    write_sample(tmp_path / "m")
    write_adapter(tmp_path / "a")
    script = (
        "import time; from megatron_cgn.hf import merge; merge.merge_adapter("
        f"{str(tmp_path / 'm')!r}, {str(tmp_path / 'a')!r}, {str(tmp_path / 'o')!r}, "
        "progress=lambda _: time.sleep(60))"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=TOOL.parents[1]) as process:
        while not list(tmp_path.glob(".o.tmp-*/*.safetensors")):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "o").exists()
