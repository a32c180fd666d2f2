"""Held-out loss and bits per byte, by hand."""

import math
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cgn.batch import TokenBatch
from megatron_cgn.eval import bits_per_byte
from megatron_cgn.eval.bits_per_byte import held_out_sums, score_held_out

# Ids: 0 ends a document (no text), 1 "a", 2 "核" (3 bytes), 3 " reactor" (8 bytes).
BYTES = torch.tensor([0, 1, 3, 8])


def _batch(labels: list[list[int]], mask: list[list[float]]) -> TokenBatch:
    ids = torch.tensor(labels)
    return TokenBatch(
        tokens=torch.zeros_like(ids),
        labels=ids,
        loss_mask=torch.tensor(mask),
        position_ids=torch.zeros_like(ids),
    )


def test_sums_by_hand() -> None:
    batch = _batch([[1, 2, 0], [3, 3, 1]], [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    nll = torch.tensor([[0.5, 2.0, 4.0], [8.0, 100.0, 100.0]])
    # Loss of four tokens; the end of a document is one of them, but stands for no text.
    assert held_out_sums(nll, batch, BYTES).tolist() == [14.5, 4.0, 10.5, 1 + 3 + 8]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_uncounted_tokens_cannot_spoil_a_score(bad: float) -> None:
    batch = _batch([[1, 2]], [[1.0, 0.0]])
    assert held_out_sums(torch.tensor([[0.5, bad]]), batch, BYTES).tolist() == [0.5, 1, 0.5, 1]


def test_sums_are_exact_where_fp32_would_not_be() -> None:
    length = 100_000
    batch = _batch([[3] * length], [[1.0] * length])
    nll = torch.full((1, length), 0.1)
    total, tokens, text, size = held_out_sums(nll, batch, BYTES).tolist()
    assert total == text == pytest.approx(length * float(torch.tensor(0.1)), rel=1e-12)
    assert (tokens, size) == (length, 8 * length)


class _Engine:
    """Scores every label with the same likelihood, a quarter."""

    state = SimpleNamespace(cp_size=2)

    def score(
        self, batches: Iterable[TokenBatch], forward_args: Callable[[TokenBatch], Any]
    ) -> Iterator[tuple[TokenBatch, Tensor]]:
        for batch in batches:
            assert forward_args(batch).labels is batch.labels
            yield batch, torch.full(batch.labels.shape, math.log(4.0))


def test_score_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two context-parallel ranks that both hold the whole output, and two data-parallel ones.
    monkeypatch.setattr(bits_per_byte, "sum_over_data", lambda values, state: 4 * values)
    engine: Any = _Engine()
    batches = [_batch([[1, 2, 3, 0]], [[1.0] * 4]), _batch([[2, 2, 1, 0]], [[1.0, 1.0, 0.0, 1.0]])]
    score = score_held_out(engine, batches, BYTES)
    assert score.tokens == 2 * (4 + 3)
    assert score.text_bytes == 2 * (12 + 6)
    assert score.loss == pytest.approx(math.log(4.0), rel=1e-7)
    # Two bits for each of five tokens of text, over 18 bytes.
    assert score.bits_per_byte == pytest.approx(2 * 5 / 18, rel=1e-7)


def test_nothing_to_score_is_no_division_by_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits_per_byte, "sum_over_data", lambda values, state: 2 * values)
    engine: Any = _Engine()
    score = score_held_out(engine, [_batch([[0, 0]], [[1.0, 1.0]])], BYTES)
    assert (score.tokens, score.text_bytes, score.bits_per_byte) == (2, 0, 0.0)
    assert score_held_out(engine, [], BYTES).loss == 0.0


def test_bits_per_byte_do_not_depend_on_how_text_is_cut() -> None:
    """One token of 8 bytes, or 8 tokens of one byte, of the same probability together."""
    whole = held_out_sums(torch.tensor([[4.0]]), _batch([[3]], [[1.0]]), BYTES)
    cut = held_out_sums(torch.full((1, 8), 0.5), _batch([[1] * 8], [[1.0] * 8]), BYTES)
    assert (whole[2] / whole[3]).item() == (cut[2] / cut[3]).item()
    assert whole[0] / whole[1] != cut[0] / cut[1]
