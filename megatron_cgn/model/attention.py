"""Causal attention without Transformer Engine: grouped, packed, and context-parallel.

Stands where Megatron's ``DotProductAttention`` stands, which materialises every score and
supports neither packed sequences nor context parallelism. Projections, RoPE and the
normalisation of queries and keys happen before; nothing here has parameters.

Shapes: s tokens on this rank, b sequences, n query heads and g key/value heads of this
tensor-parallel rank, d head width. Megatron's layout is ``[s, b, n, d]``; a packed row has b = 1.
"""

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from megatron_cgn.errors import ConfigError
from megatron_cgn.model.cache import DecodeRow, PrefillRow, attend_cached
from megatron_cgn.model.matmul import product_dtype
from megatron_cgn.model.packing import PackedRow, Span


class NativeAttention(MegatronModule):
    """Megatron's core attention on PyTorch's fused kernels.

    Args:
        config: The model's configuration.
        layer_number: Names the layer's part of a cache of keys and values.
        attn_mask_type: Mask for calls that name none.
        attention_type: Must be ``self``.
        cp_comm_type: Unused: keys and values are always gathered.
        softmax_scale: Factor of the scores; None for ``1 / sqrt(d)``.
        pg_collection: Gives the context-parallel group ``cp``.

    Raises:
        ConfigError: If the configuration asks for what this attention does not do.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        unsupported = {
            "attention_dropout": config.attention_dropout != 0.0,
            "window_size": config.window_size is not None,
            "softmax_type": config.softmax_type != "vanilla",
            "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
        }
        for name, asked in unsupported.items():
            if asked:
                raise ConfigError(
                    f"{name}={getattr(config, name)!r} is not supported by the native attention. "
                    "Leave it at its default, or set model.backend=te."
                )
        assert attention_type == "self"
        assert pg_collection is not None, "process groups are passed explicitly"
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend. Collective over cp if the context-parallel size is above one.

        Not under a `PrefillRow` or `DecodeRow`: in generation each context-parallel rank has whole
        sequences of its own.

        Args:
            query: ``[s, b, n, d]``.
            key: ``[s, b, g, d]``; n is a multiple of g.
            value: As `key`.
            attention_mask: Must be None: a mask of s × s scores is what this class avoids.
            attn_mask_type: ``causal`` (the last query sees every key), or ``no_mask`` when keys
                come from a cache.
            attention_bias: Must be None.
            packed_seq_params: A `PackedRow`: each sequence of the row attends to itself alone. A
                `PrefillRow` keeps its keys and values; a `DecodeRow` attends to what was kept.

        Returns:
            ``[s, b, n * d]``.
        """
        assert attention_mask is None and attention_bias is None, "mask by packed_seq_params"
        if isinstance(packed_seq_params, DecodeRow):
            seen = packed_seq_params.extend(self.layer_number, key, value)
            out = attend_cached(query, *seen, packed_seq_params.visible, scale=self.softmax_scale)
            return out.flatten(2)
        if isinstance(packed_seq_params, PrefillRow):
            packed_seq_params.keep(self.layer_number, key, value)
            return self._packed(query, key, value, packed_seq_params.spans)
        causal = (attn_mask_type or self.attn_mask_type) is not AttnMaskType.no_mask
        gathers = causal and self.cp_group.size() > 1
        if gathers:
            key, value = self._gather(key, value)
        if packed_seq_params is not None:
            assert causal and isinstance(packed_seq_params, PackedRow), "see pack_row"
            return self._packed(query, key, value, packed_seq_params.spans)
        heads = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if gathers:
            out = self._context_parallel(*heads)
        else:
            out = attend(*heads, causal=causal, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[s, b, g, d]`` of all context-parallel ranks, in sequence order."""
        width = key.size(-1)
        both = _GatherZigzag.apply(torch.cat((key, value), dim=-1), self.cp_group)
        key, value = both.split((width, both.size(-1) - width), dim=-1)
        return key, value

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, spans: list[Span]) -> Tensor:
        """Block-diagonal causal attention of this rank's parts of a row."""
        parts = zip(query.squeeze(1).chunk(len(spans)), spans, strict=True)
        key, value = key.squeeze(1), value.squeeze(1)
        outputs = [
            attend_packed(q, key[span.keys], value[span.keys], span, scale=self.softmax_scale)
            for q, span in parts
        ]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return out.flatten(1).unsqueeze(1)

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of two chunks of queries over all keys, ``[b, n, s, d]``.

        The sequence is cut into ``2 * cp`` chunks; rank r holds chunks r and ``2 * cp - 1 - r``,
        so that every rank has the same number of scores to compute.
        """
        size, rank = self.cp_group.size(), self.cp_group.rank()
        outputs = []
        for chunk, q in zip((rank, 2 * size - 1 - rank), query.chunk(2, dim=2), strict=True):
            visible = (chunk + 1) * q.size(2)
            k, v = key[:, :, :visible], value[:, :, :visible]
            outputs.append(attend(q, k, v, causal=True, scale=self.softmax_scale))
        return torch.cat(outputs, dim=2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float | None
) -> Tensor:
    """Grouped-query attention that never holds all scores of a long sequence on a GPU.

    Args:
        query: ``[b, n, q, d]``.
        key: ``[b, g, k, d]`` with k ≥ q; query head i reads key head ``i // (n / g)``.
        value: ``[b, g, k, d]``.
        causal: Whether query i sees keys up to ``k - q + i`` only.
        scale: Factor of the scores; None for ``1 / sqrt(d)``.

    Returns:
        ``[b, n, q, d]``.
    """
    dtype = product_dtype(query)
    if dtype != query.dtype:
        # Conversion is a tenth of what this CPU's half-precision kernel takes longer.
        wide = (x.to(dtype) for x in (query, key, value))
        return attend(*wide, causal=causal, scale=scale).to(query.dtype)
    groups = query.size(1) // key.size(1)
    if groups > 1 and query.is_cuda and not _has_flash(query):
        # Only the flash kernels group queries; without them PyTorch would fall back to
        # materialised scores, whereas the memory-efficient kernel takes repeated heads.
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    options: dict[str, Any] = {"scale": scale, "enable_gqa": key.size(1) != query.size(1)}
    if causal and query.size(2) == key.size(2):
        options["is_causal"] = True
    elif causal:
        options["attn_mask"] = causal_lower_right(query.size(2), key.size(2))
    return F.scaled_dot_product_attention(query, key, value, **options)


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, span: Span, *, scale: float | None
) -> Tensor:
    """Causal attention within each sequence of a part of a packed row.

    Args:
        query: ``[q, n, d]``, the queries of `span`.
        key: ``[k, g, d]``, its keys.
        value: As `key`.
        span: Where sequences start.
        scale: Factor of the scores; None for ``1 / sqrt(d)``.

    Returns:
        ``[q, n, d]``.
    """
    kernel = _varlen_kernel() if _has_flash(query) else None
    if kernel is not None:
        out = kernel(
            query,
            key,
            value,
            span.query_starts,
            span.key_starts,
            max(span.query_lengths),
            max(span.key_lengths),
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=True,
        )
        return cast(Tensor, out)
    queries = torch.split(query, span.query_lengths)
    keys, values = (torch.split(x, span.key_lengths) for x in (key, value))
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, lengths in enumerate(zip(span.query_lengths, span.key_lengths, strict=True)):
        alike[lengths].append(place)
    outputs: list[Tensor] = [query] * len(queries)
    # Sequences of one length are one batch: a call costs more than fifty tokens do.
    for places in alike.values():
        q, k, v = (
            torch.stack([parts[i] for i in places]).transpose(1, 2)
            for parts in (queries, keys, values)
        )
        out = attend(q, k, v, causal=True, scale=scale).transpose(1, 2)
        for place, one in zip(places, out.unbind(), strict=True):
            outputs[place] = one
    return torch.cat(outputs)


def _has_flash(tensor: Tensor) -> bool:
    """Whether the flash kernels of a CUDA device take this tensor."""
    return tensor.is_cuda and tensor.dtype in (torch.float16, torch.bfloat16)


@functools.cache
def _varlen_kernel() -> Callable[..., Any] | None:
    """PyTorch's packed flash attention, if this version's has grouped queries and windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa", "scale"} <= known.keys() else None


class _GatherZigzag(torch.autograd.Function):
    """Gather the chunks of all context-parallel ranks into sequence order, dimension 0.

    Backward sums every rank's gradient of a chunk on the rank that owns it.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        size = group.size()
        gathered = local.new_empty((size * local.size(0), *local.shape[1:]))
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        chunks = gathered.view(size, 2, -1, *local.shape[1:])
        return torch.cat((chunks[:, 0], chunks[:, 1].flip(0))).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        size = ctx.group.size()
        chunks = grad.reshape(2 * size, -1, *grad.shape[1:])
        by_rank = torch.stack((chunks[:size], chunks[size:].flip(0)), dim=1).flatten(0, 2)
        local = grad.new_empty((grad.size(0) // size, *grad.shape[1:]))
        dist.reduce_scatter_tensor(local, by_rank.contiguous(), group=ctx.group)
        return local, None
