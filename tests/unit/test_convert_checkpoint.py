"""The streaming conversion, both ways, and what it does when something is wrong."""

import hashlib
import json
import os
import pickle
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hf_samples import assert_same_bytes, read_tensors, write_sample
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader

from megatron_cgn.errors import CheckpointError, ModelError
from megatron_cgn.hf import to_hf, to_megatron
from megatron_cgn.hf.checkpoint_layout import read_info
from megatron_cgn.hf.dist_reader import DistReader
from megatron_cgn.hf.safetensors_io import SafetensorsDirectory
from megatron_cgn.hf.to_hf import convert_to_hf
from megatron_cgn.hf.to_megatron import convert_to_megatron

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture(params=["large blocks", "small blocks"])
def _block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also cut tensors where real ones are cut: within parts, and within a query head."""
    if request.param == "small blocks":
        monkeypatch.setattr(to_megatron, "BLOCK_BYTES", 300)
        monkeypatch.setattr(to_megatron, "_FILE_BYTES", 5000)
        monkeypatch.setattr(to_hf, "BLOCK_BYTES", 500)


@pytest.mark.usefixtures("_block_size")
@pytest.mark.parametrize(
    ("model_type", "dtype", "tied", "files"),
    [
        ("llama", torch.bfloat16, False, 2),
        ("llama", torch.float32, True, 1),
        ("mistral", torch.float16, False, 1),
        ("qwen2", torch.bfloat16, True, 1),
        ("qwen3", torch.bfloat16, False, 3),
    ],
)
def test_both_ways_give_the_same_bytes(
    tmp_path: Path, model_type: str, dtype: torch.dtype, tied: bool, files: int
) -> None:
    source = tmp_path / "hf"
    values = write_sample(source, model_type=model_type, dtype=dtype, tied=tied, files=files)
    told: list[int] = []
    convert_to_megatron(source, tmp_path / "ckpt", progress=told.append)
    # Padding is written too: 77 rows become 128.
    padding = (128 - 77) * 24 * dtype.itemsize * (1 if tied else 2)
    total = sum(value.nbytes for value in values.values()) + padding
    assert sum(told) == to_megatron.converted_bytes(source) == total
    told.clear()
    convert_to_hf(tmp_path / "ckpt", tmp_path / "back", max_shard_bytes=9000, progress=told.append)
    assert sum(told) == to_hf.converted_bytes(tmp_path / "ckpt") == total - padding
    assert_same_bytes(read_tensors(tmp_path / "back"), values)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == values.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in values.values())
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        expected = json.loads((source / name).read_text())
        assert json.loads((tmp_path / "back" / name).read_text()) == expected


def test_the_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    write_sample(tmp_path / "hf")
    convert_to_megatron(tmp_path / "hf", tmp_path / "ckpt", make_vocab_size_divisible_by=50)
    fields = json.loads((tmp_path / "ckpt" / "checkpoint.json").read_text())
    files, digests = fields.pop("files"), fields.pop("digests")
    assert fields == {
        "format": 1,
        "step": 0,
        "optimizer_steps": 0,
        "consumed_sequences": 0,
        "has_optimizer": False,
        "has_master_weights": False,
        "layout": {},
        "fit": {},
        "vocab_size": 77,
        "padded_vocab_size": 100,
        "dtype": "bf16",
        "new_rows": {},
        "adapter": None,
    }
    for name, expected in digests.items():
        assert hashlib.sha256((tmp_path / "ckpt" / name).read_bytes()).hexdigest() == expected
    assert digests.keys() == {name for name in files if not name.endswith(".distcp")}
    # Training reads it by the same function.
    assert read_info(tmp_path / "ckpt").padded_vocab_size == 100
    found = {p for p in (tmp_path / "ckpt").rglob("*") if p.is_file()}
    assert {tmp_path / "ckpt" / name for name in files} == found - {
        tmp_path / "ckpt" / "checkpoint.json"
    }
    assert all((tmp_path / "ckpt" / name).stat().st_size == size for name, size in files.items())
    metadata = FileSystemReader(tmp_path / "ckpt" / "dist").read_metadata()
    embedding = metadata.state_dict_metadata["embedding.word_embeddings.weight"]
    assert tuple(embedding.size) == (100, 24)


def test_casts_when_asked(tmp_path: Path) -> None:
    values = write_sample(tmp_path / "hf", dtype=torch.float32)
    convert_to_megatron(tmp_path / "hf", tmp_path / "ckpt")
    convert_to_hf(tmp_path / "ckpt", tmp_path / "back", dtype=torch.bfloat16)
    expected = {name: value.to(torch.bfloat16) for name, value in values.items()}
    assert_same_bytes(read_tensors(tmp_path / "back"), expected)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_a_mixed_model_is_refused(tmp_path: Path) -> None:
    values = write_sample(tmp_path / "hf")
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file(values | {name: values[name].float()}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ModelError, match=r"'model.layers.1.self_attn.k_proj.weight' is torch.fl"):
        convert_to_megatron(tmp_path / "hf", tmp_path / "ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_types_that_vary_over_layers_are_refused(tmp_path: Path) -> None:
    values = write_sample(tmp_path / "hf")
    second = {n: v.float() for n, v in values.items() if n.startswith("model.layers.1.")}
    save_file(values | second, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ModelError, match=r"'model.layers.1..*' is torch.fl.*'model.layers.0..*'"):
        convert_to_megatron(tmp_path / "hf", tmp_path / "ckpt")
    # Norms of a type of their own, the same in every layer, are fine.
    norms = {n: v.float() for n, v in values.items() if "norm" in n}
    save_file(values | norms, tmp_path / "hf" / "model.safetensors")
    convert_to_megatron(tmp_path / "hf", tmp_path / "ckpt")
    convert_to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_bytes(read_tensors(tmp_path / "back"), values | norms)


@pytest.mark.parametrize(
    "content", [b"garbage", b"", b"cno_such_module\nThing\n.", pickle.dumps({"a": 1})]
)
def test_damaged_metadata_is_named(tmp_path: Path, content: bytes) -> None:
    write_sample(tmp_path / "hf")
    convert_to_megatron(tmp_path / "hf", tmp_path / "ckpt")
    (tmp_path / "ckpt" / "dist" / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: not the metadata"):
        DistReader(tmp_path / "ckpt" / "dist")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    write_sample(tmp_path / "hf")
    convert_to_megatron(tmp_path / "hf", tmp_path / "ckpt")
    data = tmp_path / "ckpt" / "dist" / "__0_0.distcp"
    whole = data.read_bytes()

    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has \d+ bytes, \d+ bytes were"):
        convert_to_hf(tmp_path / "ckpt", tmp_path / "back")
    data.write_bytes(b"\0" * len(whole))
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert_to_hf(tmp_path / "ckpt", tmp_path / "back")
    (tmp_path / "ckpt" / "dist" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"dist/\.metadata is missing"):
        convert_to_hf(tmp_path / "ckpt", tmp_path / "back")
    with pytest.raises(CheckpointError, match="holds no checkpoint.json"):
        convert_to_hf(tmp_path / "hf", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    write_sample(tmp_path / "hf")
    convert_to_megatron(tmp_path / "hf", tmp_path / "ckpt")
    config = tmp_path / "ckpt" / "hf" / "config.json"
    fields = json.loads(config.read_text())
    content = json.loads((tmp_path / "ckpt" / "checkpoint.json").read_text())
    (tmp_path / "ckpt" / "checkpoint.json").write_text(
        json.dumps(content | {"files": {}, "digests": {}})
    )
    config.write_text(json.dumps(fields | {"intermediate_size": 48}))
    with pytest.raises(CheckpointError, match=r"linear_fc1.weight' has shape \(3, 80, 24\).*96"):
        convert_to_hf(tmp_path / "ckpt", tmp_path / "back")
    config.write_text(json.dumps(fields | {"model_type": "qwen3"}))
    with pytest.raises(CheckpointError, match=r"q_layernorm.weight' is missing"):
        convert_to_hf(tmp_path / "ckpt", tmp_path / "back")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "checkpoint.json cannot be read"),
        ("{}", "checkpoint.json cannot be read"),
        ({"format": 99}, "format 99; this version reads 1"),
        ({"vocab_size": "many"}, "checkpoint.json cannot be read"),
    ],
)
def test_a_checkpoint_that_does_not_say_what_it_is_is_refused(
    tmp_path: Path, content: str | dict[str, Any], message: str
) -> None:
    write_sample(tmp_path / "hf")
    convert_to_megatron(tmp_path / "hf", tmp_path / "ckpt")
    file = tmp_path / "ckpt" / "checkpoint.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        convert_to_hf(tmp_path / "ckpt", tmp_path / "back")


def test_a_changed_configuration_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    write_sample(tmp_path / "hf")
    convert_to_megatron(tmp_path / "hf", tmp_path / "ckpt")
    config = tmp_path / "ckpt" / "hf" / "config.json"
    config.write_text(config.read_text().replace("64", "65"))
    with pytest.raises(CheckpointError, match="hf/config.json is not as it was written"):
        convert_to_hf(tmp_path / "ckpt", tmp_path / "back")


def test_too_little_space_is_found_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    write_sample(tmp_path / "hf")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=1000))
    with pytest.raises(CheckpointError, match=r"needs 0\.\d+ MiB, but only 0\.00 MiB"):
        convert_to_megatron(tmp_path / "hf", tmp_path / "ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def _run(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """Run the command line in this process, because importing torch anew takes seconds."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, args)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return int(ended.value.code or 0)


def test_command_line_writes_refuses_and_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    values = write_sample(tmp_path / "hf")
    to_checkpoint = ("to-megatron", "--input", tmp_path / "hf", "--output", tmp_path / "ckpt")
    assert _run(monkeypatch, *to_checkpoint) == 0
    assert capfd.readouterr() == (f"wrote {tmp_path / 'ckpt'}\n", "")
    (tmp_path / "ckpt" / "marker").touch()

    assert _run(monkeypatch, *to_checkpoint) == 2
    refusal = capfd.readouterr().err
    assert refusal.startswith("error: ") and refusal.count("\n") == 1
    assert "--overwrite" in refusal
    assert (tmp_path / "ckpt" / "marker").exists()

    assert _run(monkeypatch, *to_checkpoint, "--overwrite") == 0
    assert not (tmp_path / "ckpt" / "marker").exists()
    back = ("to-hf", "--input", tmp_path / "ckpt", "--output", tmp_path / "back")
    assert _run(monkeypatch, *back) == 0
    assert_same_bytes(read_tensors(tmp_path / "back"), values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ckpt", "hf"]


@pytest.mark.parametrize("output", ["models/hf", "models", "models/hf/../hf"])
def test_the_input_is_never_overwritten(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    output: str,
) -> None:
    source = tmp_path / "models" / "hf"
    values = write_sample(source)
    args = ("to-megatron", "--input", source, "--output", tmp_path / output, "--overwrite")
    assert _run(monkeypatch, *args) == 2
    assert "would replace the --input" in capfd.readouterr().err
    assert_same_bytes(read_tensors(source), values)


def test_a_disk_that_refuses_leaves_the_previous_output_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    values = write_sample(tmp_path / "hf", dtype=torch.float32)
    convert_to_megatron(tmp_path / "hf", tmp_path / "ckpt")
    convert_to_hf(tmp_path / "ckpt", tmp_path / "back")
    before = sorted(tmp_path.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for direction, source, target in (("to-megatron", "hf", "ckpt"), ("to-hf", "ckpt", "back")):
        args = (direction, "--input", tmp_path / source, "--output", tmp_path / target)
        # The kernel refuses every write beyond this size, in the middle of the weights.
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        try:
            code = _run(monkeypatch, *args, "--overwrite")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        message = capfd.readouterr().err
        assert code == 2
        assert message.count("\n") == 1
        assert "could not be written: File too large" in message
        assert sorted(tmp_path.rglob("*")) == before
    assert_same_bytes(read_tensors(tmp_path / "back"), values)


def test_overwrite_replaces_only_what_a_conversion_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_sample(tmp_path / "hf")
    target = tmp_path / "out"
    args = ("to-megatron", "--input", tmp_path / "hf", "--output", target, "--overwrite")
    for name in ("thesis.tex", "config.json", "model.safetensors"):
        target.mkdir()
        (target / name).touch()
        assert _run(monkeypatch, *args) == 2
        assert "is neither a checkpoint nor a Hugging Face model" in capfd.readouterr().err
        assert [path.name for path in target.iterdir()] == [name]
        shutil.rmtree(target)
    for names in ((), ("checkpoint.json", "x"), ("config.json", "model.safetensors", "x")):
        target.mkdir()
        for name in names:
            (target / name).touch()
        assert _run(monkeypatch, *args) == 0
        assert not (target / "x").exists()
        shutil.rmtree(target)


def test_a_link_stays_and_what_it_points_to_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sample(tmp_path / "hf")
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "out", tmp_path / "disk" / "out"
    link.symlink_to(target)
    for _ in range(2):
        args = ("to-megatron", "--input", tmp_path / "hf", "--output", link, "--overwrite")
        assert _run(monkeypatch, *args) == 0
        assert link.is_symlink() and (target / "checkpoint.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "hf", "out"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_file_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_sample(tmp_path / "hf")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    before = sorted(tmp_path.rglob("*"))
    for name in ("file", "link"):
        args = ("to-megatron", "--input", tmp_path / "hf", "--output", tmp_path / name)
        assert _run(monkeypatch, *args, "--overwrite") == 2
        assert "is not a directory" in capfd.readouterr().err
        with pytest.raises(CheckpointError, match="is not a directory"):
            convert_to_megatron(tmp_path / "hf", tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    write_sample(tmp_path / "hf")
    view = SafetensorsDirectory.view
    views = []

    def stop(self: SafetensorsDirectory, name: str, rows: slice) -> torch.Tensor:
        views.append(name)
        if len(views) == 1:
            assert [p for p in tmp_path.iterdir() if p.name.startswith(".ckpt.tmp-")]
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        return view(self, name, rows)

    monkeypatch.setattr(SafetensorsDirectory, "view", stop)
    args = ("to-megatron", "--input", tmp_path / "hf", "--output", tmp_path / "ckpt")
    assert _run(monkeypatch, *args) == 130
    assert capfd.readouterr().err == "error: interrupted; nothing was written\n"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    # Threads that write have been stopped too, rather than waited for.
    assert len(views) <= 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("to-megatron", "--dtype", "bf16"), "unrecognized arguments: --dtype bf16"),
        (("to-megatron", "--max-shard-gb", "1"), "unrecognized arguments: --max-shard-gb 1"),
        (("to-hf", "--make-vocab-size-divisible-by", "8"), "unrecognized arguments: --make"),
        (("to-hf", "--max-shard-gb", "nan"), "'nan': must be a positive number"),
        (("to-hf", "--max-shard-gb", "inf"), "'inf': must be a positive number"),
        (("to-hf", "--max-shard-gb", "x"), "'x': must be a positive number"),
        (("to-megatron", "--make-vocab-size-divisible-by", "1.5"), "must be a positive integer"),
        (("to-megatron", "--make-vocab-size-divisible-by", "0"), "must be a positive integer"),
    ],
)
def test_options_without_effect_or_sense_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    message: str,
) -> None:
    assert _run(monkeypatch, *args, "--input", tmp_path, "--output", tmp_path / "out") == 2
    assert message in capfd.readouterr().err


def test_help_runs_in_a_process_of_its_own_and_shows_an_example() -> None:
    done = subprocess.run([sys.executable, TOOL, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "convert_checkpoint.py to-megatron --input" in done.stdout
