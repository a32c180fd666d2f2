"""A model to ask, from wherever it is: a Hugging Face directory, a checkpoint, an adapter beside.

What a training run does with a model is `stages/`'s; here it is only loaded.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_cgn.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    Precision,
    RunConfig,
)
from megatron_cgn.config.validate import validate_architecture
from megatron_cgn.engine.checkpoint import is_checkpoint, read_info
from megatron_cgn.engine.engine import Engine
from megatron_cgn.errors import CheckpointError, ModelError
from megatron_cgn.hf.adapter import load_adapter
from megatron_cgn.hf.adapter_config import read_config
from megatron_cgn.hf.adapter_file import read_adapter_config
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.load import load_weights
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.parallel.state import ParallelState


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Where a model and what belongs to it are.

    Attributes:
        weights: Hugging Face directory or checkpoint of all weights.
        hf: Directory with ``config.json``.
        tokenizer: Directory with the tokenizer and its chat template.
        adapter: Directory of an adapter in the format of `peft`, or checkpoint of adapters.
        lora: The adapter's settings; without a rank if there is none.
    """

    weights: Path
    hf: Path
    tokenizer: Path
    adapter: Path | None = None
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)


def find_model(model: str | Path, *, adapter: str | Path | None = None) -> ModelFiles:
    """Find out what a directory is, without reading weights.

    Args:
        model: Hugging Face directory, or checkpoint of ours, of all weights or of adapters.
        adapter: Adapter directory of `peft`, to be put on `model`.

    Returns:
        Where everything is. A checkpoint of adapters names the weights they belong to.

    Raises:
        UserError: If a directory is none of these, or the adapter's weights are gone.
    """
    path = Path(model)
    if not is_checkpoint(path):
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path}: is neither a Hugging Face model (no config.json) nor a checkpoint (no "
                "checkpoint.json). A run's checkpoints are in output_dir/checkpoints/step_…, and "
                "its exported model in output_dir/export."
            )
        return _with_adapter(ModelFiles(weights=path, hf=path, tokenizer=path), adapter)
    record = read_info(path).adapter
    if record is None:
        hf = path / "hf"
        return _with_adapter(ModelFiles(weights=path, hf=hf, tokenizer=hf), adapter)
    if adapter is not None:
        raise ModelError(f"{path}: holds adapters already; give them alone, or --adapter alone.")
    base = record.get("base")
    if base is None or not Path(base).is_dir():
        raise CheckpointError(
            f"{path}: holds adapters only, and the model they belong to, {base!r}, is not there. "
            "Start where the training run was started, or use what it exported."
        )
    return ModelFiles(
        weights=Path(base),
        hf=path / "hf",
        tokenizer=path / "hf",
        adapter=path,
        lora=_lora_of(dict(record)),
    )


def _with_adapter(files: ModelFiles, adapter: str | Path | None) -> ModelFiles:
    if adapter is None:
        return files
    path = Path(adapter)
    found = dataclasses.replace(files, adapter=path, lora=read_adapter_config(path))
    # Trained with a chat template that the model itself may lack.
    if (path / "tokenizer.json").is_file():
        return dataclasses.replace(found, tokenizer=path)
    return found


def _lora_of(record: dict[str, Any]) -> LoraConfig:
    """Settings with which adapters mean what they meant when they were saved."""
    return LoraConfig(
        rank=record["rank"],
        alpha=record["scaling"] * record["rank"],
        use_dora=record["use_dora"],
        targets=tuple(record["targets"]),
        modules_to_save=tuple(record["modules_to_save"]),
    )


def model_architecture(files: ModelFiles) -> Architecture:
    """What a model is, with the head that its adapter may bring.

    Args:
        files: From `find_model`.

    Raises:
        ModelError: If the model or the adapter is not supported.
    """
    found = read_architecture(files.hf)
    if files.adapter is None or is_checkpoint(files.adapter):
        return found
    if read_config(files.adapter).head == "score":
        return dataclasses.replace(found, head="score")
    return found


def check_is_language_model(files: ModelFiles) -> None:
    """Refuse a reward model where a model shall write.

    Raises:
        ModelError: If it is one.
    """
    if model_architecture(files).head == "score":
        raise ModelError(
            f"{files.adapter or files.weights}: is a reward model, which judges answers and writes "
            "none. Give a language model; tools/rank.py takes this one."
        )


def check_is_reward_model(files: ModelFiles) -> None:
    """Refuse a model without a scalar head where answers shall be judged.

    Raises:
        ModelError: If it has none.
    """
    if model_architecture(files).head != "score":
        raise ModelError(
            f"{files.weights}: is a language model, whose last layer gives no reward. Give a "
            "reward model: what +stage=rm exports, or any other for sequence classification with "
            "one label."
        )


def open_engine(
    files: ModelFiles, state: ParallelState, *, precision: Precision, seed: int = 0
) -> Engine:
    """Build a model and load its weights. Collective over all ranks.

    Args:
        files: From `find_model`.
        state: This process's place in the layout.
        precision: Type of weights and activations.
        seed: Of the engine's random states, which answers do not depend on.

    Returns:
        An engine that was never trained.

    Raises:
        UserError: If the layout does not fit the model, or files are missing or damaged.
    """
    architecture = model_architecture(files)
    run = RunConfig(
        seed=seed,
        precision=precision,
        model=ModelConfig(hf_path=str(files.weights)),
        parallel=state.config,
        data=DataConfig(seq_length=architecture.max_position_embeddings),
        lora=dataclasses.replace(files.lora, dropout=0.0),
    )
    validate_architecture(run, architecture)
    engine = Engine(run, architecture, state, total_steps=1)
    if is_checkpoint(files.weights):
        engine.load_model(files.weights)
    else:
        load_weights(engine.chunks, files.weights, architecture=architecture, groups=state.groups)
    if files.adapter is None:
        return engine
    if is_checkpoint(files.adapter):
        engine.load_adapters(files.adapter)
    else:
        load_adapter(
            engine.chunks,
            files.adapter,
            architecture=architecture,
            lora=run.lora,
            groups=state.groups,
        )
    return engine


def check_layout(files: ModelFiles, parallel: ParallelConfig) -> None:
    """Refuse a layout that the model cannot be cut to, before processes join.

    Raises:
        UserError: Naming the sizes that would do.
    """
    architecture = model_architecture(files)
    run = RunConfig(
        parallel=parallel, data=DataConfig(seq_length=architecture.max_position_embeddings)
    )
    validate_architecture(run, architecture)


def stop_tokens(directory: Path) -> tuple[int, ...]:
    """The tokens at which servers stop: ``eos_token_id`` of the model's configuration.

    Args:
        directory: Hugging Face directory.

    Returns:
        Those of ``generation_config.json``, or else of ``config.json``; none if neither says.

    Raises:
        ModelError: If a file is not readable.
    """
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text("utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{path}: cannot be read ({error}); copy the file again.") from error
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise ModelError(f"{path}: eos_token_id is {found!r}, not ids; restore the file.")
            return tuple(ids)
    return ()
