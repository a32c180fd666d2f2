"""Process groups: start them, hold them, end them.

`initialize_parallel` is the one place where ranks meet. Everything else receives the
`ParallelState` it returns; nobody below asks Megatron's global state.
"""

import datetime
import logging
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_cgn.config.schema import ParallelConfig
from megatron_cgn.errors import ConfigError
from megatron_cgn.parallel import cpu

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelState:
    """Where this process stands in the layout, and its process groups.

    Attributes:
        groups: Megatron's collection of process groups (``tp``, ``pp``, ``cp``, ``dp``,
            ``dp_cp``, ``mp``, ``embd``, …), to be passed to every Megatron module.
        config: The layout that was asked for.
        rank: Global rank of this process.
        world_size: Number of processes.
    """

    groups: ProcessGroupCollection
    config: ParallelConfig
    rank: int
    world_size: int

    @property
    def tp_rank(self) -> int:
        """Rank in the tensor-parallel group."""
        return int(self.groups.tp.rank())

    @property
    def pp_rank(self) -> int:
        """Rank in the pipeline-parallel group, i.e. the pipeline stage."""
        return int(self.groups.pp.rank())

    @property
    def cp_rank(self) -> int:
        """Rank in the context-parallel group."""
        return int(self.groups.cp.rank())

    @property
    def cp_size(self) -> int:
        """Ranks that share each sequence."""
        return int(self.groups.cp.size())

    @property
    def dp_rank(self) -> int:
        """Rank in the data-parallel group: which part of each batch this process reads."""
        return int(self.groups.dp.rank())

    @property
    def dp_size(self) -> int:
        """Parts that each batch is split into."""
        return int(self.groups.dp.size())

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the last pipeline stage, where the loss is computed."""
        return bool(self.pp_rank == self.groups.pp.size() - 1)

    @property
    def loss_rank(self) -> int:
        """Global rank of the last stage of this process's pipeline."""
        return dist.get_global_rank(self.groups.pp, self.groups.pp.size() - 1)


def initialize_parallel(parallel: ParallelConfig) -> ParallelState:
    """Join the other processes and split them into groups. Collective over all ranks.

    Under ``torchrun`` rank and size come from the environment; without it this process is
    alone. Uses NCCL with one CUDA device per local rank, or gloo on the CPU.

    Args:
        parallel: The layout. Axes nest as ``tp`` (innermost), ``cp``, ``dp``, ``pp``.

    Returns:
        This process's place and groups.

    Raises:
        ConfigError: If the layout does not fit the number of processes.
    """
    world_size = read_world_size()
    check_world_size(parallel, world_size)
    _join(parallel, world_size)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=math.ceil(parallel.timeout_minutes),
        # Gloo twins of every group are only for checkpoint formats we do not write.
        create_gloo_process_groups=False,
    )
    return ParallelState(
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        config=parallel,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a number of processes that the layout does not divide.

    Args:
        parallel: The layout.
        world_size: Number of processes started.

    Raises:
        ConfigError: Naming both numbers and the remedy.
    """
    model_size = (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )
    if world_size % model_size:
        raise ConfigError(
            f"parallel: {world_size} process(es) were started, but tensor × pipeline × context "
            f"parallel = {parallel.tensor_model_parallel_size} × "
            f"{parallel.pipeline_model_parallel_size} × {parallel.context_parallel_size} needs a "
            f"multiple of {model_size}. Start `torchrun --nproc-per-node {model_size}` or change "
            "the parallel sizes."
        )


def read_world_size() -> int:
    """Number of processes of the run, as ``torchrun`` says; 1 where nobody says.

    Raises:
        ConfigError: If the environment contradicts itself.
    """
    text = os.environ.get("WORLD_SIZE")
    if text is None:
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        if tasks != "1":
            raise ConfigError(
                f"WORLD_SIZE is not set, but this is one of {tasks} tasks of a Slurm step: each "
                "would train alone and overwrite the others' files. Start one torchrun a node, or "
                "set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT."
            )
        return 1
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE: {text!r} in the environment is no number of processes.")
    return int(text)


def _local_device() -> int:
    """Index of this rank's CUDA device on its node."""
    local_rank, devices = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    if local_rank is None and read_world_size() > 1 and devices > 1:
        raise ConfigError(
            "LOCAL_RANK: not in the environment, so every process of a node would take its first "
            "GPU. Start with torchrun, or set it."
        )
    index = int(local_rank or "0")
    if index >= devices:
        raise ConfigError(
            f"LOCAL_RANK: {index}, but this node has {devices} CUDA device(s); start as many "
            "processes a node as it has."
        )
    return index


def _join(parallel: ParallelConfig, world_size: int) -> None:
    """Join the default process group, and take this rank's device."""
    cpu.install()
    # Lets communication start before queued compute kernels; Megatron overlaps rely on it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_device())
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(minutes=parallel.timeout_minutes)
    if world_size == 1 and "RANK" not in os.environ:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(cpu.backend(), store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(cpu.backend(), timeout=timeout)


def shutdown_parallel() -> None:
    """Leave every group, so that a process ends without warnings or hanging peers."""
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
