"""Conversations for instruction tuning: what a run reads of them, planned and opened.

Shares mean here what they mean in pre-training, for tokens of conversations: ``data.sources[]
.weight`` and ``data.mix`` divide the tokens that are read, ``train.epochs`` counts passes over
``data.epochs_of`` under a mix. Where nobody gives a weight or a mix, all conversations are one
pool: each is read exactly once an epoch.

The order depends on the conversations, on the settings that say how they are read and mixed, on
``data.seq_length`` and on the seed; never on paths, on the number of processes or on how long the
run is. No conversation is cut in two, and none is left out at the end: the last step is filled
with blank sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch.distributed as dist

from megatron_cgn.config.schema import RunConfig
from megatron_cgn.data.collective import on_first_rank, together
from megatron_cgn.data.sft_packs import (
    PackOrder,
    build_held_out,
    build_packs,
    open_packs,
)
from megatron_cgn.data.sft_pools import epochs_of, held_out_of, make_pools, shares_of
from megatron_cgn.data.sft_selection import (
    Reading,
    Tally,
    select,
)
from megatron_cgn.data.sft_sequences import Conversations, ConversationSequences, ReadFile
from megatron_cgn.data.sft_sources import OpenedFile, SftSource, open_files, sources_of
from megatron_cgn.data.sft_store import Report, build_store, open_store
from megatron_cgn.data.sources import exact
from tokenizer.chat import ChatTemplate
from tokenizer.wrapper import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class SftPlan:
    """What a run will read: decided before the model is built."""

    sources: tuple[SftSource, ...]
    """The sources, counted."""
    shares: Mapping[str, Fraction] | None
    """Shares of the tokens by source name; None: every conversation equally often."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SftData:
    """What a run reads."""

    train: ConversationSequences
    """Training sequences in the order of training, whole steps of them."""
    validation: dict[str, ConversationSequences]
    """Held-out sequences by source name; sources without held-out conversations are absent."""
    plan: SftPlan
    """What was planned."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names by `TokenBatch.source_ids`."""
        return self.plan.source_names

    def consumed(self, sequences: int) -> tuple[Tally, ...]:
        """What the first sequences of the run hold of each file, in the order of `planned`."""
        return self.train.tally(0, min(sequences, self.plan.sequences))


def plan_sft(
    run: RunConfig,
    *,
    chat: ChatTemplate,
    tokenizer: Tokenizer,
    cache: Path,
    report: Report | None = None,
    group: dist.ProcessGroup | None = None,
) -> SftPlan:
    """Encode the conversations and plan what the run reads of them.

    Collective over ``group`` where torch.distributed is up; every rank must call, and gets the
    same plan. The first rank encodes and packs into ``cache``, unless that has been done, which
    is keyed by content: the others wait for it.

    With ``train.epochs`` the run reads so many epochs whole, of the source ``data.epochs_of`` under
    a mix and of everything without. Of a last part of an epoch it reads as large a part of the
    sequences. With ``train.train_iters`` it reads so many steps.

    Args:
        run: The validated configuration.
        chat: Encodes conversations.
        tokenizer: The model's tokenizer.
        cache: Directory that every rank sees.
        report: Told of the progress, on the first rank.
        group: The ranks that call, global rank 0 among them; None for all.

    Returns:
        The plan.

    Raises:
        ConfigError: If settings contradict each other.
        DataError: If a file is unusable or has faulty records, of which the first are named.
    """

    def build(path: str) -> Path:
        return build_store(path, chat=chat, tokenizer=tokenizer, cache=cache, report=report)

    def plan() -> SftPlan:
        return _plan(run, open_files(run.data, Reading.of(run), build), cache)

    return on_first_rank(plan, group)


def build_sft_data(plan: SftPlan, *, group: dist.ProcessGroup | None = None) -> SftData:
    """Open what was planned. Collective over ``group`` where torch.distributed is up.

    Takes 13 bytes of memory a conversation; tokens are mapped.

    Args:
        plan: Equal on all ranks.
        group: The ranks that call; None for all.

    Returns:
        The data.

    Raises:
        DataError: If the cache cannot be read.
    """
    return together(lambda: _open(plan), group)


def _plan(run: RunConfig, files: list[OpenedFile], cache: Path) -> SftPlan:
    reading = Reading.of(run)
    conversations = Conversations(
        [ReadFile(f.store, f.selection, f.source) for f in files], reading
    )
    folder, order_key = _pack(run, files, conversations, cache)
    packs = open_packs(folder)
    sources = sources_of(run.data, files)
    return SftPlan(
        sources=sources,
        shares=shares_of(run),
        epochs_of=epochs_of(run),
        reading=reading,
        packing=run.data.packing,
        seed=run.seed,
        global_batch_size=run.train.global_batch_size,
        order_key=order_key,
        packs=folder,
        held_out=_pack_held_out(run, files, conversations, sources, cache),
        sequences=len(packs),
        planned=conversations.tally(packs.between(0, len(packs))),
    )


def _pack(
    run: RunConfig, files: list[OpenedFile], conversations: Conversations, cache: Path
) -> tuple[Path, str]:
    """Write the sequences of the run; return where they are, and what stands for their order."""
    pools, epoch = make_pools(run, files, conversations.bases.tolist())
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
        conversations.lengths,
        sequences=None if steps is None else steps * run.train.global_batch_size,
        epochs=None if epochs is None else exact(epochs),
        numbering=conversations.numbering,
        cache=cache,
    )
    return folder, order.key()


def _pack_held_out(
    run: RunConfig,
    files: list[OpenedFile],
    conversations: Conversations,
    sources: Sequence[SftSource],
    cache: Path,
) -> dict[str, Path]:
    """Write the held-out sequences of each source that has some."""
    return {
        source.name: build_held_out(
            *held_out_of(files, conversations.bases.tolist(), place),
            lengths=conversations.lengths,
            seq_length=run.data.seq_length,
            packing=run.data.packing,
            numbering=conversations.numbering,
            cache=cache,
        )
        for place, source in enumerate(sources)
        if source.held_out.conversations
    }


def _open(plan: SftPlan) -> SftData:
    files = []
    for place, source in enumerate(plan.sources):
        for file in source.all_files:
            store = open_store(file.folder)
            files.append(ReadFile(store, select(store, plan.reading), place))
    conversations = Conversations(files, plan.reading)
    return SftData(
        train=ConversationSequences(
            conversations, open_packs(plan.packs), multiple_of=plan.global_batch_size
        ),
        validation={
            name: ConversationSequences(conversations, open_packs(folder), multiple_of=1)
            for name, folder in plan.held_out.items()
        },
        plan=plan,
    )
