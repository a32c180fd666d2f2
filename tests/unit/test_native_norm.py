import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatron_cgn.model.native import NativeRMSNorm
from megatron_cgn.parallel import cpu

cpu.install()


def _config(dtype: torch.dtype, *, sequence_parallel: bool = False) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=96,
        num_attention_heads=2,
        normalization="RMSNorm",
        params_dtype=dtype,
        tensor_model_parallel_size=2 if sequence_parallel else 1,
        sequence_parallel=sequence_parallel,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 2, 96), (5, 3, 4, 32)])
def test_equals_transformers_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ours = NativeRMSNorm(config=_config(dtype), hidden_size=shape[-1], eps=1e-5)
    theirs = LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    ours.weight.data.copy_(weight)
    theirs.weight.data.copy_(weight)
    data, grad = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    outputs = []
    for norm in (ours, theirs):
        x = data.clone().requires_grad_()
        y = norm(x)
        y.backward(grad)
        outputs.append((y, x.grad, norm.weight.grad))
    for a, b in zip(*outputs, strict=True):
        assert a.dtype is dtype
        assert torch.equal(a, b)


def test_starts_as_ones_and_is_marked_for_sequence_parallelism() -> None:
    for sequence_parallel in (False, True):
        config = _config(torch.float32, sequence_parallel=sequence_parallel)
        weight = NativeRMSNorm(config=config, hidden_size=96).weight
        assert torch.equal(weight, torch.ones(96))
        assert weight.sequence_parallel is sequence_parallel
