"""Optimizer state in the shape of the model, whatever optimizer holds it.

Megatron's optimizers keep their state in flat buffers cut over data-parallel ranks (distributed
optimizer) or in whole tensors; the formats it saves them in either fix the layout or need
Transformer Engine or Apex. Here every state tensor is saved with the shape and sharding of its
parameter (``optimizer.state.exp_avg.<parameter>``), so that a checkpoint resumes under any
tensor, pipeline and data parallel size, with or without the distributed optimizer.

Saving spreads the work: parameter i is put together on data-parallel rank i mod n.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
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
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from torch import Tensor

from megatron_cgn.engine.optim import leaves
from megatron_cgn.parallel import cpu
from megatron_cgn.parallel.state import ParallelState

MASTER = "fp32_param"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    """Where one model parameter's optimizer state lives on this rank.

    Attributes:
        model_param: The parameter of the model.
        main_param: What the inner optimizer updates: an FP32 copy, a slice of one, or the
            parameter itself. None where other data-parallel ranks own it all.
        start: First element of the flattened parameter that `main_param` covers.
        end: One past the last.
        inner: The PyTorch optimizer.
        group: The inner optimizer's parameter group.
    """

    model_param: Tensor
    main_param: Tensor | None
    start: int
    end: int
    inner: torch.optim.Optimizer
    group: dict[str, Any]

    @property
    def has_master(self) -> bool:
        """Whether the FP32 weights are not simply the model's own."""
        return self.model_param.dtype != torch.float32

    def tensors(self) -> dict[str, Tensor]:
        """This rank's flat state tensors by name; empty if it owns none."""
        if self.main_param is None:
            return {}
        # Without state yet, every step so far was skipped (FP16 overflows): moments are zero.
        state = self.inner.state.get(self.main_param)
        if not state:
            zeros = torch.zeros_like(self.main_param, dtype=torch.float32)
            state = dict.fromkeys(MOMENTS, zeros)
        named = {name: state[name] for name in MOMENTS}
        if self.has_master:
            named[MASTER] = self.main_param.data
        return {name: tensor.detach().view(-1) for name, tensor in named.items()}

    def names(self) -> tuple[str, ...]:
        """Names of the state tensors, the same on every rank."""
        return (*MOMENTS, MASTER) if self.has_master else MOMENTS


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model_state: ShardedStateDict, state: ParallelState
) -> ShardedStateDict:
    """Put the state of all parameters together for saving. Collective over dp_cp.

    Args:
        optimizer: Megatron's.
        model_state: The model's sharded state dict, whose tensors are the parameters.
        state: This process's place in the layout.

    Returns:
        Sharded FP32 tensors on the CPU, by parameter and name.
    """
    group = state.groups.dp_cp
    sharded_params = _by_parameter(model_state)
    slots = list(_slots(optimizer))
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
    optimizer: MegatronOptimizer, model_state: ShardedStateDict, *, with_master: bool
) -> ShardedStateDict:
    """Describe what this rank needs to read, for `dist_checkpointing.load` to fill.

    Args:
        optimizer: Freshly built.
        model_state: The model's sharded state dict.
        with_master: Whether the checkpoint holds FP32 master weights.

    Returns:
        Sharded FP32 tensors on the CPU, by parameter and name.
    """
    sharded_params = _by_parameter(model_state)
    result: ShardedStateDict = {}
    for index, slot in enumerate(_slots(optimizer)):
        owned = slot.main_param is not None
        names = list(MOMENTS) if owned else []
        # An FP32 model takes a BF16 run's master weights, not the rounded ones.
        if with_master and (owned or not slot.has_master):
            names.append(MASTER)
        for name in names:
            data = torch.empty(slot.model_param.shape, dtype=torch.float32)
            template = sharded_params[id(slot.model_param)]
            result[f"{index}.{name}"] = _like(template, name, data, writes=False)
    return result


def empty_master_weights(
    optimizer: MegatronOptimizer, model_state: ShardedStateDict
) -> ShardedStateDict:
    """Describe the master weights of this rank where the checkpoint's own weights are FP32.

    To be read by themselves: one reading cannot hold the same tensor in two types.

    Args:
        optimizer: Freshly built.
        model_state: The model's sharded state dict.

    Returns:
        As `empty_optimizer_state`; empty if the optimizer has no master weights.
    """
    sharded_params = _by_parameter(model_state)
    return {
        f"{index}.{MASTER}": _like(
            sharded_params[id(slot.model_param)],
            None,
            torch.empty(slot.model_param.shape, dtype=torch.float32),
            writes=False,
        )
        for index, slot in enumerate(_slots(optimizer))
        if slot.main_param is not None and slot.has_master
    }


@torch.no_grad()
def fill_optimizer_state(
    optimizer: MegatronOptimizer, loaded: dict[str, Any], optimizer_steps: int
) -> None:
    """Put loaded state into the optimizer, and exact weights into an FP32 model.

    Args:
        optimizer: The one that `empty_optimizer_state` was called with.
        loaded: The filled state dict.
        optimizer_steps: Updates done, which Adam's bias correction counts; skipped steps are none.
    """
    for index, slot in enumerate(_slots(optimizer)):
        master = loaded.get(f"{index}.{MASTER}")
        if master is not None and not slot.has_master:
            slot.model_param.copy_(master.view(slot.model_param.shape))
        if slot.main_param is None:
            continue
        if master is not None and slot.has_master:
            slot.main_param.view(-1).copy_(master.view(-1)[slot.start : slot.end])
        inner_state = slot.inner.state[slot.main_param]
        for name in MOMENTS:
            part = loaded[f"{index}.{name}"].view(-1)[slot.start : slot.end]
            moment = torch.empty_like(slot.main_param, dtype=torch.float32)
            inner_state[name] = moment.copy_(part.view(moment.shape))
        # PyTorch's AdamW counts steps per parameter, the fused ones per group.
        if isinstance(slot.inner, torch.optim.Adam):
            inner_state["step"] = torch.tensor(float(optimizer_steps), dtype=torch.float32)
        else:
            slot.group["step"] = optimizer_steps


def has_master_weights(optimizer: MegatronOptimizer) -> bool:
    """Whether the optimizer keeps FP32 copies of the weights."""
    return any(slot.has_master for slot in _slots(optimizer))


def _slots(optimizer: MegatronOptimizer) -> Iterator[_Slot]:
    """Every trained parameter of this rank, in an order that all data-parallel ranks share."""
    for leaf in leaves(optimizer):
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
                yield from _whole_slots(
                    zip(group["params"], group["params"], strict=True), leaf.optimizer, group
                )


def _whole_slots(
    pairs: Iterable[tuple[Tensor, Tensor]], inner: torch.optim.Optimizer, group: dict[str, Any]
) -> Iterator[_Slot]:
    for model_param, main_param in pairs:
        yield _Slot(
            model_param=model_param,
            main_param=main_param,
            start=0,
            end=model_param.numel(),
            inner=inner,
            group=group,
        )


def _distributed_slots(leaf: DistributedOptimizer) -> Iterator[_Slot]:
    owned = leaf.model_param_group_index_map
    for buffer in leaf.buffers:
        for model_param in buffer.param_index_map:
            main_param, start, end, group = None, 0, 0, leaf.optimizer.param_groups[0]
            if model_param in owned:
                group_index, position = owned[model_param]
                group = leaf.optimizer.param_groups[group_index]
                main_param = group["params"][position]
                part = leaf._get_model_param_range_map(model_param)["param"]
                start, end = part.start, part.end
            yield _Slot(
                model_param=model_param,
                main_param=main_param,
                start=start,
                end=end,
                inner=leaf.optimizer,
                group=group,
            )


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
