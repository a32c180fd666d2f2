"""Native layers on two processes against the same model on one.

One start of the processes serves every case: each rank first computes the whole result alone
(data parallelism of two identical replicas), then its part of it under each layout.
"""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_cgn.config.schema import ModelConfig, ParallelConfig
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.attention import NativeAttention, attend
from megatron_cgn.model.build import build_model, transformer_config
from megatron_cgn.model.initialize import global_name
from megatron_cgn.parallel.seed import seed_everything
from megatron_cgn.parallel.state import initialize_parallel
from megatron_cgn.testing import run_distributed

RELATIVE = 1e-5
"""Largest difference over largest value: the same FP32 sums in another order."""
LENGTH = 48
TINY = Architecture(
    family="qwen3",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    vocab_size=1000,
    max_position_embeddings=256,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
    qkv_bias=True,
    qk_norm=True,
    initializer_range=0.05,
)
MULTI_QUERY = dataclasses.replace(TINY, num_key_value_heads=1)
TIED = dataclasses.replace(TINY, tie_word_embeddings=True)
LAYOUTS: dict[str, tuple[Architecture, ParallelConfig, str]] = {
    "tp2": (TINY, ParallelConfig(tensor_model_parallel_size=2), "none"),
    "tp2-sp": (TINY, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), "none"),
    "tp2-sp-full-recompute": (
        TINY,
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        "full",
    ),
    "tp2-one-kv-head": (MULTI_QUERY, ParallelConfig(tensor_model_parallel_size=2), "none"),
    "tp2-tied": (TIED, ParallelConfig(tensor_model_parallel_size=2), "none"),
    "cp2": (TINY, ParallelConfig(context_parallel_size=2), "none"),
    "cp2-selective-recompute": (TINY, ParallelConfig(context_parallel_size=2), "selective"),
    "cp2-full-recompute": (TINY, ParallelConfig(context_parallel_size=2), "full"),
}


def _build(architecture: Architecture, parallel: ParallelConfig, recompute: Any = "none") -> Any:
    """Lay out this process anew and build its part of the model from one seed."""
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    state = initialize_parallel(parallel)
    seed_everything(1, state)
    config = transformer_config(
        architecture,
        parallel=parallel,
        model=ModelConfig(backend="native"),
        precision="fp32",
        recompute=recompute,
    )
    chunks = build_model(
        architecture,
        config=config,
        groups=state.groups,
        seq_length=LENGTH,
        make_vocab_size_divisible_by=128,
        backend="native",
        seed=9,
    )
    return state, chunks


def _local_positions(size: int, rank: int) -> Tensor:
    """Positions of the two chunks that a context-parallel rank holds."""
    chunks = torch.arange(LENGTH).chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def _run_model(state: Any, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """NLL of this rank's tokens and gradients, reduced as Megatron's finalizer does."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, TINY.vocab_size, (2, LENGTH + 1), generator=generator)
    weights = torch.rand(2, LENGTH, generator=generator)
    mine = _local_positions(state.cp_size, state.cp_rank)
    tokens, labels, weights = ids[:, :-1][:, mine], ids[:, 1:][:, mine], weights[:, mine]
    nll = model(tokens, mine.expand(2, -1), None, labels=labels)
    (nll * weights).sum().backward()
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if getattr(parameter, "sequence_parallel", False) or "q_layernorm" in name:
            dist.all_reduce(grad, group=state.groups.tp)
        elif "k_layernorm" in name:
            dist.all_reduce(grad, group=state.groups.tp)
        dist.all_reduce(grad, group=state.groups.cp)
        grads[name] = grad
    return nll.detach(), grads


def _slice(full: Tensor, parameter: Any, name: str, state: Any) -> Tensor:
    """Cut this tensor-parallel rank's part out of the whole model's tensor."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    rank, size, dim = state.tp_rank, state.groups.tp.size(), parameter.partition_dim
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size, dim)[rank] for half in full.chunk(2, dim)], dim)
    if "embedding" in name or "output_layer" in name:
        # More ranks pad the vocabulary further, with zeros.
        missing = parameter.size(0) * size - len(full)
        full = torch.cat((full, full.new_zeros(missing, full.size(1))))
    return full.chunk(size, dim)[rank]


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _compare(
    architecture: Architecture, parallel: ParallelConfig, recompute: str
) -> dict[str, Any]:
    state, (whole,) = _build(architecture, ParallelConfig())
    nll, grads = _run_model(state, whole)
    weights = {name: p.detach().clone() for name, p in whole.named_parameters()}
    state, (part,) = _build(architecture, parallel, recompute)
    part_nll, part_grads = _run_model(state, part)
    expected_nll = nll[:, _local_positions(state.cp_size, state.cp_rank)]
    result: dict[str, Any] = {"nll": _relative(part_nll, expected_nll)}
    differing, grad_error = [], {}
    for name, parameter in part.named_parameters():
        if not torch.equal(_slice(weights[name], parameter, name, state), parameter):
            differing.append(name)
        grad_error[name] = _relative(part_grads[name], _slice(grads[name], parameter, name, state))
    return {**result, "differing_weights": differing, "grads": grad_error}


def _attention_errors() -> dict[str, float]:
    """Core attention alone, under context parallelism: outputs and input gradients."""
    _build(TINY, ParallelConfig(context_parallel_size=2))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = transformer_config(
        TINY, parallel=ParallelConfig(), model=ModelConfig(backend="native"), precision="fp32"
    )
    attention = NativeAttention(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=groups,
    )
    generator = torch.Generator().manual_seed(8)
    shapes = ((LENGTH, 3, 4, 24), (LENGTH, 3, 2, 24), (LENGTH, 3, 2, 16))
    full = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    q, k, v = (x.permute(1, 2, 0, 3) for x in full)
    expected = attend(q, k, v, causal=True, scale=None).permute(2, 0, 1, 3).flatten(2)
    upstream = torch.randn(expected.shape, generator=generator)
    expected_grads = torch.autograd.grad(expected, full, upstream)
    mine = _local_positions(2, groups.cp.rank())
    local = [x.detach()[mine].requires_grad_() for x in full]
    out = attention(*local, None)
    grads = torch.autograd.grad(out, local, upstream[mine])
    errors = {"out": _relative(out, expected[mine])}
    for name, ours, theirs in zip("qkv", grads, expected_grads, strict=True):
        errors[name] = _relative(ours, theirs[mine])
    return errors


def _pipeline_weights(parallel: ParallelConfig) -> dict[str, Any]:
    """Every parameter of this stage by its name in the whole model, as NumPy arrays."""
    _, chunks = _build(dataclasses.replace(TIED, num_layers=4), parallel)
    return {
        f"{global_name(chunk, name)}#{name}": parameter.detach().numpy()
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }


def _everything() -> dict[str, Any]:
    torch.set_num_threads(1)
    return {
        "attention": _attention_errors(),
        "layouts": {name: _compare(*layout) for name, layout in LAYOUTS.items()},
        "whole": _pipeline_weights(ParallelConfig()),
        "pp2": _pipeline_weights(ParallelConfig(pipeline_model_parallel_size=2)),
        "pp2-interleaved": _pipeline_weights(
            ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
        ),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(_everything, 2)


def test_context_parallel_attention_is_exact(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, error in rank["attention"].items():
            assert error < RELATIVE, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_single_process_losses_and_gradients(
    ranks: list[dict[str, Any]], layout: str
) -> None:
    for rank in ranks:
        result = rank["layouts"][layout]
        assert result["nll"] < RELATIVE
        assert {n: e for n, e in result["grads"].items() if not e < RELATIVE} == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_weights_do_not_depend_on_the_layout(
    ranks: list[dict[str, Any]], layout: str
) -> None:
    for rank in ranks:
        assert rank["layouts"][layout]["differing_weights"] == []


@pytest.mark.parametrize("layout", ["pp2", "pp2-interleaved"])
def test_random_weights_do_not_depend_on_pipeline_stages(
    ranks: list[dict[str, Any]], layout: str
) -> None:
    whole = {key.partition("#")[0]: value for key, value in ranks[0]["whole"].items()}
    seen = set()
    for rank in ranks:
        for key, value in rank[layout].items():
            name = key.partition("#")[0]
            seen.add(name)
            assert (value == whole[name]).all(), key
    assert seen == whole.keys()
    assert any(key.endswith("#output_layer.weight") for key in ranks[1][layout])
