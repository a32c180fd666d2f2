"""Next-token loss: sums and counts, and masked tokens that cannot spoil anything."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from megatron_cgn.batch import TokenBatch
from megatron_cgn.objectives.next_token import NextToken


def _batch(mask: Tensor, **more: Tensor) -> TokenBatch:
    ids = torch.arange(mask.numel()).view(mask.shape)
    return TokenBatch(
        tokens=ids, labels=ids + 1, loss_mask=mask, position_ids=ids % mask.size(1), **more
    )


def test_model_is_asked_for_the_likelihood_of_the_labels() -> None:
    batch = _batch(torch.ones(1, 4), cu_seqlens=torch.tensor([0, 2, 4], dtype=torch.int32))
    args = NextToken().forward_args(batch)
    for name in ("tokens", "labels", "position_ids", "cu_seqlens"):
        assert getattr(args, name) is getattr(batch, name)
    assert args.counted is not None and args.counted.all()
    assert NextToken().unit == "token"


def test_model_is_not_asked_for_what_does_not_count() -> None:
    args = NextToken().forward_args(_batch(torch.tensor([[1.0, 0.0, 0.5]])))
    assert args.counted is not None
    assert args.counted.tolist() == [[True, False, True]]


def test_loss_is_a_sum_and_a_count_of_what_the_mask_says() -> None:
    nll = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    result = NextToken().loss(nll, _batch(torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])))
    assert result.loss_sum.item() == 1.0 + 4.0 + 16.0
    assert result.count.item() == 3
    assert not result.count.is_floating_point()
    assert result.loss_sum.dtype == torch.float32
    assert result.loss_sum.shape == result.count.shape == ()
    assert dict(result.metrics) == {}


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_masked_infinities_reach_neither_loss_nor_gradient(bad: float) -> None:
    nll = torch.tensor([[1.0, bad, 3.0]], requires_grad=True)
    result = NextToken().loss(nll, _batch(torch.tensor([[1.0, 0.0, 1.0]])))
    assert result.loss_sum.item() == 4.0
    result.loss_sum.backward()
    assert nll.grad is not None
    assert nll.grad.tolist() == [[1.0, 0.0, 1.0]]


def test_counted_infinity_is_not_hidden() -> None:
    nll = torch.tensor([[1.0, math.inf]])
    assert NextToken().loss(nll, _batch(torch.ones(1, 2))).loss_sum.item() == math.inf


def test_empty_mask_counts_nothing() -> None:
    nll = torch.full((2, 3), 5.0, requires_grad=True)
    result = NextToken().loss(nll, _batch(torch.zeros(2, 3)))
    assert (result.loss_sum.item(), result.count.item()) == (0.0, 0)
    result.loss_sum.backward()
    assert nll.grad is not None and not nll.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(dtype: torch.dtype) -> None:
    # 4,096 ones: BF16 would stop at 256, FP16 at 2,048.
    nll = torch.ones(1, 4096, dtype=dtype)
    result = NextToken().loss(nll, _batch(torch.ones(1, 4096)))
    assert result.loss_sum.item() == 4096.0
    assert result.count.item() == 4096


def test_sums_add_up_however_the_batch_is_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    nll = torch.randint(0, 64, (8, 16), generator=generator).float()
    mask = (torch.rand(8, 16, generator=generator) < 0.3).float()
    whole = NextToken().loss(nll, _batch(mask))
    parts = [NextToken().loss(nll[i : i + 2], _batch(mask[i : i + 2])) for i in range(0, 8, 2)]
    assert sum(p.loss_sum.item() for p in parts) == whole.loss_sum.item()
    assert sum(p.count.item() for p in parts) == whole.count.item()


def test_batches_cannot_be_changed_by_an_objective() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        _batch(torch.ones(1, 2)).loss_mask = torch.zeros(1, 2)  # type: ignore[misc]


def test_losses_of_sources_are_those_of_their_counted_tokens() -> None:
    nll = torch.tensor([[1.0, 2.0, 4.0], [8.0, math.nan, 32.0]], requires_grad=True)
    batch = _batch(
        torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]),
        source_ids=torch.tensor([[2, 0, 2], [2, 2, 0]]),
    )
    result = NextToken(["领域", "none", "code"]).loss(nll, batch)
    found = {name: (r.sum.item(), r.count.item()) for name, r in result.metrics.items()}
    assert found == {
        "train/领域/loss": (32.0, 1.0),
        "train/none/loss": (0.0, 0.0),
        "train/code/loss": (1.0 + 4.0 + 8.0, 3.0),
    }
    assert not any(r.sum.requires_grad for r in result.metrics.values())
    assert result.loss_sum.item() == 1.0 + 4.0 + 8.0 + 32.0


def test_batches_that_know_no_source_report_none() -> None:
    result = NextToken(["a"]).loss(torch.ones(1, 4), _batch(torch.ones(1, 4)))
    assert dict(result.metrics) == {}
