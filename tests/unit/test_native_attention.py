import math
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cgn.errors import ConfigError
from megatron_cgn.model.attention import NativeAttention, attend_packed
from megatron_cgn.model.packing import PackedRow, pack_row
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


def _packed(bounds: list[int], **part: int) -> PackedRow:
    length = bounds[-1] // part.get("cp_size", 1)
    packed = pack_row(
        torch.tensor(bounds, dtype=torch.int32),
        position_ids=torch.arange(length)[None],
        backend="native",
        **part,
    )
    assert isinstance(packed, PackedRow)
    return packed


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


@pytest.mark.parametrize("bounds", [[0, 7, 8, 31, 40], [0, 10, 20, 30, 40], [0, 40]])
def test_packed_sequences_equal_the_same_sequences_alone(bounds: list[int]) -> None:
    inputs = [x.requires_grad_() for x in _inputs(40, 1)]
    out = _attention()(*inputs, None, packed_seq_params=_packed(bounds))
    pieces = [_naive(*(x[a:b] for x in inputs)) for a, b in zip(bounds, bounds[1:], strict=False)]
    expected = torch.cat(pieces)
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
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = _attention()(*leaves, None, packed_seq_params=packed)
        out.sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[:13], b[:13])
        assert torch.equal(a[29:], b[29:])
    assert not torch.equal(results[0][0][13:29], results[1][0][13:29])


@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("bounds", [[0, 64], [0, 8, 16, 24, 64], [0, 1, 30, 31, 63, 64]])
def test_parts_of_a_packed_row_see_their_own_sequences(bounds: list[int], cp_size: int) -> None:
    query, key, value = _inputs(64, 1)
    sequences = list(zip(bounds, bounds[1:], strict=False))
    expected = torch.cat([_naive(query[a:b], key[a:b], value[a:b]) for a, b in sequences])
    part = 64 // (2 * cp_size)
    for rank in range(cp_size):
        spans = _packed(bounds, cp_rank=rank, cp_size=cp_size).spans
        for chunk, span in zip((rank, 2 * cp_size - 1 - rank), spans, strict=True):
            mine = slice(chunk * part, (chunk + 1) * part)
            # Keys before the first query's own sequence are not even handed over.
            assert span.first_key == max(a for a in bounds if a <= mine.start)
            assert span.keys.stop == mine.stop
            out = attend_packed(
                query[mine, 0], key[span.keys, 0], value[span.keys, 0], span, scale=None
            )
            torch.testing.assert_close(
                out.flatten(1).double(), expected[mine, 0], rtol=0, atol=FP32_ATTENTION_ATOL
            )


def test_the_packed_kernel_is_told_the_same_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of a CUDA device, played by textbook attention under its documented contract."""
    calls = []

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        **how: Any,
    ) -> Tensor:
        calls.append((max_q, max_k, how))
        pieces = [
            _naive(*(x[None, a:b].transpose(0, 1) for x, (a, b) in ((q, s), (k, t), (v, t))))
            for s, t in zip(_pairs(cu_q), _pairs(cu_k), strict=True)
        ]
        return torch.cat(pieces).view_as(q).to(q.dtype)

    def _pairs(starts: Tensor) -> list[tuple[int, int]]:
        bounds = starts.tolist()
        return list(zip(bounds, bounds[1:], strict=False))

    inputs = _inputs(40, 1)
    packed = _packed([0, 13, 14, 29, 40], cp_rank=1, cp_size=2)  # places 10 to 30
    parts = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr("megatron_cgn.model.attention._has_flash", lambda x: True)
            monkeypatch.setattr("megatron_cgn.model.attention._varlen_kernel", lambda: kernel)
        for span, start in zip(packed.spans, (10, 20), strict=True):
            q, (k, v) = inputs[0][start : start + 10, 0], (x[span.keys, 0] for x in inputs[1:])
            parts.append(attend_packed(q, k, v, span, scale=None))
    torch.testing.assert_close(parts[2:], parts[:2], rtol=0, atol=2 * FP32_ATTENTION_ATOL)
    how = {"scale": None, "window_size": (-1, 0), "enable_gqa": True}
    assert calls == [(6, 13, how), (9, 15, how)]


@pytest.mark.parametrize("bounds", [[0, 3, 7], [1, 8], [0, 3, 3, 8]])
def test_cu_seqlens_that_are_wrong_are_a_programmers_fault(bounds: list[int]) -> None:
    with pytest.raises(AssertionError, match="cover the row|may be empty"):
        pack_row(
            torch.tensor(bounds, dtype=torch.int32),
            position_ids=torch.arange(8)[None],
            backend="native",
        )


def test_a_packed_row_of_another_kind_is_never_ignored() -> None:
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    foreign = PackedSeqParams(qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts)
    with pytest.raises(AssertionError, match="pack_row"):
        _attention()(*_inputs(8, 1), None, packed_seq_params=foreign)


def test_transformer_engine_is_told_in_its_own_terms_or_refused() -> None:
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    packed = pack_row(starts, position_ids=torch.arange(8)[None], backend="te")
    assert packed.qkv_format == "thd"
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 3, 8]
    assert (packed.max_seqlen_q, packed.max_seqlen_kv) == (5, 5)
    with pytest.raises(ConfigError, match=r"context_parallel_size: 2.*model.backend=native"):
        pack_row(starts, position_ids=torch.arange(4)[None], backend="te", cp_size=2)


@pytest.mark.parametrize(
    "options", [{"attention_dropout": 0.1}, {"window_size": (8, 0)}, {"softmax_type": "learnable"}]
)
def test_what_it_cannot_do_is_refused_by_name(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        _attention(**options)
