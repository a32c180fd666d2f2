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

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_cgn.config.schema import RunConfig
from megatron_cgn.data.collective import on_first_rank, together
from megatron_cgn.data.packed_plan import PackedData, PackedPlan, make_plan
from megatron_cgn.data.sft_loader import ConversationRow
from megatron_cgn.data.sft_packs import open_packs
from megatron_cgn.data.sft_selection import Reading, Selection, select
from megatron_cgn.data.sft_sequences import Conversations, ConversationSequences, ReadFile
from megatron_cgn.data.sft_sources import open_files
from megatron_cgn.data.sft_store import SftStore, build_store, open_store
from megatron_cgn.data.store_folder import Report
from tokenizer.chat import ChatTemplate
from tokenizer.wrapper import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class SftPlan(PackedPlan):
    """What a run of instruction tuning will read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SftData(PackedData[ConversationRow]):
    """What a run of instruction tuning reads."""


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
    reading = Reading.of(run)

    def open_file(path: str) -> tuple[SftStore, Selection]:
        folder = build_store(path, chat=chat, tokenizer=tokenizer, cache=cache, report=report)
        store = open_store(folder)
        return store, select(store, reading)

    def plan() -> SftPlan:
        files = open_files(run.data, reading, open_file)
        numbered = Conversations([ReadFile(f.store, f.selection, f.source) for f in files], reading)
        return make_plan(
            SftPlan, run, reading=reading, opened=files, numbered=numbered, cache=cache
        )

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
