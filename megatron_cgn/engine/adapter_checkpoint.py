"""What a checkpoint of adapters says of itself, and which run may go on from it.

It holds adapters, what ``lora.modules_to_save`` names, a scalar head and their optimizer state, and
nothing of the weights beside them: these are read from ``model.hf_path`` again, and must be the
same.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_cgn.config.schema import LoraConfig, RunConfig
from megatron_cgn.errors import CheckpointError, UserError
from megatron_cgn.hf.checkpoint_layout import CheckpointInfo
from megatron_cgn.hf.fingerprint import weights_fingerprint
from megatron_cgn.model.lora import scaling
from megatron_cgn.parallel.reduce import first_problem

_BASE, _FINGERPRINT = "base", "base_fingerprint"


def adapter_record(run: RunConfig) -> dict[str, Any]:
    """Describe a run's adapters and the weights they belong to. Collective over all ranks.

    Args:
        run: A configuration with ``lora.rank``.

    Returns:
        For `CheckpointInfo.adapter`: ``base``, where the weights are; ``base_fingerprint``; and
        the settings that decide what the adapters mean, by their names in ``lora``.

    Raises:
        UserError: On every rank, if the weights cannot be read.
    """
    shared: list[str | None] = [None]
    problem: str | None = None
    if dist.get_rank() == 0:
        try:
            shared[0] = _base_fingerprint(run)
        except (UserError, OSError) as error:
            problem = str(error)
    if first := first_problem(problem):
        raise CheckpointError(first)
    dist.broadcast_object_list(shared, src=0)
    return {
        _BASE: run.model.hf_path if run.model.init == "from_hf" else None,
        _FINGERPRINT: shared[0],
        **_settings(run.lora),
    }


def check_adapters(info: CheckpointInfo, record: Mapping[str, Any] | None, directory: Path) -> None:
    """Refuse to go on from a checkpoint of other adapters, or of none.

    Args:
        info: The checkpoint's.
        record: This run's, from `adapter_record`; None without adapters.
        directory: For the message.

    Raises:
        CheckpointError: Naming every difference.
    """
    if info.adapter is None and record is None:
        return
    if info.adapter is None:
        raise CheckpointError(
            f"{directory}: holds all weights and no adapters, but this run has lora.rank set. To "
            "train adapters on these weights, give the checkpoint as model.hf_path and use another "
            "output_dir or checkpoint.dir; to go on training them all, set lora.rank=null."
        )
    if record is None:
        raise CheckpointError(
            f"{directory}: holds adapters only, but this run has none. Set lora.rank="
            f"{info.adapter.get('rank')} and the other settings of the run that wrote it, or use "
            "another output_dir or checkpoint.dir."
        )
    written = dict(info.adapter)
    faults = []
    if written.get(_FINGERPRINT) != record[_FINGERPRINT]:
        faults.append(
            f"model.hf_path: the adapters were trained on the weights of {written.get(_BASE)!r}, "
            f"and those of {record[_BASE]!r} are others"
        )
    faults += [
        f"{_SPELLED.get(name, 'lora.' + name)}: checkpoint {written.get(name)!r}, "
        f"this run {value!r}"
        for name, value in record.items()
        if name not in (_BASE, _FINGERPRINT) and written.get(name) != value
    ]
    if faults:
        lines = "".join(f"\n  {fault}" for fault in faults)
        raise CheckpointError(
            f"{directory}: its adapters do not fit this run:{lines}\n"
            "Restore these settings, or start anew with checkpoint.resume=never and another "
            "checkpoint.dir."
        )


def check_is_whole(directory: Path, info: CheckpointInfo) -> None:
    """Refuse a checkpoint of adapters where a whole model is needed.

    Args:
        directory: A checkpoint directory.
        info: What it says.

    Raises:
        CheckpointError: Naming the model that the adapters belong to, and what to do.
    """
    if info.adapter is not None:
        base = info.adapter.get(_BASE)
        raise CheckpointError(
            f"{directory}: holds adapters only, of the model {base!r}. Use the merged model that "
            "the run exported (output_dir/export), or set model.hf_path to that model and "
            "lora.adapter_path to the adapter that the run exported (output_dir/adapter)."
        )


_SPELLED = {"scaling": "lora.alpha / rank (lora.use_rslora: / its root)"}
"""What is no setting of its own, by the settings that it is made of."""


def _base_fingerprint(run: RunConfig) -> str:
    if run.model.init == "random":
        return f"random weights of seed {run.seed}"
    assert run.model.hf_path is not None
    return weights_fingerprint(Path(run.model.hf_path))


def _settings(lora: LoraConfig) -> dict[str, Any]:
    """Settings that decide what adapters mean, in values that JSON gives back equal."""
    assert lora.rank is not None
    order = LoraConfig().targets
    return {
        "rank": lora.rank,
        "scaling": scaling(lora),
        "use_dora": lora.use_dora,
        "targets": sorted(lora.targets, key=order.index),
        "modules_to_save": sorted(lora.modules_to_save),
    }
