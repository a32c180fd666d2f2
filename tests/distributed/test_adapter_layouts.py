"""Adapters between `peft` and every layout: the same bytes out, the same logits in.

One start of four processes serves everything. On each layout the adapter of `peft` is opened and
written again, alone and merged; on one process's layout adapters are also trained for a few steps.
The parent process holds all that against `peft` and `transformers`.
"""

import dataclasses
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_cgn.config.schema import LoraConfig, ModelConfig, ParallelConfig
from megatron_cgn.errors import CheckpointError, ConfigError, ModelError
from megatron_cgn.hf.adapter_file import read_adapter_config
from megatron_cgn.hf.adapter_to_hf import (
    adapter_bytes,
    convert_adapter,
    holds_adapters,
    merge_checkpoint,
)
from megatron_cgn.hf.checkpoint_layout import CheckpointInfo, write_info
from megatron_cgn.hf.fingerprint import weights_fingerprint
from megatron_cgn.hf.merge import merge_adapter
from megatron_cgn.hf.to_hf import convert_to_hf
from megatron_cgn.hf.to_megatron import convert_to_megatron
from megatron_cgn.model.lora_layout import scaling
from megatron_cgn.testing import free_port, run_distributed, tiny_hf_model

LOGITS_ATOL = 1e-5
"""FP32 logits of size 10 of an adapter's two implementations: sums in another order."""
MERGED_ATOL = 1e-6
"""FP32 weights below 1 in size: one product of rank 4 and one sum, rounded once each."""
EFFECT = 0.1
"""An adapter that changes logits less would let a wrong one pass."""
LENGTH = 24
STEPS = 3

TARGETS = LoraConfig().targets
CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "num_key_value_heads": 4},
    "untied-whole": {"family": "llama", "head_dim": 24, "vocab_size": 1001},
    "tied-whole": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen3-some": {"family": "qwen3"},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": list(TARGETS)},
    "untied-whole": {
        "target_modules": list(TARGETS),
        "modules_to_save": ["embed_tokens", "lm_head"],
        "use_dora": True,
    },
    "tied-whole": {
        "target_modules": "all-linear",
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "qwen3-some": {
        "target_modules": r".*\.(q_proj|v_proj|up_proj|down_proj)",
        "use_rslora": True,
    },
}
LAYOUTS: dict[str, ParallelConfig] = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "tp2-pp2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "pp2-vp2": ParallelConfig(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    ),
}
NUM_PROCESSES = 4


def _tokens() -> torch.Tensor:
    return torch.randint(0, 1000, (2, LENGTH), generator=torch.Generator().manual_seed(5))


def _build(source: Path, state: Any, lora: LoraConfig) -> tuple[list[Any], dict[str, Any]]:
    """A loaded model with adapters, and what most functions ask for."""
    from megatron_cgn.hf.config import read_architecture
    from megatron_cgn.hf.load import load_weights
    from megatron_cgn.model.build import build_model, transformer_config
    from megatron_cgn.model.lora import add_adapters, start_magnitudes

    architecture = read_architecture(source)
    config = transformer_config(
        architecture,
        parallel=state.config,
        model=ModelConfig(backend="native"),
        precision="fp32",
    )
    chunks = build_model(
        architecture,
        config=config,
        groups=state.groups,
        seq_length=LENGTH,
        make_vocab_size_divisible_by=16,
        backend="native",
    )
    common = {"architecture": architecture, "groups": state.groups}
    load_weights(chunks, source, **common)
    add_adapters(chunks, lora=lora, seed=3, **common)
    start_magnitudes(chunks)
    return chunks, common | {"lora": lora}


def _logits(chunks: list[Any], vocab_size: int) -> Any:
    """Logits of a model in one process, as an array, since a queue would share a tensor."""
    tokens = _tokens()
    with torch.no_grad():
        output = chunks[0].eval()(tokens, torch.arange(LENGTH).expand_as(tokens), None)
    return output[..., :vocab_size].numpy().copy()


def _train(chunks: list[Any]) -> None:
    """A few plain steps on everything that is trained."""
    trained = [p for p in chunks[0].parameters() if p.requires_grad]
    tokens = _tokens()
    for _ in range(STEPS):
        positions = torch.arange(LENGTH).expand_as(tokens)
        chunks[0](tokens, positions, None, labels=tokens.roll(-1, 1)).mean().backward()
        with torch.no_grad():
            for parameter in trained:
                gradient = parameter.grad
                assert gradient is not None
                parameter.sub_(gradient, alpha=0.5)
                parameter.grad = None


def _rank(root: str, ports: list[int]) -> dict[str, Any]:
    """Run every case on every layout on one rank."""
    from megatron_cgn.hf.adapter import export_adapter, load_adapter
    from megatron_cgn.hf.export import export_weights
    from megatron_cgn.parallel.seed import seed_everything
    from megatron_cgn.parallel.state import initialize_parallel, shutdown_parallel

    base, results = Path(root), {}
    for (layout, parallel), port in zip(LAYOUTS.items(), ports, strict=True):
        # A rank that is ahead must not meet the others of the layout before.
        os.environ["MASTER_PORT"] = str(port)
        state = initialize_parallel(parallel)
        seed_everything(1, state)
        for name in CASES:
            source, adapter = base / "hf" / name, base / "peft" / name
            chunks, common = _build(source, state, read_adapter_config(adapter))
            without_lora = {k: v for k, v in common.items() if k != "lora"}
            load_adapter(chunks, adapter, **common)
            out = base / layout / name
            export_adapter(chunks, out / "adapter", base=str(source), source_dir=source, **common)
            export_weights(chunks, out / "merged", source_dir=source, **without_lora)
            export_weights(
                chunks, out / "merged-bf16", source_dir=source, dtype="bf16", **without_lora
            )
            if layout == "tp2-pp2":
                _save(chunks, base / "checkpoint" / name / "dist", is_first=state.rank == 0)
            if layout == "one":
                vocab_size = common["architecture"].vocab_size
                results[f"{name} imported"] = _logits(chunks, vocab_size)
                chunks, common = _build(source, state, common["lora"])
                _train(chunks)
                results[f"{name} trained"] = _logits(chunks, vocab_size)
                export_adapter(chunks, base / "trained" / name, base=str(source), **common)
        if layout == "tp2-pp2":
            results["refused"] = _refusals(base, state)
        shutdown_parallel()
    return results


def _save(chunks: list[Any], directory: Path, *, is_first: bool) -> None:
    """Write what is trained as the engine's checkpoints hold it."""
    from megatron.core import dist_checkpointing

    from megatron_cgn.model.lora import trained_whole

    if is_first:
        directory.mkdir(parents=True)
    torch.distributed.barrier()
    whole = {name for name, _ in trained_whole(chunks)}
    state = chunks[0].sharded_state_dict()
    trained = {n: e for n, e in state.items() if n in whole or n.startswith("adapters.")}
    dist_checkpointing.save({"model": trained}, str(directory), validate_access_integrity=False)


def _refusals(base: Path, state: Any) -> list[str]:
    """What every rank is told when something is wrong."""
    from megatron_cgn.hf.adapter import export_adapter, load_adapter

    source, adapter = base / "hf" / "tied-whole", base / "peft" / "tied-whole"
    chunks, common = _build(source, state, read_adapter_config(adapter))
    messages = []
    other = common | {"lora": dataclasses.replace(common["lora"], alpha=3.0)}
    for path, arguments in ((adapter, other), (base / "unequal", common), (base / "gone", common)):
        try:
            load_adapter(chunks, path, **arguments)
        except (ModelError, ConfigError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if state.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        export_adapter(chunks, base / "full" / "adapter", base="b", **common)
    except ModelError as error:
        messages.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return messages


def _make_adapter(source: Path, target: Path, **fields: Any) -> None:
    """Let `peft` write an adapter whose every tensor is random."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = PeftConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        adapted = get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0.0, 0.1)
    adapted.save_pretrained(target)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Everything that the processes wrote, and what they returned."""
    root = tmp_path_factory.mktemp("adapters")
    for name, fields in CASES.items():
        tiny_hf_model(root / "hf" / name, **fields)
        _make_adapter(root / "hf" / name, root / "peft" / name, **ADAPTERS[name])
    shutil.copytree(root / "peft" / "tied-whole", root / "unequal")
    file = root / "unequal" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"] + 1.0
    save_file(tensors, file)
    results = run_distributed(
        _rank, NUM_PROCESSES, str(root), [free_port() for _ in LAYOUTS], warm=True
    )
    messages = {tuple(result["refused"]) for result in results}
    assert len(messages) == 1
    return root, results[0]


def _opened(root: Path, name: str, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(root / "hf" / name, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter).eval()


def _logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(_tokens()).logits
    return logits


def _assert_same_logits(ours: Any, model: Any) -> None:
    theirs = _logits_of(model)
    with model.disable_adapter():
        assert (_logits_of(model) - theirs).abs().max() > EFFECT
    assert (torch.from_numpy(ours) - theirs).abs().max() <= LOGITS_ATOL


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_peft_gives_the_same_logits_here(
    outcome: tuple[Path, dict[str, Any]], name: str
) -> None:
    root, results = outcome
    _assert_same_logits(results[f"{name} imported"], _opened(root, name, root / "peft" / name))


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_trained_here_gives_the_same_logits_in_peft(
    outcome: tuple[Path, dict[str, Any]], name: str
) -> None:
    root, results = outcome
    _assert_same_logits(results[f"{name} trained"], _opened(root, name, root / "trained" / name))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_writes_the_tensors_that_it_read(
    outcome: tuple[Path, dict[str, Any]], name: str, layout: str
) -> None:
    root, _ = outcome
    written, theirs = root / layout / name / "adapter", root / "peft" / name
    ours = load_file(written / "adapter_model.safetensors")
    expected = load_file(theirs / "adapter_model.safetensors")
    assert ours.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(ours[key].view(torch.uint8), tensor.view(torch.uint8)), key
    first = root / "one" / name / "adapter"
    for file in first.iterdir():
        assert (written / file.name).read_bytes() == file.read_bytes(), file.name
    assert (written / "generation_config.json").exists()
    assert read_adapter_config(written) == read_adapter_config(theirs)


@pytest.mark.parametrize("name", CASES)
def test_merged_weights_are_those_of_peft(outcome: tuple[Path, dict[str, Any]], name: str) -> None:
    from transformers import AutoModelForCausalLM

    root, results = outcome
    peft_model = _opened(root, name, root / "peft" / name).merge_and_unload()
    expected = peft_model.state_dict()
    merge_adapter(root / "hf" / name, root / "peft" / name, root / "by-files" / name)
    for directory in (
        *(root / layout / name / "merged" for layout in LAYOUTS),
        root / "by-files" / name,
    ):
        tensors = load_file(directory / "model.safetensors")
        for key, tensor in tensors.items():
            assert (tensor - expected[key]).abs().max() <= MERGED_ATOL, (directory, key)
    for layout in LAYOUTS:
        full, low = (
            load_file(root / layout / name / kind / "model.safetensors")
            for kind in ("merged", "merged-bf16")
        )
        for key, tensor in full.items():
            assert torch.equal(low[key], tensor.bfloat16()), (layout, key)
    opened = AutoModelForCausalLM.from_pretrained(root / "tp2-pp2" / name / "merged").eval()
    assert opened.config.tie_word_embeddings == CASES[name].get("tie_word_embeddings", False)
    logits = _logits_of(opened)
    assert (torch.from_numpy(results[f"{name} imported"]) - logits).abs().max() <= LOGITS_ATOL


def _finish_checkpoint(root: Path, name: str, base: Path) -> Path:
    """Make what `_save` wrote a checkpoint of adapters on a base."""
    checkpoint = root / "checkpoint" / name
    if not (checkpoint / "hf").exists():
        (checkpoint / "hf").symlink_to(root / "hf" / name)
    (checkpoint / "checkpoint.json").unlink(missing_ok=True)
    lora = read_adapter_config(root / "peft" / name)
    record = {
        "base": str(base),
        "base_fingerprint": weights_fingerprint(base),
        "rank": lora.rank,
        "scaling": scaling(lora),
        "use_dora": lora.use_dora,
        "targets": list(lora.targets),
        "modules_to_save": list(lora.modules_to_save),
    }
    info = CheckpointInfo(
        step=1,
        consumed_sequences=8,
        has_optimizer=False,
        vocab_size=CASES[name].get("vocab_size", 1000),
        padded_vocab_size=1024,
        dtype="fp32",
        adapter=record,
    )
    write_info(checkpoint, info)
    return checkpoint


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_adapters_becomes_a_directory_of_peft_or_a_model(
    outcome: tuple[Path, dict[str, Any]], name: str
) -> None:
    root, _ = outcome
    checkpoint = _finish_checkpoint(root, name, root / "hf" / name)
    assert holds_adapters(checkpoint)
    told: list[int] = []
    out = root / "converted" / name
    convert_adapter(checkpoint, out, progress=told.append)
    assert sum(told) == adapter_bytes(checkpoint, merge=False)
    ours = load_file(out / "adapter_model.safetensors")
    expected = load_file(root / "peft" / name / "adapter_model.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in expected.items())
    # A scale by the rank's root is written as one by the rank.
    lora, theirs = read_adapter_config(out), read_adapter_config(root / "peft" / name)
    assert (scaling(lora), lora.targets) == (scaling(theirs), theirs.targets)
    merge_checkpoint(checkpoint, root / "model" / name)
    merge_adapter(root / "hf" / name, root / "peft" / name, root / "expected" / name)
    for key, tensor in load_file(root / "expected" / name / "model.safetensors").items():
        with safe_open(root / "model" / name / "model.safetensors", "pt") as file:
            assert torch.equal(file.get_tensor(key), tensor), key
    with pytest.raises(CheckpointError, match="holds adapters only, of the model"):
        convert_to_hf(checkpoint, root / "never")
    assert not [p for p in (root / "model").iterdir() if p.name.startswith(".")]


def test_adapters_of_a_checkpoint_are_merged_into_it_and_into_no_other(
    outcome: tuple[Path, dict[str, Any]],
) -> None:
    root, _ = outcome
    convert_to_megatron(root / "hf" / "llama", root / "base")
    checkpoint = _finish_checkpoint(root, "llama", root / "base")
    merge_checkpoint(checkpoint, root / "on-checkpoint")
    merge_adapter(root / "hf" / "llama", root / "peft" / "llama", root / "on-files")
    ours = load_file(root / "on-checkpoint" / "model.safetensors")
    for key, tensor in load_file(root / "on-files" / "model.safetensors").items():
        assert torch.equal(ours[key], tensor), key
    for base, message in (
        (str(root / "hf" / "qwen3-some"), "its weights are not those that the adapters of"),
        (str(root / "nowhere"), "no such directory, but it is given by --base"),
    ):
        with pytest.raises(CheckpointError, match=message):
            merge_checkpoint(checkpoint, root / "refused", base=base)
    shutil.rmtree(root / "base")
    with pytest.raises(CheckpointError, match=r"named in checkpoint\.json as the model"):
        merge_checkpoint(checkpoint, root / "refused")
    # A name on a hub cannot be checked, and is written down.
    convert_adapter(checkpoint, root / "named", base="some/base")
    assert "some/base" in (root / "named" / "adapter_config.json").read_text()
    assert not (root / "refused").exists()


def test_every_rank_hears_what_is_wrong(outcome: tuple[Path, dict[str, Any]]) -> None:
    root, results = outcome
    settings, unequal, gone, full = results["refused"]
    assert "ConfigError: lora.adapter_path:" in settings
    assert "lora.alpha: the adapter has 6.0, this run 3.0" in settings
    assert "'base_model.model.lm_head.weight' differs from the embedding" in unequal
    assert "gone/adapter_config.json: not found" in gone
    assert "could not be written: File too large" in full
    assert not list((root / "full").iterdir())
