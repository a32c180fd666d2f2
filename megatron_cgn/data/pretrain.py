"""Pre-training data: a blend of sources to train on, and each source's held-out documents."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from megatron_cgn.config.schema import DataConfig, RunConfig
from megatron_cgn.data.blend import Blend, Place
from megatron_cgn.data.blocks import HANDLES_PER_INDEX, SampleReader, fill_cache, reading_order
from megatron_cgn.data.boundaries import check_boundaries
from megatron_cgn.data.collective import on_first_rank, together
from megatron_cgn.data.plan import plan_run
from megatron_cgn.data.sources import Source, check_sources
from megatron_cgn.data.windows import Sample, WindowDataset
from megatron_cgn.errors import DataError
from tokenizer.wrapper import Tokenizer

_HANDLES_AT_LEAST = 128
"""Open files that a process has besides its data, at the very least."""
_HANDLES_AT_EASE = 1024
"""The same with many ranks and loader processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingPlan:
    """What a run will read: decided before anything is built."""

    sources: tuple[Source, ...]
    """The checked sources."""
    blend: Blend
    """Which sequences come from which of them."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.blend.sequences // self.blend.global_batch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingData:
    """What a pre-training run reads."""

    train: "TrainingSequences"
    """Training sequences in the order of training."""
    validation: dict[str, WindowDataset]
    """Held-out windows by source name; sources without held-out documents are absent."""
    blend: Blend
    """The plan: what comes from where."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names by a sample's ``source``."""
        return tuple(source.name for source in self.blend.sources)


class TrainingSequences(Dataset[Sample]):
    """The sequences of a blend, in the order of training."""

    def __init__(self, blend: Blend, readers: dict[Place, SampleReader]) -> None:
        """Put a blend and what it reads together.

        Args:
            blend: Which sequences come from where.
            readers: Of every file that the blend draws from.
        """
        self._blend = blend
        self._readers = readers

    def __len__(self) -> int:
        """Number of sequences."""
        return self._blend.sequences

    def __getitem__(self, index: int) -> Sample:
        """Sequence ``index``: see `Sample`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        place, sample = self._blend.locate(index)
        text = torch.from_numpy(self._readers[place].read(sample))
        seq_length = self._blend.seq_length
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(seq_length, dtype=torch.float32),
            "position_ids": torch.arange(seq_length),
            "source": torch.tensor(place[0]),
        }


def plan_pretraining(run: RunConfig, *, tokenizer: Tokenizer) -> PretrainingPlan:
    """Check the sources and plan what the run reads of them. See `collective.together`.

    Args:
        run: The validated configuration.
        tokenizer: The model's tokenizer; indices made with another are refused.

    Returns:
        The plan.

    Raises:
        ConfigError: If settings contradict each other.
        DataError: If a source is unusable or too small, or does not show where documents end
            though they are to be kept apart.
    """
    _allow_open_files(run.data)
    sources = check_sources(run.data, tokenizer_fingerprint=tokenizer.fingerprint())
    if run.data.reset_attention_mask:
        check_boundaries(d.index for s in sources for d in (*s.training, *s.validation))
    return PretrainingPlan(sources=sources, blend=plan_run(run, sources))


def _allow_open_files(data: DataConfig) -> None:
    """Raise this process' limit of open files, often 1,024, as far as many indices need."""
    indices = sum(
        (len(source.files) or 1) + (source.validation_path is not None) for source in data.sources
    )
    least = HANDLES_PER_INDEX * indices + _HANDLES_AT_LEAST
    # Connections to thousands of ranks are open files, too.
    wanted = HANDLES_PER_INDEX * indices + _HANDLES_AT_EASE + len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if allowed < least:
        raise DataError(
            f"data.sources: {indices:,} indices need about {least:,} open files, and this system "
            f"allows a process {allowed:,} (ulimit -Hn). Merge some with tools/preprocess_data.py "
            "merge, or have the limit raised."
        )
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def build_pretraining_data(
    plan: PretrainingPlan,
    *,
    eod_id: int,
    cache_dir: str | Path,
    group: dist.ProcessGroup | None = None,
) -> PretrainingData:
    """Open the training sequences and the held-out windows.

    The order depends on the sources' documents, the mix, ``seq_length`` and the seed; never on
    paths, on the number of processes or on how long the run is. Documents follow one another with
    nothing in between but their own end-of-document token.

    Collective over ``group`` where torch.distributed is up; every rank must call. The first rank
    builds the shuffled indices in ``cache_dir`` and the others open them. A fault on any rank is
    raised on all of them.

    Args:
        plan: Equal on all ranks.
        eod_id: The tokenizer's end-of-document id, in front of held-out documents.
        cache_dir: Directory that every rank sees. What is cached there is keyed by the content
            of the sources, so a changed source is never read through an old index.
        group: The ranks that call, global rank 0 among them; None for all.

    Returns:
        The data.

    Raises:
        DataError: If the cache cannot be written or read, or a source has gone.
    """
    cache = Path(cache_dir)
    on_first_rank(lambda: _fill(plan, cache), group)
    return PretrainingData(
        train=together(lambda: _open(plan, cache), group),
        validation=together(lambda: _windows(plan, eod_id=eod_id), group),
        blend=plan.blend,
    )


def _fill(plan: PretrainingPlan, cache: Path) -> bool:
    blend = plan.blend
    for (source, file), samples in blend.drawn(0, blend.sequences).items():
        documents = plan.sources[source].training[file]
        if samples:
            order = reading_order(documents, seq_length=blend.seq_length, seed=blend.seed)
            fill_cache(order, documents, samples=samples, cache=cache)
    return True


def _open(plan: PretrainingPlan, cache: Path) -> TrainingSequences:
    blend = plan.blend
    readers = {}
    for (source, file), samples in blend.drawn(0, blend.sequences).items():
        documents = plan.sources[source].training[file]
        if samples:
            order = reading_order(documents, seq_length=blend.seq_length, seed=blend.seed)
            readers[source, file] = SampleReader(documents, order, samples=samples, cache=cache)
    return TrainingSequences(blend, readers)


def _windows(plan: PretrainingPlan, *, eod_id: int) -> dict[str, WindowDataset]:
    return {
        source.name: WindowDataset(
            source.validation, seq_length=plan.blend.seq_length, eod_id=eod_id
        )
        for source in plan.sources
        if source.validation
    }
