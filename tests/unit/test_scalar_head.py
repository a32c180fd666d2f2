"""A decoder with a scalar head, in one process."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from megatron_cgn.config.lora_rules import lora_model_faults
from megatron_cgn.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParamGroupConfig,
    RunConfig,
)
from megatron_cgn.engine.checkpoint import CheckpointInfo, check_fit
from megatron_cgn.engine.engine import Engine
from megatron_cgn.engine.group_selection import resolve_groups
from megatron_cgn.errors import CheckpointError, ModelError
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.load import load_weights
from megatron_cgn.hf.to_megatron import convert_to_megatron
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.score_model import ScalarHead
from megatron_cgn.model.size import parameter_count
from megatron_cgn.parallel.seed import seed_everything
from megatron_cgn.parallel.state import ParallelState, initialize_parallel, shutdown_parallel
from megatron_cgn.stages.common import base_fit, open_architecture
from megatron_cgn.testing import tiny_hf_model

FP64_ATOL = 1e-6
"""A product of 64 numbers below 3 in size, in FP32 against FP64."""
LENGTH = 24


@pytest.fixture(scope="module")
def state() -> Iterator[ParallelState]:
    run = RunConfig()
    state = initialize_parallel(run.parallel)
    seed_everything(1, state)
    yield state
    shutdown_parallel()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    return tiny_hf_model(root / "lm", num_hidden_layers=2, tie_word_embeddings=request.param)


def _architecture(path: Path) -> Architecture:
    return dataclasses.replace(read_architecture(path), head="score")


def _engine(path: Path, state: ParallelState, *, seed: int = 5, **fields: Any) -> Engine:
    run = RunConfig(
        seed=seed,
        precision=fields.pop("precision", "fp32"),
        model=ModelConfig(hf_path=str(path), **fields.pop("model", {})),
        data=DataConfig(seq_length=LENGTH),
        **fields,
    )
    return Engine(run, _architecture(path), state, total_steps=1)


def _tokens() -> Tensor:
    return torch.randint(0, 1000, (2, LENGTH), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def _values(engine: Engine) -> Tensor:
    tokens = _tokens()
    positions = torch.arange(LENGTH).expand_as(tokens)
    output: Tensor = engine.chunks[0].eval()(tokens, positions, None)
    return output


def test_a_value_is_the_product_of_head_and_hidden_state(model: Path, state: ParallelState) -> None:
    engine = _engine(model, state)
    (chunk,) = engine.chunks
    load_weights(engine.chunks, model, architecture=engine.architecture, groups=state.groups)
    seen: list[Tensor] = []
    handle = chunk.output_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    values = _values(engine)
    handle.remove()
    expected = seen[0].double() @ chunk.output_layer.weight[0].double()
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected.t().float(), rtol=0, atol=FP64_ATOL)


def test_nothing_of_the_vocabulary_is_at_the_end(model: Path, state: ParallelState) -> None:
    (chunk,) = _engine(model, state).chunks
    assert isinstance(chunk.output_layer, ScalarHead)
    shapes = {name: tuple(p.shape) for name, p in chunk.named_parameters()}
    assert shapes["output_layer.weight"] == (1, 64)
    assert [name for name, shape in shapes.items() if 1000 in shape or 1024 in shape] == [
        "embedding.word_embeddings.weight"
    ]
    # Marks that make Megatron add up or zero gradients of two ends.
    assert not chunk.share_embeddings_and_output_weights
    embedding = chunk.embedding.word_embeddings.weight
    assert not hasattr(embedding, "zero_out_wgrad") and not hasattr(embedding, "shared_embedding")


def test_the_head_comes_from_the_seed_also_beside_loaded_weights(
    model: Path, state: ParallelState
) -> None:
    def head(seed: int, **more: Any) -> Tensor:
        engine = _engine(model, state, seed=seed, **more)
        if not more:
            load_weights(
                engine.chunks, model, architecture=engine.architecture, groups=state.groups
            )
        weight: Tensor = engine.chunks[0].output_layer.weight.detach()
        return weight

    assert torch.equal(head(5), head(5))
    assert torch.equal(head(5), head(5, model={"init": "random"}))
    assert not torch.equal(head(5), head(6))
    assert float(head(5).std()) == pytest.approx(0.02, rel=0.3)


def test_a_checkpoint_of_a_language_model_is_one_to_start_from(
    model: Path, state: ParallelState, tmp_path: Path
) -> None:
    convert_to_megatron(model, tmp_path / "lm")
    expected, engine = _engine(model, state), _engine(model, state)
    load_weights(expected.chunks, model, architecture=engine.architecture, groups=state.groups)
    engine.load_model(tmp_path / "lm")
    assert torch.equal(_values(engine), _values(expected))
    with pytest.raises(CheckpointError, match="optimizer state of a language model"):
        engine.start_optimizer(tmp_path / "lm")


def test_a_checkpoint_of_a_reward_model_keeps_its_head_and_is_no_language_model(
    model: Path, state: ParallelState, tmp_path: Path
) -> None:
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=torch.float32
    )
    classifier.save_pretrained(tmp_path / "rm")
    convert_to_megatron(tmp_path / "rm", tmp_path / "checkpoint")
    engine = _engine(tmp_path / "rm", state)
    engine.load_model(tmp_path / "checkpoint")
    assert torch.equal(engine.chunks[0].output_layer.weight, classifier.score.weight)
    run = dataclasses.replace(engine.run, model=ModelConfig(hf_path=str(model)))
    language = Engine(run, read_architecture(model), state, total_steps=1)
    with pytest.raises(CheckpointError, match="is of a reward model"):
        language.load_model(tmp_path / "checkpoint")
    for stage, path in (("rm", model), ("rm", tmp_path / "rm"), ("sft", model)):
        asked = dataclasses.replace(run, stage=stage, model=ModelConfig(hf_path=str(path)))
        assert open_architecture(asked).head == ("score" if stage == "rm" else "lm")
    asked = dataclasses.replace(run, stage="sft", model=ModelConfig(hf_path=str(tmp_path / "rm")))
    with pytest.raises(ModelError, match=r"rm: is a reward model.*Stage sft needs a language"):
        open_architecture(asked)


def test_bf16_weights_give_values_in_fp32(model: Path, state: ParallelState) -> None:
    engine = _engine(model, state, precision="bf16")
    load_weights(engine.chunks, model, architecture=engine.architecture, groups=state.groups)
    values = _values(engine)
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


def test_checkpoints_from_before_there_were_heads_go_on(model: Path) -> None:
    language, scorer = read_architecture(model), _architecture(model)
    old = {k: v for k, v in base_fit(language).items() if k != "model.head"}
    info = CheckpointInfo(
        step=1,
        consumed_sequences=1,
        has_optimizer=True,
        vocab_size=1000,
        padded_vocab_size=1024,
        dtype="fp32",
        fit=old,
    )
    check_fit(info, base_fit(language), Path("step_0000001"))
    with pytest.raises(CheckpointError, match="model.head: checkpoint 'lm', this run 'score'"):
        check_fit(info, base_fit(scorer), Path("step_0000001"))
    again = dataclasses.replace(info, fit=base_fit(scorer))
    with pytest.raises(CheckpointError, match="model.head: checkpoint 'score', this run 'lm'"):
        check_fit(again, base_fit(language), Path("step_0000001"))


def test_parameters_are_counted(model: Path, state: ParallelState) -> None:
    (chunk,) = _engine(model, state, model={"make_vocab_size_divisible_by": 1}).chunks
    count = parameter_count(_architecture(model))
    assert count.total == sum(p.numel() for p in chunk.parameters())
    matrices = {n: p.numel() for n, p in chunk.named_parameters() if p.dim() > 1}
    assert count.matmul == sum(matrices.values()) - matrices["embedding.word_embeddings.weight"]


@pytest.mark.parametrize("selector", ["output", "score.weight"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_groups_select_the_head(model: Path, selector: str, lora: LoraConfig | None) -> None:
    group = ParamGroupConfig(name="head", parameters=(selector,), lr_mult=10.0)
    rest = ParamGroupConfig(name="rest", parameters=("others",))
    grouping = resolve_groups(
        OptimConfig(param_groups=(group, rest)), _architecture(model), first_new=None, lora=lora
    )
    assert grouping is not None
    head, others = grouping.groups
    assert list(head.rows) == [(None, "output_layer.weight")]
    assert (None, "output_layer.weight") not in others.rows and others.rows


def test_adapters_leave_the_head_trained_whole(model: Path, state: ParallelState) -> None:
    (chunk,) = _engine(model, state, lora=LoraConfig(rank=4)).chunks
    trained = [n for n, p in chunk.named_parameters() if p.requires_grad]
    assert [n for n in trained if not n.startswith("adapters.")] == ["output_layer.weight"]
    run = RunConfig(lora=LoraConfig(rank=4, modules_to_save=("lm_head",)))
    (fault,) = lora_model_faults(run, _architecture(model))
    assert "a reward model has none" in fault and "remove lm_head" in fault
