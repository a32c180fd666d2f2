"""Megatron's shuffled, blended training sequences, and the cache of their indices.

The only module here that calls Megatron-Core. Its `GPTDataset` and `BlendedDataset` are put
together directly, not by `BlendedMegatronDatasetBuilder`: that one divides every source of a
blend alike, where ours may bring their own held-out files; its caches outlive a change of the
documents, and a kill while they are written leaves them broken; and when the first rank fails it
leaves the others waiting in a barrier.
"""

import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.core
import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split, normalize
from torch.utils.data import Dataset

from megatron_cgn.data.blend import SourcePlan
from megatron_cgn.data.windows import Sample
from megatron_cgn.errors import DataError

# Megatron reports every file it maps; a user who wants that can still set the level.
if logging.getLogger("megatron.core.datasets").level == logging.NOTSET:
    logging.getLogger("megatron.core.datasets").setLevel(logging.WARNING)

_VISIBLE_WITHIN_S = 60.0  # a network file system may show another node's new files late
_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendRecipe:
    """Everything that decides the training sequences and their order."""

    plans: tuple[SourcePlan, ...]
    """Sources with a share above 0."""
    num_sequences: int
    """Length of the blend."""
    seq_length: int
    """Tokens of one sequence."""
    seed: int
    """Seed of the order."""

    def key(self) -> str:
        """Hash of the recipe: of the sources' content, not of where they lie."""
        facts = {
            "megatron": megatron.core.__version__,
            "sequences": self.num_sequences,
            "seq_length": self.seq_length,
            "seed": self.seed,
            "sources": [(plan.training.identity, plan.share) for plan in self.plans],
        }
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()

    def draw(self) -> tuple[int, ...]:
        """How many sequences each source gives: Megatron's own interleaving, counted."""
        drawn = [self.num_sequences] + [0] * (len(self.plans) - 1)
        used = list(range(len(self.plans)))
        while len(used) > 1:
            drawn = [0] * len(self.plans)
            for place, count in zip(used, self._interleave(used), strict=True):
                drawn[place] = count
            # One too light to be drawn even once leaves, and the others are interleaved anew.
            remaining = [place for place in used if drawn[place]]
            if remaining == used:
                break
            drawn[remaining[0]] = self.num_sequences
            used = remaining
        return tuple(drawn)

    def _interleave(self, places: Sequence[int]) -> list[int]:
        sources = np.zeros(self.num_sequences, dtype=np.int16)
        helpers.build_blending_indices(
            sources,
            np.zeros(self.num_sequences, dtype=np.int64),
            normalize([self.plans[place].share for place in places]),
            len(places),
            self.num_sequences,
            False,
        )
        counts: list[int] = np.bincount(sources, minlength=len(places)).tolist()
        return counts

    def open(self, drawn: Sequence[int], folder: Path) -> Dataset[Sample]:
        """Open the blend; where ``folder`` lacks an index, global rank 0 builds it.

        Args:
            drawn: What `draw` returned.
            folder: Where the indices are.

        Returns:
            The training sequences.
        """
        config = self._config(folder)
        used = [(plan, count) for plan, count in zip(self.plans, drawn, strict=True) if count]
        parts = [
            GPTDataset(
                IndexedDataset(plan.training.index.prefix),
                # Stands for a path in Megatron's hashes.
                plan.training.identity,
                np.arange(plan.training.start, plan.training.stop, dtype=np.int32),
                count,
                Split.train,
                config,
            )
            for plan, count in used
        ]
        if len(parts) == 1:
            return TrainingSequences(parts[0], self.num_sequences)
        weights = normalize([plan.share for plan, _ in used])
        blend = BlendedDataset(parts, weights, self.num_sequences, config)
        return TrainingSequences(blend, self.num_sequences)

    def _config(self, folder: Path) -> GPTDatasetConfig:
        return GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.seq_length,
            blend=([str(folder)], None),  # unused, but without one Megatron mocks the data
            split="1",
            path_to_cache=str(folder),
            tokenizer=_NoTokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,  # seq_length squared booleans per sequence, unused
        )


class TrainingSequences(Dataset[Sample]):
    """The first ``length`` sequences of one of Megatron's datasets, as our samples."""

    def __init__(self, dataset: Any, length: int) -> None:
        """Wrap a dataset.

        Args:
            dataset: `GPTDataset` or `BlendedDataset`; may hold more than ``length``.
            length: Sequences to offer.
        """
        assert len(dataset) >= length, (len(dataset), length)
        self._dataset = dataset
        self._length = length

    def __len__(self) -> int:
        """Number of sequences."""
        return self._length

    def __getitem__(self, index: int) -> Sample:
        """Sequence ``index`` in the order of training."""
        if not 0 <= index < self._length:
            raise IndexError(index)
        sample = self._dataset[index]
        return {name: sample[name] for name in _FIELDS}


def fill_cache(recipe: BlendRecipe, folder: Path) -> tuple[int, ...]:
    """Build the indices of a blend unless they are there. For global rank 0.

    Args:
        recipe: The blend.
        folder: Where they belong; appears only when complete.

    Returns:
        How many sequences each source gives.

    Raises:
        DataError: If the folder cannot be written.
    """
    drawn = recipe.draw()
    if folder.is_dir():
        return drawn
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
    try:
        recipe.open(drawn, temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was faster, with the same content
                raise
    except OSError as error:
        raise DataError(
            f"{folder.parent}: cannot write the shuffled indices ({error.strerror or error}). "
            "Make room there, or set data.cache_dir to a directory that can be written."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return drawn


def open_cache(recipe: BlendRecipe, drawn: Sequence[int], folder: Path) -> Dataset[Sample]:
    """Open a blend whose indices have been built, waiting for a slow network file system.

    Args:
        recipe: The blend.
        drawn: What `fill_cache` returned.
        folder: Where the indices are.

    Returns:
        The training sequences.

    Raises:
        DataError: If the folder does not appear or is damaged.
    """
    deadline = time.monotonic() + _VISIBLE_WITHIN_S
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise DataError(
                f"{folder}: not visible on this node. Set data.cache_dir to a directory that all "
                "nodes share."
            )
        time.sleep(0.2)
    try:
        return recipe.open(drawn, folder)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{folder}: cannot read the shuffled indices ({error}). Delete this folder; it is "
            "built again."
        ) from error


class _NoTokenizer:
    """What Megatron's datasets ask of a tokenizer when nothing is masked or padded."""

    vocab_size = None
    eod = None
    unique_identifiers: dict[str, Any] = {}
