"""Rewards of conversations against `transformers`, on every kind of layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state as mpu

from megatron_cgn.config.schema import ParallelConfig
from megatron_cgn.parallel.state import initialize_parallel, shutdown_parallel
from megatron_cgn.rollout.open import find_model, open_engine
from megatron_cgn.rollout.score import score_tokens
from megatron_cgn.testing import run_distributed

REWARD_ATOL = 1e-5
"""FP32 rewards of about 1: other kernels and sums in another order, one forward pass."""
ROW_TOKENS = 64
"""Few, so that conversations fill several rows, and one needs a longer row of its own."""
LENGTHS = (1, 9, 40, 64, 3, 17, 90, 31, 25)
VOCABULARY = 100

TP2_SP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
LAYOUTS: dict[str, tuple[str, ParallelConfig]] = {
    "dp2": ("llama", ParallelConfig()),
    "tp2": ("qwen2", ParallelConfig(tensor_model_parallel_size=2)),
    "tp2-sp": ("llama", TP2_SP),
    "pp2": ("qwen2", ParallelConfig(pipeline_model_parallel_size=2)),
    "pp2-interleaved": (
        "llama",
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
    "cp2": ("llama", ParallelConfig(context_parallel_size=2)),
}


def _conversations() -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(VOCABULARY, (n,), generator=draw).tolist() for n in LENGTHS]


def _write_model(path: Path, family: str) -> Path:
    """A random model of sequence classification; Qwen's ties its embedding, and has biases."""
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2"}[family]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=family == "qwen2",
        num_labels=1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(transformers, f"{name}ForSequenceClassification")(config)
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.1).add_(1.0 if parameter.dim() == 1 else 0.0)
    model.float().save_pretrained(path)
    return path


def _score(path: Path, parallel: ParallelConfig) -> list[float]:
    state = initialize_parallel(parallel)
    engine = open_engine(find_model(path), state, precision="fp32")
    return score_tokens(engine, _conversations(), row_tokens=ROW_TOKENS)


def _run(layouts: dict[str, tuple[str, ParallelConfig]], models: dict[str, Path]) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = {}
    for name, (family, parallel) in layouts.items():
        if mpu.model_parallel_is_initialized():
            mpu.destroy_model_parallel()
        found[name] = _score(models[family], parallel)
    shutdown_parallel()
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: _write_model(root / family, family) for family in ("llama", "qwen2")}


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, list[float]]:
    """One conversation at a time, so that nothing is padded."""
    from transformers import AutoModelForSequenceClassification

    found = {}
    for family, path in models.items():
        model: Any = AutoModelForSequenceClassification.from_pretrained(path).eval()
        with torch.no_grad():
            found[family] = [model(torch.tensor([ids])).logits.item() for ids in _conversations()]
        assert len({round(reward, 3) for reward in found[family]}) == len(LENGTHS)
    return found


@pytest.fixture(scope="module")
def two_ranks(models: dict[str, Path]) -> list[dict[str, Any]]:
    return run_distributed(_run, 2, LAYOUTS, models, warm=True)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_one_process_scores_as_transformers(
    models: dict[str, Path], expected: dict[str, list[float]], family: str
) -> None:
    found = _run({"alone": (family, ParallelConfig())}, models)["alone"]
    assert found == pytest.approx(expected[family], rel=0, abs=REWARD_ATOL)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_score_as_transformers(
    two_ranks: list[dict[str, Any]], expected: dict[str, list[float]], name: str
) -> None:
    first, second = two_ranks
    assert first[name] == second[name]
    assert first[name] == pytest.approx(expected[LAYOUTS[name][0]], rel=0, abs=REWARD_ATOL)
