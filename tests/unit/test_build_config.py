import dataclasses
from typing import Any

import pytest
import torch
import transformers

from megatron_cgn.config.schema import ModelConfig, ParallelConfig
from megatron_cgn.errors import ConfigError
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.build import resolve_backend, transformer_config
from megatron_cgn.model.heads import PaddingMask, padded_vocab_size
from megatron_cgn.model.size import parameter_count
from megatron_cgn.parallel import cpu

cpu.install()

LLAMA3_8B = Architecture(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=8192,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=None,
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    initializer_range=0.02,
)


def _config(parallel: ParallelConfig, **options: Any) -> Any:
    options = {"model": ModelConfig(), "precision": "bf16", **options}
    return transformer_config(LLAMA3_8B, parallel=parallel, **options)


@pytest.mark.parametrize(
    ("size", "multiple", "tp", "padded"),
    [(1000, 128, 1, 1024), (1024, 128, 1, 1024), (1025, 128, 2, 1280), (49152, 128, 3, 49152)]
    + [(151936, 128, 2, 152064), (7, 1, 4, 8)],
)
def test_padded_vocab_size(size: int, multiple: int, tp: int, padded: int) -> None:
    assert padded_vocab_size(size, multiple=multiple, tensor_parallel_size=tp) == padded


def test_parameter_count_of_llama3_8b_is_the_published_one() -> None:
    count = parameter_count(LLAMA3_8B)
    assert count.total == 8_030_261_248
    assert round(count.matmul / 1e9, 3) == 7.505  # head in, embedding out


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 48}),
    ],
)
def test_parameter_count_is_that_of_transformers(name: str, fields: dict[str, Any]) -> None:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=1003,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"tie_word_embeddings": False, **fields},
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    architecture = dataclasses.replace(
        LLAMA3_8B,
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=172,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=fields.get("head_dim", 16),
        vocab_size=1003,
        tie_word_embeddings=config.tie_word_embeddings,
        qkv_bias=name == "Qwen2",
        qk_norm=name == "Qwen3",
    )
    count = parameter_count(architecture)
    assert count.total == model.num_parameters()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert count.matmul == sum(m.weight.numel() for m in linear)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
def test_backend_without_a_gpu() -> None:
    assert resolve_backend("auto") == "native"
    assert resolve_backend("native") == "native"
    with pytest.raises(ConfigError, match=r"model.backend=te: .*model.backend=native"):
        resolve_backend("te")


def test_missing_transformer_engine_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"\.\[te\]"):
        resolve_backend("te")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precision_sets_every_type(precision: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    config = _config(ParallelConfig(), precision=precision)
    assert config.params_dtype is config.pipeline_dtype is dtype
    assert (config.bf16, config.fp16) == (precision == "bf16", precision == "fp16")


def test_interleaving_overlaps_and_nothing_else_does() -> None:
    plain = _config(ParallelConfig(pipeline_model_parallel_size=2))
    assert (plain.overlap_p2p_comm, plain.batch_p2p_comm) == (False, True)
    layout = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    interleaved = _config(layout)
    assert (interleaved.overlap_p2p_comm, interleaved.batch_p2p_comm) == (True, False)
    with pytest.raises(AssertionError, match="refuses"):
        _config(dataclasses.replace(layout, overlap_p2p_comm=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rank", "width", "valid"), [(0, 12, 12), (1, 12, 8), (0, 24, 20), (1, 24, 20)]
)
def test_padding_mask_leaves_no_probability(
    dtype: torch.dtype, rank: int, width: int, valid: int
) -> None:
    """Vocabulary 20 padded to 24 over two ranks; 24 columns where the layer has gathered."""
    mask = PaddingMask(
        vocab_size=20, padded_size=24, tensor_parallel_rank=rank, tensor_parallel_size=2
    )
    leaf = (20 * torch.randn(3, 2, width)).to(dtype).requires_grad_()
    logits, _ = mask(torch.nn.Identity(), (), (leaf * 1, None))
    assert torch.equal(logits[..., :valid], leaf[..., :valid])
    log_probabilities = logits.float().log_softmax(-1)
    torch.testing.assert_close(
        log_probabilities[..., :valid], leaf[..., :valid].float().log_softmax(-1)
    )
    assert (log_probabilities.exp()[..., valid:] == 0).all()
    log_probabilities[..., 0].sum().backward()
    assert (leaf.grad[..., valid:] == 0).all() and leaf.grad[..., :valid].abs().sum() > 0
