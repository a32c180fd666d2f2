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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch.utils.data import Dataset

from megatron_cgn.config.schema import RunConfig
from megatron_cgn.data.collective import on_first_rank, together
from megatron_cgn.data.sft_loader import ConversationRow, blank
from megatron_cgn.data.sft_packs import (
    PackList,
    PackOrder,
    build_held_out,
    build_packs,
    open_packs,
)
from megatron_cgn.data.sft_pools import epochs_of, held_out_of, make_pools, shares_of
from megatron_cgn.data.sft_selection import (
    Reading,
    Selection,
    Tally,
    counted_labels,
    select,
)
from megatron_cgn.data.sft_sources import OpenedFile, SftSource, open_files, sources_of
from megatron_cgn.data.sft_store import Report, SftStore, build_store, open_store
from megatron_cgn.data.sources import exact
from tokenizer.chat import ChatTemplate
from tokenizer.wrapper import Tokenizer

_COUNTED_AT_ONCE = 1 << 18


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

    train: "ConversationSequences"
    """Training sequences in the order of training, whole steps of them."""
    validation: dict[str, "ConversationSequences"]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """How a conversation begins."""

    prompt: list[int]
    """Ids up to where the assistant first writes, the generation prompt included."""
    answer: list[int]
    """Ids of the assistant's first turn, its end-of-turn token included."""


@dataclass(frozen=True, slots=True)
class _File:
    """A file as it is read."""

    store: SftStore
    selection: Selection
    source: int


class Conversations:
    """The conversations of all files, numbered through."""

    def __init__(self, files: Sequence[_File], reading: Reading) -> None:
        """Put files together."""
        self._files = files
        self._reading = reading
        self.bases = np.cumsum([0, *(len(file.store) for file in files)])
        """Number of each file's first conversation, and the end."""

    def row(self, numbers: Sequence[int]) -> ConversationRow:
        """Read conversations, end to end."""
        parts = [self._read(*self._place(number)) for number in numbers]
        return ConversationRow(
            tokens=np.concatenate([tokens[:-1] for tokens, _, _ in parts]),
            labels=np.concatenate([tokens[1:] for tokens, _, _ in parts]),
            loss_mask=np.concatenate([counted for _, counted, _ in parts]),
            lengths=tuple(len(counted) for _, counted, _ in parts),
            sources=tuple(source for _, _, source in parts),
        )

    def record_id(self, number: int) -> str:
        """The id of a conversation's record."""
        file, conversation = self._place(number)
        return file.store.record_id(conversation)

    def beginning(self, number: int) -> Beginning:
        """What a conversation asks, and how it is answered first."""
        file, conversation = self._place(number)
        row = file.store.rows[conversation]
        begin, end = file.store.turns[int(row["turn"])].tolist()
        first = int(row["token"])
        tokens: list[int] = file.store.tokens[first : first + end].tolist()
        return Beginning(prompt=tokens[:begin], answer=tokens[begin:])

    def tally(self, numbers: npt.NDArray[np.integer[Any]]) -> tuple[Tally, ...]:
        """Count conversations file by file, as often as each is given."""
        totals = [Tally() for _ in self._files]
        for begin in range(0, len(numbers), _COUNTED_AT_ONCE):
            part = numbers[begin : begin + _COUNTED_AT_ONCE]
            owners = np.searchsorted(self.bases, part, side="right") - 1
            for place, file in enumerate(self._files):
                mine = part[owners == place] - self.bases[place]
                totals[place] += file.selection.tally(mine)
        return tuple(totals)

    def _place(self, number: int) -> tuple[_File, int]:
        place = int(np.searchsorted(self.bases, number, side="right")) - 1
        return self._files[place], number - int(self.bases[place])

    def _read(
        self, file: _File, number: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], int]:
        begin, stop = int(file.selection.begin[number]), int(file.selection.stop[number])
        first = int(file.store.rows[number]["token"])
        tokens = file.store.tokens[first + begin : first + stop].astype(np.int64)
        counted = counted_labels(file.store, number, self._reading, begin=begin, stop=stop)
        return tokens, counted, file.source


class ConversationSequences(Dataset[ConversationRow]):
    """Sequences in order; blank ones fill the last step. Maps files, so it may cross a fork."""

    def __init__(self, conversations: Conversations, packs: PackList, *, multiple_of: int) -> None:
        """Put conversations and their order together.

        Args:
            conversations: Of all files.
            packs: Which of them each sequence holds.
            multiple_of: The number of sequences is filled up to a multiple of this.
        """
        self._conversations = conversations
        self._packs = packs
        self._length = -(-len(packs) // multiple_of) * multiple_of

    def __len__(self) -> int:
        """Number of sequences, blank ones at the end included."""
        return self._length

    def __getitem__(self, index: int) -> ConversationRow:
        """Sequence ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index >= len(self._packs):
            return blank()
        return self._conversations.row(self._packs[index])

    def record_ids(self, sequence: int) -> list[str]:
        """Ids of the records that a sequence holds, in its order; none of a blank one."""
        if sequence >= len(self._packs):
            return []
        return [self._conversations.record_id(number) for number in self._packs[sequence]]

    def tally(self, start: int, stop: int) -> tuple[Tally, ...]:
        """Count what consecutive sequences hold of each file."""
        return self._conversations.tally(self._packs.between(start, stop))

    def beginnings(self) -> Iterator[Beginning]:
        """What each conversation asks and how it is answered first, in this order."""
        for sequence in range(len(self._packs)):
            yield from map(self._conversations.beginning, self._packs[sequence])


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
    conversations = Conversations([_File(f.store, f.selection, f.source) for f in files], reading)
    sources = sources_of(run.data, files)
    pools, epoch = make_pools(run, files, conversations.bases.tolist())
    order = PackOrder(
        pools=pools,
        seed=run.seed,
        seq_length=run.data.seq_length,
        packing=run.data.packing,
        epoch=epoch,
    )
    lengths = np.concatenate([file.selection.places for file in files])
    numbering = "/".join(file.store.key for file in files)
    steps, epochs = run.train.train_iters, run.train.epochs
    folder = build_packs(
        order,
        lengths,
        sequences=None if steps is None else steps * run.train.global_batch_size,
        epochs=None if epochs is None else exact(epochs),
        numbering=numbering,
        cache=cache,
    )
    packs = open_packs(folder)
    return SftPlan(
        sources=sources,
        shares=shares_of(run),
        epochs_of=epochs_of(run),
        reading=reading,
        packing=run.data.packing,
        seed=run.seed,
        global_batch_size=run.train.global_batch_size,
        order_key=order.key(),
        packs=folder,
        held_out={
            source.name: build_held_out(
                *held_out_of(files, conversations.bases.tolist(), place),
                lengths=lengths,
                seq_length=run.data.seq_length,
                packing=run.data.packing,
                numbering=numbering,
                cache=cache,
            )
            for place, source in enumerate(sources)
            if source.held_out.conversations
        },
        sequences=len(packs),
        planned=conversations.tally(packs.between(0, len(packs))),
    )


def _open(plan: SftPlan) -> SftData:
    files = []
    for place, source in enumerate(plan.sources):
        for file in source.all_files:
            store = open_store(file.folder)
            files.append(_File(store, select(store, plan.reading), place))
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
