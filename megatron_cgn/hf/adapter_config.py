"""``adapter_config.json`` of `peft`: what an adapter is, read and written.

A field that would change the mathematics and that is not implemented is an error, and so is a
field that is not known, unless it is switched off: `peft` adds kinds of adapters as fields of one
configuration, and one that was ignored would give another model without a word.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_cgn.config.schema import LoraConfig
from megatron_cgn.errors import ModelError
from megatron_cgn.hf.adapter_names import TARGETS, WHOLE_MATRICES

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_READ = frozenset(
    """peft_type task_type r lora_alpha lora_dropout use_rslora use_dora target_modules
    exclude_modules modules_to_save bias init_lora_weights base_model_name_or_path
    ensure_weight_tying""".split()
)
_HARMLESS = frozenset(
    """auto_mapping peft_version revision inference_mode megatron_core qalora_group_size
    runtime_config layers_pattern loftq_config eva_config corda_config lora_ga_config""".split()
)
"""Fields of provenance, of training, and of starting values, which are in the file by now."""

_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Kinds of starting values that leave the base as it is."""

_TASKS = {"lm": "CAUSAL_LM", "score": "SEQ_CLS"}
"""What `peft` calls models by their heads."""
_HEADS = ("score", "classifier")
"""Names that `peft` itself adds to what sequence classifiers hold whole; the first is ours."""

_REMEDIES: Mapping[str, str] = {
    "rank_pattern": "adapters of several ranks are not supported",
    "alpha_pattern": "adapters of several scales are not supported",
    "layers_to_transform": "adapters on some layers only are not supported",
    "layer_replication": "models with repeated layers are not supported",
    "trainable_token_indices": "train the matrix whole, by modules_to_save",
    "target_parameters": "adapters on bare parameters are not supported",
    "lora_bias": "adapters with biases are not supported",
    "fan_in_fan_out": "no matrix of these models is stored transposed",
    "use_qalora": "adapters of quantised models are not supported",
    "alora_invocation_tokens": "adapters that some tokens switch on are not supported",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What ``adapter_config.json`` says, as far as it concerns the mathematics.

    Attributes:
        path: The file.
        rank: Rank of every adapter.
        alpha: Adapters are scaled by ``alpha / rank``, or ``alpha / sqrt(rank)``.
        dropout: Probability of dropping an adapter's input while training.
        use_rslora: Whether the rank's root divides.
        use_dora: Whether every adapter has a magnitude vector.
        target_modules: Names, or the ends of names, of modules; or one regular expression.
        exclude_modules: The same for modules that have no adapter.
        modules_to_save: Matrices held whole, out of `WHOLE_MATRICES`; a scalar head apart.
        head: What the model ends in: ``score`` of a reward model, whose head is held whole too.
        ties_weights: Whether a tied model's two ends stay one matrix when they are held whole.
        base: The model that it belongs to, as its author named it.
    """

    path: Path
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    modules_to_save: tuple[str, ...]
    head: Literal["lm", "score"]
    ties_weights: bool
    base: str | None

    def selects(self, module: str) -> bool:
        """Whether `peft` gives a module an adapter, by its full name in the base model."""
        return _matches(self.target_modules, module) and not _matches(self.exclude_modules, module)


def config_json(
    lora: LoraConfig, *, base: str, head: Literal["lm", "score"] = "lm", ties_weights: bool
) -> dict[str, Any]:
    """The contents of ``adapter_config.json``, in fields that all versions of `peft` know.

    Args:
        lora: The adapters.
        base: What users shall load them onto: a directory or a name on a hub.
        head: What the model ends in.
        ties_weights: Whether the model is tied and its embedding trained whole. Written only then,
            because `peft` has known the field since recently only.

    Returns:
        A JSON object.
    """
    assert lora.rank is not None
    alpha = 2.0 * lora.rank if lora.alpha is None else lora.alpha
    whole = [*lora.modules_to_save, *(_HEADS[:1] if head == "score" else ())]
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _TASKS[head],
        "base_model_name_or_path": base,
        "r": lora.rank,
        # Servers declare it an integer.
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "modules_to_save": whole or None,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "auto_mapping": None,
        "revision": None,
    }
    return fields | ({"ensure_weight_tying": True} if ties_weights else {})


def read_config(directory: str | Path) -> AdapterConfig:
    """Read ``adapter_config.json``.

    Args:
        directory: An adapter directory of `peft`.

    Returns:
        What it says.

    Raises:
        ModelError: If it is missing, is no JSON object, or describes something that is not
            implemented. All faults are reported together, each with field and value.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(
            f"{path}: not found; give an adapter directory as peft's save_pretrained writes it"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}; copy it again") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path}: holds a {type(fields).__name__}, expected a JSON object")
    reader = _Reader(path, fields)
    config = reader.config()
    if reader.faults:
        lines = "".join(f"\n  - {fault}" for fault in reader.faults)
        raise ModelError(f"{path}: not an adapter this engine runs:{lines}")
    return config


class _Reader:
    """Reads fields and collects faults, so that all of them are reported at once."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self.fields = fields
        self.faults: list[str] = []

    def fault(self, field: str, remedy: str) -> None:
        value = json.dumps(self.fields.get(field), ensure_ascii=False)
        value = value if len(value) < 200 else value[:200] + "…"
        self.faults.append(f"{field} = {value}: {remedy}")

    def config(self) -> AdapterConfig:
        """The configuration; meaningless after faults."""
        self._check_kind()
        self._check_others()
        rank = self._number("r", 8)
        if rank < 1 or rank != int(rank):
            self.fault("r", "must be a positive integer")
        base = self.fields.get("base_model_name_or_path")
        return AdapterConfig(
            path=self.path,
            rank=int(rank),
            alpha=self._number("lora_alpha", 8),
            dropout=self._number("lora_dropout", 0.0),
            use_rslora=self._flag("use_rslora"),
            use_dora=self._flag("use_dora"),
            target_modules=self._patterns("target_modules"),
            exclude_modules=self._patterns("exclude_modules"),
            modules_to_save=self._whole(),
            head="score" if self._scores() else "lm",
            ties_weights=self._flag("ensure_weight_tying"),
            base=str(base) if base else None,
        )

    def _check_kind(self) -> None:
        """Refuse other methods than LoRA, and starting values that changed the base."""
        if self.fields.get("peft_type") != "LORA":
            self.fault("peft_type", 'only "LORA" is supported')
        if self.fields.get("task_type") not in (None, *_TASKS.values()):
            self.fault("task_type", 'only "CAUSAL_LM" and "SEQ_CLS" are supported')
        if self.fields.get("bias", "none") != "none":
            self.fault("bias", 'only "none" is supported: biases stay as they are')
        init = self.fields.get("init_lora_weights", True)
        if init is not None and init not in _INITS:
            self.fault(
                "init_lora_weights",
                "starting values that changed the base model too, so that the adapter does not "
                "belong to the base as published; save it again with peft's "
                "path_initial_model_for_weight_conversion",
            )

    def _check_others(self) -> None:
        """Refuse what would change the mathematics, known or not, unless it is off."""
        for field, value in self.fields.items():
            is_off = value is None or value is False or value in ("", [], {}, ())
            if field in _READ or field in _HARMLESS or is_off:
                continue
            unknown = "unknown field that may change the mathematics; remove it if it does not"
            self.fault(field, _REMEDIES.get(field, unknown))

    def _number(self, field: str, default: float) -> float:
        value = self.fields.get(field, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            self.fault(field, "expected a number")
            return default
        return value

    def _flag(self, field: str) -> bool:
        value = self.fields.get(field)
        if not isinstance(value, bool | None):
            self.fault(field, "expected true or false")
        return value is True

    def _patterns(self, field: str) -> tuple[str, ...] | str:
        value = self.fields.get(field) or ()
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                self.fault(field, f"not a regular expression: {error}")
            return value
        if not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
            self.fault(field, "expected a list of names or a regular expression")
            return ()
        return tuple(value)

    def _whole(self) -> tuple[str, ...]:
        value = self.fields.get("modules_to_save") or ()
        if not isinstance(value, Sequence) or isinstance(value, str):
            self.fault("modules_to_save", "expected a list of names")
            return ()
        names = [str(name).removeprefix("model.") for name in value]
        if set(names) - {*WHOLE_MATRICES, *_HEADS}:
            known = ", ".join((*WHOLE_MATRICES, _HEADS[0]))
            self.fault("modules_to_save", f"supported are {known}")
        return tuple(name for name in WHOLE_MATRICES if name in names)

    def _scores(self) -> bool:
        """Whether it is of a reward model; not every program says so by the task."""
        named = self.fields.get("modules_to_save")
        names = named if isinstance(named, list) else []
        return self.fields.get("task_type") == _TASKS["score"] or _HEADS[0] in names


def _matches(patterns: tuple[str, ...] | str, module: str) -> bool:
    """Whether a module is meant, by `peft`'s rules."""
    if patterns == "all-linear":
        return module.rpartition(".")[2] in TARGETS
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in patterns)
