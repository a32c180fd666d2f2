"""Products on a CPU: equal to FP64 up to one rounding, gradients in Megatron's buffer."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cgn.config.schema import ParallelConfig
from megatron_cgn.model import native_linear
from megatron_cgn.model.matmul import product_dtype
from megatron_cgn.model.native_linear import (
    NativeColumnParallelLinear,
    NativeRowParallelLinear,
)
from megatron_cgn.parallel.state import initialize_parallel, shutdown_parallel

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}
"""Half a unit in the last place, of values near a power of two; FP32 has sums' roundings too."""
KINDS = {
    "column": (NativeColumnParallelLinear, ColumnParallelLinear),
    "row": (NativeRowParallelLinear, RowParallelLinear),
}


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    initialize_parallel(ParallelConfig())
    yield
    shutdown_parallel()


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    # Also on a CPU that multiplies BF16 fast.
    monkeypatch.setattr("megatron_cgn.model.matmul._has_matrix_units", lambda: False)
    assert isinstance(request.param, torch.dtype)
    return request.param


def _config(dtype: torch.dtype) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        params_dtype=dtype,
        perform_initialization=False,
    )


def _layer(kind: type, dtype: torch.dtype, *, bias: bool) -> Any:
    row = {"input_is_parallel": True} if issubclass(kind, RowParallelLinear) else {}
    layer = kind(
        16,
        24,
        config=_config(dtype),
        init_method=torch.nn.init.zeros_,
        bias=bias,
        skip_bias_add=False,
        tp_group=mpu.get_tensor_model_parallel_group(),
        **row,
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def _assert_rounded(value: Tensor, exact: Tensor, limit: float) -> None:
    assert float((value.double() - exact).abs().max()) <= limit * float(exact.abs().max())


@pytest.mark.parametrize("into_buffer", [False, True], ids=["grad", "main_grad"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_product_and_gradients_are_rounded_once(
    kind: str, dtype: torch.dtype, bias: bool, into_buffer: bool
) -> None:
    layer = _layer(KINDS[kind][0], dtype, bias=bias)
    converts = product_dtype(layer.weight) != dtype
    assert converts == (dtype != torch.float32)
    if into_buffer:
        layer.weight.main_grad = torch.ones(layer.weight.shape)
    x = torch.randn(6, 2, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    by_out = torch.randn(6, 2, 24, generator=torch.Generator().manual_seed(3)).to(dtype)
    x.requires_grad_()
    out, _ = layer(x)
    out.backward(by_out)

    exact_x, weight = x.detach().double().requires_grad_(), layer.weight.detach().double()
    weight.requires_grad_()
    exact = exact_x @ weight.T + (layer.bias.detach().double() if bias else 0.0)
    exact.backward(by_out.double())
    assert out.dtype == x.grad.dtype == dtype  # type: ignore[union-attr]
    assert weight.grad is not None and exact_x.grad is not None and x.grad is not None
    _assert_rounded(out.detach(), exact.detach(), ROUNDING[dtype])
    _assert_rounded(x.grad, exact_x.grad, ROUNDING[dtype])
    if bias:
        _assert_rounded(layer.bias.grad, by_out.double().sum((0, 1)), ROUNDING[dtype])
    if into_buffer:  # added to what was there, and not rounded
        assert layer.weight.grad is None
        _assert_rounded(layer.weight.main_grad - 1.0, weight.grad, ROUNDING[torch.float32])
    else:
        _assert_rounded(layer.weight.grad, weight.grad, ROUNDING[dtype])


def test_buffer_is_left_to_megatron_where_it_reduces_during_the_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_cgn.model.matmul._has_matrix_units", lambda: False)
    layer = _layer(NativeColumnParallelLinear, torch.bfloat16, bias=False)
    layer.weight.main_grad = torch.zeros(layer.weight.shape)
    layer.config.no_sync_func = lambda: None
    layer(torch.ones(1, 1, 16, dtype=torch.bfloat16))[0].sum().backward()
    assert layer.weight.grad is not None and not layer.weight.main_grad.any()


def test_frozen_weight_gets_no_gradient(dtype: torch.dtype) -> None:
    layer = _layer(NativeColumnParallelLinear, dtype, bias=False)
    layer.weight.requires_grad_(False)
    layer.weight.main_grad = torch.zeros(layer.weight.shape)
    x = torch.ones(2, 1, 16, dtype=dtype, requires_grad=True)
    layer(x)[0].sum().backward()
    assert x.grad is not None and x.grad.any()
    assert layer.weight.grad is None and not layer.weight.main_grad.any()


def test_few_rows_are_multiplied_as_they_are_in_generation_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, answer in (("_has_matrix_units", False), ("_multiplies_bf16", True)):
        monkeypatch.setattr(f"megatron_cgn.model.matmul.{name}", lambda answer=answer: answer)
    multiplied: list[torch.dtype] = []
    plain = native_linear._product

    def recording(*operands: Any) -> Tensor:
        multiplied.append(operands[-1])
        return plain(*operands)

    monkeypatch.setattr(native_linear, "_product", recording)
    layer = _layer(NativeColumnParallelLinear, torch.bfloat16, bias=True)
    few, many = (
        torch.randn(length, 1, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
        for length in (32, 33)
    )
    with torch.no_grad():
        layer.train()  # as when activations are recomputed: the first pass has no gradients
        trained, _ = layer(few)
        layer.eval()
        (answered, _), _ = layer(few), layer(many)
    layer(few)  # with gradients
    wide = torch.float32
    assert multiplied == [wide, torch.bfloat16, wide, wide]
    exact = few.double() @ layer.weight.double().T + layer.bias.double()
    for out in (trained, answered):
        _assert_rounded(out.detach(), exact.detach(), ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_product_is_megatrons_bit_for_bit(kind: str) -> None:
    layers = [_layer(k, torch.float32, bias=False) for k in KINDS[kind]]
    x = torch.randn(3, 1, 16)
    outputs = [layer(x)[0] for layer in layers]
    assert torch.equal(*outputs)
