"""What of a Hugging Face model belongs to its vocabulary, and what a new one makes of it.

Shared by the resizing of Hugging Face directories and of checkpoints: both have a
``config.json``, a tokenizer beside it and side files.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_cgn.errors import DataError, ModelError
from megatron_cgn.hf.config_fields import FAMILIES, SCORE_FAMILIES
from megatron_cgn.hf.files import TOKENIZER_FILES, matches
from megatron_cgn.hf.safetensors_io import SafetensorsDirectory
from megatron_cgn.model.heads import padded_vocab_size
from megatron_cgn.model.resize import InitMethod, OldRows, Side, iterate_new_rows
from tokenizer.extension import FILE_NAME, Extension

logger = logging.getLogger(__name__)

_EMBEDDINGS = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "model.tok_embeddings.weight",
    "model.word_embeddings.weight",
    "transformer.wte.weight",
    "transformer.word_embeddings.weight",
    "transformer.embedding.word_embeddings.weight",
    "gpt_neox.embed_in.weight",
)
"""Names of the embedding: the first is that of the families that training knows."""
_HEADS = (
    "lm_head.weight",
    "language_model.lm_head.weight",
    "embed_out.weight",
    "output.weight",
    "transformer.output_layer.weight",
)
"""Names of the output layer likewise."""

_WEIGHTS = ("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """How many rows there are and shall be."""

    old_vocab: int
    """Ids of the old tokenizer: rows that stay bit for bit."""
    new_vocab: int
    """Ids of the new one."""
    old: int
    """Rows that the matrices have."""
    new: int
    """Rows that they get."""

    @property
    def kept_padding(self) -> range:
        """Rows of the old padding that are padding still. They stay as well.

        An output row that is zero would have a larger probability than one that training has
        pushed down.
        """
        return range(self.new_vocab, max(self.new_vocab, self.old))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMaker:
    """Makes the new rows of a matrix, in FP32 blocks."""

    pieces: Sequence[Sequence[int]]
    """Old ids of each new token."""
    method: InitMethod
    """How."""
    seed: int
    """Of methods that draw."""
    standard_deviation: float
    """Of ``random``."""

    def blocks(self, old: OldRows, side: Side) -> Iterator[Tensor]:
        """The new rows of a matrix with these old ones."""
        return iterate_new_rows(
            old,
            self.pieces,
            method=self.method,
            seed=self.seed,
            side=side,
            standard_deviation=self.standard_deviation,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeSummary:
    """What a model's new vocabulary made of it."""

    method: InitMethod
    """How the new rows were made."""
    seed: int
    """Of their random numbers."""
    old_vocab_size: int
    """Ids of the old tokenizer."""
    new_vocab_size: int
    """Ids of the new one."""
    old_rows: int
    """Rows of the matrices before, with padding."""
    rows: int
    """Rows now."""
    tied: bool
    """Whether the output layer is the embedding."""
    tensors: tuple[str, ...]
    """Tensors that have new rows."""
    written_bytes: int
    """Bytes of the files that were written or copied."""
    linked_bytes: int = 0
    """Bytes of files that are the source's own, shared with it."""


def plan_rows(
    extension: Extension,
    *,
    old_rows: int,
    make_vocab_size_divisible_by: int,
    tensor_parallel: int,
    source: Path,
) -> Rows:
    """Say how many rows a model gets, or that it is not the tokenizer's.

    Args:
        extension: The new vocabulary.
        old_rows: Rows of the model.
        make_vocab_size_divisible_by: Rows of one tensor-parallel rank are a multiple of this.
        tensor_parallel: Ranks that shall share the rows.
        source: The model, for messages.

    Returns:
        The rows; never fewer than before.

    Raises:
        ModelError: If the model has fewer rows than the old tokenizer has ids, or was extended
            from another vocabulary.
        DataError: If the extension is damaged.
    """
    if extension.old_vocab_size > old_rows:
        raise ModelError(
            f"{source}: the model has {old_rows:,} rows, but the tokenizer that was extended has "
            f"{extension.old_vocab_size:,} ids; extend the model's own tokenizer"
        )
    before = _earlier(source)
    if before is not None and before.new_vocab_size != extension.old_vocab_size:
        raise ModelError(
            f"{source / FILE_NAME}: the model was extended to {before.new_vocab_size:,} ids "
            f"before, but the tokenizer that was extended now has {extension.old_vocab_size:,}; "
            f"extend the tokenizer that is in {source}"
        )
    for token in extension.new_tokens:
        if not token.old_ids or not 0 <= min(token.old_ids) <= max(token.old_ids) < (
            extension.old_vocab_size
        ):
            raise DataError(
                f"the new token {token.id} ({token.token!r}) stands for old ids {token.old_ids}, "
                f"not for some below {extension.old_vocab_size:,}; extend the vocabulary again"
            )
    new = padded_vocab_size(
        max(old_rows, extension.new_vocab_size),
        multiple=make_vocab_size_divisible_by,
        tensor_parallel_size=tensor_parallel,
    )
    return Rows(
        old_vocab=extension.old_vocab_size,
        new_vocab=extension.new_vocab_size,
        old=old_rows,
        new=new,
    )


def find_matrices(
    weights: SafetensorsDirectory, config: Mapping[str, Any]
) -> tuple[dict[str, Side], bool]:
    """Find the embedding and the output layer by their usual names.

    Families that training does not know are resized too: nothing but these names, the vocabulary
    size and whether the two are tied has to be known of them.

    Args:
        weights: The opened directory.
        config: Its ``config.json``.

    Returns:
        The side of each matrix by name, and whether they are one. A tied model that holds its
        matrix twice has both.

    Raises:
        ModelError: If they are not found, differ in their rows, or another tensor has as many
            rows and may belong to the vocabulary too.
    """
    known = config.get("model_type") in FAMILIES
    found = [_the_one(weights, names[:1] if known else names) for names in (_EMBEDDINGS, _HEADS)]
    embedding, head = found
    if embedding is None:
        raise ModelError(
            f"{weights.path}: holds no embedding under a usual name, such as {_EMBEDDINGS[0]}; a "
            f"model of type {config.get('model_type')!r} cannot be given new rows"
        )
    flags = {value for value in _values(config, "tie_word_embeddings") if value is not None}
    tied = True in flags or (head is None and (not known and False not in flags))
    if head is None and not tied:
        raise ModelError(
            f"{weights.path}: tensor {_HEADS[0]!r} is missing, but config.json does not say "
            "tie_word_embeddings; copy the model again, or set it to true"
        )
    names = [embedding] if head is None else [embedding, head]
    if len({weights.places[name].shape for name in names}) > 1:
        shapes = " and ".join(f"{name} {weights.places[name].shape}" for name in names)
        raise ModelError(f"{weights.path}: {shapes} differ in shape; copy the model again")
    if not known:
        _check_others(weights, names, config)
    sides: dict[str, Side] = {embedding: "both" if tied else "input"}
    if head is not None:
        sides[head] = "both" if tied else "output"
    return sides, tied


def check_config(config: Mapping[str, Any], *, path: Path, rows: int | None = None) -> None:
    """Refuse weights that cannot be resized, and a vocabulary size that is not theirs.

    Args:
        config: A ``config.json``.
        path: The directory, for messages.
        rows: Rows of the embedding, once they are known.

    Raises:
        ModelError: Naming field and value.
    """
    if any(_values(config, "quantization_config")):
        raise ModelError(
            f"{path / 'config.json'}: quantization_config: the weights are quantised; dequantise "
            "the model first"
        )
    if config.get("architectures") in [[name] for name in SCORE_FAMILIES.values()]:
        raise ModelError(
            f"{path / 'config.json'}: architectures = {config['architectures']}: a reward model; "
            "extend the vocabulary of the language model, and train its reward model from that"
        )
    sizes = sorted({size for size in _values(config, "vocab_size") if isinstance(size, int)})
    if rows is not None and rows not in sizes:
        raise ModelError(
            f"{path / 'config.json'}: vocab_size = {sizes}, but the embedding has {rows:,} rows; "
            "restore the model's own config.json"
        )


def resized_config(config: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    """Bring ``vocab_size`` up to date, also in nested configurations; all else stays."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            result[key] = resized_config(value, rows)
        else:
            result[key] = rows.new if key == "vocab_size" and value == rows.old else value
    return result


def row_maker(
    extension: Extension, config: Mapping[str, Any], *, method: InitMethod, seed: int
) -> RowMaker:
    """Say how the new rows of a model are made.

    Args:
        extension: The new vocabulary.
        config: The model's ``config.json``; 0.02 where it names no ``initializer_range``.
        method: How.
        seed: Of methods that draw.

    Returns:
        What makes them.
    """
    given = [value for value in _values(config, "initializer_range") if isinstance(value, float)]
    return RowMaker(
        pieces=[token.old_ids for token in extension.new_tokens],
        method=method,
        seed=seed,
        standard_deviation=given[0] if given else 0.02,
    )


def check_target(source: Path, target: Path) -> None:
    """Refuse a target that holds something, or that lies in the source.

    Raises:
        ModelError: Naming the target.
    """
    inside = source.resolve() in (target.resolve(), *target.resolve().parents)
    if inside:
        raise ModelError(f"{target}: lies in {source}, which is read; give another directory")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target}: exists and is not an empty directory; give another")


def copy_others(source: Path, target: Path) -> None:
    """Copy every file of a model directory that is neither weights, configuration nor tokenizer."""
    for file in sorted(source.iterdir()):
        skipped = file.name == "config.json" or matches(file.name, (*_WEIGHTS, *TOKENIZER_FILES))
        if file.is_file() and not skipped and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)


def _earlier(source: Path) -> Extension | None:
    """The extension that a directory's vocabulary has gone through, if any."""
    path = source / FILE_NAME
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it") from error
    return Extension.from_json(content, name=str(path))


def _the_one(weights: SafetensorsDirectory, names: tuple[str, ...]) -> str | None:
    found = [name for name in names if name in weights.places]
    if len(found) > 1:
        raise ModelError(f"{weights.path}: holds both {found[0]} and {found[1]}; copy it again")
    return found[0] if found else None


def _check_others(
    weights: SafetensorsDirectory, names: list[str], config: Mapping[str, Any]
) -> None:
    """Refuse to guess what else has a row for each id."""
    rows = weights.places[names[0]].shape[0]
    others = [n for n, p in weights.places.items() if rows in p.shape and n not in names]
    if others:
        raise ModelError(
            f"{weights.places[others[0]].file}: tensor {others[0]!r} ({len(others)} in all) has "
            f"{rows:,} rows or columns too, and may belong to the vocabulary; a model of type "
            f"{config.get('model_type')!r} cannot be given new rows"
        )
    logger.warning(
        "%s: training does not know models of type %r; %s are resized by their names",
        weights.path,
        config.get("model_type"),
        " and ".join(names),
    )


def _values(config: Mapping[str, Any], key: str) -> Iterator[Any]:
    """The values of a key, from the outermost configuration to nested ones."""
    if key in config:
        yield config[key]
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _values(value, key)
