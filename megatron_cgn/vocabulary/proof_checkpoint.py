"""Proofs on the bytes of a checkpoint that was given a larger vocabulary, optimizer and all."""

import filecmp
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_cgn.hf.checkpoint_layout import DIST_DIRECTORY, HF_DIRECTORY
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.dist_edit import StoredMatrix, blocks_of
from megatron_cgn.hf.dist_reader import DistReader
from megatron_cgn.hf.resize_checkpoint import vocabulary_keys
from megatron_cgn.vocabulary.proof import Proof, judge
from tokenizer.extension import Extension


def prove_checkpoint_bytes(old: Path, new: Path, extension: Extension) -> list[Proof]:
    """Hold a checkpoint with a larger vocabulary against the one it was made from.

    Args:
        old: Checkpoint directory.
        new: The one that was made of it.
        extension: The new vocabulary.

    Returns:
        The proofs, some of which may have failed.
    """
    tied = read_architecture(old / HF_DIRECTORY).tie_word_embeddings
    theirs, ours = DistReader(old / DIST_DIRECTORY), DistReader(new / DIST_DIRECTORY)
    keys = [key for several in vocabulary_keys(theirs, tied=tied).values() for key in several]
    return [
        _prove_rows(theirs, ours, keys, extension.old_vocab_size),
        _prove_others(old / DIST_DIRECTORY, new / DIST_DIRECTORY, set(keys)),
        _prove_moments(ours, keys, extension),
    ]


def _prove_rows(theirs: DistReader, ours: DistReader, keys: list[str], count: int) -> Proof:
    wrong = []
    for key in keys:
        one, other = StoredMatrix(theirs, key), StoredMatrix(ours, key)
        for rows in blocks_of(0, count, row_bytes=one.width * one.dtype.itemsize):
            shape = rows.stop - rows.start, one.width
            a, b = (torch.empty(shape, dtype=m.dtype) for m in (one, other))
            one.read(rows, into=a)
            other.read(rows, into=b)
            if a.dtype != b.dtype or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                wrong.append(f"{key} between rows {rows.start:,} and {rows.stop:,}")
    return judge(
        "old rows",
        wrong,
        good=f"rows 0 to {count - 1:,} of {len(keys)} tensors, optimizer state included, are the "
        "same bit for bit",
        bad="rows differ in",
    )


def _prove_others(old: Path, new: Path, keys: set[str]) -> Proof:
    """Chunks at the same place of the same file need not be read."""
    theirs, ours = _places(old, keys), _places(new, keys)
    wrong = [f"{i.fqn} {tuple(i.offset or ())}" for i in theirs if theirs[i] != ours.get(i)]
    wrong += [i.fqn for i in ours.keys() - theirs.keys()]
    files = sorted({place[0] for place in theirs.values()})
    wrong += [f for f in files if not _same_file(old / f, new / f)]
    return judge(
        "other tensors",
        wrong,
        good=f"{len(theirs):,} chunks of other tensors lie where they lay, in the same files",
        bad="differ",
    )


def _places(directory: Path, keys: set[str]) -> dict[Any, tuple[str, int, int]]:
    with (directory / ".metadata").open("rb") as file:
        data = pickle.load(file).storage_data
    return {
        index: (place.relative_path, place.offset, place.length)
        for index, place in data.items()
        if index.fqn not in keys
    }


def _same_file(one: Path, other: Path) -> bool:
    return other.exists() and (one.samefile(other) or filecmp.cmp(one, other, shallow=False))


def _prove_moments(ours: DistReader, keys: list[str], extension: Extension) -> Proof:
    wrong = list(
        _bad_new_rows(ours, keys, slice(extension.old_vocab_size, extension.new_vocab_size))
    )
    return judge(
        "new rows",
        wrong,
        good=f"the {len(extension.new_tokens):,} new rows of all weights are finite, and those of "
        "the moments zero",
        bad="not finite, or not zero in a moment",
    )


def _bad_new_rows(ours: DistReader, keys: list[str], rows: slice) -> Iterator[str]:
    for key in keys:
        matrix = StoredMatrix(ours, key)
        made = torch.empty(rows.stop - rows.start, matrix.width, dtype=matrix.dtype)
        matrix.read(rows, into=made)
        if not made.isfinite().all() or (".exp_avg" in key and made.any()):
            yield key
