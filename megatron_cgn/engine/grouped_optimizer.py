"""A Megatron optimizer whose groups of parameters and rows have rates and times of their own.

Megatron builds gradient buffers and master weights once, by whole parameters. Here the *inner*
PyTorch optimizer is given other tensors to update: where the rows of one weight belong to
different groups, views of the master weights that hold just those rows. Rows are consecutive in
memory, so that a view of a rank's share does it on every tensor and data parallel layout; weights,
gradients and their communication stay where Megatron has them.

A frozen group's gradients are taken away after they are reduced and before the norm is taken, so
neither the norm, clipping, weight decay nor moments know it, and Adam counts no step for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer, copy_optimizer_param_metadata
from torch import Tensor, nn

from megatron_cgn.engine.optim import leaves
from megatron_cgn.engine.param_groups import Group, Grouping, Key
from megatron_cgn.engine.slots import Piece, Slot
from megatron_cgn.hf.load import model_parameters
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.lora import adapter_parameters


class GroupedOptimizer:
    """Steps of an optimizer by groups."""

    def __init__(
        self,
        optimizer: MegatronOptimizer,
        slots: Sequence[Slot],
        chunks: Sequence[nn.Module],
        *,
        grouping: Grouping,
        architecture: Architecture,
        tp_rank: int,
    ) -> None:
        """Put the inner optimizer's tensors into groups; its state must still be empty.

        Args:
            optimizer: Megatron's, freshly built.
            slots: All of its slots.
            chunks: This rank's model chunks.
            grouping: What belongs together.
            architecture: The model.
            tp_rank: Which share of the vocabulary's rows this rank has.
        """
        self.grouping = grouping
        self.steps = dict.fromkeys((group.name for group in grouping.groups), 0)
        """Updates done, by group."""
        self._optimizer = optimizer
        keys: dict[int, Key] = {
            id(weight): (entry.layer, entry.key)
            for entry, weight in model_parameters(chunks, architecture)
        }
        keys |= {id(weight): (None, entry.key) for entry, weight in adapter_parameters(chunks)}
        self._groups = _InnerGroups()
        self.slots = [
            self._place(slot, grouping.of(keys[id(slot.model_param)]), tp_rank=tp_rank)
            for slot in slots
        ]
        """The slots given, with pieces by group."""
        for leaf in leaves(optimizer):
            found = self._groups.of(leaf.optimizer)
            if found:  # else this rank owns nothing, and keeps Megatron's empty groups
                leaf.optimizer.param_groups = found

    def rates(self, lr: float, step: int) -> dict[str, float]:
        """Learning rates for the record, of the groups that ever have another than the run's.

        Args:
            lr: The run's learning rate of this step.
            step: Number of the step, from 1.

        Returns:
            Rates by ``lr/<group>``; 0 for a group that the step leaves as it is.
        """
        return {
            f"lr/{group.name}": lr * group.lr_mult if group.trains(step) else 0.0
            for group in self.grouping.groups
            if group.name and group.differs
        }

    @torch.no_grad()
    def step(self, step: int) -> tuple[bool, float | None]:
        """Update what a step trains, from reduced gradients. Collective over all ranks.

        Args:
            step: Number of the step, from 1.

        Returns:
            Whether weights were updated, and the norm of the gradients of what the step trains;
            None if FP16 gradients overflowed.
        """
        self._hand_out_gradients()
        if self._optimizer.prepare_grads():
            return False, None
        trained = {group.name for group in self.grouping.groups if group.trains(step)}
        for piece in self._pieces():
            if piece.group["name"] not in trained:
                piece.tensor.grad = None
        norm = self._optimizer.get_grad_norm()
        tensors = [p.tensor for p in self._pieces() if p.tensor.grad is not None]
        clip = self._optimizer.config.clip_grad
        if clip > 0.0 and tensors:  # the fused kernels refuse an empty list
            clip_grad_by_total_norm_fp32(tensors, max_norm=clip, total_norm=norm)
        self._count_fused_steps()
        success = bool(self._optimizer.step_with_ready_grads())
        for name in trained if success else ():
            self.steps[name] += 1
        return success, norm

    def record(self) -> list[dict[str, Any]]:
        """How often each group was updated, for a checkpoint."""
        return self.grouping.record(self.steps)

    def restore(self, record: Sequence[Mapping[str, Any]] | None, optimizer_steps: int) -> None:
        """Take over from a checkpoint how often each group was updated.

        Args:
            record: From `record`, or None if the checkpoint was written without groups.
            optimizer_steps: Updates of what the record does not know.
        """
        self.steps = self.grouping.restored_steps(record, optimizer_steps)

    def _pieces(self) -> list[Piece]:
        return [piece for slot in self.slots for piece in slot.pieces]

    def _hand_out_gradients(self) -> None:
        """Give views of master weights their views of the gradients; Megatron knows only wholes.

        Gradients are FP32 in Megatron's buffers, where it unscales and clips them too.
        """
        for slot in self.slots:
            if len(slot.pieces) < 2:
                continue
            gradient: Any = slot.model_param.main_grad  # type: ignore[attr-defined]
            for piece in slot.pieces:
                piece.tensor.grad = gradient.view(-1)[piece.start : piece.end]

    def _count_fused_steps(self) -> None:
        """Fused AdamW counts steps by group, whether or not the group has gradients."""
        for leaf in leaves(self._optimizer):
            if not isinstance(leaf.optimizer, torch.optim.Adam):
                for group in self._groups.of(leaf.optimizer):
                    group["step"] = self.steps[group["name"]]

    def _place(self, slot: Slot, parts: Sequence[tuple[Group, int, int]], *, tp_rank: int) -> Slot:
        """Put a slot's tensor, cut where its rows change groups, into inner groups."""
        if slot.main_param is None:
            return slot
        (old,) = slot.pieces
        num_rows = slot.model_param.shape[0]
        width = slot.model_param.numel() // num_rows
        # Only a vocabulary's rows are cut, and they are shared out in order.
        shift = tp_rank * num_rows
        pieces = []
        for group, low, high in parts:
            start = max(slot.start, min(max(low - shift, 0), num_rows) * width)
            end = min(slot.end, min(max(high - shift, 0), num_rows) * width)
            if start < end:
                inner_group = self._groups.like(slot.inner, old.group, group)
                tensor = _view(slot, start, end)
                inner_group["params"].append(tensor)
                pieces.append(Piece(tensor=tensor, start=start, end=end, group=inner_group))
        return replace(slot, pieces=tuple(pieces))


class _InnerGroups:
    """New groups of PyTorch optimizers, each like one of Megatron's but for our settings."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int, str], dict[str, Any]] = {}

    def like(
        self, inner: torch.optim.Optimizer, old: Mapping[str, Any], group: Group
    ) -> dict[str, Any]:
        """The group with one of Megatron's groups' fields and a group's settings."""
        key = (id(inner), id(old), group.name)
        if key not in self._made:
            made = {name: value for name, value in old.items() if name != "params"}
            made |= {"params": [], "name": group.name, "lr_mult": group.lr_mult}
            if group.weight_decay is not None:
                made["own_weight_decay"] = group.weight_decay
            self._made[key] = made
        return self._made[key]

    def of(self, inner: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """All groups made for an optimizer."""
        return [group for (owner, _, _), group in self._made.items() if owner == id(inner)]


def _view(slot: Slot, start: int, end: int) -> Tensor:
    """A part of a slot's master weights, with what Megatron's norm asks of a parameter."""
    main = slot.main_param
    assert main is not None
    if (start, end) == (slot.start, slot.end):
        return main
    view = main.detach().view(-1)[start - slot.start : end - slot.start]
    tensor_parallel.copy_tensor_model_parallel_attributes(view, slot.model_param)
    copy_optimizer_param_metadata(view, slot.model_param)
    return view
