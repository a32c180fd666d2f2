"""Embeddings on a CPU: gradients of rows in Megatron's buffer, equal to a dense gradient's."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state as mpu
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_cgn.config.schema import ParallelConfig
from megatron_cgn.model.native_embedding import NativeVocabParallelEmbedding, _LookUp
from megatron_cgn.parallel.state import initialize_parallel, shutdown_parallel

ROWS, WIDTH = 12, 4
IDS = torch.tensor([[3, 11, 3, 0], [7, 3, 6, 5]])
"""One id three times, and both ends of both halves."""


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    initialize_parallel(ParallelConfig())
    yield
    shutdown_parallel()


def _embedding() -> Any:
    config = TransformerConfig(
        num_layers=1, hidden_size=WIDTH, num_attention_heads=2, perform_initialization=False
    )
    group = mpu.get_tensor_model_parallel_group()
    layer = NativeVocabParallelEmbedding(
        ROWS, WIDTH, init_method=torch.nn.init.zeros_, config=config, tp_group=group
    )
    layer.weight.data.copy_(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)))
    layer.weight.main_grad = torch.ones(ROWS, WIDTH)
    return layer


def _dense(weight: Tensor, by_out: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, and what a buffer of ones is after their gradient."""
    weight = weight.detach().clone().requires_grad_()
    rows = F.embedding(IDS, weight)
    torch.autograd.backward(rows, by_out)
    assert weight.grad is not None
    return rows.detach(), 1.0 + weight.grad


def _by_out() -> Tensor:
    return torch.randn(*IDS.shape, WIDTH, generator=torch.Generator().manual_seed(2))


def test_gradient_goes_into_the_buffer_bit_for_bit() -> None:
    layer = _embedding()
    rows = layer(IDS)
    rows.backward(_by_out())
    expected, buffer = _dense(layer.weight, _by_out())
    assert torch.equal(rows, expected)
    assert layer.weight.grad is None and torch.equal(layer.weight.main_grad, buffer)


def test_ranks_add_their_own_rows_only() -> None:
    weight = _embedding().weight
    expected, buffer = _dense(weight, _by_out())
    total, grads = torch.zeros_like(expected), []
    for first in (0, ROWS // 2):
        part = torch.nn.Parameter(weight.detach()[first : first + ROWS // 2].clone())
        part.main_grad = torch.ones(part.shape)  # type: ignore[attr-defined]
        rows = _LookUp.apply(IDS - first, part, True)
        rows.backward(_by_out())
        total += rows.detach()
        grads.append(part.main_grad)  # type: ignore[attr-defined]
    assert torch.equal(total, expected) and torch.equal(torch.cat(grads), buffer)


def test_gradients_of_bf16_are_summed_up_in_fp32() -> None:
    weight = torch.nn.Parameter(torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16))
    weight.main_grad = torch.zeros(ROWS, WIDTH)  # type: ignore[attr-defined]
    same = torch.full((300,), 5)
    _LookUp.apply(same, weight, False).backward(torch.ones(300, WIDTH, dtype=torch.bfloat16))
    # In BF16 the sum would stop at 256.
    assert weight.main_grad[5].tolist() == [300.0] * WIDTH  # type: ignore[attr-defined]
    assert weight.main_grad.count_nonzero() == WIDTH  # type: ignore[attr-defined]


def test_nothing_is_added_where_nobody_may() -> None:
    waiting, frozen = _embedding(), _embedding()
    waiting.config.no_sync_func = lambda: None  # Megatron's hooks wait for a gradient
    waiting(IDS).backward(_by_out())
    assert torch.equal(1.0 + waiting.weight.grad, _dense(waiting.weight, _by_out())[1])
    frozen.weight.requires_grad_(False)
    assert not frozen(IDS).requires_grad
    for layer in (waiting, frozen):
        assert torch.equal(layer.weight.main_grad, torch.ones(ROWS, WIDTH))


def test_id_of_nobody_raises() -> None:
    with pytest.raises(IndexError):
        _embedding()(torch.tensor([[ROWS]]))
