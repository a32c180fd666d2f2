"""Collect what ranks hold in shares, tensor by tensor, and write it as one directory.

Each pipeline stage's first tensor-parallel rank receives one share of a parameter at a time,
puts the shares together in main memory, and writes the whole at its planned place in the stage's
own files. So no device holds more than its own share and another rank's. What fits one file is
written by the first stage, to which the others send.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_cgn.errors import ModelError
from megatron_cgn.hf.files import (
    check_free_space,
    directory_to_write,
    disk_fault,
    replace_directory,
    work_directory,
)
from megatron_cgn.hf.safetensors_io import ShardPlan, ShardWriter, TensorTypes


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Tensors of which this rank has a share.

    Attributes:
        types: The whole tensors, as they shall be written.
        device: Where the share is; tensors go to other stages through it.
        collect: Puts the tensors together in main memory. Collective over tp; what it returns
            matters on the group's first rank only.
    """

    types: TensorTypes
    device: torch.device
    collect: Callable[[], Mapping[str, Tensor]]


def once_for_replicas(groups: ProcessGroupCollection, action: Callable[[], None]) -> None:
    """Let the first of the data- and context-parallel ranks do something. Collective over all.

    Args:
        groups: Process groups; ``dp_cp`` is used.
        action: What to do; the other ranks wait to hear how it ended.

    Raises:
        ModelError: On every rank, if the action raised one.
    """
    fault: list[str | None] = [None]
    if groups.dp_cp.rank() == 0:
        try:
            action()
        except ModelError as error:
            fault = [str(error)]
    dist.broadcast_object_list(fault, group=groups.dp_cp, group_src=0)
    if fault[0] is not None:
        raise ModelError(fault[0])


def write_directory(
    out_dir: str | Path,
    shares: Sequence[Share],
    *,
    groups: ProcessGroupCollection,
    plan: Callable[[Sequence[TensorTypes]], list[ShardPlan]],
    write_beside: Callable[[Path, Sequence[TensorTypes], Sequence[ShardPlan]], None],
) -> None:
    """Write a directory of safetensors files. Collective over tp and pp.

    The directory appears when it is complete; one that exists is replaced only then.

    Args:
        out_dir: The directory to write.
        shares: This rank's, in an order that is the same on all tensor-parallel ranks.
        groups: Process groups; ``tp``, ``pp`` and ``mp`` are used.
        plan: Lays out the tensors of all pipeline stages over files, the same on every rank.
        write_beside: Writes the other files into a directory. Called on the first rank.

    Raises:
        ModelError: On every rank alike, if the disk refuses.
    """
    target, work = Path(out_dir), None
    with collected_faults(target) as faults:
        target = directory_to_write(target, error=ModelError)
    agree(groups, faults)
    stages = _stage_tensors(shares, groups.pp)
    plans = plan(stages)
    try:
        with collected_faults(target) as faults:
            if groups.mp.rank() == 0:
                needed = sum(plan.num_bytes for plan in plans)
                check_free_space(target, needed, error=ModelError)
                work = work_directory(target)
                write_beside(work, stages, plans)
        shared = agree(groups, faults, work)
        assert shared is not None
        writer = _StageWriter(shared, stages, plans, groups)
        for share in shares:
            tensors = share.collect()
            if groups.tp.rank() == 0:
                writer.take(tensors, share.device)
        with collected_faults(target) as faults:
            writer.finish()
        agree(groups, faults)
        with collected_faults(target) as faults:
            if work is not None:
                replace_directory(work, target)
        agree(groups, faults)
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def collected_faults(target: Path) -> Iterator[list[str]]:
    """Collect one rank's faults as messages, for all ranks to agree on."""
    faults: list[str] = []
    try:
        yield faults
    except OSError as fault:
        faults.append(disk_fault(target, fault))
    except ModelError as fault:
        faults.append(str(fault))


def agree(
    groups: ProcessGroupCollection, faults: Sequence[str], work: Path | None = None
) -> Path | None:
    """Raise on every rank what went wrong on any. Collective over mp.

    Args:
        groups: Process groups; ``mp`` is used.
        faults: From `collected_faults`.
        work: The first rank's directory.

    Returns:
        The first rank's `work`.

    Raises:
        ModelError: The first rank's fault that has one.
    """
    answers: list[Any] = [None] * groups.mp.size()
    dist.all_gather_object(answers, (work, *faults), group=groups.mp)
    messages = [message for _, *messages in answers for message in messages]
    if messages:
        raise ModelError(messages[0])
    path: Path | None = answers[0][0]
    return path


def shares_in_turn(weight: Tensor, tp: dist.ProcessGroup) -> Iterator[Tensor]:
    """Every tensor-parallel rank's share in turn, on rank 0; nothing elsewhere.

    Collective over tp. One share at a time is on the device besides the rank's own, because the
    optimizer's state is there too.
    """
    local = weight.detach().contiguous()
    if tp.rank() > 0:
        dist.send(local, group=tp, group_dst=0)
        return
    yield local.cpu()
    share = torch.empty_like(local) if tp.size() > 1 else local
    for rank in range(1, tp.size()):
        dist.recv(share, group=tp, group_src=rank)
        yield share.cpu()


def _stage_tensors(shares: Sequence[Share], pp: dist.ProcessGroup) -> list[TensorTypes]:
    """Types and shapes of every pipeline stage's tensors. Collective over pp."""
    mine = {name: entry for share in shares for name, entry in share.types.items()}
    stages: list[Any] = [None] * pp.size()
    dist.all_gather_object(stages, mine, group=pp)
    return stages


class _StageWriter:
    """Puts tensors into the planned files, or sends them to the stage that writes them.

    Faults of the disk are kept until `finish`, so that collectives stay in step.
    """

    def __init__(
        self,
        work: Path,
        stages: Sequence[TensorTypes],
        plans: Sequence[ShardPlan],
        groups: ProcessGroupCollection,
    ) -> None:
        self._work = work
        self._stages = stages
        self._pp = groups.pp
        self._is_writer = groups.tp.rank() == 0
        self._sends = len(plans) == 1 and groups.pp.rank() > 0
        self._plans = {name: plan for plan in plans for name in plan.offsets}
        self._open: dict[str, ShardWriter] = {}
        self._left = {plan.file_name: len(plan.offsets) for plan in plans}
        self._device = torch.device("cpu")
        self._fault: OSError | None = None

    def take(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Write or send some of this stage's tensors, through `device` if they are sent."""
        self._device = device
        types = self._stages[self._pp.rank()]
        for name, tensor in tensors.items():
            if self._sends:
                dist.send(tensor.to(device, types[name][0]), group=self._pp, group_dst=0)
            else:
                self._write(name, tensor.to(types[name][0]))

    def finish(self) -> None:
        """Receive what other stages send, and close the files.

        Raises:
            OSError: The first fault of the disk.
        """
        if self._is_writer and len(self._left) == 1 and self._pp.rank() == 0:
            for stage, types in enumerate(self._stages[1:], start=1):
                for name, (dtype, shape) in types.items():
                    tensor = torch.empty(shape, dtype=dtype, device=self._device)
                    dist.recv(tensor, group=self._pp, group_src=stage)
                    self._write(name, tensor)
        for file in self._open.values():
            file.close()
        if self._fault is not None:
            raise self._fault

    def _write(self, name: str, tensor: Tensor) -> None:
        if self._fault is not None:
            return
        plan = self._plans[name]
        try:
            if plan.file_name not in self._open:
                self._open[plan.file_name] = ShardWriter(self._work, plan)
            self._open[plan.file_name].write(name, tensor.cpu().contiguous())
            self._left[plan.file_name] -= 1
            if not self._left[plan.file_name]:
                self._open.pop(plan.file_name).close()
        except OSError as fault:
            self._fault = fault
