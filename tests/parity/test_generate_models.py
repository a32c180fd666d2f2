"""Answers of models opened from wherever they are: checkpoints, and adapters of `peft`."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state as mpu

from megatron_cgn.config.schema import LoraConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_cgn.engine.engine import Engine
from megatron_cgn.errors import CheckpointError, ModelError
from megatron_cgn.hf.adapter import load_adapter
from megatron_cgn.hf.adapter_file import read_adapter_config
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.load import load_weights
from megatron_cgn.hf.to_megatron import convert_to_megatron
from megatron_cgn.parallel.state import initialize_parallel, shutdown_parallel
from megatron_cgn.rollout.generate import generate
from megatron_cgn.rollout.open import ModelFiles, find_model, open_engine, stop_tokens
from megatron_cgn.rollout.sampling import Sampling
from megatron_cgn.testing import tiny_hf_model

NEW_TOKENS = 8
PROMPTS = [[3, 4, 5], [7] * 11, [900]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of `peft` that changes every answer, and those answers beside it."""
    import peft
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = peft.LoraConfig(
        r=4, lora_alpha=24, lora_dropout=0.3, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    adapted = peft.get_peft_model(base, settings).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    target = tmp_path_factory.mktemp("adapter") / "peft"
    adapted.save_pretrained(target)
    torch.save(_transformers(adapted), target / "answers.pt")
    return target


def _transformers(model: Any) -> list[list[int]]:
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=1001,
            pad_token_id=0,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def _ours(files: ModelFiles) -> list[list[int]]:
    torch.set_num_threads(1)
    state = initialize_parallel(ParallelConfig())
    try:
        engine = open_engine(files, state, precision="fp32")
        return generate(engine, PROMPTS, sampling=Sampling(max_new_tokens=NEW_TOKENS))
    finally:
        shutdown_parallel()


def test_a_checkpoint_answers_as_the_directory_it_was_made_of(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    convert_to_megatron(model, tmp_path / "ckpt")
    expected = _transformers(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    assert _ours(find_model(model)) == expected
    assert _ours(find_model(tmp_path / "ckpt")) == expected


def test_an_adapter_answers_as_in_peft(model: Path, adapter: Path) -> None:
    files = find_model(model, adapter=adapter)
    found, plain = _ours(files), _ours(find_model(model))
    assert found == torch.load(adapter / "answers.pt")
    assert all(mine != other for mine, other in zip(found, plain, strict=True))


def test_a_checkpoint_of_adapters_finds_its_model(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    _save_adapters(model, adapter, tmp_path / "checkpoints")
    (checkpoint,) = (p for p in (tmp_path / "checkpoints").iterdir() if not p.is_symlink())
    files = find_model(checkpoint)
    assert files.weights == model
    assert _ours(files) == torch.load(adapter / "answers.pt")
    with pytest.raises(ModelError, match="holds adapters already"):
        find_model(checkpoint, adapter=adapter)


def _save_adapters(model: Path, adapter: Path, root: Path) -> None:
    """A checkpoint as a training run with this adapter writes it."""
    torch.set_num_threads(1)
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    state, architecture = initialize_parallel(ParallelConfig()), read_architecture(model)
    lora: LoraConfig = dataclasses.replace(read_adapter_config(adapter), dropout=0.0)
    run = RunConfig(precision="fp32", model=ModelConfig(hf_path=str(model)), lora=lora)
    engine = Engine(run, architecture, state, total_steps=1)
    load_weights(engine.chunks, model, architecture=architecture, groups=state.groups)
    load_adapter(engine.chunks, adapter, architecture=architecture, lora=lora, groups=state.groups)

    def copy_config(target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_bytes((model / "config.json").read_bytes())

    engine.save(root, fit={}, hf_files=copy_config, with_optimizer=False)
    shutdown_parallel()


def test_a_checkpoint_of_adapters_without_its_model_is_refused(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.symlink_to(model)
    _save_adapters(base, adapter, tmp_path / "checkpoints")
    (checkpoint,) = (p for p in (tmp_path / "checkpoints").iterdir() if not p.is_symlink())
    base.unlink()
    with pytest.raises(CheckpointError, match="is not there"):
        find_model(checkpoint)


@pytest.mark.parametrize(
    ("content", "ids"), [('{"eos_token_id": 5}', (5,)), ('{"eos_token_id": [5, 7]}', (5, 7))]
)
def test_stop_tokens_are_those_of_servers(
    model: Path, tmp_path: Path, content: str, ids: tuple[int, ...]
) -> None:
    assert stop_tokens(model) == (2,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert stop_tokens(tmp_path) == (9,)
    (tmp_path / "generation_config.json").write_text(content)
    assert stop_tokens(tmp_path) == ids
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ModelError, match="eos_token_id is 'x'"):
        stop_tokens(tmp_path)
