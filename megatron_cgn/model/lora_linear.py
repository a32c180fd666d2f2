"""The adapters of one Megatron linear layer: ``out + scaling * B A dropout(x)``.

Hu et al. 2021, https://arxiv.org/abs/2106.09685. The adapters of fused matrices are computed
together: one product with all ``A``, one communication of that narrow result, and one product with
all ``B``, laid out like the fused rows, that is added to the layer's output in the same kernel.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_cgn.config.schema import LoraConfig
from megatron_cgn.model.lora_layout import AdapterEntry, Fusion, scaling

REPLICATED_RNG, SHARDED_RNG = "adapter-replicated", "adapter-sharded"
"""Random states of dropout in Megatron's tracker; recomputation replays them."""


class LinearAdapter(nn.Module):
    """Adapters of the matrices that one linear layer is made of.

    Args:
        fusion: The linear layer.
        layer: Global index of its transformer layer.
        lora: Settings.
        base: The ``ColumnParallelLinear`` or ``RowParallelLinear``; not made a submodule.
        tp_group: Tensor-parallel group.
        sequence_parallel: Whether activations outside the layers are split over that group.
        seed: Draws every ``A``, alike on every layout and device.
    """

    def __init__(
        self,
        fusion: Fusion,
        *,
        layer: int,
        lora: LoraConfig,
        base: nn.Module,
        tp_group: torch.distributed.ProcessGroup,
        sequence_parallel: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.fusion, self.lora = fusion, lora
        self.scaling = scaling(lora)
        self.enabled = True
        self.targets = tuple(t for t in fusion.targets if t in lora.targets)
        self.entries = tuple(fusion.entries(layer, lora))
        self.tp_group = tp_group
        self.sequence_parallel = sequence_parallel
        self._column = fusion.parallel == "column"
        weight = base.weight
        assert isinstance(weight, Tensor)
        for entry in self.entries:
            self.register_parameter(parameter_name(entry), self._parameter(entry, weight, seed))

    def _parameter(self, entry: AdapterEntry, like: Tensor, seed: int) -> nn.Parameter:
        """This rank's share of a tensor with its first value, marked as Megatron's norm needs."""
        whole = _first_value(entry, seed=seed)
        share = whole
        if entry.tp_dim is not None:
            share = whole.chunk(self.tp_group.size(), dim=entry.tp_dim)[self.tp_group.rank()]
        parameter = nn.Parameter(share.to(device=like.device, dtype=like.dtype).contiguous())
        split = entry.tp_dim is not None
        set_tensor_model_parallel_attributes(
            parameter, split, entry.tp_dim if entry.tp_dim is not None else -1, 1
        )
        marked: Any = parameter
        marked.allreduce = True
        # Each rank then sees its own tokens only, and Megatron must sum this gradient over ranks.
        marked.sequence_parallel = self.sequence_parallel and not split
        return parameter

    def named_entries(self) -> Iterator[tuple[AdapterEntry, nn.Parameter]]:
        """Every trained tensor of this rank, with what it is of the whole."""
        for entry in self.entries:
            yield entry, self._tensor(entry.target, entry.part)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Add the adapters to the layer's output. Collective over tp.

        Args:
            x: The layer's input ``[s, b, columns]``: column-parallel the whole width, row-parallel
                this rank's columns.
            out: The layer's output ``[s, b, rows]`` (column-parallel: this rank's rows).

        Returns:
            Same shape and type as `out`.
        """
        low = self._communicate(self._down(x))
        added = torch.addmm(
            out.flatten(0, -2), low.flatten(0, -2), self._up().t(), alpha=self.scaling
        )
        return added.view_as(out)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What the adapters add to this rank's share of the fused weight, in FP32."""
        return self.scaling * (self._up().float() @ self._all_a().float())

    def _down(self, x: Tensor) -> Tensor:
        """``A dropout(x)`` of all adapters, ``[s, b, adapters * rank]``."""
        if not (self.training and self.lora.dropout > 0.0):
            return F.linear(x, self._all_a())
        # An input that all ranks have must lose the same elements on all of them.
        replicated = self._column and not self.sequence_parallel
        name = REPLICATED_RNG if replicated else SHARDED_RNG
        with tensor_parallel.get_cuda_rng_tracker().fork(name):
            parts = [
                F.linear(F.dropout(x, self.lora.dropout), self._tensor(target, "lora_A"))
                for target in self.targets
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _communicate(self, low: Tensor) -> Tensor:
        """Bring ``A x`` to where ``B`` needs it, and gradients back."""
        if self.tp_group.size() == 1:
            return low
        group = self.tp_group
        result: Tensor
        if self._column and self.sequence_parallel:
            result = tensor_parallel.gather_from_sequence_parallel_region(low, group=group)
        elif self._column:
            result = tensor_parallel.copy_to_tensor_model_parallel_region(low, group=group)
        elif self.sequence_parallel:
            result = tensor_parallel.reduce_scatter_to_sequence_parallel_region(low, group=group)
        else:
            result = tensor_parallel.reduce_from_tensor_model_parallel_region(low, group=group)
        return result

    def _tensor(self, target: str, part: str) -> nn.Parameter:
        return self.get_parameter(f"{target}_{part}")

    def _all_a(self) -> Tensor:
        """Every ``A``, one below the other: ``[adapters * rank, columns]``."""
        parts: list[Tensor] = [self._tensor(target, "lora_A") for target in self.targets]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _up(self) -> Tensor:
        """Every ``B`` in the rows of the fused weight: ``[rows, adapters * rank]``.

        Each has columns of its own; the rest is zero. That is a few times the arithmetic of the
        products one by one, which is little beside the layer's own, and one pass over its output.
        """
        if len(self.fusion.targets) == 1:
            return self._tensor(self.targets[0], "lora_B")
        size = self.tp_group.size() if self._column else 1
        # Key/value heads are shared out whole; gate and up are each cut.
        groups = max(self.fusion.groups // size, 1)
        rank, count = self._tensor(self.targets[0], "lora_A").size(0), len(self.targets)
        blocks = []
        for target, rows in zip(self.fusion.targets, self.fusion.rows, strict=True):
            rows = rows if self.fusion.groups > 1 else rows // size
            if target in self.targets:
                place = self.targets.index(target)
                part = self._tensor(target, "lora_B").view(groups, -1, rank)
                blocks.append(F.pad(part, (place * rank, (count - 1 - place) * rank)))
            else:
                like = self._tensor(self.targets[0], "lora_B")
                blocks.append(like.new_zeros(groups, rows, count * rank))
        return torch.cat(blocks, dim=1).flatten(0, 1)


def parameter_name(entry: AdapterEntry) -> str:
    """Name of an entry's parameter within its `LinearAdapter`."""
    return f"{entry.target}_{entry.part}"


def _first_value(entry: AdapterEntry, *, seed: int) -> Tensor:
    """A whole tensor as `peft` starts it: ``A`` uniform within ±1/sqrt(columns), ``B`` zero."""
    if entry.part != "lora_A":
        return torch.zeros(entry.shape)
    digest = hashlib.blake2b(f"{seed}/{entry.key}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    limit = 1.0 / math.sqrt(entry.shape[1])
    return torch.empty(entry.shape).uniform_(-limit, limit, generator=generator)
