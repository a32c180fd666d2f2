"""What can be told wrong of an extension before any work is done, all of it at once."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from megatron_cgn.data.readers import check_inputs
from megatron_cgn.errors import ConfigError, DataError, ModelError, UserError
from megatron_cgn.hf.checkpoint_layout import CHECKPOINT_FILE, HF_DIRECTORY, digest, read_info
from megatron_cgn.hf.config import read_config_json
from megatron_cgn.hf.files import check_free_space
from megatron_cgn.vocabulary.settings import Settings
from tokenizer.extend import Extender, open_extender
from tokenizer.extension import FILE_NAME
from tokenizer.filters import Rules, read_deny_list
from tokenizer.terms import read_terms

MOST_TOKENS = 100_000
"""More new tokens than any published extension has: beyond it lies a slip of the keyboard."""
REPORT_FILE = "report.json"
"""Written beside every output, so that an output is known as one."""

ModelKind = Literal["hugging_face", "checkpoint", "tokenizer"]
"""What was given: a model, one of our checkpoints, or a tokenizer without a model."""

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "*.gguf")
_PADDING_SHARE = 0.05
_PADDING_ROWS = 2048
"""A model with more rows without a token, and a larger share, is taken for another tokenizer's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was found by looking, before any work."""

    kind: ModelKind
    tokenizer: Path
    """Directory of the tokenizer; holds ``config.json`` too if there is a model."""
    extender: Extender
    rules: Rules
    terms: list[str]
    output: Path
    """The directory to write, behind links."""


def check(settings: Settings) -> Plan:
    """Look at everything that is given, before anything is done.

    Args:
        settings: What is asked for.

    Returns:
        What was found.

    Raises:
        UserError: Naming all faults that can be told without reading the corpus.
    """
    faults = _Faults()
    faults.of(partial(_check_numbers, settings))
    faults.of(partial(_check_inputs, settings))
    rules = faults.of(partial(_rules, settings))
    terms = faults.of(partial(read_terms, settings.terms)) if settings.terms else []
    output = faults.of(partial(_check_output, settings))
    kind = faults.of(partial(kind_of_model, settings.model))
    tokenizer = settings.model / HF_DIRECTORY if kind == "checkpoint" else settings.model
    extender = faults.of(partial(open_extender, tokenizer)) if kind else None
    if kind and extender:
        faults.of(partial(_check_model, settings, kind, extender.tokenizer.vocab_size))
        faults.of(partial(extender.splitter, terms or []))
    faults.raise_all()
    assert kind and extender and rules and output and terms is not None
    return Plan(
        kind=kind,
        tokenizer=tokenizer,
        extender=extender,
        rules=rules,
        terms=terms,
        output=output,
    )


class _Faults:
    """Collects the faults of several checks."""

    def __init__(self) -> None:
        self._found: list[UserError] = []

    def of[T](self, look: Callable[[], T]) -> T | None:
        """What a check gives, or None after a fault."""
        try:
            return look()
        except UserError as error:
            self._found.append(error)
            return None

    def raise_all(self) -> None:
        """Raise the only fault as it is, several as one."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            raise ConfigError("\n".join(f"- {fault}" for fault in self._found))


def kind_of_model(path: Path) -> ModelKind:
    """Tell what a directory is.

    Args:
        path: What was given as the model.

    Returns:
        The kind.

    Raises:
        ModelError: If there is no such directory.
    """
    if not path.is_dir():
        raise ModelError(
            f"{path}: there is no such directory. Give a Hugging Face model, a tokenizer, or a "
            "checkpoint (a directory with checkpoint.json)."
        )
    if (path / CHECKPOINT_FILE).is_file():
        return "checkpoint"
    has_weights = any(any(path.glob(pattern)) for pattern in _WEIGHTS)
    return "hugging_face" if has_weights else "tokenizer"


def _check_numbers(settings: Settings) -> None:
    sizes = {"--num-tokens": settings.num_tokens or 1, "--sweep": max(settings.sizes, default=0)}
    for name, size in sizes.items():
        if size > MOST_TOKENS:
            raise ConfigError(
                f"{name}: {size:,} new tokens are more than the {MOST_TOKENS:,} that this tool "
                "makes; a tokenizer trained anew would serve better."
            )
    if settings.report_only and settings.init is not None:
        raise ConfigError("--init has no effect with --report-only. Leave one of them out.")


def _check_inputs(settings: Settings) -> None:
    """Hold inputs apart: a figure measured on the corpus would flatter."""
    check_inputs(settings.corpus)
    for name, paths in (("--held-out", settings.held_out), ("--general", settings.general)):
        check_inputs(paths)
        for path, other in _common(paths, settings.corpus):
            raise DataError(
                f"{path}: is given as {name}, and {other} as --corpus has the same content. "
                "Figures on text that the tokens were made from would flatter: give other text, "
                "or leave --held-out out to hold out one in ten documents of the corpus."
            )


def _common(paths: Sequence[Path], others: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Pairs that are one file or have the same bytes."""
    return [(path, other) for path in paths for other in others if _is_same(path, other)]


def _is_same(path: Path, other: Path) -> bool:
    if os.path.realpath(path) == os.path.realpath(other):
        return True
    if not (path.is_file() and other.is_file()) or path.stat().st_size != other.stat().st_size:
        return False
    return digest(path) == digest(other)


def _rules(settings: Settings) -> Rules:
    if settings.deny is None:
        return settings.rules
    texts, patterns = read_deny_list(settings.deny)
    return replace(settings.rules, deny=texts, deny_patterns=patterns)


def _check_output(settings: Settings) -> Path:
    """Refuse to replace anything but what this tool could have written."""
    target = settings.output.resolve()
    sources = [settings.model, *settings.corpus, *settings.held_out, *settings.general]
    for source in (path.resolve() for path in sources):
        if target == source or target in source.parents:
            raise ConfigError(f"{target}: would replace {source}. Give another --output.")
    if settings.model.resolve() in target.parents:
        raise ConfigError(f"{target}: lies in the --model. Give another --output.")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target}: exists and is not a directory. Give another --output.")
    if target.is_dir() and any(target.iterdir()):
        is_ours = (target / REPORT_FILE).is_file() or (target / FILE_NAME).is_file()
        if not is_ours:
            raise ConfigError(
                f"{target}: is not empty, and not from this tool. Give another --output."
            )
        if not settings.overwrite:
            raise ConfigError(
                f"{target}: is not empty. Give another --output, or --overwrite to replace it."
            )
    parent = next(path for path in target.parents if path.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{target}: {parent} may not be written to. Give another --output.")
    return target


def _check_model(settings: Settings, kind: ModelKind, vocab_size: int) -> None:
    """Refuse a model that is another tokenizer's, and a disk that cannot hold it."""
    if kind == "tokenizer":
        if settings.init is not None:
            raise ConfigError(
                f"{settings.model}: has no weights, so --init has no effect. Leave it out, or "
                "give a model."
            )
        return
    if kind == "checkpoint":
        read_info(settings.model)  # refuses a damaged one
    rows = _rows(settings.model / HF_DIRECTORY if kind == "checkpoint" else settings.model)
    if vocab_size > rows or rows - vocab_size > max(_PADDING_ROWS, _PADDING_SHARE * rows):
        raise ModelError(
            f"{settings.model}: the model has {rows:,} rows in its embedding, but its tokenizer "
            f"{vocab_size:,} ids: they are not a pair. Copy the tokenizer from the model it is of."
        )
    if kind == "hugging_face" and not settings.report_only:  # checkpoints share files
        size = sum(file.stat().st_size for file in settings.model.rglob("*") if file.is_file())
        check_free_space(settings.output, size, error=ConfigError)


def _rows(model: Path) -> int:
    config = read_config_json(model)
    nested = config.get("text_config")
    rows = config.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    if not isinstance(rows, int):
        raise ModelError(f"{model / 'config.json'}: vocab_size is {rows!r}, not a number.")
    return rows
