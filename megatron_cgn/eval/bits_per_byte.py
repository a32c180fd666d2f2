"""Held-out loss, per token and per byte of text.

A loss per token depends on how a tokenizer cuts text; bits per byte do not, so they compare a
model before and after its vocabulary was extended.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cgn.batch import TokenBatch
from megatron_cgn.engine.engine import Engine
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.reduce import sum_over_data


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutScore:
    """How well a model predicts held-out documents.

    Attributes:
        loss: Mean negative log-likelihood of a token, nats; end-of-document tokens included.
        bits_per_byte: Bits needed per UTF-8 byte of text; tokens that stand for no text (such as
            the end of a document) count on neither side.
        tokens: Tokens scored.
        text_bytes: Bytes of text they stand for.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    text_bytes: int


def score_held_out(
    engine: Engine, batches: Iterable[TokenBatch], token_byte_lengths: Tensor
) -> HeldOutScore:
    r"""Score held-out windows. Collective over all ranks.

    .. math:: \mathrm{bpb} = \frac{\sum_i -\log_2 p(y_i)}{\sum_i \mathrm{bytes}(y_i)}

    Args:
        engine: The model.
        batches: This data-parallel rank's micro-batches; as many on every rank.
        token_byte_lengths: UTF-8 bytes of text each id stands for, int ``[V]``.

    Returns:
        The score, equal on every rank.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    for batch, nll in engine.score(batches, NextToken().forward_args):
        totals += held_out_sums(nll.cpu(), batch, token_byte_lengths)
    # Every rank of a model-parallel group has the whole output, also under context parallelism.
    nll_sum, tokens, text_nll, text_bytes = sum_over_data(
        totals / engine.state.cp_size, engine.state
    ).tolist()
    return HeldOutScore(
        loss=nll_sum / max(tokens, 1.0),
        bits_per_byte=text_nll / math.log(2) / max(text_bytes, 1.0),
        tokens=round(tokens),
        text_bytes=round(text_bytes),
    )


def held_out_sums(nll: Tensor, batch: TokenBatch, token_byte_lengths: Tensor) -> Tensor:
    """Add up one micro-batch.

    Args:
        nll: Negative log-likelihood of every label, float ``[B, S]``.
        batch: The micro-batch.
        token_byte_lengths: Bytes of text each id stands for, int ``[V]``.

    Returns:
        Float64 ``[4]``: loss and number of all counted tokens, then loss and bytes of those that
        stand for text.
    """
    nll = nll.double()
    mask = batch.loss_mask.double()
    lengths = token_byte_lengths[batch.labels].double() * mask
    text = (lengths > 0).double()
    masked = torch.where(mask > 0, nll, 0.0)
    return torch.stack((masked.sum(), mask.sum(), (masked * text).sum(), lengths.sum()))
