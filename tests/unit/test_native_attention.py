import math
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cgn.errors import ConfigError
from megatron_cgn.model.attention import NativeAttention
from megatron_cgn.parallel import cpu

cpu.install()

FP32_ATTENTION_ATOL = 2e-6
"""FP32 softmax averages of unit normals, against FP64: a few units in the last place."""
HEADS, GROUPS, WIDTH = 6, 2, 16


class _Group:
    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


class _Groups:
    def __init__(self, cp: int = 1) -> None:
        self.cp = _Group(cp)


def _attention(*, cp: int = 1, **options: Any) -> NativeAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        **{"attention_dropout": 0.0, **options},
    )
    return NativeAttention(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=_Groups(cp),
    )


def _naive(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    """Textbook attention in FP64. Shapes ``[s, b, n, d]``; returns ``[s, b, n*d]``."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty_like(q)
    for b in range(q.size(1)):
        for head in range(q.size(2)):
            group = head // (q.size(2) // k.size(2))
            scores = q[:, b, head] @ k[:, b, group].T / math.sqrt(q.size(3))
            if causal:
                offset = k.size(0) - q.size(0)
                hidden = torch.ones_like(scores, dtype=torch.bool).triu(1 + offset)
                scores = scores.masked_fill(hidden, -math.inf)
            out[:, b, head] = scores.softmax(-1) @ v[:, b, group]
    return out.flatten(2)


def _inputs(s: int, b: int, *, keys: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    keys = s if keys is None else keys
    return (
        torch.randn(s, b, HEADS, WIDTH),
        torch.randn(keys, b, GROUPS, WIDTH),
        torch.randn(keys, b, GROUPS, WIDTH),
    )


def _packed(bounds: list[int]) -> PackedSeqParams:
    starts = torch.tensor(bounds, dtype=torch.int32)
    longest = max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def test_equals_textbook_attention_forward_and_backward() -> None:
    inputs = [x.requires_grad_() for x in _inputs(33, 2)]
    out = _attention()(*inputs, None)
    expected = _naive(*inputs)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, grad)
    theirs = torch.autograd.grad(expected, inputs, grad.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=FP32_ATTENTION_ATOL)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=10 * FP32_ATTENTION_ATOL)


def test_bf16_rounds_the_textbook_result() -> None:
    q, k, v = (x.bfloat16() for x in _inputs(40, 1))
    out = _attention()(q, k, v, None)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.double(), _naive(q, k, v), rtol=2**-7, atol=2**-7)


def test_queries_behind_a_cache_see_all_earlier_keys() -> None:
    q, k, v = _inputs(5, 2, keys=21)
    out = _attention()(q, k, v, None, attn_mask_type=AttnMaskType.causal)
    torch.testing.assert_close(out.double(), _naive(q, k, v), rtol=0, atol=FP32_ATTENTION_ATOL)
    out = _attention()(q[:1], k, v, None, attn_mask_type=AttnMaskType.no_mask)
    expected = _naive(q[:1], k, v, causal=False)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=FP32_ATTENTION_ATOL)


def test_softmax_scale_is_used() -> None:
    q, k, v = _inputs(9, 1)
    attention = _attention()
    attention.softmax_scale = 0.5
    expected = _naive(q * (0.5 * math.sqrt(WIDTH)), k, v)
    torch.testing.assert_close(
        attention(q, k, v, None).double(), expected, rtol=0, atol=FP32_ATTENTION_ATOL
    )


def test_packed_sequences_equal_the_same_sequences_alone() -> None:
    bounds = [0, 7, 8, 31, 40]
    inputs = [x.requires_grad_() for x in _inputs(40, 1)]
    out = _attention()(*(x.squeeze(1) for x in inputs), None, packed_seq_params=_packed(bounds))
    pieces = [_naive(*(x[a:b] for x in inputs)) for a, b in zip(bounds, bounds[1:], strict=False)]
    expected = torch.cat(pieces).squeeze(1)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=FP32_ATTENTION_ATOL)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, grad)
    for a, b in zip(ours, torch.autograd.grad(expected, inputs, grad.double()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=10 * FP32_ATTENTION_ATOL)


def test_a_packed_neighbour_changes_no_bit() -> None:
    packed = _packed([0, 13, 29, 40])
    before = _inputs(40, 1)
    after = [x.clone() for x in before]
    for x in after:
        x[13:29] += 5.0
    results = []
    for inputs in (before, after):
        leaves = [x.squeeze(1).clone().requires_grad_() for x in inputs]
        out = _attention()(*leaves, None, packed_seq_params=packed)
        out.sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[:13], b[:13])
        assert torch.equal(a[29:], b[29:])
    assert not torch.equal(results[0][0][13:29], results[1][0][13:29])


def test_packed_rows_with_context_parallelism_are_refused() -> None:
    q, k, v = (x.squeeze(1) for x in _inputs(8, 1))
    with pytest.raises(ConfigError, match=r"context_parallel_size=2.*packed"):
        _attention(cp=2)(q, k, v, None, packed_seq_params=_packed([0, 3, 8]))


def test_cu_seqlens_that_leave_tokens_out_are_a_programmers_fault() -> None:
    q, k, v = (x.squeeze(1) for x in _inputs(8, 1))
    with pytest.raises(AssertionError, match="cover the row"):
        _attention()(q, k, v, None, packed_seq_params=_packed([0, 3, 7]))


@pytest.mark.parametrize(
    "options", [{"attention_dropout": 0.1}, {"window_size": (8, 0)}, {"softmax_type": "learnable"}]
)
def test_what_it_cannot_do_is_refused_by_name(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        _attention(**options)
