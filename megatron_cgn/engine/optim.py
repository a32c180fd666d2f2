"""Mixed precision, data-parallel wrapping and the optimizer, in Megatron's terms."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cgn.config.schema import OptimConfig, ParallelConfig, Precision
from megatron_cgn.parallel.state import ParallelState


def wrap_model(
    chunks: list[GPTModel],
    *,
    config: TransformerConfig,
    parallel: ParallelConfig,
    precision: Precision,
    state: ParallelState,
) -> list[DistributedDataParallel]:
    """Give every chunk gradient buffers that are reduced over data-parallel ranks.

    Args:
        chunks: This rank's model chunks.
        config: Their configuration.
        parallel: Says what overlaps.
        precision: Type of the forward and backward pass.
        state: This process's place in the layout.

    Returns:
        The wrapped chunks.
    """
    ddp_config = DistributedDataParallelConfig(
        # BF16 has 8 bits of mantissa: sums over many micro-batches and ranks need FP32.
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        # The interleaved schedule then starts the gathers, of all stages at the same time.
        align_param_gather=parallel.overlap_param_gather and len(chunks) > 1,
        # FP16 expects overflows and answers them with the loss scale.
        check_for_nan_in_grad=precision != "fp16",
    )
    half = precision != "fp32"
    modules = [Float16Module(config, chunk) if half else chunk for chunk in chunks]
    return [
        DistributedDataParallel(
            config,
            ddp_config,
            module,
            # Later chunks' gradients are complete long before they could overlap.
            disable_bucketing=index > 0 or not parallel.overlap_grad_reduce,
            pg_collection=state.groups,
        )
        for index, module in enumerate(modules)
    ]


def build_optimizer(
    chunks: list[DistributedDataParallel],
    *,
    optim: OptimConfig,
    parallel: ParallelConfig,
    precision: Precision,
    params_dtype: torch.dtype,
    micro_batch_tokens: int,
) -> MegatronOptimizer:
    """Build AdamW with FP32 master weights, shared over data-parallel ranks if asked.

    Args:
        chunks: Wrapped model chunks.
        optim: Hyperparameters.
        parallel: Whether the optimizer is distributed.
        precision: Type of the forward and backward pass; ``fp16`` brings a loss scale.
        params_dtype: Type of the model's weights.
        micro_batch_tokens: Tokens whose losses one backward pass sums.

    Returns:
        Megatron's optimizer; its rates are set each step by `set_rates`.
    """
    # A loss scale is known for mean losses, whose gradients are smaller than those of our sums by
    # the number of tokens; unadjusted, FP16 would begin with a dozen overflows.
    tokens = 1 << (micro_batch_tokens - 1).bit_length()
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        initial_loss_scale=optim.initial_loss_scale / tokens,
        min_loss_scale=1.0 / tokens,
        params_dtype=params_dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)
    if not torch.cuda.is_available():
        # One pass over memory instead of a dozen. Megatron does not ask PyTorch for it.
        for group in param_groups(optimizer):
            group["fused"] = True
    return optimizer


def set_rates(optimizer: MegatronOptimizer, *, lr: float, weight_decay: float) -> None:
    """Set learning rate and weight decay of the next step.

    Args:
        optimizer: From `build_optimizer`.
        lr: Learning rate.
        weight_decay: Decay of matrices; groups that Megatron marks (biases, norms) have none.
            Groups of ``optim.param_groups`` may have their own.
    """
    for group in param_groups(optimizer):
        group["lr"] = lr * group.get("lr_mult", 1.0)
        decay = group.get("own_weight_decay", weight_decay)
        group["weight_decay"] = decay * group.get("wd_mult", 1.0)


def param_groups(optimizer: MegatronOptimizer) -> list[dict[str, Any]]:
    """Every parameter group of a (possibly chained) Megatron optimizer."""
    return [group for leaf in leaves(optimizer) for group in leaf.optimizer.param_groups]


def leaves(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that a chained optimizer is made of, or the optimizer itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
