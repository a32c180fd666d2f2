"""What a user can get wrong: one message that names it, exit code 2, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_files import TinyFiles, byte_level_tokenizer
from train_runs import Ended, Zygote, checkpoints, overrides, records

from megatron_cgn.data.index_writer import IndexWriter
from tokenizer.wrapper import Tokenizer


def _refused(ended: Ended, output: Path, *texts: str) -> None:
    """Every rank exits 2; standard error is the one message; nothing was left behind."""
    assert set(ended.codes) == {2}, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    assert ended.stderr.startswith("error: "), ended.stderr
    assert ended.stderr.count("error: ") == 1, ended.stderr
    for text in texts:
        assert text in ended.stderr, ended.stderr
    if output.is_dir():
        # Only the shuffled indices, which are whole and keyed by what they are of.
        assert [p.name for p in output.iterdir()] in ([], ["cache"])
        assert not [p for p in output.rglob("*") if ".tmp" in p.name or ".partial" in p.name]


SETTINGS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown key": (["train.micro_batchsize=2"], ("train.micro_batch_size",)),
    "unknown key with a plus": (["+optim.learning_rate=1"], ("optim.learning_rate", "unknown")),
    "unknown key of a source": (
        ["data.sources=[{name: a, path: b, wieght: 1}]"],
        ("data.sources.0.wieght", "weight"),
    ),
    "unknown stage": (["stage=cpt2"], ("stage",)),
    "wrong type": (["train.train_iters=many"], ("train.train_iters", "many")),
    "wrong choice": (["precision=fp8"], ("precision", "fp8", "bf16")),
    "broken override": (["data.sources=[{name: a"], ("data.sources",)),
    "heads not divisible by TP": (
        ["parallel.tensor_model_parallel_size=3"],
        ("tensor_model_parallel_size: 3", "4 attention heads", "1, 2, 4"),
    ),
    "layers not divisible by PP": (
        ["parallel.pipeline_model_parallel_size=3", "train.global_batch_size=6"],
        ("pipeline_model_parallel_size: 3", "4 layers"),
    ),
    "interleaving without overlap": (
        [
            "parallel.pipeline_model_parallel_size=2",
            "parallel.virtual_pipeline_model_parallel_size=2",
            "parallel.overlap_p2p_comm=false",
        ],
        ("parallel.overlap_p2p_comm: false", "interleaved"),
    ),
    "global batch not divisible": (
        ["train.global_batch_size=5"],
        ("train.global_batch_size: 5", "2", "6"),
    ),
    "world size and layout": (
        ["parallel.tensor_model_parallel_size=2"],
        ("1 process", "multiple of 2"),
    ),
    "rate that is no number": (["optim.lr=nan"], ("optim.lr: nan", "finite")),
    "endless epochs": (
        ["train.train_iters=null", "train.epochs=inf"],
        ("train.epochs: inf", "finite"),
    ),
    "negative seed": (["seed=-1"], ("seed: -1", "at least 0")),
    "negative iterations": (["train.train_iters=-3"], ("train.train_iters: -3", "at least 1")),
    "negative weight": (
        ["data.sources=[{name: a, path: b, weight: -1}]"],
        ("weight", "-1"),
    ),
    "too long for the model": (["data.seq_length=65"], ("data.seq_length: 65", "64")),
    "too few tokens": (
        ["train.train_iters=null", "train.epochs=0.001"],
        ("train.epochs", "0.001"),
    ),
    "no model": (["model.hf_path=/nowhere/model"], ("/nowhere/model",)),
    "no source": (["data.sources=[{name: a, path: /nowhere/a}]"], ("/nowhere/a",)),
}
RANKS = {
    "heads not divisible by TP": 3,
    "layers not divisible by PP": 3,
    "interleaving without overlap": 2,
    "no source": 2,
    "unknown key": 2,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(tiny: TinyFiles, zygote: Zygote, tmp_path: Path, name: str) -> None:
    more, texts = SETTINGS[name]
    ended = zygote.run(
        overrides(tiny, tmp_path / "run", *more),
        stderr=tmp_path / "stderr",
        ranks=RANKS.get(name, 1),
    )
    _refused(ended, tmp_path / "run", *texts)


def test_all_faults_are_told_at_once(tiny: TinyFiles, zygote: Zygote, tmp_path: Path) -> None:
    more = ["optim.lr=-1", "train.global_batch_size=5", "checkpoint.keep_last=0"]
    ended = zygote.run(overrides(tiny, tmp_path / "run", *more), stderr=tmp_path / "stderr")
    _refused(ended, tmp_path / "run", "optim.lr: -1", "train.global_batch_size: 5", "keep_last: 0")


def _edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _truncate(path: Path, *, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


def _empty_index(prefix: str) -> None:
    for suffix in (".bin", ".idx", ".json"):
        Path(prefix + suffix).unlink()
    tokenizer = Tokenizer.from_pretrained(Path(prefix).parent / "model")
    with IndexWriter(prefix, vocab_size=320) as writer:
        writer.add(np.zeros(0, dtype=np.int64), [])
        writer.finish(
            tokenizer_fingerprint=tokenizer.fingerprint(),
            tokenizer_name="model",
            eod_id=0,
            text_bytes=0,
        )


def _without_end_of_document(directory: Path) -> None:
    """A tokenizer without the token, and indices that agree with it."""
    byte_level_tokenizer(directory / "model", eos=None)
    fingerprint = Tokenizer.from_pretrained(directory / "model").fingerprint()
    for name in ("domain", "general"):
        _edit(directory / f"{name}.json", tokenizer_fingerprint=fingerprint)


def _config(model: Path, **fields: object) -> None:
    _edit(model / "config.json", **fields)


FILES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing .bin": (lambda d: (d / "domain.bin").unlink(), ("domain.bin", "no such file")),
    "missing .idx": (lambda d: (d / "general.idx").unlink(), ("general.idx", "no such file")),
    "truncated .bin": (lambda d: _truncate(d / "domain.bin", by=2), ("domain.bin", "truncated")),
    "truncated .idx": (lambda d: _truncate(d / "domain.idx", by=8), ("domain.idx", "truncated")),
    "header of .idx cut": (lambda d: os.truncate(d / "domain.idx", 20), ("domain.idx",)),
    "empty source": (lambda d: _empty_index(str(d / "domain")), ("domain", "empty")),
    "missing safetensors": (
        lambda d: (d / "model" / "model.safetensors").unlink(),
        ("model.safetensors",),
    ),
    "truncated safetensors": (
        lambda d: _truncate(d / "model" / "model.safetensors", by=100),
        ("model.safetensors", "truncated"),
    ),
    "header of safetensors cut": (
        lambda d: os.truncate(d / "model" / "model.safetensors", 100),
        ("model.safetensors",),
    ),
    "another tokenizer": (
        lambda d: byte_level_tokenizer(d / "model", vocab_size=300),
        ("another tokenizer", "fingerprint"),
    ),
    "more ids than embeddings": (
        lambda d: _config(d / "model", vocab_size=310),
        ("310",),
    ),
    "tokenizer without end of document": (
        lambda d: _without_end_of_document(d),
        ("eos_token",),
    ),
    "no tokenizer": (
        lambda d: [(d / "model" / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        ("tokenizer.json",),
    ),
    "broken config.json": (
        lambda d: (d / "model" / "config.json").write_text("{"),
        ("config.json",),
    ),
    "unsupported architecture": (
        lambda d: _config(d / "model", model_type="gpt2"),
        ("gpt2", "llama"),
    ),
    "output_dir is a file": (lambda d: (d / "run").write_text("x"), ("output_dir", "is a file")),
}
ON_TWO_RANKS = ("truncated .bin", "truncated safetensors", "another tokenizer", "empty source")


def _copy(tiny: TinyFiles, target: Path) -> TinyFiles:
    """The tiny files, to be broken."""
    shutil.copytree(tiny.model.parent, target, dirs_exist_ok=True)
    return TinyFiles(
        model=target / "model", domain=str(target / "domain"), general=str(target / "general")
    )


@pytest.mark.parametrize("name", FILES)
def test_files(tiny: TinyFiles, zygote: Zygote, tmp_path: Path, name: str) -> None:
    broken = _copy(tiny, tmp_path)
    break_it, texts = FILES[name]
    break_it(tmp_path)
    ended = zygote.run(
        overrides(broken, tmp_path / "run"),
        stderr=tmp_path / "stderr",
        ranks=2 if name in ON_TWO_RANKS else 1,
    )
    _refused(ended, tmp_path / "run", *texts)


def _flip(path: Path, *, at: float) -> None:
    content = bytearray(path.read_bytes())
    middle = int(len(content) * at)
    for place in range(middle, middle + 8):
        content[place] ^= 0xFF
    path.write_bytes(content)


def _shorten(path: Path) -> None:
    _truncate(path, by=64)


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "truncated .distcp": (lambda d: _shorten(d / "dist/__0_0.distcp"), ("__0_0.distcp", "bytes")),
    "flipped .distcp": (
        lambda d: _flip(d / "dist/__0_0.distcp", at=0.5),
        ("__0_0.distcp is not as it was written",),
    ),
    "flipped .metadata": (lambda d: _flip(d / "dist/.metadata", at=0.5), (".metadata",)),
    "missing .metadata": (lambda d: (d / "dist/.metadata").unlink(), (".metadata is missing",)),
    "missing .distcp": (lambda d: (d / "dist/__0_0.distcp").unlink(), ("__0_0.distcp is missing",)),
    "missing metadata.json": (lambda d: (d / "dist/metadata.json").unlink(), ("metadata.json",)),
    "missing checkpoint.json": (lambda d: (d / "checkpoint.json").unlink(), ("checkpoint.json",)),
    "broken checkpoint.json": (lambda d: _shorten(d / "checkpoint.json"), ("checkpoint.json",)),
    "wrong types": (
        lambda d: (d / "checkpoint.json").write_text('{"step": "x", "files": null}'),
        ("checkpoint.json", "step"),
    ),
    "no object": (lambda d: (d / "checkpoint.json").write_text("[]"), ("checkpoint.json",)),
    "another format": (
        lambda d: _edit(d / "checkpoint.json", format=99),
        ("format 99",),
    ),
}


@pytest.fixture(scope="module")
def saved(
    tiny: TinyFiles, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Outputs of runs on one and two ranks that were stopped after their second checkpoint."""
    outputs = {}
    for ranks in (1, 2):
        outputs[ranks] = tmp_path_factory.mktemp("saved")
        arguments = overrides(tiny, outputs[ranks], "checkpoint.interval_steps=4")
        ended = zygote.run(arguments, stderr=outputs[ranks] / "stderr", ranks=ranks)
        assert ended.codes == [0] * ranks, ended.stderr
    return outputs


@pytest.mark.parametrize(
    ("name", "ranks"),
    [(name, 1) for name in CHECKPOINTS]
    # The other faults are found before ranks differ.
    + [(name, 2) for name in CHECKPOINTS if name.startswith(("flipped", "truncated"))],
)
def test_corrupt_checkpoints(
    tiny: TinyFiles,
    zygote: Zygote,
    saved: dict[int, Path],
    tmp_path: Path,
    name: str,
    ranks: int,
) -> None:
    output = tmp_path / "run"
    shutil.copytree(saved[ranks], output, symlinks=True)
    break_it, texts = CHECKPOINTS[name]
    break_it(output / "checkpoints" / "step_0000008")
    before = records(output)
    arguments = overrides(tiny, output, "checkpoint.interval_steps=4")
    ended = zygote.run(arguments, stderr=tmp_path / "stderr", ranks=ranks)
    assert set(ended.codes) == {2}, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    assert ended.stderr.count("error: ") == 1, ended.stderr
    for text in ("step_0000008", *texts):
        assert text in ended.stderr, ended.stderr
    assert records(output) == before

    if name in ("flipped .metadata", "missing checkpoint.json"):  # the remedy of the message
        shutil.rmtree(output / "checkpoints" / "step_0000008")
        ended = zygote.run(arguments, stderr=tmp_path / "stderr", ranks=ranks)
        assert set(ended.codes) == {0}, ended.stderr
        assert "step_0000004 after step 4" in ended.stderr
        assert records(output) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, where mounting one is allowed."""
    target = tmp_path / "disk"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(target)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield target
    subprocess.run(["umount", str(target)], check=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_disk_full_while_saving(
    tiny: TinyFiles, zygote: Zygote, small_disk: Path, tmp_path: Path, ranks: int
) -> None:
    """Checkpoints of 1 MB fill the disk; then it has room again, and the run goes on."""
    more = (f"checkpoint.dir={small_disk}/checkpoints", "checkpoint.interval_steps=1")
    arguments = overrides(tiny, tmp_path / "run", *more)
    ended = zygote.run(arguments, stderr=tmp_path / "stderr", ranks=ranks)
    assert set(ended.codes) == {2}, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    assert ended.stderr.count("error: ") == 1, ended.stderr
    assert "No space left on device" in ended.stderr
    names = checkpoints(small_disk)
    assert names[0] == "latest" and len(names) >= 3, names
    assert not [name for name in names if name.endswith(".partial")]
    assert os.readlink(small_disk / "checkpoints" / "latest") == names[-1]

    for name in names[1:-1]:
        shutil.rmtree(small_disk / "checkpoints" / name)
    ended = zygote.run(
        [*arguments, "checkpoint.keep_last=1"], stderr=tmp_path / "stderr", ranks=ranks
    )
    assert set(ended.codes) == {0}, ended.stderr
    assert f"resumed from {small_disk}/checkpoints/{names[-1]}" in ended.stderr
    assert [r["step"] for r in records(tmp_path / "run") if "loss" in r] == list(range(1, 9))


@pytest.mark.parametrize("free_kib", [0, 4, 8, 16, 32, 64, 200, 1024, 1070, 1088, 1100, 1112])
def test_disk_full_at_any_file(
    tiny: TinyFiles, zygote: Zygote, small_disk: Path, tmp_path: Path, free_kib: int
) -> None:
    """Outputs and checkpoints on a disk with hardly any room left: whichever file is refused."""
    filler = small_disk / "filler"
    filler.write_bytes(bytes(4 * 2**20 - free_kib * 1024))
    output = small_disk / "run"
    ended = zygote.run(
        overrides(tiny, output, f"data.cache_dir={tmp_path}/cache", "data.num_workers=0"),
        stderr=tmp_path / "stderr",
        ranks=2,
    )
    assert set(ended.codes) == {2}, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    assert ended.stderr.count("error: ") == 1, ended.stderr
    assert "No space left on device" in ended.stderr
    left = [p.name for p in output.rglob("*")] if output.exists() else []
    assert not [name for name in left if "partial" in name], left


def test_a_limit_on_file_size_ends_a_save_cleanly(
    tiny: TinyFiles, zygote: Zygote, tmp_path: Path
) -> None:
    """As `ulimit -f` sets it; the checkpoint's file is larger, everything before is not."""
    output = tmp_path / "run"
    run = zygote.start(
        overrides(tiny, output), stderr=tmp_path / "stderr", ranks=2, limit_bytes=300_000
    )
    ended = run.wait()
    assert ended.codes == [2, 2], ended.stderr
    assert "Traceback" not in ended.stderr and ended.stderr.count("error: ") == 1, ended.stderr
    assert checkpoints(output) == []


def test_the_program_itself_exits_with_2(tmp_path: Path) -> None:
    """Without the tests' way of starting it."""
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        [sys.executable, "train.py", "+stage=cpt", f"output_dir={tmp_path / 'run'}"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and "model.hf_path" in ended.stderr
    assert "Traceback" not in ended.stderr and not list(tmp_path.iterdir())
