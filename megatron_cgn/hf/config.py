"""Read an `Architecture` from a Hugging Face ``config.json``, or refuse it by name.

Both spellings are understood: that of transformers 4 (``rope_theta`` and ``rope_scaling``) and
of transformers 5 (``rope_parameters``). A field that would change the mathematics and that is
not implemented, or that is not known at all, is an error: it is never ignored.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_cgn.errors import ModelError
from megatron_cgn.model.architecture import Architecture, LinearRopeScaling, Llama3RopeScaling

logger = logging.getLogger(__name__)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` that are implemented."""

_READ = frozenset(
    """model_type hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim vocab_size max_position_embeddings rms_norm_eps
    tie_word_embeddings initializer_range rope_theta rope_scaling rope_parameters sliding_window
    use_sliding_window max_window_layers layer_types dtype torch_dtype""".split()
)
"""Fields this module reads."""

_REQUIRED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "hidden_dropout": (0, 0.0),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1, 1.0),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "chunk_size_feed_forward": (0,),
}
"""Fields that would change the mathematics, with the values that leave it as implemented."""

_HARMLESS = frozenset(
    """architectures auto_map bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id
    unk_token_id mask_token_id decoder_start_token_id transformers_version use_cache _name_or_path
    name_or_path return_dict output_hidden_states output_attentions return_dict_in_generate
    torchscript use_bfloat16 id2label label2id problem_type num_labels finetuning_task
    tokenizer_class prefix task_specific_params _attn_implementation _attn_implementation_autoset
    attn_implementation is_llama_config transformers.js_config unsloth_version unsloth_fixed
    _commit_hash language license
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens pruned_heads
    tf_legacy_loss cross_attention_hidden_size""".split()
)
"""Fields that describe tokens, outputs, generation or provenance, not the mathematics."""

_ROPE_FIELDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
}
"""RoPE types that are implemented, with their parameters."""


def read_config_json(path: str | Path) -> dict[str, Any]:
    """Read ``config.json`` of a Hugging Face directory.

    Args:
        path: The directory.

    Returns:
        The parsed object.

    Raises:
        ModelError: If the directory or file is missing or is not a JSON object.
    """
    directory = Path(path)
    file = directory / "config.json"
    if not directory.is_dir():
        raise ModelError(
            f"{directory}: no such directory; give a Hugging Face model directory that holds "
            "config.json and *.safetensors"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{file}: not found; {directory} is not a Hugging Face model directory"
        ) from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}; copy it again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: holds a {type(config).__name__}, expected a JSON object")
    return config


def read_architecture(path: str | Path) -> Architecture:
    """Read what a Hugging Face model is from its ``config.json``.

    Args:
        path: Hugging Face directory.

    Returns:
        The architecture.

    Raises:
        ModelError: If the file is missing or broken, or names something that is not
            implemented. All faults are reported together, each with field and value.
    """
    config = read_config_json(path)
    reader = _Reader(config, family=str(config.get("model_type")))
    architecture = reader.architecture() if reader.family in FAMILIES else None
    if architecture is None and not reader.faults:
        reader.fault("model_type", f"supported are {', '.join(FAMILIES)}")
    if reader.faults:
        faults = "\n".join(f"  - {fault}" for fault in reader.faults)
        raise ModelError(f"{Path(path) / 'config.json'}: not a model this engine runs:\n{faults}")
    assert architecture is not None
    return architecture


class _Reader:
    """Reads fields and collects faults, so that all of them are reported at once."""

    def __init__(self, config: Mapping[str, Any], *, family: str) -> None:
        self.config = config
        self.family = family
        self.faults: list[str] = []

    def fault(self, field: str, remedy: str) -> None:
        value = json.dumps(self.config.get(field), ensure_ascii=False)
        self.faults.append(
            f"{field} = {value if len(value) < 200 else value[:200] + '…'}: {remedy}"
        )

    def architecture(self) -> Architecture | None:
        """The architecture, or None after faults."""
        self._check_values()
        self._check_window()
        heads = self._integer("num_attention_heads")
        hidden = self._integer("hidden_size")
        # Only Llama's own default is "as many as query heads"; the others' are odd constants.
        kv_heads = self._integer("num_key_value_heads", heads if self.family == "llama" else None)
        if self.family == "qwen3":
            head_dim = self._integer("head_dim", 128)
        else:
            head_dim = self._integer("head_dim", hidden // heads if heads else None)
            if "head_dim" not in self.config and heads and hidden % heads:
                self.fault("hidden_size", f"not a multiple of num_attention_heads = {heads}")
        if kv_heads and heads % kv_heads:
            self.fault("num_key_value_heads", f"must divide num_attention_heads = {heads}")
        theta, scaling = self._rope()
        result = Architecture(
            family=self.family,
            num_layers=self._integer("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=self._integer("intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=self._integer("vocab_size"),
            max_position_embeddings=self._integer("max_position_embeddings"),
            norm_eps=self._number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=self._flag("tie_word_embeddings", default=False),
            qkv_bias=self.family == "qwen2",
            qk_norm=self.family == "qwen3",
            initializer_range=self._number("initializer_range", 0.02),
        )
        return None if self.faults else result

    def _check_values(self) -> None:
        for field, value in self.config.items():
            # Absent and null both mean "not used" in Hugging Face configurations.
            if value is None or field in _READ or field in _HARMLESS:
                continue
            allowed = _REQUIRED_VALUES.get(field)
            if field == "quantization_config":
                self.fault(field, "quantised weights are not supported; dequantise the model first")
            elif allowed is None:
                self.fault(
                    field,
                    "unknown field that may change the mathematics; remove it if it does not",
                )
            elif value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
                self.fault(field, f"only {json.dumps(allowed[0])} is implemented")

    def _check_window(self) -> None:
        """Refuse attention windows that a sequence could outgrow."""
        window = self.config.get("sliding_window")
        longest = self.config.get("max_position_embeddings")
        in_use = window is not None
        if self.family in ("qwen2", "qwen3"):
            first = self.config.get("max_window_layers") or 0
            layers = self.config.get("num_hidden_layers") or 0
            in_use = in_use and bool(self.config.get("use_sliding_window")) and first < layers
        elif self.family == "llama":
            in_use = False
        types = self.config.get("layer_types")
        if isinstance(types, list) and types:
            in_use = window is not None and "sliding_attention" in types
            if unknown := set(types) - {"full_attention", "sliding_attention"}:
                self.fault("layer_types", f"{sorted(map(str, unknown))} is not implemented")
        shorter = isinstance(window, int) and isinstance(longest, int) and window < longest
        if in_use and shorter:
            self.fault(
                "sliding_window",
                f"shorter than max_position_embeddings = {longest}, and windowed attention is not "
                'implemented; set it to null (and "layer_types" to full attention), or set '
                f"max_position_embeddings to {window}",
            )

    def _rope(self) -> tuple[float, Llama3RopeScaling | LinearRopeScaling | None]:
        old, new = self.config.get("rope_scaling"), self.config.get("rope_parameters")
        for field, value in (("rope_scaling", old), ("rope_parameters", new)):
            if value is not None and not isinstance(value, dict):
                self.fault(field, "expected an object or null")
                return 1.0, None
        name = "rope_parameters" if new else "rope_scaling"
        rope = dict(new or old or {})
        if old and new and dict(old).get("factor") != rope.get("factor"):
            self.fault("rope_scaling", "disagrees with rope_parameters; keep one of the two")
        theta = rope.pop("rope_theta", None)
        top = self.config.get("rope_theta")
        if theta is not None and top is not None and theta != top:
            self.fault("rope_theta", f"disagrees with {name}.rope_theta = {theta}; keep one")
        theta = theta if theta is not None else (10000.0 if top is None else top)
        if not _is_number(theta) or theta <= 0:
            self.fault("rope_theta", "expected a positive number")
            theta = 1.0
        return float(theta), self._rope_scaling(rope, name)

    def _rope_scaling(
        self, rope: dict[str, Any], name: str
    ) -> Llama3RopeScaling | LinearRopeScaling | None:
        kinds = {rope.pop(key) for key in ("rope_type", "type") if isinstance(rope.get(key), str)}
        if rope.get("partial_rotary_factor") in (1, None):
            rope.pop("partial_rotary_factor", None)
        if len(kinds) > 1 or (kind := next(iter(kinds), "default")) not in _ROPE_FIELDS:
            self.fault(name, f"implemented rope types are {', '.join(_ROPE_FIELDS)}")
            return None
        wanted = _ROPE_FIELDS[kind]
        if unknown := sorted(key for key in set(rope) - wanted if rope[key] is not None):
            self.fault(name, f"{', '.join(unknown)} does not belong to rope type {kind!r}")
            return None
        if bad := sorted(key for key in wanted if not _is_number(rope.get(key))):
            self.fault(name, f"rope type {kind!r} needs {', '.join(bad)} as numbers")
            return None
        if kind == "linear":
            return LinearRopeScaling(factor=float(rope["factor"]))
        if kind == "llama3":
            return Llama3RopeScaling(
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
            )
        return None

    def _integer(self, field: str, default: int | None = None) -> int:
        value = self.config.get(field)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            self.fault(field, "expected a positive integer")
            return 0
        return value

    def _number(self, field: str, default: float) -> float:
        value = self.config.get(field)
        value = default if value is None else value
        if not _is_number(value) or value <= 0:
            self.fault(field, "expected a positive number")
            return 0.0
        return float(value)

    def _flag(self, field: str, *, default: bool) -> bool:
        value = self.config.get(field)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.fault(field, "expected true or false")
            return default
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
