"""The adapters of one Megatron linear layer: ``out + scaling * B A dropout(x)``.

Hu et al. 2021, https://arxiv.org/abs/2106.09685. With DoRA (Liu et al. 2024,
https://arxiv.org/abs/2402.09353) each row of ``W + scaling * B A`` is divided by its length, which
is held constant in the backward pass, and multiplied by a trained magnitude; unlike in `peft`,
dropout then does not touch what ``W`` alone gives.

The adapters of fused matrices are computed together: one product with all ``A``, one communication
of that narrow result, and one product with all ``B``, laid out like the fused rows, that is added
to the layer's output in the same kernel.
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
        # In a tuple, so that PyTorch does not count the layer among the adapters' modules.
        self._base = (base,)
        self._squares: tuple[tuple[int, int], Tensor] | None = None
        weight = self.base_weight
        for entry in self.entries:
            self.register_parameter(parameter_name(entry), self._parameter(entry, weight, seed))

    @property
    def base_weight(self) -> Tensor:
        """This rank's share of the weight that is adapted."""
        weight = self._base[0].weight
        assert isinstance(weight, Tensor)
        return weight

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
        # In the run's own type also where `matmul.py` has a wider one: products with so narrow
        # matrices cost less than converting what they are added to (15 ms against 22 ms of a CPU
        # for 1,024 tokens of a gate and up projection of rank 16, both ways).
        low = self._communicate(self._down(x))
        bias = self._base[0].bias if self.lora.use_dora else None
        if bias is not None:  # the length of a row is no business of its bias
            assert isinstance(bias, Tensor)
            out = out - bias
        added = torch.addmm(
            out.flatten(0, -2), low.flatten(0, -2), self._up().t(), alpha=self.scaling
        ).view_as(out)
        if self.lora.use_dora:
            added = added * self._ratio(self._lengths())
        return added if bias is None else added + bias

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What the adapters add to this rank's share of the fused weight, in FP32.

        Collective over tp with DoRA.
        """
        change = self.scaling * (self._up().float() @ self._all_a().float())
        if not self.lora.use_dora:
            return change
        weight = self.base_weight.float()
        merged = change.add_(weight)
        # Not by `_lengths`, which are rounded to the type of the weight as the forward pass needs.
        squares = merged.square().sum(1)
        if not self._column and self.tp_group.size() > 1:
            torch.distributed.all_reduce(squares, group=self.tp_group)
        return merged.mul_(self._ratio(squares.sqrt_()).unsqueeze(1)).sub_(weight)

    @torch.no_grad()
    def start_magnitudes(self) -> None:
        """Set magnitudes that have no value yet to the lengths of the rows. Collective over tp."""
        self._squares = None  # of weights before they were loaded
        lengths = self._by_target(self._lengths()) if self.lora.use_dora else {}
        for target, length in lengths.items():
            magnitude = self._tensor(target, "lora_magnitude_vector")
            if not magnitude.any():
                magnitude.copy_(length)

    def _ratio(self, lengths: Tensor) -> Tensor:
        """Magnitude over length of each row of the fused weight; 1 where nothing is adapted."""
        known = self._by_target(lengths)
        magnitudes: dict[str, Tensor] = {
            target: self._tensor(target, "lora_magnitude_vector") / known[target].to(lengths.dtype)
            for target in known
        }
        groups = self._groups()
        blocks = [
            magnitudes[target].view(groups, rows)
            if target in magnitudes
            else lengths.new_ones(groups, rows)
            for target, rows in zip(self.fusion.targets, self._rows(), strict=True)
        ]
        return torch.cat(blocks, dim=1).flatten()

    def _by_target(self, rows: Tensor) -> dict[str, Tensor]:
        """Cut a value of each row of the fused weight into those of the adapted matrices."""
        blocks = torch.split(rows.view(self._groups(), -1), self._rows(), dim=1)
        parts = zip(self.fusion.targets, blocks, strict=True)
        return {target: part.flatten() for target, part in parts if target in self.targets}

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        """Length of each row of ``W + scaling * B A``, in the type of `W`. Collective over tp.

        The squared length is ``|w|² + 2 s b·(A w) + s² b·(A Aᵀ b)`` for a row ``w`` and its ``b``:
        unlike the sum itself it needs no more memory than the adapters. The first term stays.
        """
        weight, a, up = self.base_weight, self._all_a(), self._up().float()
        version = weight.data_ptr(), weight._version
        if self._squares is None or self._squares[0] != version:
            squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
            self._squares = version, squares
        cross = ((weight @ a.t()).float() * up).sum(1)
        square = ((up @ (a.float() @ a.float().t())) * up).sum(1)
        total = self._squares[1] + 2 * self.scaling * cross + self.scaling**2 * square
        if not self._column and self.tp_group.size() > 1:
            torch.distributed.all_reduce(total, group=self.tp_group)
        # Lengths of real matrices are nowhere near zero; rounding must not make a root imaginary.
        return total.clamp_min(torch.finfo(torch.float32).tiny).sqrt().to(weight.dtype)

    def _groups(self) -> int:
        """How often the order of matrices repeats in this rank's rows."""
        size = self.tp_group.size() if self._column else 1
        # Key/value heads are shared out whole; gate and up are each cut.
        return max(self.fusion.groups // size, 1)

    def _rows(self) -> list[int]:
        """Rows of each matrix in one group of this rank's rows."""
        size = self.tp_group.size() if self._column and self.fusion.groups == 1 else 1
        return [rows // size for rows in self.fusion.rows]

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
        groups = self._groups()
        rank, count = self._tensor(self.targets[0], "lora_A").size(0), len(self.targets)
        blocks = []
        for target, rows in zip(self.fusion.targets, self._rows(), strict=True):
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
