"""An adapter directory of `peft`, opened and held against a model. Reads headers, no tensors."""

import re
from dataclasses import replace
from pathlib import Path

from megatron_cgn.config.schema import LoraConfig
from megatron_cgn.errors import ConfigError, ModelError
from megatron_cgn.hf.adapter_config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    read_config,
)
from megatron_cgn.hf.adapter_names import (
    PREFIX,
    TARGETS,
    WHOLE_MATRICES,
    adapter_shapes,
    module_name,
    parse_name,
)
from megatron_cgn.hf.families import SCORE_NAME, hf_shapes
from megatron_cgn.hf.safetensors_io import MappedTensors, read_header
from megatron_cgn.hf.weights import tied_copy_fault
from megatron_cgn.model.architecture import Architecture

_EMBEDDING, _HEAD = WHOLE_MATRICES["embed_tokens"], WHOLE_MATRICES["lm_head"]


_STATE_NAME = re.compile(r"\.lora_[AB]\.(?!weight$)[^.]+\.weight$|\.modules_to_save\.")
"""In a model that is being trained, names hold that of the adapter, e.g. ``lora_A.default.weight``;
`peft` saves without it."""


class AdapterFile:
    """An adapter directory whose header was read and checked.

    Attributes:
        directory: The directory.
        config: What ``adapter_config.json`` says.
        lora: The same as settings of ours. Its targets are those that the file has tensors for.
        tensors: The tensors, by `peft`'s names; those held whole also by the base model's.
    """

    def __init__(self, directory: str | Path) -> None:
        """Read configuration and header.

        Args:
            directory: An adapter directory of `peft`.

        Raises:
            ModelError: If a file is missing or damaged, the adapter is of a kind that is not
                supported, or configuration and tensors contradict each other.
        """
        self.directory = Path(directory)
        self.config: AdapterConfig = read_config(self.directory)
        self.file = self.directory / WEIGHTS_FILE
        if not self.file.is_file():
            raise ModelError(f"{self.file}: not found; {_found_instead(self.directory)}")
        places = read_header(self.file)
        targets = self._check_names(list(places))
        base_names = {name.removeprefix(PREFIX): place for name, place in places.items()}
        self.tensors = MappedTensors(places | base_names)
        self._names = frozenset(places)
        self.lora = LoraConfig(
            rank=self.config.rank,
            alpha=self.config.alpha,
            dropout=self.config.dropout,
            targets=targets,
            use_rslora=self.config.use_rslora,
            use_dora=self.config.use_dora,
            modules_to_save=self.config.modules_to_save,
        )

    def _check_names(self, names: list[str]) -> tuple[str, ...]:
        """Refuse tensors that `peft` would not put into the model; which targets there are."""
        found: set[str] = set()
        for name in names:
            key = parse_name(name)
            if key is not None:
                layer, target, _ = key
                found.add(target)
                module = module_name(layer, target)
                if not self.config.selects(module):
                    raise ModelError(
                        f"{self.file}: holds tensor {name!r}, but target_modules and "
                        f"exclude_modules of {CONFIG_FILE} give {module} no adapter; one of the "
                        "files is of another adapter"
                    )
            elif self.config.head == "score" and name == PREFIX + SCORE_NAME:
                continue
            elif name.removeprefix(PREFIX) not in (_EMBEDDING, _HEAD):
                remedy = (
                    "these are names of a training state; save the adapter with peft's "
                    "save_pretrained"
                    if _STATE_NAME.search(name) or not name.startswith(PREFIX)
                    else f"adapters may be on {', '.join(TARGETS)}, and "
                    f"{' and '.join(WHOLE_MATRICES)} may be held whole"
                )
                raise ModelError(f"{self.file}: tensor {name!r} is not supported: {remedy}")
            elif not self.config.modules_to_save:
                raise ModelError(
                    f"{self.file}: tensor {name!r} is a whole matrix of the base model, but "
                    f"modules_to_save in {CONFIG_FILE} names none. If it belongs to the adapter, "
                    "e.g. because the vocabulary was resized, name it there; else save the "
                    "adapter with save_embedding_layers=False"
                )
        if not found:
            raise ModelError(f"{self.file}: holds no adapter's tensors; copy the adapter again")
        return tuple(target for target in TARGETS if target in found)

    def check(self, architecture: Architecture) -> None:
        """Hold the tensors against a model.

        Args:
            architecture: The model that the adapter shall be put on.

        Raises:
            ModelError: Naming a tensor that is missing, unexpected or of another shape, with
                both shapes; or if it is of a reward model, and the model is none.
        """
        architecture = self.stored_architecture(architecture)
        self._check_rank(architecture)
        self._check_tied(architecture)
        expected = adapter_shapes(architecture, self.lora)
        if self.config.ties_weights and PREFIX + _HEAD not in self._names:
            expected.pop(PREFIX + _HEAD, None)
        layers = 1 + max(key[0] for name in self._names if (key := parse_name(name)))
        if layers != architecture.num_layers:
            raise ModelError(
                f"{self.file}: has adapters for {layers} layers, but the model has "
                f"{architecture.num_layers}; {self._other_model()}"
            )
        for name, shape in expected.items():
            if name not in self._names:
                if name == PREFIX + SCORE_NAME:
                    raise ModelError(
                        f"{self.file}: holds no {name!r}: the head that gives the scores was not "
                        "saved with the adapter, so they cannot be had again; train it with "
                        'modules_to_save = ["score"]'
                    )
                raise ModelError(
                    f"{self.file}: tensor {name!r} of shape {shape} is missing; adapters on some "
                    "layers only are not supported"
                )
            found = self.tensors.places[name].shape
            if found != shape:
                raise ModelError(
                    f"{self.file}: tensor {name!r} has shape {found}, but the model needs "
                    f"{shape}; {self._other_model()}"
                )
        for name in sorted(self._names - expected.keys()):
            raise ModelError(f"{self.file}: tensor {name!r} is not expected by {CONFIG_FILE}")

    def stored_architecture(self, architecture: Architecture) -> Architecture:
        """The model that the adapter was made for, as far as its head goes.

        An adapter of a language model may go on a model with a scalar head, which it says nothing
        of.

        Args:
            architecture: The model that the adapter shall be put on.

        Returns:
            `architecture`, with the head that the adapter knows.

        Raises:
            ModelError: If the adapter is of a reward model, and the model is a language model.
        """
        if self.config.head == "score" and architecture.head == "lm":
            raise ModelError(
                f"{self.file}: is an adapter of a reward model, which ends in a score; here is a "
                "language model. To have the reward model, merge the two with "
                "tools/convert_checkpoint.py merge-adapter"
            )
        return replace(architecture, head=self.config.head)

    def check_settings(self, lora: LoraConfig, architecture: Architecture) -> None:
        """Hold the adapter against a run's settings.

        Args:
            lora: The run's.
            architecture: The model; a tied one's matrix has two names.

        Raises:
            ConfigError: Naming every setting that differs, with both values.
        """
        tied = self.stored_architecture(architecture).ties_output
        scores = architecture.head == "score"
        ours, theirs = (
            _comparable(settings, tied=tied, scores=scores) for settings in (lora, self.lora)
        )
        faults = [
            f"lora.{name}: the adapter has {theirs[name]!r}, this run {value!r}"
            for name, value in ours.items()
            if theirs[name] != value
        ]
        if faults:
            lines = "".join(f"\n  {fault}" for fault in faults)
            raise ConfigError(
                f"lora.adapter_path: {self.directory} does not fit these settings:{lines}\n"
                "Give the adapter's values, or leave lora.adapter_path out."
            )

    def has_tied_copy(self, architecture: Architecture) -> bool:
        """Whether a tied model's matrix is here twice, so that `tied_copy_fault` must read it."""
        both = PREFIX + _EMBEDDING in self._names and PREFIX + _HEAD in self._names
        return self.stored_architecture(architecture).ties_output and both

    def tied_copy_fault(self) -> str | None:
        """Compare the two copies of a tied model's matrix; what is wrong, or None."""
        return tied_copy_fault(self.tensors, embedding=PREFIX + _EMBEDDING, head=PREFIX + _HEAD)

    def _check_rank(self, architecture: Architecture) -> None:
        shapes = hf_shapes(architecture)
        for target in self.lora.targets:
            shape = shapes[f"{module_name(0, target)}.weight"]
            if self.config.rank > min(shape):
                raise ModelError(
                    f"{self.config.path}: r = {self.config.rank} is larger than {target}, which "
                    f"is {shape[0]} × {shape[1]} in this model; {self._other_model()}"
                )

    def _check_tied(self, architecture: Architecture) -> None:
        """Refuse an adapter that makes two matrices of a tied model's one."""
        whole = [name for name in (_EMBEDDING, _HEAD) if PREFIX + name in self._names]
        is_one = _EMBEDDING in whole and (self.config.ties_weights or len(whole) == 2)
        if architecture.ties_output and whole and not is_one:
            raise ModelError(
                f"{self.file}: holds {whole[0]!r} alone, with ensure_weight_tying = false in "
                f"{CONFIG_FILE}: output layer and embedding of this model are one matrix, which "
                "the adapter makes two. Train it again with ensure_weight_tying=True, or untie "
                "the model first: tie_word_embeddings = false, with an lm_head of its own"
            )

    def _other_model(self) -> str:
        base = f" ({self.config.base})" if self.config.base else ""
        return f"it is an adapter of another model{base}"


def read_adapter_config(path: str | Path) -> LoraConfig:
    """Read what an adapter directory holds, as settings.

    Args:
        path: An adapter directory of `peft`.

    Returns:
        Rank, alpha, dropout, targets and the rest.

    Raises:
        ModelError: As `AdapterFile` does.
    """
    return AdapterFile(path).lora


def _found_instead(directory: Path) -> str:
    """What to do about a directory without its file of tensors."""
    if (directory / "adapter_model.bin").exists():
        return "adapter_model.bin is a pickle, which is not read; save it as safetensors"
    others = sorted(file.name for file in directory.glob("*.safetensors*"))
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return (
            f"{others[0]}{more} found instead, but an adapter is one file of this name, as peft's "
            "save_pretrained writes it; save it again, or rename the file if it is whole"
        )
    return "copy the adapter again"


def _comparable(lora: LoraConfig, *, tied: bool, scores: bool) -> dict[str, object]:
    """The settings that a file's tensors depend on."""
    alpha = 2.0 * (lora.rank or 0) if lora.alpha is None else float(lora.alpha)
    whole = tuple(name for name in WHOLE_MATRICES if name in lora.modules_to_save)
    if tied and whole:
        whole = ("embed_tokens",)
    elif scores:  # which has no use for a language model's output layer
        whole = tuple(name for name in whole if name != "lm_head")
    return {
        "rank": lora.rank,
        "alpha": alpha,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "targets": tuple(name for name in TARGETS if name in lora.targets),
        "modules_to_save": whole,
    }
