"""What `read_architecture` reads, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_cgn.errors import ModelError
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.model.architecture import Architecture, LinearRopeScaling, Llama3RopeScaling

# As published with Llama 3.1 8B, in the spelling of transformers 4.
LLAMA_3_1: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"]},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128},
}
LLAMA_3_1_ARCHITECTURE = Architecture(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=Llama3RopeScaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    tie_word_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
    initializer_range=0.02,
)


def _read(tmp_path: Path, config: dict[str, Any]) -> Architecture:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_architecture(tmp_path)


def test_reads_the_spelling_of_transformers_4(tmp_path: Path) -> None:
    assert _read(tmp_path, LLAMA_3_1) == LLAMA_3_1_ARCHITECTURE


def test_reads_the_spelling_of_transformers_5(tmp_path: Path) -> None:
    config = {k: v for k, v in LLAMA_3_1.items() if k not in ("rope_theta", "rope_scaling")}
    config["rope_parameters"] = LLAMA_3_1["rope_scaling"] | {"rope_theta": 500000.0}
    config["dtype"] = config.pop("torch_dtype")
    assert _read(tmp_path, config) == LLAMA_3_1_ARCHITECTURE


def test_reads_smollm2_with_its_extra_fields(tmp_path: Path) -> None:
    architecture = _read(
        tmp_path,
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
            "use_cache": True,
            "vocab_size": 49152,
        },
    )
    assert (architecture.head_dim, architecture.rope_theta) == (64, 100000.0)
    assert architecture.tie_word_embeddings
    assert architecture.rope_scaling is None


@pytest.mark.parametrize(
    ("name", "qkv_bias", "qk_norm", "head_dim"),
    [("Llama", 0, 0, 16), ("Mistral", 0, 0, 16), ("Qwen2", 1, 0, 16), ("Qwen3", 0, 1, 128)],
)
def test_reads_what_the_installed_transformers_writes(
    tmp_path: Path, name: str, qkv_bias: int, qk_norm: int, head_dim: int
) -> None:
    config = getattr(transformers, f"{name}Config")(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
        **({} if name == "Qwen3" else {"head_dim": None}),
    )
    config.save_pretrained(tmp_path)
    architecture = read_architecture(tmp_path)
    assert architecture.family == name.lower()
    assert (architecture.qkv_bias, architecture.qk_norm) == (bool(qkv_bias), bool(qk_norm))
    assert (architecture.head_dim, architecture.num_key_value_heads) == (head_dim, 2)
    assert architecture.rope_theta == 5e5
    assert architecture.rope_scaling == LinearRopeScaling(factor=4.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gpt2"),
        ("hidden_act", "gelu"),
        ("mlp_bias", True),
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("pretraining_tp", 2),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"bits": 4}),
        ("final_logit_softcapping", 30.0),
        ("residual_multiplier", 0.22),
        ("num_local_experts", 8),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"rope_type": "linear", "factor": 8.0, "beta_fast": 32}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("hidden_size", "4096"),
        ("num_attention_heads", None),
        ("num_key_value_heads", 5),
        ("rope_theta", 0),
        ("tie_word_embeddings", "no"),
        ("rms_norm_eps", float("nan")),
        ("initializer_range", float("inf")),
        ("rope_theta", float("inf")),
        ("rope_scaling", {"rope_type": "linear", "factor": 0.0}),
        ("rope_scaling", {"rope_type": "linear", "factor": -2.0}),
        ("rope_scaling", {"rope_type": "linear", "factor": float("nan")}),
        ("rope_scaling", LLAMA_3_1["rope_scaling"] | {"high_freq_factor": 1.0}),
        ("rope_scaling", LLAMA_3_1["rope_scaling"] | {"low_freq_factor": 8.0}),
        ("rope_scaling", LLAMA_3_1["rope_scaling"] | {"original_max_position_embeddings": 8.5}),
        ("head_dim", 63),
        ("layer_types", [["x"]]),
        ("layer_types", ["chunked_attention"]),
        ("layer_types", "full_attention"),
        ("architectures", ["LlamaModel"]),
        ("architectures", ["MistralForCausalLM"]),
        ("architectures", []),
    ],
)
def test_names_field_and_value_it_cannot_run(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(ModelError) as caught:
        _read(tmp_path, LLAMA_3_1 | {field: value})
    assert f"{field} = {json.dumps(value)}" in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("value", ["3", None, -1, True])
def test_names_a_wrong_number_of_layers_with_a_window(tmp_path: Path, value: object) -> None:
    with pytest.raises(ModelError, match="max_window_layers = .*: expected an integer"):
        _read(tmp_path, LLAMA_3_1 | FAMILIES["qwen2"] | SLIDING | {"max_window_layers": value})


def test_a_number_too_large_for_a_float_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="rope_theta = 1000.*…: expected a positive number"):
        _read(tmp_path, LLAMA_3_1 | {"rope_theta": 10**400})


def test_an_odd_head_is_refused_also_where_it_is_derived(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="head_dim = 127: must be even"):
        _read(tmp_path, LLAMA_3_1 | {"hidden_size": 32 * 127})


def test_reports_all_faults_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        _read(tmp_path, LLAMA_3_1 | {"hidden_act": "relu", "mlp_bias": True, "logit_scale": 2.0})
    for text in ('hidden_act = "relu"', "mlp_bias = true", "logit_scale = 2.0"):
        assert text in str(caught.value)


WINDOW: dict[str, Any] = {"sliding_window": 4096}
SLIDING: dict[str, Any] = WINDOW | {"use_sliding_window": True}


@pytest.mark.parametrize(
    ("family", "changes", "accepted"),
    [
        ("llama", SLIDING, True),
        ("mistral", WINDOW, False),
        ("mistral", {}, False),
        ("mistral", {"max_position_embeddings": 4096}, True),
        ("mistral", WINDOW | {"layer_types": ["full_attention"] * 32}, False),
        ("mistral", {"sliding_window": None}, True),
        ("mistral", {"sliding_window": 131072}, True),
        ("mistral", {"sliding_window": 131071}, False),
        ("qwen2", WINDOW | {"use_sliding_window": False}, True),
        ("qwen2", WINDOW, True),
        ("qwen2", SLIDING | {"max_window_layers": 16}, False),
        ("qwen2", SLIDING | {"max_window_layers": 0}, False),
        ("qwen2", SLIDING | {"max_window_layers": 32}, True),
        ("qwen2", SLIDING, False),
        ("qwen2", SLIDING | {"num_hidden_layers": 28}, True),
        ("qwen2", {"use_sliding_window": True}, False),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None}, True),
        ("qwen3", SLIDING | {"layer_types": ["full_attention", "sliding_attention"] * 16}, False),
        ("qwen3", SLIDING | {"layer_types": ["full_attention"] * 32}, True),
        ("qwen3", {"use_sliding_window": True}, False),
    ],
)
def test_refuses_a_window_only_where_it_is_in_use(
    tmp_path: Path, family: str, changes: dict[str, Any], accepted: bool
) -> None:
    config = LLAMA_3_1 | FAMILIES[family] | changes
    if accepted:
        _read(tmp_path, config)
    else:
        with pytest.raises(ModelError, match="sliding_window = .*shorter than max_position"):
            _read(tmp_path, config)
    # What transformers makes of the same fields, apart from Llama's, which knows no window.
    if family != "llama":
        del config["architectures"]
        theirs = getattr(transformers, f"{family.capitalize()}Config")(**config)
        layers = getattr(theirs, "layer_types", None)
        slides = family == "mistral" or "sliding_attention" in layers
        window = theirs.sliding_window if slides else None
        assert accepted == (window is None or window >= theirs.max_position_embeddings)


ROPE = LLAMA_3_1["rope_scaling"]
OLD_ROPE = {key: value for key, value in ROPE.items() if key != "rope_type"} | {"type": "llama3"}


@pytest.mark.parametrize(
    ("old", "new", "top"),
    [
        (ROPE, ROPE | {"rope_theta": 500000.0}, 500000.0),
        (OLD_ROPE, ROPE | {"rope_theta": 500000.0}, None),
        (OLD_ROPE | {"type": "llama3", "rope_type": "llama3"}, ROPE, 500000.0),
        (ROPE | {"beta_fast": None}, ROPE, 500000),
        (None, ROPE, 500000),
        (ROPE | {"rope_theta": 500000}, {}, None),
    ],
)
def test_both_spellings_of_rope_may_say_the_same(
    tmp_path: Path, old: Any, new: Any, top: Any
) -> None:
    config = LLAMA_3_1 | {"rope_scaling": old, "rope_parameters": new, "rope_theta": top}
    assert _read(tmp_path, config) == LLAMA_3_1_ARCHITECTURE


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": ROPE | {"low_freq_factor": 2.0}},
        {"rope_parameters": ROPE | {"rope_type": "linear"}},
        {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
        {"rope_parameters": ROPE | {"rope_theta": 10000.0}},
        {"rope_parameters": ROPE, "rope_scaling": ROPE | {"rope_theta": 10000.0}},
        {"rope_scaling": ROPE | {"type": "linear"}},
    ],
)
def test_spellings_of_rope_that_disagree_are_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match="keep one|implemented rope types"):
        _read(tmp_path, LLAMA_3_1 | changes)


@pytest.mark.parametrize(
    ("auto_map", "accepted"),
    [
        ({"AutoTokenizer": ["tokenization_x.Tokenizer", None]}, True),
        ({"AutoModelForCausalLM": "modeling_x.Model"}, False),
        ({"AutoConfig": "configuration_x.Config", "AutoModel": "modeling_x.Model"}, False),
        ("modeling_x.Model", False),
    ],
)
def test_models_with_their_own_code_are_refused(
    tmp_path: Path, auto_map: object, accepted: bool
) -> None:
    if accepted:
        assert _read(tmp_path, LLAMA_3_1 | {"auto_map": auto_map}) == LLAMA_3_1_ARCHITECTURE
    else:
        with pytest.raises(ModelError, match="auto_map = .*code of their own"):
            _read(tmp_path, LLAMA_3_1 | {"auto_map": auto_map})


def test_missing_or_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        read_architecture(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"config\.json: not found"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelError, match=r"config\.json: cannot be read as JSON"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="expected a JSON object"):
        read_architecture(tmp_path)
