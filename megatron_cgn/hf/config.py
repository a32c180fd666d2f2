"""Read an `Architecture` from a Hugging Face ``config.json``, or refuse it by name.

Both spellings are understood: that of transformers 4 (``rope_theta`` and ``rope_scaling``) and
of transformers 5 (``rope_parameters``). A field that would change the mathematics and that is
not implemented, or that is not known at all, is an error: it is never ignored.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_cgn.errors import ModelError
from megatron_cgn.hf.config_fields import (
    FAMILIES,
    HARMLESS,
    READ,
    REQUIRED_VALUES,
    ROPE_FIELDS,
    SCORE_FAMILIES,
)
from megatron_cgn.hf.config_values import is_integer, is_number, normal_rope
from megatron_cgn.model.architecture import Architecture, LinearRopeScaling, Llama3RopeScaling

_DEFAULT_WINDOW = 4096
"""What `transformers` takes ``sliding_window`` for where it is absent."""

_DEFAULT_MAX_WINDOW_LAYERS = 28
"""What it takes ``max_window_layers`` of Qwen models for where it is absent."""


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
        head = self._head()
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
        if head_dim % 2:
            # RoPE turns pairs of a head's components.
            self.faults.append(f"head_dim = {head_dim}: must be even")
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
            head=head,
        )
        return None if self.faults else result

    def _check_values(self) -> None:
        for field, value in self.config.items():
            # Absent and null both mean "not used" in Hugging Face configurations.
            if value is None or field in READ or field in HARMLESS:
                continue
            allowed = REQUIRED_VALUES.get(field)
            if field == "quantization_config":
                self.fault(field, "quantised weights are not supported; dequantise the model first")
            elif allowed is None:
                self.fault(
                    field,
                    "unknown field that may change the mathematics; remove it if it does not",
                )
            elif value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
                self.fault(field, f"only {json.dumps(allowed[0])} is implemented")

    def _head(self) -> Literal["lm", "score"]:
        """What the model ends in; models that run another class's code are refused."""
        expected = [FAMILIES[self.family], SCORE_FAMILIES[self.family]]
        named = self.config.get("architectures")
        if named is not None and (
            not isinstance(named, list) or len(named) != 1 or named[0] not in expected
        ):
            classes = " or ".join(json.dumps([name]) for name in expected)
            self.fault("architectures", f"only {classes} is implemented")
        auto_map = self.config.get("auto_map")
        # A tokenizer's code does not change the model.
        harmless = ("AutoTokenizer", "AutoProcessor")
        if auto_map is not None and (
            not isinstance(auto_map, dict) or any(key not in harmless for key in auto_map)
        ):
            self.fault("auto_map", "models with code of their own are not supported")
        if named != [SCORE_FAMILIES[self.family]]:
            return "lm"
        if self._num_labels() != 1:
            field = "num_labels" if self.config.get("id2label") is None else "id2label"
            self.fault(
                field,
                "a model that sorts into classes; only one that scores, with one label, is "
                "implemented (absent means two)",
            )
        return "score"

    def _num_labels(self) -> int | None:
        """How many numbers a sequence classifier gives, as `transformers` reads it."""
        labels = self.config.get("id2label")
        if labels is not None:
            return len(labels) if isinstance(labels, dict) else None
        number = self.config.get("num_labels")
        return number if is_integer(number, least=1) else None

    def _check_window(self) -> None:
        """Refuse attention windows that a sequence could outgrow, as `transformers` reads them."""
        types = self._layer_types()
        # Absent means 4096 to `transformers`, unlike null.
        window = self.config.get("sliding_window", _DEFAULT_WINDOW)
        if window is not None and not is_integer(window, least=1):
            self.fault("sliding_window", "expected a positive integer or null")
            return
        if self.family in ("qwen2", "qwen3"):
            in_use = self._flag("use_sliding_window", default=False) and self._slides(types)
        else:
            # Mistral's layers all slide, whatever layer_types says; Llama's never do.
            in_use = self.family == "mistral"
        longest = self.config.get("max_position_embeddings")
        if in_use and window is not None and is_integer(longest, least=window + 1):
            self.fault(
                "sliding_window",
                f"{'' if 'sliding_window' in self.config else f'(absent means {window}) '}"
                f"shorter than max_position_embeddings = {longest}, and windowed attention is not "
                f"implemented; set it to null, or set max_position_embeddings to {window}",
            )

    def _layer_types(self) -> list[str] | None:
        types = self.config.get("layer_types")
        known = ("full_attention", "sliding_attention")
        if types is None or (isinstance(types, list) and all(kind in known for kind in types)):
            return types
        self.fault("layer_types", f"expected a list of {' and '.join(known)}")
        return None

    def _slides(self, types: list[str] | None) -> bool:
        """Whether any layer of a Qwen model has a window, provided it uses one."""
        if types is not None:
            return "sliding_attention" in types
        first = self.config.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
        if not is_integer(first, least=0):
            self.fault("max_window_layers", "expected an integer of at least 0")
            return False
        layers = self.config.get("num_hidden_layers")
        return is_integer(layers, least=first + 1)

    def _rope(self) -> tuple[float, Llama3RopeScaling | LinearRopeScaling | None]:
        spellings: dict[str, dict[str, Any]] = {}
        thetas: dict[str, Any] = {"rope_theta": self.config.get("rope_theta")}
        for field in ("rope_parameters", "rope_scaling"):
            value = self.config.get(field)
            if value is not None and not isinstance(value, dict):
                self.fault(field, "expected an object or null")
                return 1.0, None
            if value:
                spellings[field] = normal_rope(value)
                thetas[f"{field}.rope_theta"] = spellings[field].pop("rope_theta", None)
        name, rope = next(iter(spellings.items()), ("rope_scaling", {}))
        if any(other != rope for other in spellings.values()):
            self.fault("rope_scaling", "disagrees with rope_parameters; keep one of the two")
        thetas = {field: theta for field, theta in thetas.items() if theta is not None}
        theta = next(iter(thetas.values()), 10000.0)
        if any(other != theta for other in thetas.values()):
            self.fault("rope_theta", f"{json.dumps(thetas)} disagree; keep one")
        if not is_number(theta) or theta <= 0:
            self.fault("rope_theta", "expected a positive number")
            theta = 1.0
        return float(theta), self._rope_scaling(rope, name)

    def _rope_scaling(
        self, rope: dict[str, Any], name: str
    ) -> Llama3RopeScaling | LinearRopeScaling | None:
        kind = rope.pop("rope_type", "default")
        if not isinstance(kind, str) or "type" in rope or kind not in ROPE_FIELDS:
            self.fault(name, f"implemented rope types are {', '.join(ROPE_FIELDS)}")
            return None
        wanted = ROPE_FIELDS[kind]
        if unknown := sorted(rope.keys() - wanted):
            self.fault(name, f"{', '.join(unknown)} does not belong to rope type {kind!r}")
            return None
        if bad := sorted(key for key in wanted if not is_number(rope.get(key)) or rope[key] <= 0):
            self.fault(name, f"rope type {kind!r} needs {', '.join(bad)} as positive numbers")
            return None
        if kind == "linear":
            return LinearRopeScaling(factor=float(rope["factor"]))
        if kind == "llama3":
            low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
            original = rope["original_max_position_embeddings"]
            if high <= low:
                self.fault(name, "high_freq_factor must be larger than low_freq_factor")
            if original != int(original):
                self.fault(name, "original_max_position_embeddings must be an integer")
            return Llama3RopeScaling(
                factor=float(rope["factor"]),
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_position_embeddings=int(original),
            )
        return None

    def _integer(self, field: str, default: int | None = None) -> int:
        value = self.config.get(field)
        value = default if value is None else value
        if not is_integer(value, least=1):
            self.fault(field, "expected a positive integer")
            return 0
        assert value is not None
        return value

    def _number(self, field: str, default: float) -> float:
        value = self.config.get(field)
        value = default if value is None else value
        if not is_number(value) or value <= 0:
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
