"""Write a Megatron model as a Hugging Face directory, tensor by tensor.

Each pipeline stage's first tensor-parallel rank receives one share of a parameter at a time,
takes it apart into Hugging Face tensors in main memory and puts those at their planned places in
the stage's own files. So no device holds more than its own share and another rank's. A model
that fits one file is written by the first stage, to which the others send.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_cgn.errors import ModelError
from megatron_cgn.hf.config import read_config_json
from megatron_cgn.hf.families import Parameter
from megatron_cgn.hf.files import (
    check_free_space,
    directory_to_write,
    disk_fault,
    replace_directory,
    work_directory,
    write_side_files,
)
from megatron_cgn.hf.load import model_parameters
from megatron_cgn.hf.safetensors_io import (
    ShardPlan,
    ShardWriter,
    TensorTypes,
    plan_shards,
)
from megatron_cgn.model.architecture import Architecture

logger = logging.getLogger(__name__)

ExportDtype = Literal["auto", "bf16", "fp16", "fp32"]

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9
"""Size of one safetensors file, as `transformers` has it."""

_NAMED_DTYPES: Mapping[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@torch.no_grad()
def export_weights(
    model_chunks: Sequence[nn.Module],
    out_dir: str | Path,
    *,
    architecture: Architecture,
    source_dir: str | Path,
    groups: ProcessGroupCollection,
    dtype: ExportDtype = "auto",
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Write a Hugging Face directory. Collective over all ranks.

    Only ranks 0 of the data- and context-parallel groups take part; the others wait to hear how
    it ended. The directory appears when it is complete; one that exists is replaced only then.
    All files are written to one file system that every pipeline stage sees.

    Args:
        model_chunks: This rank's ``GPTModel`` chunks, possibly wrapped.
        out_dir: The directory to write.
        architecture: The model.
        source_dir: The Hugging Face directory that configuration and tokenizer come from.
        groups: Process groups; ``tp``, ``pp``, ``mp`` and ``dp_cp`` are used.
        dtype: Type of the weights; ``auto`` is the one named in the source's ``config.json``,
            or else the parameters' own.
        max_shard_bytes: Largest size of one file.

    Raises:
        ModelError: On every rank alike, if the source cannot be read or the disk refuses.
    """
    fault: list[str | None] = [None]
    if groups.dp_cp.rank() == 0:
        try:
            _export(
                model_chunks,
                out_dir,
                architecture=architecture,
                source_dir=source_dir,
                groups=groups,
                dtype=dtype,
                max_shard_bytes=max_shard_bytes,
            )
        except ModelError as error:
            fault = [str(error)]
    dist.broadcast_object_list(fault, group=groups.dp_cp, group_src=0)
    if fault[0] is not None:
        raise ModelError(fault[0])


def _export(
    model_chunks: Sequence[nn.Module],
    out_dir: str | Path,
    *,
    architecture: Architecture,
    source_dir: str | Path,
    groups: ProcessGroupCollection,
    dtype: ExportDtype,
    max_shard_bytes: int,
) -> None:
    """Do what `export_weights` says. Collective over tp and pp."""
    target, source, first = Path(out_dir), Path(source_dir), groups.mp.rank() == 0
    config: dict[str, Any] = {}
    with _collected_faults(target) as faults:
        target = directory_to_write(target, error=ModelError)
        config = read_config_json(source)
    _agree(groups, faults)
    parameters = list(_exported(model_chunks, architecture))
    stages = _stage_tensors(parameters, groups, resolve_dtype(dtype, config))
    plans = plan_shards(stages, max_shard_bytes=max_shard_bytes)
    work: Path | None = None
    try:
        with _collected_faults(target) as faults:
            if first:
                needed = sum(plan.num_bytes for plan in plans)
                check_free_space(target, needed, error=ModelError)
                work = work_directory(target)
                write_side_files(work, source, config, architecture, stages=stages, plans=plans)
        shared = _agree(groups, faults, work)
        assert shared is not None
        writer = _StageWriter(shared, stages, plans, groups)
        for parameter, weight in parameters:
            tensors = _hf_tensors(parameter, weight, groups.tp)
            if groups.tp.rank() == 0:
                writer.take(tensors, weight.device)
        with _collected_faults(target) as faults:
            writer.finish()
        _agree(groups, faults)
        with _collected_faults(target) as faults:
            if work is not None:
                replace_directory(work, target)
        _agree(groups, faults)
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def resolve_dtype(name: ExportDtype, config: Mapping[str, Any]) -> torch.dtype | None:
    """The type to write weights in, or None for the type they have.

    Args:
        name: The user's choice.
        config: The source's ``config.json``.

    Returns:
        The type.
    """
    if name != "auto":
        return _NAMED_DTYPES[name]
    return _NAMED_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))


def _exported(
    model_chunks: Sequence[nn.Module], architecture: Architecture
) -> Iterator[tuple[Parameter, Tensor]]:
    """This rank's parameters, without a tied output layer's copy of the embedding."""
    seen = set()
    first_stage = any(
        name.endswith("embedding.word_embeddings.weight")
        for chunk in model_chunks
        for name, _ in chunk.named_parameters()
    )
    for parameter, weight in model_parameters(model_chunks, architecture):
        copy = parameter.key == "embedding.word_embeddings.weight" and not first_stage
        if not copy and (parameter.layer, parameter.key) not in seen:
            seen.add((parameter.layer, parameter.key))
            yield parameter, weight


def _stage_tensors(
    parameters: Sequence[tuple[Parameter, Tensor]],
    groups: ProcessGroupCollection,
    dtype: torch.dtype | None,
) -> list[TensorTypes]:
    """Types and shapes of every pipeline stage's Hugging Face tensors. Collective over pp."""
    mine = {
        name: (dtype or weight.dtype, shape)
        for parameter, weight in parameters
        for name, shape in parameter.hf_shapes().items()
    }
    stages: list[Any] = [None] * groups.pp.size()
    dist.all_gather_object(stages, mine, group=groups.pp)
    return stages


@contextlib.contextmanager
def _collected_faults(target: Path) -> Iterator[list[str]]:
    """Collect one rank's faults as messages, for all ranks to agree on."""
    faults: list[str] = []
    try:
        yield faults
    except OSError as fault:
        faults.append(disk_fault(target, fault))
    except ModelError as fault:
        faults.append(str(fault))


def _agree(
    groups: ProcessGroupCollection, faults: Sequence[str], work: Path | None = None
) -> Path | None:
    """Raise on every rank what went wrong on any. Collective over mp.

    Returns:
        The first rank's `work`.
    """
    answers: list[Any] = [None] * groups.mp.size()
    dist.all_gather_object(answers, (work, *faults), group=groups.mp)
    messages = [message for _, *messages in answers for message in messages]
    if messages:
        raise ModelError(messages[0])
    path: Path | None = answers[0][0]
    return path


def _shares(weight: Tensor, tp: dist.ProcessGroup) -> Iterator[Tensor]:
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


def _hf_tensors(parameter: Parameter, weight: Tensor, tp: dist.ProcessGroup) -> dict[str, Tensor]:
    """Take one parameter apart into Hugging Face tensors in main memory, on rank 0.

    Collective over tp.

    Returns:
        The tensors by name; unset on the other ranks.
    """
    result: dict[str, Tensor] = {}
    if parameter.tp_dim is None:
        if tp.rank() == 0:
            (name,) = parameter.hf_names()
            result[name] = weight.detach().cpu()
        return result
    padded = weight.shape[0] * tp.size()
    for tp_rank, share in enumerate(_shares(weight, tp)):
        for name, shape in parameter.hf_shapes().items():
            result.setdefault(name, share.new_empty(shape))
        pieces = parameter.pieces(tp_rank=tp_rank, tp_size=tp.size(), padded_vocab_size=padded)
        for piece in pieces:
            rows = result[piece.name][piece.rows]
            rows = rows if piece.columns is None else rows[:, piece.columns]
            rows.copy_(share[piece.local_rows])
    return result


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
