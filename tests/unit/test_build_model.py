"""A whole model in one process, against `transformers` and against itself."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_cgn.config.schema import ModelConfig, ParallelConfig
from megatron_cgn.model.architecture import Architecture, Llama3RopeScaling
from megatron_cgn.model.build import build_model, transformer_config
from megatron_cgn.model.packing import pack_row
from megatron_cgn.parallel.seed import seed_everything
from megatron_cgn.parallel.state import ParallelState, initialize_parallel, shutdown_parallel

HF_LOSS_ATOL = 1e-5
"""FP32 losses near 7 against `transformers`: a few units in the last place, other kernels."""
ROPE = dict(
    factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
TINY = Architecture(
    family="llama",
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=24,
    vocab_size=1000,
    max_position_embeddings=256,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=Llama3RopeScaling(**ROPE),
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    initializer_range=0.05,
)


@pytest.fixture(scope="module")
def state() -> Iterator[ParallelState]:
    state = initialize_parallel(ParallelConfig())
    seed_everything(1, state)
    yield state
    shutdown_parallel()


def _model(
    state: ParallelState,
    architecture: Architecture = TINY,
    *,
    recompute: Literal["none", "selective", "full"] = "none",
    multiple: int = 128,
    seed: int | None = 5,
) -> Any:
    config = transformer_config(
        architecture,
        parallel=ParallelConfig(),
        model=ModelConfig(backend="native"),
        precision="fp32",
        recompute=recompute,
    )
    (model,) = build_model(
        architecture,
        config=config,
        groups=state.groups,
        seq_length=96,
        make_vocab_size_divisible_by=multiple,
        backend="native",
        seed=seed,
    )
    return model


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(0, TINY.vocab_size, (2, 97), generator=generator)
    return ids[:, :-1], ids[:, 1:], torch.arange(96).expand(2, -1)


def _nll(model: Any, packed: Any | None = None) -> Tensor:
    tokens, labels, positions = _batch()
    if packed is not None:
        tokens, labels, positions = (x.reshape(1, -1) for x in (tokens, labels, positions))
    return model(tokens, positions, None, labels=labels, packed_seq_params=packed)


def _gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    _nll(model).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def _copy_from_transformers(model: Any, reference: LlamaForCausalLM) -> None:
    """Write out by hand which weight goes where; `hf/` has its own tests."""
    source = reference.state_dict()
    target = dict(model.named_parameters())
    with torch.no_grad():
        for name, theirs in (
            ("embedding.word_embeddings", "model.embed_tokens"),
            ("output_layer", "lm_head"),
            ("decoder.final_layernorm", "model.norm"),
        ):
            weight = source[f"{theirs}.weight"]
            target[f"{name}.weight"][: len(weight)] = weight
        for i in range(TINY.num_layers):
            ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
            q, k, v = (source[f"{theirs}.self_attn.{x}_proj.weight"].view(2, -1, 64) for x in "qkv")
            rows = torch.cat((q, k, v), dim=1).reshape(-1, 64)
            target[f"{ours}.self_attention.linear_qkv.weight"].copy_(rows)
            gate, up = (source[f"{theirs}.mlp.{x}_proj.weight"] for x in ("gate", "up"))
            target[f"{ours}.mlp.linear_fc1.weight"].copy_(torch.cat((gate, up)))
            for a, b in (
                ("self_attention.linear_proj", "self_attn.o_proj"),
                ("mlp.linear_fc2", "mlp.down_proj"),
                ("input_layernorm", "input_layernorm"),
                ("pre_mlp_layernorm", "post_attention_layernorm"),
            ):
                target[f"{ours}.{a}.weight"].copy_(source[f"{theirs}.{b}.weight"])


def _transformers_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=TINY.vocab_size,
        hidden_size=TINY.hidden_size,
        intermediate_size=TINY.ffn_hidden_size,
        num_hidden_layers=TINY.num_layers,
        num_attention_heads=TINY.num_attention_heads,
        num_key_value_heads=TINY.num_key_value_heads,
        head_dim=TINY.head_dim,
        rms_norm_eps=TINY.norm_eps,
        max_position_embeddings=TINY.max_position_embeddings,
        rope_parameters={"rope_type": "llama3", "rope_theta": TINY.rope_theta, **ROPE},
        tie_word_embeddings=False,
    )
    torch.manual_seed(2)
    reference = LlamaForCausalLM(config)
    for parameter in reference.parameters():
        parameter.data.normal_(0.0, 0.08).add_(1.0 if parameter.dim() == 1 else 0.0)
    return reference


def test_loss_is_that_of_transformers(state: ParallelState) -> None:
    reference = _transformers_model()
    model = _model(state, seed=None)
    _copy_from_transformers(model, reference)
    tokens, labels, _ = _batch()
    with torch.no_grad():
        logits = reference(tokens).logits
        expected = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        torch.testing.assert_close(_nll(model), expected, rtol=0, atol=HF_LOSS_ATOL)
        ours = model(tokens, None, None)
        torch.testing.assert_close(ours[..., : TINY.vocab_size], logits, rtol=0, atol=1e-5)
        # Against the same model without RoPE scaling, so that the test can see it.
        model.rotary_pos_emb.inv_freq.mul_(2.0)
        RotaryEmbedding.forward.cache_clear()
        assert (_nll(model) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("tied", [False, True])
def test_padding_the_vocabulary_changes_neither_loss_nor_gradients(
    state: ParallelState, tied: bool
) -> None:
    architecture = dataclasses.replace(TINY, tie_word_embeddings=tied)
    padded = _model(state, architecture, multiple=256)
    exact = _model(state, architecture, multiple=1)
    assert padded.embedding.word_embeddings.weight.shape == (1024, 64)
    assert exact.embedding.word_embeddings.weight.shape == (1000, 64)
    torch.testing.assert_close(_nll(padded), _nll(exact), rtol=0, atol=2e-6)
    ours, expected = _gradients(padded), _gradients(exact)
    assert ours.keys() == expected.keys()
    for name, grad in ours.items():
        rows = len(expected[name])
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(grad[:rows], expected[name], rtol=0, atol=1e-6 * scale)
        assert (grad[rows:] == 0).all()


def test_weights_left_unset_have_no_nan_in_the_padding(state: ParallelState) -> None:
    weight = _model(state, multiple=256, seed=None).output_layer.weight
    assert (weight[1000:] == 0).all()


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_recomputation_changes_no_bit_of_any_gradient(
    state: ParallelState, recompute: Literal["selective", "full"], qk_norm: bool
) -> None:
    architecture = dataclasses.replace(TINY, qk_norm=qk_norm, qkv_bias=not qk_norm)
    expected = _gradients(_model(state, architecture))
    model = _model(state, architecture, recompute=recompute)
    calls: dict[str, int] = {"core_attention": 0, "mlp": 0}
    layer = model.decoder.layers[1]
    for name, module in (
        ("core_attention", layer.self_attention.core_attention),
        ("mlp", layer.mlp),
    ):
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    ours = _gradients(model)
    assert calls == {"core_attention": 2, "mlp": 2 if recompute == "full" else 1}
    for name, grad in expected.items():
        assert torch.equal(ours[name], grad), name
        assert grad.abs().sum() > 0, name


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_packed_row_is_the_batch_it_packs(
    state: ParallelState, recompute: Literal["none", "selective", "full"]
) -> None:
    model = _model(state, recompute=recompute)
    expected = _nll(model)
    expected.sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    packed = pack_row(
        torch.tensor([0, 96, 192], dtype=torch.int32),
        position_ids=torch.arange(96).repeat(2)[None],
        backend="native",
    )
    model.zero_grad()
    nll = _nll(model, packed)
    torch.testing.assert_close(nll.view(2, 96), expected, rtol=0, atol=1e-5)
    nll.sum().backward()
    for name, parameter in model.named_parameters():
        scale = float(grads[name].abs().max())
        torch.testing.assert_close(parameter.grad, grads[name], rtol=0, atol=1e-5 * scale)


def test_random_weights_come_from_the_seed_and_have_the_asked_spread(state: ParallelState) -> None:
    first, again, other = (_model(state, seed=s) for s in (5, 5, 6))
    for (name, a), b, c in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        if a.dim() == 2:
            assert not torch.equal(a, c), name
            assert float(a[:1000].std()) == pytest.approx(0.05, rel=0.03), name
    layers = [first.decoder.layers[i].mlp.linear_fc2.weight for i in range(3)]
    assert not torch.equal(layers[0], layers[1])


def test_checkpoint_keys_are_those_of_transformer_engine_layers(state: ParallelState) -> None:
    model = _model(state, dataclasses.replace(TINY, qk_norm=True))
    keys = {t.key for t in model.sharded_state_dict().values() if "_extra_state" not in t.key}
    layer = "decoder.layers"
    assert keys == {
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "decoder.final_layernorm.weight",
        f"{layer}.self_attention.linear_qkv.layer_norm_weight",
        f"{layer}.self_attention.linear_qkv.weight",
        f"{layer}.self_attention.q_layernorm.weight",
        f"{layer}.self_attention.k_layernorm.weight",
        f"{layer}.self_attention.linear_proj.weight",
        f"{layer}.mlp.linear_fc1.layer_norm_weight",
        f"{layer}.mlp.linear_fc1.weight",
        f"{layer}.mlp.linear_fc2.weight",
    }
