"""Where the optimizer state of each parameter lives, whatever optimizer holds it.

Megatron's optimizers update FP32 copies of the weights, slices of such copies (distributed
optimizer), or the weights themselves. A `Slot` says which for one parameter of the model, and a
`Piece` what PyTorch's optimizer in it updates: usually all of that, and only some rows of it
where `optim.param_groups` treats the rows of one weight differently.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from torch import Tensor

MASTER = "fp32_param"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What the inner optimizer updates as one tensor.

    Attributes:
        tensor: The tensor, in one of the inner optimizer's groups.
        start: First element of the flattened model parameter that it covers.
        end: One past the last.
        group: The inner optimizer's parameter group.
    """

    tensor: Tensor
    start: int
    end: int
    group: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one model parameter's optimizer state lives on this rank.

    Attributes:
        model_param: The parameter of the model.
        main_param: The FP32 weights that are updated: a copy, a slice of one, or the parameter
            itself. None where other data-parallel ranks own it all.
        start: First element of the flattened parameter that `main_param` covers.
        end: One past the last.
        pieces: Parts of `main_param` from `start` to `end`, in order.
        inner: The PyTorch optimizer.
    """

    model_param: Tensor
    main_param: Tensor | None
    start: int
    end: int
    pieces: tuple[Piece, ...]
    inner: torch.optim.Optimizer

    @property
    def has_master(self) -> bool:
        """Whether the FP32 weights are not simply the model's own."""
        return self.model_param.dtype != torch.float32

    def tensors(self) -> dict[str, Tensor]:
        """This rank's flat state tensors by name; empty if it owns none."""
        if self.main_param is None:
            return {}
        moments = [self._moments(piece) for piece in self.pieces]
        named = {
            name: moments[0][name] if len(moments) == 1 else torch.cat([m[name] for m in moments])
            for name in MOMENTS
        }
        if self.has_master:
            named[MASTER] = self.main_param.detach().view(-1)
        return named

    def names(self) -> tuple[str, ...]:
        """Names of the state tensors, the same on every rank."""
        return (*MOMENTS, MASTER) if self.has_master else MOMENTS

    def _moments(self, piece: Piece) -> dict[str, Tensor]:
        # No state yet: every step so far was skipped (FP16 overflows), or left it as it is.
        state = self.inner.state.get(piece.tensor)
        if not state:
            zeros = torch.zeros_like(piece.tensor, dtype=torch.float32).view(-1)
            return dict.fromkeys(MOMENTS, zeros)
        return {name: state[name].detach().view(-1) for name in MOMENTS}


def slots_of(optimizers: Sequence[MegatronOptimizer]) -> list[Slot]:
    """Every trained parameter of this rank, in an order that all data-parallel ranks share.

    Args:
        optimizers: Megatron's, none of them chained.

    Returns:
        One slot a parameter, of one piece each, or of none where other ranks own it.
    """
    return [slot for optimizer in optimizers for slot in _slots(optimizer)]


def _slots(leaf: MegatronOptimizer) -> Iterator[Slot]:
    if isinstance(leaf, DistributedOptimizer):
        yield from _distributed_slots(leaf)
    elif isinstance(leaf, Float16OptimizerWithFloat16Params):
        for models, mains, group in zip(
            leaf.float16_groups + leaf.fp32_from_fp32_groups,
            leaf.fp32_from_float16_groups + leaf.fp32_from_fp32_groups,
            leaf.optimizer.param_groups * 2,
            strict=True,
        ):
            yield from _whole_slots(zip(models, mains, strict=True), leaf.optimizer, group)
    else:
        for group in leaf.optimizer.param_groups:
            pairs = zip(group["params"], group["params"], strict=True)
            yield from _whole_slots(pairs, leaf.optimizer, group)


def _whole_slots(
    pairs: Iterable[tuple[Tensor, Tensor]], inner: torch.optim.Optimizer, group: dict[str, Any]
) -> Iterator[Slot]:
    for model_param, main_param in pairs:
        yield _slot(model_param, main_param, (0, model_param.numel()), inner=inner, group=group)


def _distributed_slots(leaf: DistributedOptimizer) -> Iterator[Slot]:
    owned = leaf.model_param_group_index_map
    for buffer in leaf.buffers:
        for model_param in buffer.param_index_map:
            main_param, span, group = None, (0, 0), leaf.optimizer.param_groups[0]
            if model_param in owned:
                group_index, position = owned[model_param]
                group = leaf.optimizer.param_groups[group_index]
                main_param = group["params"][position]
                part = leaf._get_model_param_range_map(model_param)["param"]
                span = part.start, part.end
            yield _slot(model_param, main_param, span, inner=leaf.optimizer, group=group)


def _slot(
    model_param: Tensor,
    main_param: Tensor | None,
    span: tuple[int, int],
    *,
    inner: torch.optim.Optimizer,
    group: dict[str, Any],
) -> Slot:
    start, end = span
    piece = (
        [Piece(tensor=main_param, start=start, end=end, group=group)]
        if main_param is not None
        else []
    )
    return Slot(
        model_param=model_param,
        main_param=main_param,
        start=start,
        end=end,
        pieces=tuple(piece),
        inner=inner,
    )
