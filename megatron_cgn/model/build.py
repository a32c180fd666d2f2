"""An `Architecture` becomes a Megatron-Core model. With `score_model.py` all that knows `GPTModel`.

Weights are left unset here unless a seed is given; `hf/load.py` fills them. Wrapping for mixed
precision and data parallelism is the engine's.
"""

import functools
import importlib.util
import shutil
from typing import Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megatron_cgn.config.schema import ModelConfig, ParallelConfig, Precision
from megatron_cgn.errors import ConfigError
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.heads import mask_padded_vocabulary, padded_vocab_size
from megatron_cgn.model.initialize import initialize_weights
from megatron_cgn.model.native import NativeRMSNorm, native_layer_spec
from megatron_cgn.model.native_embedding import NativeVocabParallelEmbedding
from megatron_cgn.model.rope import Rotary
from megatron_cgn.model.score_model import ScoreModel

Backend = Literal["native", "te"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Type of weights and activations for each value of ``precision``."""


def resolve_backend(backend: Literal["auto", "native", "te"]) -> Backend:
    """Choose the layers.

    Args:
        backend: ``model.backend``.

    Returns:
        ``te`` if asked for or, under ``auto``, if it can run here; else ``native``.

    Raises:
        ConfigError: If ``te`` is asked for and cannot run here.
    """
    if backend == "native":
        return "native"
    installed = importlib.util.find_spec("transformer_engine") is not None
    cuda = torch.cuda.is_available()
    if installed and cuda:
        return "te"
    if backend == "auto":
        return "native"
    missing = "there is no CUDA device" if installed else "Transformer Engine is not installed"
    remedy = "" if installed else "Install it with `pip install -e .[te]` on a CUDA machine, or "
    raise ConfigError(
        f"model.backend=te: {missing}. {remedy}{'S' if installed else 's'}et model.backend=native "
        "or auto."
    )


@functools.cache
def can_compile() -> bool:
    """Whether Megatron's fused functions can be compiled: CUDA, Triton and a C compiler."""
    return (
        torch.cuda.is_available()
        and importlib.util.find_spec("triton") is not None
        and any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    )


def transformer_config(
    architecture: Architecture,
    *,
    parallel: ParallelConfig,
    model: ModelConfig,
    precision: Precision,
    recompute: Literal["none", "selective", "full"] = "none",
) -> TransformerConfig:
    """Say in Megatron's terms what the model is and how it is laid out.

    Args:
        architecture: The model.
        parallel: The layout.
        model: Gives the backend.
        precision: Type of weights and activations.
        recompute: Activations recomputed in the backward pass.

    Returns:
        A configuration that the engine completes with its gradient functions.

    Raises:
        ConfigError: If the backend cannot run here.
    """
    dtype = DTYPES[precision]
    te = resolve_backend(model.backend) == "te"
    fuse = can_compile()
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    overlap_p2p = parallel.overlap_p2p_comm
    if overlap_p2p is None:
        overlap_p2p = interleaved
    # Interleaving without overlap runs, and its gradients are silently wrong.
    assert overlap_p2p or not interleaved, "configuration validation refuses this"
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        qk_layernorm=architecture.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # The output layer's probabilities and the attention's are FP32 whatever the weights are.
        attention_softmax_in_fp32=True,
        # Losses are sums; the engine divides once, by the global count.
        calculate_per_token_loss=True,
        # Weights are read from a checkpoint, or drawn by `initialize.py` from the seed: either
        # way Megatron need not draw any.
        perform_initialization=False,
        init_method_std=architecture.initializer_range,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        overlap_p2p_comm=overlap_p2p,
        batch_p2p_comm=not overlap_p2p,
        # Every micro-batch is padded or packed to the same length, so pipeline stages know the
        # shape of what they receive; asking would cost a host synchronisation a message.
        variable_seq_lengths=False,
        # An activation already sent to the next stage is needed only by autograd's graph.
        deallocate_pipeline_outputs=True,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        # Apex's kernel; Transformer Engine's own layers do not need it, but the output layer,
        # which is Megatron's, does.
        gradient_accumulation_fusion=torch.cuda.is_available()
        and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        bias_activation_fusion=fuse,
        bias_dropout_fusion=fuse,
        # Its backward pass rounds to BF16 whatever the type, so only BF16 may use it.
        cross_entropy_loss_fusion=fuse and precision == "bf16",
        cross_entropy_fusion_impl="native",
        apply_rope_fusion=te,
    )


def build_model(
    architecture: Architecture,
    *,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    seq_length: int,
    make_vocab_size_divisible_by: int,
    backend: Backend,
    seed: int | None = None,
) -> list[GPTModel]:
    """Build this rank's part of the model, on this rank's device.

    Collective over the embedding group if embeddings are tied and the pipeline has stages.

    Args:
        architecture: The model.
        config: From `transformer_config`.
        groups: Process groups; ``tp``, ``pp``, ``cp`` and ``embd`` are used.
        seq_length: Longest sequence, in tokens.
        make_vocab_size_divisible_by: Vocabulary rows of a rank are a multiple of this.
        backend: From `resolve_backend`.
        seed: Draws the weights; None leaves them unset, for a loader to fill.

    Returns:
        The chunks this pipeline stage holds, in order: one without interleaving. A chunk called
        with labels returns the negative log-likelihood of each, ``[b, s]``, as if the vocabulary
        had no padding. One with a scalar head returns a value for each token, float32 ``[b, s]``,
        called without labels.
    """
    tp_rank, tp_size = groups.tp.rank(), groups.tp.size()
    padded_size = padded_vocab_size(
        architecture.vocab_size,
        multiple=make_vocab_size_divisible_by,
        tensor_parallel_size=tp_size,
    )
    virtual_size = config.virtual_pipeline_model_parallel_size
    model_class = ScoreModel if architecture.head == "score" else GPTModel
    chunks = []
    for virtual_stage in [None] if virtual_size is None else range(virtual_size):
        chunk = model_class(
            config=config,
            transformer_layer_spec=_block_spec(
                architecture, config, groups, backend=backend, virtual_stage=virtual_stage
            ),
            vocab_size=padded_size,
            max_sequence_length=seq_length,
            pre_process=is_vp_first_stage(virtual_stage, virtual_size)
            and is_pp_first_stage(groups.pp),
            post_process=is_vp_last_stage(virtual_stage, virtual_size)
            and is_pp_last_stage(groups.pp),
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.ties_output,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            pg_collection=groups,
            vp_stage=virtual_stage,
        )
        if chunk.pre_process and backend == "native":
            # Megatron makes it where no spec reaches; the class adds methods, no state.
            chunk.embedding.word_embeddings.__class__ = NativeVocabParallelEmbedding
        chunk.rotary_pos_emb = Rotary(architecture, cp_group=groups.cp)
        if seed is not None:
            initialize_weights(
                chunk,
                seed=seed,
                standard_deviation=architecture.initializer_range,
                tensor_parallel_rank=tp_rank,
            )
        _clear_padding(chunk, architecture, tp_rank=tp_rank)
        if chunk.post_process and architecture.head == "lm":
            mask_padded_vocabulary(
                chunk.output_layer,
                vocab_size=architecture.vocab_size,
                padded_size=padded_size,
                tensor_parallel_rank=tp_rank,
                tensor_parallel_size=tp_size,
            )
        chunks.append(chunk)
    return chunks


def _block_spec(
    architecture: Architecture,
    config: TransformerConfig,
    groups: ProcessGroupCollection,
    *,
    backend: Backend,
    virtual_stage: int | None,
) -> ModuleSpec | TransformerBlockSubmodules:
    """Say which modules the decoder is made of."""
    if backend == "te":
        # Imported here: without Transformer Engine the module is of no use.
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_layer_with_transformer_engine_spec,
        )

        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=architecture.qk_norm)
    num_layers = get_num_layers_to_build(config, vp_stage=virtual_stage, pp_rank=groups.pp.rank())
    return TransformerBlockSubmodules(
        layer_specs=[native_layer_spec(architecture)] * num_layers, layer_norm=NativeRMSNorm
    )


def _clear_padding(chunk: GPTModel, architecture: Architecture, *, tp_rank: int) -> None:
    """Zero the vocabulary rows that no token has.

    They are never written otherwise, and a NaN in fresh memory times a gradient of zero is NaN.
    """
    weights = []
    if chunk.pre_process:
        weights.append(chunk.embedding.word_embeddings.weight)
    has_rows = chunk.post_process and architecture.head == "lm"
    if has_rows and chunk.output_layer.weight is not None:
        weights.append(chunk.output_layer.weight)
    for weight in weights:
        rows = weight.size(0)
        weight.data[min(max(architecture.vocab_size - tp_rank * rows, 0), rows) :] = 0.0
