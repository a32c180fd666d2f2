"""Rules that span settings. All faults are found before anything is allocated, and told at once.

Every fault says where, which value, which limit, and what to do.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Protocol

from megatron_cgn.config.data_rules import data_faults, epoch_faults
from megatron_cgn.config.lora_rules import lora_faults, lora_model_faults
from megatron_cgn.config.optim_rules import param_group_faults, param_group_step_faults
from megatron_cgn.config.preference_rules import preference_faults
from megatron_cgn.config.schema import ExportConfig, LoraConfig, OptimConfig, RunConfig
from megatron_cgn.config.sft_rules import conversation_faults, conversation_model_faults
from megatron_cgn.errors import ConfigError


class ArchitectureLike(Protocol):
    """What of a model's architecture the rules need."""

    @property
    def num_layers(self) -> int: ...  # noqa: D102
    @property
    def num_attention_heads(self) -> int: ...  # noqa: D102
    @property
    def num_key_value_heads(self) -> int: ...  # noqa: D102
    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def ffn_hidden_size(self) -> int: ...  # noqa: D102
    @property
    def head_dim(self) -> int: ...  # noqa: D102
    @property
    def tie_word_embeddings(self) -> bool: ...  # noqa: D102
    @property
    def max_position_embeddings(self) -> int: ...  # noqa: D102
    @property
    def head(self) -> str: ...  # noqa: D102


def validate(run: RunConfig, *, world_size: int) -> None:
    """Check everything that can be known without the model.

    Args:
        run: The configuration.
        world_size: Number of processes started.

    Raises:
        ConfigError: Naming all faults.
    """
    # No limit below can judge a value that is not a number.
    _raise(list(_numbers(run)))
    faults = [
        *_seed(run),
        *_model(run),
        *_layout(run, world_size),
        *_batch(run, world_size),
        *data_faults(run.data),
        *epoch_faults(run.data, run.train),
        *conversation_faults(run),
        *preference_faults(run),
        *lora_faults(run),
        *_optim(run),
        *param_group_faults(run.optim),
        *_checkpoint(run),
        *_export(run),
    ]
    _raise(faults)


def validate_steps(run: RunConfig, total_steps: int) -> None:
    """Check that the learning-rate schedule fits into the run, once its length is known.

    Args:
        run: The configuration.
        total_steps: Optimizer steps of the run.

    Raises:
        ConfigError: If warm-up and decay are longer than the run.
    """
    _raise(list(_schedule(run, total_steps, f"train.epochs={run.train.epochs}")))


def validate_architecture(run: RunConfig, architecture: ArchitectureLike) -> None:
    """Check that the model can be cut as the layout asks.

    Args:
        run: The configuration.
        architecture: The model.

    Raises:
        ConfigError: Naming all faults.
    """
    longest = architecture.max_position_embeddings
    faults = [
        *_cuts(run, architecture),
        *conversation_model_faults(run, max_positions=longest),
        *lora_model_faults(run, architecture),
    ]
    _raise(faults)


def _raise(faults: list[str]) -> None:
    if faults:
        raise ConfigError("\n".join(faults))


def _numbers(value: object, path: str = "") -> Iterator[str]:
    """Refuse NaN and infinity anywhere."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{path}: {value}; must be a finite number."
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{path}.{index}")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{path}.{key}")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            name = f"{path}.{field.name}" if path else field.name
            yield from _numbers(getattr(value, field.name), name)


def _seed(run: RunConfig) -> Iterator[str]:
    if not 0 <= run.seed < 2**32:
        yield f"seed: {run.seed}; must be at least 0 and below 2^32 = {2**32}."


def _model(run: RunConfig) -> Iterator[str]:
    if run.model.hf_path is None:
        yield "model.hf_path: not set; give the directory of a Hugging Face model."
    if run.model.make_vocab_size_divisible_by < 1:
        yield _at_least("model.make_vocab_size_divisible_by", 1, run)


def _layout(run: RunConfig, world_size: int) -> Iterator[str]:
    p = run.parallel
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    bad = [name for name in sizes if getattr(p, name) < 1]
    for name in bad:
        yield _at_least(f"parallel.{name}", 1, run)
    if not bad:
        model_size = (
            p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size
        )
        if world_size % model_size:
            yield (
                f"parallel: {world_size} process(es) were started, but tensor × pipeline × context "
                f"parallel = {p.tensor_model_parallel_size} × {p.pipeline_model_parallel_size} × "
                f"{p.context_parallel_size} needs a multiple of {model_size}; start that many with "
                "torchrun, or change the sizes."
            )
    virtual = p.virtual_pipeline_model_parallel_size
    if virtual is not None:
        if virtual < 2:
            yield (
                f"parallel.virtual_pipeline_model_parallel_size: {virtual}; interleaving needs 2 "
                "chunks a stage or more (null for none)."
            )
        if p.pipeline_model_parallel_size < 2:
            yield (
                "parallel.virtual_pipeline_model_parallel_size: has no effect with "
                "parallel.pipeline_model_parallel_size=1; set it to null."
            )
        if p.overlap_p2p_comm is False:
            yield (
                "parallel.overlap_p2p_comm: false; the interleaved schedule computes wrong "
                "gradients without it. Leave it null, or set "
                "parallel.virtual_pipeline_model_parallel_size=null."
            )
    elif p.overlap_p2p_comm:
        yield (
            "parallel.overlap_p2p_comm: true; only the interleaved schedule overlaps. Leave it "
            "null, or set parallel.virtual_pipeline_model_parallel_size."
        )
    if p.sequence_parallel and p.tensor_model_parallel_size == 1:
        yield (
            "parallel.sequence_parallel: true has no effect with "
            "parallel.tensor_model_parallel_size=1; set it to false."
        )
    if p.overlap_param_gather and not (p.distributed_optimizer and p.overlap_grad_reduce):
        yield (
            "parallel.overlap_param_gather: true needs parallel.distributed_optimizer=true and "
            "parallel.overlap_grad_reduce=true."
        )
    if p.timeout_minutes <= 0:
        yield f"parallel.timeout_minutes: {p.timeout_minutes}; must be above 0."


def _batch(run: RunConfig, world_size: int) -> Iterator[str]:
    p, t, length = run.parallel, run.train, run.data.seq_length
    small = [n for n in ("micro_batch_size", "global_batch_size") if getattr(t, n) < 1]
    for name in small:
        yield _at_least(f"train.{name}", 1, run)
    if not small:
        yield from _portions(run, world_size)
    if length < 1:
        yield _at_least("data.seq_length", 1, run)
    elif p.context_parallel_size > 1 and length % (2 * p.context_parallel_size):
        yield (
            f"data.seq_length: {length} is not a multiple of 2 × parallel.context_parallel_size = "
            f"{2 * p.context_parallel_size}."
        )
    if p.sequence_parallel and p.context_parallel_size > 0 and p.tensor_model_parallel_size > 0:
        share = length // p.context_parallel_size
        if share % p.tensor_model_parallel_size:
            yield (
                f"data.seq_length: {length} / context parallel {p.context_parallel_size} is not a "
                "multiple of parallel.tensor_model_parallel_size="
                f"{p.tensor_model_parallel_size}, which sequence parallelism needs."
            )
    if run.data.reset_attention_mask and run.model.backend == "te" and p.context_parallel_size > 1:
        yield (
            "data.reset_attention_mask: true; Transformer Engine cannot keep documents apart with "
            f"parallel.context_parallel_size={p.context_parallel_size}. Set model.backend=native, "
            "or parallel.context_parallel_size=1."
        )
    if (t.train_iters is None) == (t.epochs is None):
        state = "both set" if t.epochs is not None else "neither set"
        yield f"train.train_iters, train.epochs: {state}; give exactly one."
    if t.train_iters is not None and t.train_iters < 1:
        yield _at_least("train.train_iters", 1, run)
    held_out = run.data.validation_fraction > 0 or any(
        source.validation_path is not None for source in run.data.sources
    )
    if t.epochs is not None and t.epochs <= 0:
        yield f"train.epochs: {t.epochs}; must be above 0."
    for name in ("log_interval_steps", "validation_interval_steps", "validation_sequences"):
        value = getattr(t, name)
        if value is not None and value < 1:
            yield _at_least(f"train.{name}", 1, run)
        elif name == "validation_interval_steps" and run.samples.prompts:
            continue  # these are answered then, also where nothing is held out
        elif name.startswith("validation") and value and run.data.sources and not held_out:
            yield (
                f"train.{name}: {value} has no effect, since nothing is held out; set "
                "data.validation_fraction or a source's validation_path."
            )


def _portions(run: RunConfig, world_size: int) -> Iterator[str]:
    """Find what keeps a global batch from being cut into micro-batches."""
    p, t = run.parallel, run.train
    model_size = max(
        1,
        p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size,
    )
    dp = max(1, world_size // model_size)
    portion = t.micro_batch_size * dp
    if t.global_batch_size % portion:
        yield (
            f"train.global_batch_size: {t.global_batch_size} is not a multiple of "
            f"train.micro_batch_size × data-parallel size = {t.micro_batch_size} × {dp} = "
            f"{portion}; use {-(-t.global_batch_size // portion) * portion}."
        )
    elif p.virtual_pipeline_model_parallel_size is not None:
        micro_batches = t.global_batch_size // portion
        if p.pipeline_model_parallel_size > 1 and micro_batches % p.pipeline_model_parallel_size:
            yield (
                f"train.global_batch_size: makes {micro_batches} micro-batches a rank; the "
                "interleaved schedule needs a multiple of parallel.pipeline_model_parallel_size="
                f"{p.pipeline_model_parallel_size}."
            )


def _optim(run: RunConfig) -> Iterator[str]:
    o = run.optim
    if o.lr <= 0:
        yield f"optim.lr: {o.lr}; must be above 0."
    if not 0 <= o.min_lr <= o.lr:
        yield f"optim.min_lr: {o.min_lr}; must be between 0 and optim.lr={o.lr}."
    for name in ("warmup_steps", "weight_decay", "clip_grad"):
        if getattr(o, name) < 0:
            yield _at_least(f"optim.{name}", 0, run)
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(o, name) < 1:
            yield f"optim.{name}: {getattr(o, name)}; must be at least 0 and below 1."
    if o.adam_eps <= 0:
        yield f"optim.adam_eps: {o.adam_eps}; must be above 0."
    if o.initial_loss_scale < 1:
        yield _at_least("optim.initial_loss_scale", 1, run)
    if run.precision != "fp16" and o.initial_loss_scale != OptimConfig().initial_loss_scale:
        yield (
            f"optim.initial_loss_scale: {o.initial_loss_scale} has no effect with "
            f"precision={run.precision}; only fp16 has a loss scale."
        )
    if (o.schedule == "wsd") != (o.decay_steps is not None):
        remedy = (
            "say over how many last steps wsd decays"
            if o.decay_steps is None
            else f"it has no effect with optim.schedule={o.schedule}; set it to null"
        )
        yield f"optim.decay_steps: {o.decay_steps}; {remedy}."
    elif o.decay_steps is not None and o.decay_steps < 1:
        yield _at_least("optim.decay_steps", 1, run)
    iters = run.train.train_iters
    if iters is not None:
        yield from _schedule(run, iters, f"train.train_iters={iters}")


def _schedule(run: RunConfig, total_steps: int, setting: str) -> Iterator[str]:
    warmup, decay = run.optim.warmup_steps, run.optim.decay_steps or 0
    if warmup + decay > total_steps:
        yield (
            f"optim.warmup_steps: {warmup} warm-up and {decay} decay steps do not fit into the "
            f"{total_steps} steps of {setting}; use fewer."
        )
    yield from param_group_step_faults(run.optim, total_steps, setting)


def _checkpoint(run: RunConfig) -> Iterator[str]:
    for name in ("interval_steps", "keep_last"):
        value = getattr(run.checkpoint, name)
        if value is not None and value < 1:
            yield _at_least(f"checkpoint.{name}", 1, run)
    if run.checkpoint.load_optimizer and run.model.init != "from_hf":
        yield (
            "checkpoint.load_optimizer: true, but optimizer state belongs to weights, and "
            f"model.init={run.model.init} draws others; set model.init=from_hf."
        )
    if not run.checkpoint.save_optimizer and run.checkpoint.interval_steps is not None:
        yield (
            "checkpoint.save_optimizer: false, but a run cannot go on from the checkpoints of "
            "checkpoint.interval_steps without optimizer state; set one of them otherwise."
        )


def _export(run: RunConfig) -> Iterator[str]:
    if not run.export.enabled and run.export.dtype != ExportConfig().dtype:
        yield f"export.dtype: {run.export.dtype} has no effect with export.enabled=false."
    if not run.export.enabled and run.lora.export != LoraConfig().export:
        yield f"lora.export: {run.lora.export} has no effect with export.enabled=false."


def _cuts(run: RunConfig, a: ArchitectureLike) -> Iterator[str]:
    p = run.parallel
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    for what, number in (
        ("attention heads", a.num_attention_heads),
        ("key/value heads", a.num_key_value_heads),
        ("feed-forward columns", a.ffn_hidden_size),
    ):
        if number % tp:
            fitting = [n for n in range(1, number + 1) if number % n == 0][:8]
            yield (
                f"parallel.tensor_model_parallel_size: {tp} does not divide the model's {number} "
                f"{what}; choose from {', '.join(map(str, fitting))}."
            )
    parts = pp * (p.virtual_pipeline_model_parallel_size or 1)
    if a.num_layers % parts:
        yield (
            f"parallel.pipeline_model_parallel_size: {pp}"
            + (f" × {parts // pp} virtual stages" if parts != pp else "")
            + f" does not divide the model's {a.num_layers} layers."
        )
    if run.data.seq_length > a.max_position_embeddings:
        yield (
            f"data.seq_length: {run.data.seq_length} is more than the model's "
            f"max_position_embeddings={a.max_position_embeddings}."
        )


def _at_least(path: str, limit: int, run: RunConfig) -> str:
    value: object = run
    for name in path.split("."):
        value = getattr(value, name)
    return f"{path}: {value}; must be at least {limit}."
