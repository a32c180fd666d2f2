"""Every fault of the adapters' settings, with what its message must say."""

import dataclasses
from typing import Any

import pytest

from megatron_cgn.config.lora_rules import lora_faults, lora_model_faults, matrix_shapes
from megatron_cgn.config.schema import CheckpointConfig, LoraConfig, ModelConfig, RunConfig
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.lora import adapter_entries, scaling
from megatron_cgn.testing import tiny_hf_model


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return read_architecture(tiny_hf_model(tmp_path_factory.mktemp("model")))


def _run(**lora: Any) -> RunConfig:
    return RunConfig(lora=LoraConfig(**lora))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, ["lora.rank: 0", "at least 1", "null"]),
        ({"rank": 4, "alpha": 0.0}, ["lora.alpha: 0.0", "above 0"]),
        ({"rank": 4, "dropout": 1.0}, ["lora.dropout: 1.0", "below 1"]),
        ({"rank": 4, "dropout": -0.1}, ["lora.dropout: -0.1"]),
        ({"rank": 4, "targets": ()}, ["lora.targets: is empty", "q_proj"]),
        (
            {"rank": 4, "targets": ("q_proj", "model.layers.0.self_attn.v_porj")},
            ["lora.targets: 'model.layers.0.self_attn.v_porj'", "did you mean v_proj?"],
        ),
        ({"rank": 4, "targets": ("xyz",)}, ["'xyz' matches no layer", "choose from q_proj"]),
        ({"rank": 4, "targets": ("q_proj", "q_proj")}, ["q_proj is given twice"]),
        ({"rank": 4, "targets": ("lm_head",)}, ["belongs to lora.modules_to_save"]),
        ({"rank": 4, "modules_to_save": ("q_proj",)}, ["belongs to lora.targets"]),
        ({"rank": 4, "modules_to_save": ("embed_token",)}, ["did you mean embed_tokens?"]),
        ({"rank": 4, "modules_to_save": ("score",)}, ["score has no effect", "remove it"]),
        ({"alpha": 8.0}, ["lora.alpha: 8.0 has no effect", "set lora.rank"]),
        ({"targets": ("q_proj",)}, ["lora.targets: ['q_proj'] has no effect"]),
        ({"use_dora": True}, ["lora.use_dora: True has no effect"]),
    ],
)
def test_a_fault_says_path_value_and_remedy(settings: dict[str, Any], words: list[str]) -> None:
    (fault,) = lora_faults(_run(**settings))
    assert all(word in fault for word in words), fault


@pytest.mark.parametrize(
    "settings", [{}, {"rank": 1}, {"rank": 8, "dropout": 0.0, "use_rslora": True, "use_dora": True}]
)
def test_good_settings_have_no_fault(settings: dict[str, Any]) -> None:
    assert not list(lora_faults(_run(**settings)))


def test_other_settings_that_adapters_rule_out() -> None:
    run = dataclasses.replace(
        _run(rank=4),
        model=ModelConfig(backend="te"),
        checkpoint=CheckpointConfig(load_optimizer=True),
    )
    optimizer, backend = lora_faults(run)
    assert "checkpoint.load_optimizer" in optimizer
    assert "model.backend: te" in backend and "native" in backend


def test_a_rank_above_a_matrix_names_it_and_the_limit(architecture: Architecture) -> None:
    (fault,) = lora_model_faults(_run(rank=33), architecture)
    assert "lora.rank: 33" in fault and "at most 32" in fault
    assert "k_proj [32, 64]" in fault and "v_proj" in fault and "q_proj" not in fault
    assert not list(lora_model_faults(_run(rank=32), architecture))
    assert not list(lora_model_faults(_run(rank=64, targets=("q_proj", "up_proj")), architecture))


def test_a_tied_head_is_its_embedding(architecture: Architecture) -> None:
    tied = dataclasses.replace(architecture, tie_word_embeddings=True)
    run = _run(rank=4, modules_to_save=("lm_head",))
    (fault,) = lora_model_faults(run, tied)
    assert "lm_head" in fault and "name embed_tokens alone" in fault
    assert not list(lora_model_faults(run, architecture))


def test_shapes_of_rules_and_of_adapters_agree(architecture: Architecture) -> None:
    shapes = matrix_shapes(architecture)
    for entry in adapter_entries(architecture, LoraConfig(rank=4)):
        rows, columns = shapes[entry.target]
        assert entry.shape == ((4, columns) if entry.part == "lora_A" else (rows, 4))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rank": 16}, 2.0),
        ({"rank": 16, "alpha": 8.0}, 0.5),
        ({"rank": 16, "alpha": 8.0, "use_rslora": True}, 2.0),
        ({"rank": 16, "use_rslora": True}, 8.0),
    ],
)
def test_scaling(settings: dict[str, Any], expected: float) -> None:
    assert scaling(LoraConfig(**settings)) == expected
