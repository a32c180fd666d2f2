"""Rewards of conversations: what a reward model's head says at the last token of each.

The last token is that of the conversation as its chat template renders it, line feeds behind the
end of the turn included, as `transformers` sees what ``apply_chat_template`` gives; of models that
pad with a token that ends answers too, the one before it, as there. Conversations share packed
rows, in which each attends to itself alone.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_cgn.batch import TokenBatch
from megatron_cgn.data.packing import first_fit_decreasing
from megatron_cgn.data.sft_loader import ROW_MULTIPLE, ConversationRow, blank, lay_out
from megatron_cgn.engine.engine import Engine
from megatron_cgn.errors import DataError
from megatron_cgn.hf.score_files import without_padding
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.objectives.base import ForwardArgs
from megatron_cgn.parallel.reduce import sum_over_data
from tokenizer.chat import ChatTemplate, Message

ROW_TOKENS = 4096
"""Places of a row, where no conversation is longer."""


def score_conversations(
    engine: Engine,
    conversations: Sequence[Sequence[Message]],
    *,
    template: ChatTemplate,
    pad_token_id: int | None = None,
    row_tokens: int = ROW_TOKENS,
) -> list[float]:
    """Rewards of conversations, each ending with the answer that is judged.

    Collective over all ranks, all of which bring the same conversations.

    Args:
        engine: A reward model, in training or not.
        conversations: What is said in each.
        template: The chat template that the reward model was trained with.
        pad_token_id: See `hf.score_files.padding_id`: what is passed over at the end.
        row_tokens: See `score_tokens`.

    Returns:
        A reward for each, equal on every rank.

    Raises:
        DataError: If the template refuses a conversation, or it does not fit the model.
    """
    encoded = template.encode_batch(conversations)
    tokens = []
    for number, chat in enumerate(encoded, start=1):
        if isinstance(chat, DataError):
            raise DataError(f"conversation {number}: {chat}") from chat
        if fault := conversation_fault(chat.ids, engine.architecture):
            raise DataError(f"conversation {number}: {fault}")
        tokens.append(without_padding(chat.ids, pad_token_id))
    return score_tokens(engine, tokens, row_tokens=row_tokens)


def score_tokens(
    engine: Engine, conversations: Sequence[Sequence[int]], *, row_tokens: int = ROW_TOKENS
) -> list[float]:
    """Rewards at the last tokens of conversations.

    Collective over all ranks, all of which bring the same conversations; data-parallel ranks share
    them.

    Args:
        engine: A model with a scalar head, in training or not.
        conversations: Ids of each, at least one and no more than the model has positions.
        row_tokens: Places of a row that conversations share; more if one of them is longer.

    Returns:
        A reward for each, equal on every rank.
    """
    assert engine.architecture.head == "score", "rewards need a scalar head"
    if not conversations:
        return []
    lengths = np.array([len(ids) for ids in conversations], dtype=np.int64)
    capacity, is_full = _row_size(engine, max(row_tokens, int(lengths.max())))
    packs = first_fit_decreasing(lengths, capacity=capacity)
    rows = [packs.items[a:b].tolist() for a, b in itertools.pairwise(packs.bounds.tolist())]
    rows += [[]] * (-len(rows) % engine.state.dp_size)  # every rank brings as many
    mine = rows[engine.state.dp_rank :: engine.state.dp_size]

    def batches() -> Iterator[TokenBatch]:
        for items in mine:
            row = _join([conversations[item] for item in items])
            yield lay_out([row], seq_length=capacity, length=capacity if is_full else None)

    rewards = torch.zeros(len(conversations), dtype=torch.float64)
    scored = engine.score(batches(), _ask_for_values)
    for items, (_, values) in zip(mine, scored, strict=True):
        ends = np.cumsum([len(conversations[item]) for item in items], dtype=np.int64) - 1
        places = torch.tensor(items, dtype=torch.int64)
        rewards[places] = values[0].double().cpu()[torch.from_numpy(ends)]
    # Every rank of a model-parallel group has the whole output, also under context parallelism.
    total = sum_over_data(rewards / engine.state.cp_size, engine.state)
    # Ranks that compute alike on a GPU need not get alike numbers.
    dist.broadcast(total, src=0)
    return [float(reward) for reward in total.tolist()]


def conversation_fault(ids: Sequence[int], architecture: Architecture) -> str | None:
    """Say why a conversation cannot be scored.

    Args:
        ids: Its tokens.
        architecture: The model.

    Returns:
        What is wrong with it, and the remedy; None if nothing is.
    """
    wrong = next((t for t in ids if not 0 <= t < architecture.vocab_size), None)
    if wrong is not None:
        return (
            f"has id {wrong}, but the model's ids end at {architecture.vocab_size - 1}. Use the "
            "model's own tokenizer."
        )
    positions = architecture.max_position_embeddings
    if len(ids) > positions:
        return (
            f"has {len(ids):,} tokens, but the reward model {positions:,} positions "
            "(max_position_embeddings). Shorten it."
        )
    return None


def _ask_for_values(batch: TokenBatch) -> ForwardArgs:
    """Call the model without labels: its output is then its head's own."""
    return ForwardArgs(
        tokens=batch.tokens, position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens
    )


def _row_size(engine: Engine, tokens: int) -> tuple[int, bool]:
    """Places of a row, and whether all rows have as many, to be sent or cut."""
    parallel, groups = engine.run.parallel, engine.state.groups
    cp, pp = engine.state.cp_size, groups.pp.size()
    cut = 2 * cp * (groups.tp.size() if parallel.sequence_parallel else 1)
    multiple = math.lcm(ROW_MULTIPLE, cut)
    is_full = pp > 1 or cp > 1 or parallel.sequence_parallel
    return -(-tokens // multiple) * multiple, is_full


def _join(conversations: Sequence[Sequence[int]]) -> ConversationRow:
    """Lay conversations end to end; nothing is to be predicted."""
    if not conversations:
        return blank()
    tokens = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in conversations])
    return ConversationRow(
        tokens=tokens,
        labels=np.zeros_like(tokens),
        loss_mask=np.zeros(len(tokens), dtype=np.bool_),
        lengths=tuple(len(ids) for ids in conversations),
        sources=(0,) * len(conversations),
    )
