"""Optimizer state in the shape of the model, whatever optimizer holds it.

Megatron's optimizers keep their state in flat buffers cut over data-parallel ranks (distributed
optimizer) or in whole tensors; the formats it saves them in either fix the layout or need
Transformer Engine or Apex. Here every state tensor is saved with the shape and sharding of its
parameter (``optimizer.state.exp_avg.<parameter>``), so that a checkpoint resumes under any
tensor, pipeline and data parallel size, with or without the distributed optimizer.

Saving spreads the work: parameter i is put together on data-parallel rank i mod n.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from megatron_cgn.engine.slots import MASTER, MOMENTS, Slot
from megatron_cgn.parallel import cpu
from megatron_cgn.parallel.state import ParallelState


def sharded_optimizer_state(
    slots: Sequence[Slot], model_state: ShardedStateDict, state: ParallelState
) -> ShardedStateDict:
    """Put the state of all parameters together for saving. Collective over dp_cp.

    Args:
        slots: All of the optimizer's.
        model_state: The model's sharded state dict, whose tensors are the parameters.
        state: This process's place in the layout.

    Returns:
        Sharded FP32 tensors on the CPU, by parameter and name.
    """
    group = state.groups.dp_cp
    sharded_params = _by_parameter(model_state)
    ranges: list[list[tuple[int, int]]] = [[] for _ in range(group.size())]
    dist.all_gather_object(ranges, [(slot.start, slot.end) for slot in slots], group=group)
    result: ShardedStateDict = {}
    for index, slot in enumerate(slots):
        writer = index % group.size()
        shares = [ranges[rank][index] for rank in range(group.size())]
        tensors = slot.tensors()
        for name in slot.names():
            whole = _assemble(
                tensors.get(name), shares, numel=slot.model_param.numel(), to=writer, group=group
            )
            if whole is not None:
                template = sharded_params[id(slot.model_param)]
                result[f"{index}.{name}"] = _like(template, name, whole, writes=True)
    return result


def empty_optimizer_state(
    slots: Sequence[Slot], model_state: ShardedStateDict, *, with_master: bool
) -> ShardedStateDict:
    """Describe what this rank needs to read, for `dist_checkpointing.load` to fill.

    Args:
        slots: Those of a freshly built optimizer.
        model_state: The model's sharded state dict.
        with_master: Whether the checkpoint holds FP32 master weights.

    Returns:
        Sharded FP32 tensors on the CPU, by parameter and name.
    """
    sharded_params = _by_parameter(model_state)
    result: ShardedStateDict = {}
    for index, slot in enumerate(slots):
        owned = slot.main_param is not None
        names = list(MOMENTS) if owned else []
        # An FP32 model takes a BF16 run's master weights, not the rounded ones.
        if with_master and (owned or not slot.has_master):
            names.append(MASTER)
        for name in names:
            data = torch.zeros(slot.model_param.shape, dtype=torch.float32)
            template = sharded_params[id(slot.model_param)]
            result[f"{index}.{name}"] = _like(template, name, data, writes=False)
    return result


def empty_master_weights(slots: Sequence[Slot], model_state: ShardedStateDict) -> ShardedStateDict:
    """Describe the master weights of this rank where the checkpoint's own weights are FP32.

    To be read by themselves: one reading cannot hold the same tensor in two types.

    Args:
        slots: Those of a freshly built optimizer.
        model_state: The model's sharded state dict.

    Returns:
        As `empty_optimizer_state`; empty if the optimizer has no master weights.
    """
    sharded_params = _by_parameter(model_state)
    return {
        f"{index}.{MASTER}": _like(
            sharded_params[id(slot.model_param)],
            None,
            torch.zeros(slot.model_param.shape, dtype=torch.float32),
            writes=False,
        )
        for index, slot in enumerate(slots)
        if slot.main_param is not None and slot.has_master
    }


@torch.no_grad()
def fill_optimizer_state(
    slots: Sequence[Slot],
    loaded: dict[str, Any],
    optimizer_steps: int,
    *,
    group_steps: Mapping[str, int] | None = None,
) -> None:
    """Put loaded state into the optimizer, and exact weights into an FP32 model.

    Args:
        slots: Those that `empty_optimizer_state` was called with.
        loaded: The filled state dict.
        optimizer_steps: Updates done, which Adam's bias correction counts; skipped steps are none.
        group_steps: The same of every group by its name, where groups are not all alike.
    """
    for index, slot in enumerate(slots):
        master = loaded.get(f"{index}.{MASTER}")
        if master is not None and not slot.has_master:
            slot.model_param.copy_(master.view(slot.model_param.shape))
        if slot.main_param is None:
            continue
        if master is not None and slot.has_master:
            slot.main_param.view(-1).copy_(master.view(-1)[slot.start : slot.end])
        for piece in slot.pieces:
            steps = optimizer_steps if group_steps is None else group_steps[piece.group["name"]]
            inner_state = slot.inner.state[piece.tensor]
            for name in MOMENTS:
                part = loaded[f"{index}.{name}"].view(-1)[piece.start : piece.end]
                moment = torch.empty_like(piece.tensor, dtype=torch.float32)
                inner_state[name] = moment.copy_(part.view(moment.shape))
            # PyTorch's AdamW counts steps per parameter, the fused ones per group.
            if isinstance(slot.inner, torch.optim.Adam):
                inner_state["step"] = torch.tensor(float(steps), dtype=torch.float32)
            else:
                piece.group["step"] = steps


def has_master_weights(slots: Sequence[Slot]) -> bool:
    """Whether the optimizer keeps FP32 copies of the weights."""
    return any(slot.has_master for slot in slots)


def _by_parameter(model_state: ShardedStateDict) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    return {id(entry.data): entry for entry in nested_values(sharded)}


def _like(
    template: ShardedTensor | ShardedTensorFactory,
    name: str | None,
    data: Tensor,
    *,
    writes: bool,
) -> ShardedTensor | ShardedTensorFactory:
    """Shard `data` like the parameter, under the optimizer's name, or under its own for None."""
    key = template.key if name is None else f"optimizer.state.{name}.{template.key}"
    changes: dict[str, Any] = {"key": key}
    if writes:
        # The last entry of a replica id counts data-parallel copies; this is the only one.
        changes["replica_id"] = (*template.replica_id[:-1], 0)
    if isinstance(template, ShardedTensor):
        changes["dtype"] = data.dtype
    changes["data"] = data.view(template.data.shape)
    return replace(template, **changes)


def _assemble(
    part: Tensor | None,
    shares: list[tuple[int, int]],
    *,
    numel: int,
    to: int,
    group: dist.ProcessGroup,
) -> Tensor | None:
    """Gather the slices of one flat tensor on one rank of a group. Collective over the group.

    Args:
        part: This rank's slice, or None if its share is empty.
        shares: ``(start, end)`` of every rank; equal shares are copies of one another.
        numel: Elements of the whole.
        to: The group rank that receives.
        group: Data-parallel ranks.

    Returns:
        The whole on the CPU, on rank `to`; None elsewhere.
    """
    rank = group.rank()
    if shares[to] == (0, numel):  # nothing to send: every rank has it all
        return part.cpu() if rank == to and part is not None else None
    if rank != to:
        if part is not None and part.numel():
            _exchange([dist.P2POp(dist.isend, part.contiguous(), group=group, group_peer=to)])
        return None
    received = {
        source: torch.empty(end - start, dtype=torch.float32, device=cpu.device())
        for source, (start, end) in enumerate(shares)
        if start < end and source != rank
    }
    _exchange(
        [
            dist.P2POp(dist.irecv, tensor, group=group, group_peer=source)
            for source, tensor in received.items()
        ]
    )
    if part is not None:
        received[rank] = part
    whole = torch.empty(numel, dtype=torch.float32)
    for source, tensor in received.items():
        whole[slice(*shares[source])].copy_(tensor)
    return whole


def _exchange(operations: list[dist.P2POp]) -> None:
    """Send and receive at once: NCCL then uses the group's communicator, not one for every pair."""
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
