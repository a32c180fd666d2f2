"""Adapters in one process: merging, dropout, half precision, and checkpoints that do not fit."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cgn.batch import TokenBatch
from megatron_cgn.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParamGroupConfig,
    RunConfig,
    TrainConfig,
)
from megatron_cgn.engine.engine import Engine, StepReport
from megatron_cgn.engine.group_selection import configured_groups
from megatron_cgn.errors import CheckpointError, ConfigError
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.fingerprint import weights_fingerprint
from megatron_cgn.hf.load import load_weights, model_parameters
from megatron_cgn.model.lora import adapter_parameters, adapters_off, delta_of
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.state import initialize_parallel, shutdown_parallel
from megatron_cgn.testing import tiny_hf_model

LENGTH = 16
MERGED_ATOL = 2e-5
"""FP32 losses of the model with adapters and of the merged weights: other orders of summation."""
LORA = LoraConfig(rank=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    small = {"num_hidden_layers": 2, "vocab_size": 200}
    model = tiny_hf_model(root / "qwen2", "qwen2", **small)
    shutil.copytree(model, root / "other")
    weights = load_file(model / "model.safetensors")
    save_file({n: 1.001 * w for n, w in weights.items()}, root / "other" / "model.safetensors")
    return {"qwen2": model, "other": root / "other"}


@pytest.fixture(autouse=True)
def _leave() -> Iterator[None]:
    yield
    shutdown_parallel()


def _run(path: Path, lora: LoraConfig, **more: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "precision": "fp32",
        "model": ModelConfig(hf_path=str(path)),
        "data": DataConfig(seq_length=LENGTH),
        "train": TrainConfig(global_batch_size=2, train_iters=4),
        "optim": OptimConfig(lr=1e-2, initial_loss_scale=64.0),
        "lora": lora,
        **more,
    }
    return RunConfig(**settings)


def _engine(run: RunConfig) -> Engine:
    assert run.model.hf_path is not None
    path = Path(run.model.hf_path)
    state = initialize_parallel(run.parallel)
    architecture = read_architecture(path)
    engine = Engine(run, architecture, state, total_steps=4)
    load_weights(engine.chunks, path, architecture=architecture, groups=state.groups)
    engine.prepare_training()
    return engine


def _batch(step: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 200, (1, LENGTH + 1), generator=generator)
    return TokenBatch(
        tokens=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=torch.ones(1, LENGTH),
        position_ids=torch.arange(LENGTH)[None],
    )


def _train(engine: Engine, steps: range) -> list[StepReport]:
    return [
        engine.train_step([_batch(2 * step), _batch(2 * step + 1)], NextToken()) for step in steps
    ]


def _figures(reports: list[StepReport]) -> list[tuple[float, float | None]]:
    return [(r.metrics["loss"], r.grad_norm) for r in reports]


def _scores(engine: Engine) -> torch.Tensor:
    ((_, nll),) = engine.score([_batch(0)], NextToken().forward_args)
    return nll


@pytest.mark.parametrize(
    "lora",
    [
        LORA,
        dataclasses.replace(LORA, targets=("k_proj", "up_proj"), alpha=3.0, use_rslora=True),
        dataclasses.replace(LORA, use_dora=True),
        dataclasses.replace(LORA, use_dora=True, targets=("v_proj", "gate_proj", "down_proj")),
    ],
)
def test_the_weight_with_its_delta_is_the_weight_with_its_adapters(
    models: dict[str, Path], lora: LoraConfig
) -> None:
    engine = _engine(_run(models["qwen2"], lora))
    base = _scores(engine)
    generator = torch.Generator().manual_seed(5)
    for entry, parameter in adapter_parameters(engine.chunks):
        if entry.part == "lora_B":
            parameter.data.normal_(0.0, 0.1, generator=generator)
        elif entry.part == "lora_magnitude_vector":
            parameter.data.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
    adapted = _scores(engine)
    assert (adapted - base).abs().max() > 0.01
    (chunk,) = engine.chunks
    merged = 0
    for entry, weight in model_parameters([chunk], engine.architecture):
        name = entry.key.removesuffix(".weight").rpartition(".")[2]
        delta = None if entry.layer is None else delta_of(chunk, entry.layer, name)
        if delta is not None and entry.key.endswith(f"{name}.weight"):
            assert delta.dtype == torch.float32 and delta.shape == weight.shape
            weight.data += delta
            merged += 1
    fused = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv")
    fused |= dict.fromkeys(("gate_proj", "up_proj"), "fc1")
    assert merged == 2 * len({fused.get(target, target) for target in lora.targets})
    with adapters_off(engine.chunks):
        torch.testing.assert_close(_scores(engine), adapted, atol=MERGED_ATOL, rtol=0.0)


def test_dropout_drops_the_asked_share_apart_for_every_matrix(models: dict[str, Path]) -> None:
    engine = _engine(_run(models["qwen2"], dataclasses.replace(LORA, dropout=0.25)))
    adapter = engine.chunks[0].adapters.find(0, "linear_qkv")
    x = torch.ones(500, 1, 64)
    for target in ("q_proj", "k_proj", "v_proj"):  # A picks the first four columns
        adapter.get_parameter(f"{target}_lora_A").data.copy_(torch.eye(4, 64))
    adapter.train()
    dropped = adapter._down(x).detach().view(500, 3, 4)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    # 6,000 draws: four standard deviations are 0.022.
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.022)
    assert not torch.equal(dropped[:, 0], dropped[:, 1])
    adapter.eval()
    assert torch.equal(adapter._down(x), torch.ones(500, 1, 12))


def test_recomputed_layers_drop_the_same_and_have_the_same_gradients(
    models: dict[str, Path],
) -> None:
    lora = dataclasses.replace(LORA, dropout=0.3)
    figures = []
    recomputes: tuple[Any, ...] = ("none", "full")
    for recompute in recomputes:
        train = TrainConfig(global_batch_size=2, train_iters=4, recompute=recompute)
        engine = _engine(_run(models["qwen2"], lora, train=train))
        figures.append(_figures(_train(engine, range(2))))
        shutdown_parallel()
    assert figures[0] == figures[1]
    assert all(norm is not None and norm > 0.01 for _, norm in figures[1])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_and_resumes_bit_for_bit(
    models: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    lora = dataclasses.replace(LORA, dropout=0.1, use_dora=precision == "bf16")
    run = _run(models["qwen2"], lora, precision=precision)
    engine = _engine(run)
    before = {n: p.detach().clone() for n, p in engine.chunks[0].named_parameters()}
    assert all(
        hasattr(p, "main_grad") == n.startswith("adapters.")
        for n, p in engine.chunks[0].named_parameters()
    )
    _train(engine, range(2))
    saved = engine.save(tmp_path / "all", fit={}, hf_files=lambda target: target.mkdir())
    whole = _figures(_train(engine, range(2, 4)))
    assert all(math.isfinite(loss) and norm for loss, norm in whole)
    for name, parameter in engine.chunks[0].named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("adapters.")
    shutdown_parallel()
    resumed = _engine(run)
    resumed.resume(saved, fit={})
    assert _figures(_train(resumed, range(2, 4))) == whole


def _saved(models: dict[str, Path], tmp_path: Path) -> Path:
    engine = _engine(_run(models["qwen2"], LORA))
    _train(engine, range(1))
    saved = engine.save(tmp_path / "run", fit={}, hf_files=lambda target: target.mkdir())
    shutdown_parallel()
    return saved


def test_a_checkpoint_of_adapters_fits_its_own_run_only(
    models: dict[str, Path], tmp_path: Path
) -> None:
    saved = _saved(models, tmp_path)
    other = _run(models["qwen2"], dataclasses.replace(LORA, alpha=2.0, targets=("q_proj",)))
    scaling = r"lora.alpha / rank .*: checkpoint 2.0, this run 0.5"
    with pytest.raises(CheckpointError, match=scaling) as e:
        _engine(other).resume(saved, fit={})
    assert "lora.targets" in str(e.value)
    shutdown_parallel()
    with pytest.raises(CheckpointError, match="model.hf_path: the adapters were trained on") as e:
        _engine(_run(models["other"], LORA)).resume(saved, fit={})
    assert str(models["qwen2"]) in str(e.value) and str(models["other"]) in str(e.value)
    shutdown_parallel()
    with pytest.raises(CheckpointError, match="holds adapters only, but this run has none"):
        _engine(_run(models["qwen2"], LoraConfig())).resume(saved, fit={})


def test_a_checkpoint_of_adapters_is_no_model_to_start_from(
    models: dict[str, Path], tmp_path: Path
) -> None:
    saved = _saved(models, tmp_path)
    engine = _engine(_run(models["qwen2"], LoraConfig()))
    with pytest.raises(CheckpointError, match=r"holds adapters only, of the model .*qwen2"):
        engine.load_model(saved)
    with pytest.raises(CheckpointError, match="lora.adapter_path"):
        engine.start_optimizer(saved)
    whole = engine.save(tmp_path / "whole", fit={}, hf_files=lambda target: target.mkdir())
    shutdown_parallel()
    adapted = _engine(_run(models["qwen2"], LORA))
    with pytest.raises(CheckpointError, match="holds all weights and no adapters"):
        adapted.resume(whole, fit={})
    adapted.load_model(whole)  # but it is one to start from


def test_a_fingerprint_is_of_the_values(models: dict[str, Path], tmp_path: Path) -> None:
    source = models["qwen2"]
    weights = load_file(source / "model.safetensors")
    names = sorted(weights)
    for part, chosen in (("1", names[:5]), ("2", names[5:])):  # other files, same tensors
        save_file(
            {n: weights[n] for n in chosen}, tmp_path / f"model-0000{part}-of-00002.safetensors"
        )
    index = {n: f"model-0000{1 if n in names[:5] else 2}-of-00002.safetensors" for n in names}
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    assert weights_fingerprint(tmp_path) == weights_fingerprint(source)
    assert weights_fingerprint(models["other"]) != weights_fingerprint(source)
    weights["model.norm.weight"] += 1e-3
    moved = tmp_path / "moved"
    moved.mkdir()
    save_file(weights, moved / "model.safetensors")
    assert weights_fingerprint(moved) != weights_fingerprint(source)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (("blocks",), "'blocks' stays as it is, since lora.rank trains adapters"),
        (("embeddings",), "lora.modules_to_save"),
        (("model.layers.0.self_attn.q_proj.weight",), "stays as it is"),
        (("adaptors",), "did you mean adapters?"),
    ],
)
def test_groups_are_of_what_is_trained(
    models: dict[str, Path], parameters: tuple[str, ...], words: str
) -> None:
    group = ParamGroupConfig(name="g", parameters=parameters, lr_mult=2.0)
    run = _run(models["qwen2"], LORA, optim=OptimConfig(param_groups=(group,)))
    with pytest.raises(ConfigError) as error:
        configured_groups(run, read_architecture(models["qwen2"]))
    assert words in str(error.value)


def test_groups_may_tell_both_matrices_of_an_adapter_apart(models: dict[str, Path]) -> None:
    group = ParamGroupConfig(name="b", parameters=("*.lora_B.weight",), lr_mult=16.0)
    run = _run(models["qwen2"], LORA, optim=OptimConfig(param_groups=(group,)))
    grouping = configured_groups(run, read_architecture(models["qwen2"]))
    assert grouping is not None
    found, rest = grouping.groups
    assert len(found.rows) == len(rest.rows) == 2 * 7
    assert all(name.endswith("lora_B") for _, name in found.rows)
    assert all(name.endswith("lora_A") for _, name in rest.rows)
