"""Give a Hugging Face model the rows of an extended vocabulary, file by file.

No model is built. Files without the embedding and the output layer are copied; the others are
laid out again with more rows, every byte of the old ones is copied, and the new rows are made
from the mapped old ones. So memory is bounded by those matrices, whatever the model's size.
"""

import functools
import json
import math
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_cgn.errors import ModelError
from megatron_cgn.hf.config import read_config_json
from megatron_cgn.hf.files import check_free_space, directory_to_write, new_directory, write_json
from megatron_cgn.hf.safetensors_io import (
    INDEX_FILE,
    SafetensorsDirectory,
    ShardPlan,
    ShardWriter,
    TensorPlace,
    forget_file,
    plan_again,
    read_header,
)
from megatron_cgn.hf.streaming import Progress, run_in_threads
from megatron_cgn.hf.vocabulary import (
    ResizeSummary,
    RowMaker,
    Rows,
    check_config,
    check_target,
    copy_others,
    find_matrices,
    plan_rows,
    resized_config,
    row_maker,
)
from megatron_cgn.hf.weights import tied_copy_fault
from megatron_cgn.model.resize import InitMethod, OldRows, Side
from tokenizer.extension import Extension


def resize_hf(
    source: Path,
    target: Path,
    extension: Extension,
    *,
    write_tokenizer: Callable[[Path], object],
    method: InitMethod = "mean",
    seed: int = 1234,
    make_vocab_size_divisible_by: int = 128,
    tensor_parallel: int = 1,
    progress: Progress = lambda _: None,
) -> ResizeSummary:
    """Write a model with rows for the new tokens; every other tensor keeps its bytes and file.

    Rows of the old tokenizer's ids stay bit for bit, then come the new tokens', then padding:
    the old model's own as far as it reached, zeros beyond. ``vocab_size`` counts them all.

    Args:
        source: Hugging Face directory with safetensors.
        target: Directory to write: new or empty, and not in the source.
        extension: The new vocabulary.
        write_tokenizer: Writes the new tokenizer's files into the directory it is given, which
            is the target before it is published.
        method: How new rows are made.
        seed: Of methods that draw.
        make_vocab_size_divisible_by: Rows are a multiple of this times `tensor_parallel`.
        tensor_parallel: Tensor-parallel ranks that shall share the rows.
        progress: Told of every few megabytes that were written.

    Returns:
        What was done.

    Raises:
        ModelError: If the model is incomplete, quantised or not the extended tokenizer's, or the
            disk refuses. Nothing is left behind then.
        DataError: If the extension is damaged.
    """
    check_target(source, target)
    config = read_config_json(source)
    check_config(config, path=source)
    weights = SafetensorsDirectory(source)
    sides, tied = find_matrices(weights, config)
    if tied and len(sides) > 1 and (fault := _tied_fault(weights, sides)):
        raise ModelError(fault)
    (old_rows,) = {weights.places[name].shape[0] for name in sides}
    check_config(config, path=source, rows=old_rows)
    rows = plan_rows(
        extension,
        old_rows=old_rows,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        tensor_parallel=tensor_parallel,
        source=source,
    )
    files = sorted({place.file for place in weights.places.values()})
    maker = row_maker(extension, config, method=method, seed=seed)
    work = _Work(weights, rows, sides, maker, progress)
    plans = {file: work.plan(file) for file in files}
    total = sum(_size(file, plan) for file, plan in plans.items())
    target = directory_to_write(target, error=ModelError)
    check_free_space(target, total + total // 1000, error=ModelError)
    with new_directory(target, error=ModelError) as directory:
        # First, because it may be what fails, and the rest takes long.
        write_tokenizer(directory)
        copy_others(source, directory)
        write_json(directory / "config.json", resized_config(config, rows))
        if (source / INDEX_FILE).exists():
            added = [work.added(name) for name in sides]
            _write_index(
                source,
                directory,
                added=sum(numbers for numbers, _ in added),
                added_bytes=sum(num_bytes for _, num_bytes in added),
            )
        run_in_threads(
            [functools.partial(work.write, directory, file, plan) for file, plan in plans.items()]
        )
    return ResizeSummary(
        method=method,
        seed=seed,
        old_vocab_size=rows.old_vocab,
        new_vocab_size=rows.new_vocab,
        old_rows=rows.old,
        rows=rows.new,
        tied=tied,
        tensors=tuple(sides),
        written_bytes=total,
    )


def resized_bytes(source: Path) -> int:
    """Bytes of weights that a resizing will read, about as many as it tells its progress of.

    Args:
        source: Hugging Face directory with safetensors.

    Returns:
        The sum.

    Raises:
        ModelError: If a file is missing or damaged.
    """
    return sum(place.num_bytes for place in SafetensorsDirectory(source).places.values())


class _Work:
    """Writes the files of the new directory."""

    def __init__(
        self,
        weights: SafetensorsDirectory,
        rows: Rows,
        sides: Mapping[str, Side],
        maker: RowMaker,
        progress: Progress,
    ) -> None:
        self._weights = weights
        self._rows = rows
        self._sides = sides
        self._maker = maker
        self._progress = progress
        self._one_at_a_time = threading.Lock()

    def plan(self, file: Path) -> ShardPlan | None:
        """Lay out a file with more rows; None for a file that stays as it is."""
        shapes = {
            name: (self._rows.new, *self._weights.places[name].shape[1:])
            for name in self._sides
            if self._weights.places[name].file == file
        }
        return plan_again(file, shapes) if shapes else None

    def added(self, name: str) -> tuple[int, int]:
        """How many numbers and bytes a matrix gets."""
        place = self._weights.places[name]
        numbers = (self._rows.new - self._rows.old) * math.prod(place.shape[1:])
        return numbers, numbers * place.dtype.itemsize

    def write(self, directory: Path, file: Path, plan: ShardPlan | None) -> None:
        """Write one file."""
        if plan is None:
            # Within the kernel where it can; file systems that share blocks copy nothing.
            shutil.copyfile(file, directory / file.name)
            self._progress(file.stat().st_size)
        else:
            writer = ShardWriter(directory, plan)
            for name, place in read_header(file).items():
                if name in self._sides:
                    # The rows of both matrices need not be in memory at once.
                    with self._one_at_a_time:
                        self._write_matrix(writer, name, place)
                else:
                    self._copy(writer, name, place, slice(0, place.num_bytes))
            writer.close()
        forget_file(directory / file.name)

    def _write_matrix(self, writer: ShardWriter, name: str, place: TensorPlace) -> None:
        """Write old rows, new rows and old padding; the file is zero where nothing is written."""
        row_bytes = math.prod(place.shape[1:]) * place.dtype.itemsize
        old_vocab, padding = self._rows.old_vocab, self._rows.kept_padding
        position = old_vocab * row_bytes
        everything = slice(0, old_vocab)
        old = OldRows([self._weights.view(name, everything)])
        for block in self._maker.blocks(old, self._sides[name]):
            made = block.to(place.dtype)
            writer.write(name, made, start_byte=position)
            position += made.nbytes
            self._progress(made.nbytes)
        self._weights.drop(name, everything)
        self._copy(writer, name, place, slice(0, old_vocab * row_bytes))
        self._copy(writer, name, place, slice(padding.start * row_bytes, padding.stop * row_bytes))

    def _copy(self, writer: ShardWriter, name: str, place: TensorPlace, part: slice) -> None:
        size = part.stop - part.start
        if not size:
            return
        writer.copy(
            name,
            place.file,
            offset=place.offset + part.start,
            num_bytes=size,
            start_byte=part.start,
        )
        self._progress(size)


def _size(file: Path, plan: ShardPlan | None) -> int:
    return file.stat().st_size if plan is None else plan.num_bytes


def _tied_fault(weights: SafetensorsDirectory, sides: Mapping[str, Side]) -> str | None:
    embedding, head = sides
    return tied_copy_fault(weights, embedding=embedding, head=head)


def _write_index(source: Path, directory: Path, *, added: int, added_bytes: int) -> None:
    """Write the index, whose metadata may name how many numbers and bytes there are."""
    index = json.loads((source / INDEX_FILE).read_text(encoding="utf-8"))
    more = {"total_size": added_bytes, "total_parameters": added}
    metadata = {
        key: value + more.get(key, 0) if isinstance(value, int) else value
        for key, value in (index.get("metadata") or {}).items()
    }
    write_json(directory / INDEX_FILE, index | {"metadata": metadata})
