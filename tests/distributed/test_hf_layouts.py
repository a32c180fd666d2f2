"""Hugging Face → TP2 × PP2 → Hugging Face, and Megatron's own loader on converted checkpoints."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cgn.config.schema import ModelConfig, ParallelConfig
from megatron_cgn.errors import ModelError
from megatron_cgn.hf.checkpoint_layout import CheckpointInfo, write_info
from megatron_cgn.hf.to_hf import convert_to_hf
from megatron_cgn.hf.to_megatron import convert_to_megatron
from megatron_cgn.testing import run_distributed, tiny_hf_model

CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-tied-wide-heads": {
        "family": "llama",
        "tie_word_embeddings": True,
        "head_dim": 24,
        "vocab_size": 301,
    },
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3"},
}
NUM_PROCESSES = 4
SECOND_NUM_PROCESSES = 2


def _build(architecture: Any, state: Any, *, virtual_size: int | None, multiple: int) -> list[Any]:
    """Chunks full of NaN, so that a value which is not written shows."""
    from megatron_cgn.model.build import build_model, transformer_config

    parallel = dataclasses.replace(state.config, virtual_pipeline_model_parallel_size=virtual_size)
    config = transformer_config(
        architecture,
        parallel=parallel,
        model=ModelConfig(backend="native"),
        precision="fp32",
    )
    chunks = build_model(
        architecture,
        config=config,
        groups=state.groups,
        seq_length=32,
        make_vocab_size_divisible_by=multiple,
        backend="native",
    )
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    return chunks


def _parameters(chunks: list[Any]) -> list[torch.Tensor]:
    return [parameter.detach() for chunk in chunks for parameter in chunk.parameters()]


def _sharded(chunks: list[Any]) -> dict[str, Any]:
    return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}


def _rank(root: str, names: list[str]) -> list[str]:
    """Run every case on one rank; return what went wrong."""
    from megatron.core import dist_checkpointing

    from megatron_cgn.hf.config import read_architecture
    from megatron_cgn.hf.export import export_weights
    from megatron_cgn.hf.load import load_weights
    from megatron_cgn.parallel.state import initialize_parallel

    state = initialize_parallel(
        ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    )
    faults = []
    for name in names:
        source = Path(root) / "hf" / name
        architecture = read_architecture(source)
        common: dict[str, Any] = {"architecture": architecture, "groups": state.groups}
        for virtual_size in (None, 2):
            out = Path(root) / "out" / f"{name}-{virtual_size}"
            chunks = _build(architecture, state, virtual_size=virtual_size, multiple=16)
            load_weights(chunks, source, **common)
            if any(p.isnan().any() for p in _parameters(chunks)):
                faults.append(f"{name}, {virtual_size}: values were left unset")
            export_weights(chunks, out / "one", source_dir=source, **common)
            # Twice for one of them, so that an existing export is replaced.
            for _ in range(2 if name == names[0] else 1):
                export_weights(
                    chunks, out / "many", source_dir=source, max_shard_bytes=250_000, **common
                )
            # Another padding than the converted checkpoint's.
            loaded = _build(architecture, state, virtual_size=virtual_size, multiple=16)
            sharded = _sharded(loaded)
            result = dist_checkpointing.load(sharded, str(Path(root) / "ckpt" / name / "dist"))
            for i, chunk in enumerate(loaded):
                chunk.load_state_dict(result[f"model{i}"], strict=False)
            for ours, theirs in zip(_parameters(chunks), _parameters(loaded), strict=True):
                if not torch.equal(ours, theirs):
                    faults.append(f"{name}, {virtual_size}: Megatron's loader differs")
            if virtual_size is None:
                dist = Path(root) / "trained" / name / "dist"
                if state.rank == 0:
                    dist.mkdir(parents=True)
                torch.distributed.barrier()
                saved = _sharded(chunks)
                saved["optimizer"] = dist_checkpointing.ShardedTensor.from_rank_offsets(
                    "optimizer.state.exp_avg", torch.ones(4), replica_id=state.rank
                )
                dist_checkpointing.save(saved, str(dist))
    faults += _untied_is_refused(state, Path(root))
    return faults + _disk_refuses(state, Path(root), names[0])


def _untied_is_refused(state: Any, root: Path) -> list[str]:
    """Every rank refuses a tied model with an output layer of its own, though one compares."""
    from megatron_cgn.hf.config import read_architecture
    from megatron_cgn.hf.load import load_weights

    source = root / "untied"
    architecture = read_architecture(source)
    chunks = _build(architecture, state, virtual_size=None, multiple=16)
    try:
        load_weights(chunks, source, architecture=architecture, groups=state.groups)
    except ModelError as error:
        return [] if "differs from the embedding" in str(error) else [str(error)]
    return ["an output layer that is not tied went unnoticed"]


def _replicas(root: str) -> list[str]:
    """Two data-parallel ranks, of which the first alone exports: return both ranks' errors."""
    from megatron_cgn.hf.config import read_architecture
    from megatron_cgn.hf.export import export_weights
    from megatron_cgn.hf.load import load_weights
    from megatron_cgn.parallel.state import initialize_parallel

    state = initialize_parallel(ParallelConfig())
    source = Path(root) / "hf" / "llama"
    architecture = read_architecture(source)
    chunks = _build(architecture, state, virtual_size=None, multiple=16)
    load_weights(chunks, source, architecture=architecture, groups=state.groups)
    messages = []
    for where, out in (("gone", "refused"), ("hf/llama", "file"), ("hf/llama", "replicas")):
        try:
            export_weights(
                chunks,
                Path(root) / out,
                architecture=architecture,
                source_dir=Path(root) / where,
                groups=state.groups,
            )
            # The directory is there for every rank when the call returns.
            messages.append(str((Path(root) / out / "config.json").exists()))
        except ModelError as error:
            messages.append(str(error))
    return messages


def _disk_refuses(state: Any, root: Path, name: str) -> list[str]:
    """Every rank raises the one message, whichever rank's disk refused."""
    import resource

    from megatron_cgn.hf.config import read_architecture
    from megatron_cgn.hf.export import export_weights
    from megatron_cgn.hf.load import load_weights

    source = root / "hf" / name
    architecture = read_architecture(source)
    chunks = _build(architecture, state, virtual_size=None, multiple=16)
    load_weights(chunks, source, architecture=architecture, groups=state.groups)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Only the second stage's files hit the limit.
    if state.pp_rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        export_weights(
            chunks,
            root / "full" / "export",
            architecture=architecture,
            source_dir=source,
            groups=state.groups,
            max_shard_bytes=90_000,
        )
    except ModelError as error:
        return [] if "could not be written: File too large" in str(error) else [str(error)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return ["a full disk went unnoticed"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all cases in one start of the processes."""
    root = tmp_path_factory.mktemp("layouts")
    for name, fields in CASES.items():
        tiny_hf_model(root / "hf" / name, **fields)
        convert_to_megatron(root / "hf" / name, root / "ckpt" / name)
    _write_untied(root / "hf" / "llama-tied-wide-heads", root / "untied")
    for rank, faults in enumerate(run_distributed(_rank, NUM_PROCESSES, str(root), list(CASES))):
        assert not faults, f"rank {rank}: {faults}"
    return root


def _write_untied(source: Path, target: Path) -> None:
    """Give a tied model an output layer that differs in its last row."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1] += 1.0
    save_file(tensors | {"lm_head.weight": head}, target / "model.safetensors")


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _assert_same(actual: Path, expected: Path) -> None:
    ours, theirs = _tensors(actual), _tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("virtual_size", [None, 2])
@pytest.mark.parametrize("files", ["one", "many"])
def test_export_gives_back_the_same_bytes(
    root: Path, name: str, virtual_size: int | None, files: str
) -> None:
    out = root / "out" / f"{name}-{virtual_size}" / files
    _assert_same(out, root / "hf" / name)
    assert (len(list(out.glob("*.safetensors"))) == 1) == (files == "one")
    assert (out / "generation_config.json").read_bytes() == (
        root / "hf" / name / "generation_config.json"
    ).read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_transformers_opens_the_export(root: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(root / "hf" / name)
    export = AutoModelForCausalLM.from_pretrained(root / "out" / f"{name}-None" / "many")
    ours, theirs = export.state_dict(), source.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", CASES)
def test_a_training_checkpoint_converts_to_the_same_bytes(root: Path, name: str) -> None:
    checkpoint = root / "trained" / name
    (checkpoint / "hf").symlink_to(root / "hf" / name)
    info = CheckpointInfo(
        step=1,
        consumed_sequences=8,
        has_optimizer=True,
        vocab_size=1000,
        padded_vocab_size=1024,
        dtype="fp32",
    )
    write_info(checkpoint, info)
    convert_to_hf(checkpoint, root / "from-trained" / name)
    _assert_same(root / "from-trained" / name, root / "hf" / name)


def test_replicas_hear_how_the_export_ended(tmp_path: Path) -> None:
    tiny_hf_model(tmp_path / "hf" / "llama")
    (tmp_path / "file").touch()
    first, second = run_distributed(_replicas, SECOND_NUM_PROCESSES, str(tmp_path))
    assert first == second
    assert "gone: no such directory" in first[0]
    assert "file: exists and is not a directory" in first[1]
    assert first[2] == "True"
    _assert_same(tmp_path / "replicas", tmp_path / "hf" / "llama")


def test_nothing_half_written_is_left(root: Path) -> None:
    for directory in (root / "full", *(root / "out").iterdir()):
        assert not [path.name for path in directory.iterdir() if path.name.startswith(".")]
    assert not list((root / "full").iterdir())
