"""How well a model predicts held-out answers: loss and accuracy of the tokens that count."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cgn.batch import TokenBatch
from megatron_cgn.engine.engine import Engine
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.reduce import sum_over_data


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerScore:
    """How well a model predicts the counted tokens of held-out conversations.

    Attributes:
        loss: Mean negative log-likelihood of a counted token, nats.
        token_accuracy: Share of counted tokens that the model finds likeliest, given all before.
        tokens: Counted tokens.
    """

    loss: float
    token_accuracy: float
    tokens: int


def score_answers(engine: Engine, batches: Iterable[TokenBatch]) -> AnswerScore:
    """Score held-out conversations. Collective over all ranks.

    Args:
        engine: The model.
        batches: This data-parallel rank's micro-batches; as many on every rank.

    Returns:
        The score, equal on every rank.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    for batch, nll, ids in engine.score_with_predictions(batches, NextToken().forward_args):
        totals += answer_sums(nll.cpu(), ids.cpu(), batch)
    # Every rank of a model-parallel group has the whole output, also under context parallelism.
    nll_sum, right, tokens = sum_over_data(totals / engine.state.cp_size, engine.state).tolist()
    return AnswerScore(
        loss=nll_sum / max(tokens, 1.0),
        token_accuracy=right / max(tokens, 1.0),
        tokens=round(tokens),
    )


def answer_sums(nll: Tensor, ids: Tensor, batch: TokenBatch) -> Tensor:
    """Add up one micro-batch.

    Args:
        nll: Negative log-likelihood of every label, float ``[B, S]``.
        ids: The likeliest ids in their places, int64 ``[B, S]``.
        batch: The micro-batch.

    Returns:
        Float64 ``[3]`` over the counted tokens: their loss, those predicted right, their number.
    """
    counted = batch.loss_mask > 0
    right = (ids == batch.labels) & counted
    return torch.stack(
        (
            torch.where(counted, nll.double(), 0.0).sum(),
            right.sum().double(),
            counted.sum().double(),
        )
    )
