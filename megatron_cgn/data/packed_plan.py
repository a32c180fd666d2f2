"""What a run reads of conversations, or of records of preferences: planned, packed and opened.

``sft.py`` and ``preference.py`` say what is read; here is what they share.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from megatron_cgn.config.schema import RunConfig
from megatron_cgn.data.sft_files import AnyFile
from megatron_cgn.data.sft_packs import PackOrder, build_held_out, build_packs, open_packs
from megatron_cgn.data.sft_pools import epochs_of, held_out_of, make_pools, shares_of
from megatron_cgn.data.sft_selection import Reading, Tally
from megatron_cgn.data.sft_sequences import Numbered, PackedSequences
from megatron_cgn.data.sft_sources import SftSource, sources_of
from megatron_cgn.data.sources import exact


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPlan:
    """What a run will read: decided before the model is built."""

    sources: tuple[SftSource, ...]
    """The sources, counted."""
    shares: Mapping[str, Fraction] | None
    """Shares of the tokens by source name; None: everything equally often."""
    epochs_of: str | None
    """The source whose epochs are counted; None: of everything, or none are counted."""
    reading: Reading
    """How conversations are read."""
    packing: bool
    """Whether they share sequences."""
    seed: int
    """Seed of the order."""
    global_batch_size: int
    """Sequences of one step."""
    order_key: str
    """Stands for the order, which a longer run shares."""
    packs: Path
    """The sequences."""
    held_out: Mapping[str, Path]
    """The held-out sequences by source name; sources of which nothing is held out are absent."""
    sequences: int
    """Sequences of the run, blank ones not counted."""
    planned: tuple[Tally, ...]
    """What the run reads of each file, as often as it reads it: source by source, those held out
    whole among them."""

    unit: ClassVar[str] = "conversations"
    """What is packed, for messages and accounts."""
    void: ClassVar[str] = "with no token that counts"
    """What is said of those that are left out for having nothing to learn."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run; blank sequences fill the last."""
        return -(-self.sequences // self.global_batch_size)

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names by `TokenBatch.source_ids`."""
        return tuple(source.name for source in self.sources)

    @property
    def utilisation(self) -> float:
        """Tokens read over the places of all sequences; what is left would be padding."""
        tokens = sum(tally.tokens for tally in self.planned)
        return tokens / (self.sequences * self.reading.seq_length)

    def settings(self) -> dict[str, Any]:
        """What decides how conversations are read, under the names of the configuration."""
        shares = self.shares
        return {
            "seed": self.seed,
            "data.seq_length": self.reading.seq_length,
            "data.packing": self.packing,
            "data.mix": None if shares is None else {n: str(s) for n, s in sorted(shares.items())},
            "data.epochs_of": self.epochs_of,
            "chat.truncation": self.reading.truncation,
            "chat.train_on_prompt": self.reading.train_on_prompt,
            "chat.last_turn_only": self.reading.last_turn_only,
        }

    def facts(self) -> dict[str, Any]:
        """What else the account tells."""
        return {}

    def remarks(self) -> Iterator[str]:
        """What else is to be said of the data, in lines of text."""
        yield from ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedData[R]:
    """What a run reads: its sequences give rows of type R."""

    train: PackedSequences[R]
    """Training sequences in the order of training, whole steps of them."""
    validation: dict[str, PackedSequences[R]]
    """Held-out sequences by source name; sources of which nothing is held out are absent."""
    plan: PackedPlan
    """What was planned."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names by ``source_ids`` of batches."""
        return self.plan.source_names

    def consumed(self, sequences: int) -> tuple[Tally, ...]:
        """What the first sequences of the run hold of each file, in the order of `planned`."""
        return self.train.tally(0, min(sequences, self.plan.sequences))


def make_plan[P: PackedPlan](
    plan_type: type[P],
    run: RunConfig,
    *,
    reading: Reading,
    opened: Sequence[AnyFile],
    numbered: Numbered[Any],
    cache: Path,
    **more: Any,
) -> P:
    """Pack what a run reads, unless that has been done, and say what it will be.

    Args:
        plan_type: Its class.
        run: The configuration.
        reading: How conversations are read.
        opened: The files, divided.
        numbered: What they hold.
        cache: Where sequences belong.
        **more: Fields that its class has besides.

    Returns:
        The plan.

    Raises:
        DataError: If a source with a share has nothing to train on, or the cache cannot be
            written.
    """
    folder, order_key = _pack(run, opened, numbered, cache)
    packs = open_packs(folder)
    sources = sources_of(run.data, opened)
    return plan_type(
        sources=sources,
        shares=shares_of(run),
        epochs_of=epochs_of(run),
        reading=reading,
        packing=run.data.packing,
        seed=run.seed,
        global_batch_size=run.train.global_batch_size,
        order_key=order_key,
        packs=folder,
        held_out=_pack_held_out(run, opened, numbered, sources, cache),
        sequences=len(packs),
        planned=numbered.tally(packs.between(0, len(packs))),
        **more,
    )


def _pack(
    run: RunConfig, files: Sequence[AnyFile], numbered: Numbered[Any], cache: Path
) -> tuple[Path, str]:
    """Write the sequences of the run; return where they are, and what stands for their order."""
    pools, epoch = make_pools(run, files, numbered.bases.tolist())
    order = PackOrder(
        pools=pools,
        seed=run.seed,
        seq_length=run.data.seq_length,
        packing=run.data.packing,
        epoch=epoch,
    )
    steps, epochs = run.train.train_iters, run.train.epochs
    folder = build_packs(
        order,
        numbered.lengths,
        sequences=None if steps is None else steps * run.train.global_batch_size,
        epochs=None if epochs is None else exact(epochs),
        numbering=numbered.numbering,
        cache=cache,
    )
    return folder, order.key()


def _pack_held_out(
    run: RunConfig,
    files: Sequence[AnyFile],
    numbered: Numbered[Any],
    sources: Sequence[SftSource],
    cache: Path,
) -> dict[str, Path]:
    """Write the held-out sequences of each source that has some."""
    return {
        source.name: build_held_out(
            *held_out_of(files, numbered.bases.tolist(), place),
            lengths=numbered.lengths,
            seq_length=run.data.seq_length,
            packing=run.data.packing,
            numbering=numbered.numbering,
            cache=cache,
        )
        for place, source in enumerate(sources)
        if source.held_out.conversations
    }
