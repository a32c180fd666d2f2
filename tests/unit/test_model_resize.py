"""New rows: expectations by NumPy, from the definitions of the methods."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_cgn.model.resize import METHODS, InitMethod, OldRows, Side, is_trained, new_rows

PIECES = [(3, 7), (11,), (5, 5, 9), (0, 1, 2, 3, 4)]


def _old(rows: int = 40, width: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, width, generator=generator).to(dtype)


def test_mean_is_the_mean_of_the_pieces_rows() -> None:
    old = _old()
    expected = np.stack([old.numpy()[list(ids)].mean(axis=0) for ids in PIECES])
    assert np.array_equal(new_rows(old, PIECES).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    old = _old(dtype=dtype)
    ids = list(range(39))
    exact = old.double()[ids].mean(dim=0)
    made = new_rows(old, [ids])[0]
    assert made.dtype == dtype
    # Nearest value of the type, but for ties that FP32's own rounding may turn.
    assert (made.double() - exact).abs().max() <= 0.51 * torch.finfo(dtype).eps * exact.abs().max()
    in_type = torch.zeros(12, dtype=dtype)
    for row in old[ids]:
        in_type += row
    assert not torch.equal(made, in_type / 39), "the case tells FP32 from the type's own sums"


def test_zero_is_zero() -> None:
    assert torch.equal(new_rows(_old(), PIECES, method="zero"), torch.zeros(4, 12))


@pytest.mark.parametrize(
    ("side", "shares"),
    [
        ("input", [1 / 7, 2 / 7, 4 / 7]),
        ("output", [4 / 7, 2 / 7, 1 / 7]),
        ("both", [5 / 14, 4 / 14, 5 / 14]),
    ],
)
def test_weights_double_towards_the_end_that_matters(side: Side, shares: list[float]) -> None:
    old = _old()
    expected = np.average(old.numpy()[[5, 8, 9]], axis=0, weights=shares)
    made = new_rows(old, [(5, 8, 9)], method="weighted", side=side).numpy()
    np.testing.assert_allclose(made[0], expected, rtol=1e-6, atol=1e-7)


def test_hundreds_of_pieces_do_not_overflow() -> None:
    old = _old()
    made = new_rows(old, [[1] * 299 + [2]], method="weighted")
    torch.testing.assert_close(made[0], (old[1] + old[2]) / 2)


def test_random_has_the_given_deviation() -> None:
    made = new_rows(_old(width=500), [(1,)] * 400, method="random", standard_deviation=0.3)
    # 200,000 draws: the estimate is off by 0.0005 at one standard error.
    assert abs(float(made.std()) - 0.3) < 0.003
    assert abs(float(made.mean())) < 0.003


def test_gaussian_has_the_mean_and_covariance_of_the_old_rows() -> None:
    mixing = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.5, 2.0]])
    old = _old(rows=50, width=3) @ mixing + torch.tensor([3.0, -2.0, 5.0])
    made = new_rows(old, [(0,)] * 20_000, method="gaussian").numpy()
    np.testing.assert_allclose(made.mean(axis=0), old.numpy().mean(axis=0), atol=0.08)
    expected = np.cov(old.numpy().T, bias=True)
    np.testing.assert_allclose(np.cov(made.T), expected, atol=0.04 * float(expected.max()))


def test_gaussian_leaves_untrained_rows_out() -> None:
    old = _old() + 10.0
    reserved = torch.zeros(30, 12)
    reserved[::2] = 1e-4
    assert is_trained(OldRows([torch.cat([old, reserved])])).tolist() == [True] * 40 + [False] * 30
    made = new_rows(torch.cat([old, reserved]), [(1,)] * 300, method="gaussian")
    np.testing.assert_allclose(made.mean(dim=0), old.mean(dim=0), atol=0.4)
    assert bool(is_trained(OldRows([torch.zeros(3, 2)])).all()), "nothing to compare with"


@pytest.mark.parametrize("method", METHODS)
def test_a_row_does_not_depend_on_its_neighbours_or_the_parts(method: InitMethod) -> None:
    old = _old(rows=5000, width=16)
    pieces = [(i, 3 * i % 1000, 4999 - i) for i in range(1500)]
    whole = new_rows(old, pieces, method=method)
    parts = OldRows([old[:1], old[1:2500], old[2500:]])
    assert torch.equal(new_rows(parts, pieces, method=method), whole)
    first = new_rows(old, pieces[:700], method=method)
    if method == "gaussian":  # a matrix product of another shape: equal to FP32's last bit
        torch.testing.assert_close(first, whole[:700], rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(first, whole[:700])


@pytest.mark.parametrize("method", ["random", "gaussian"])
def test_draws_differ_by_token_seed_and_side_and_are_repeated(method: InitMethod) -> None:
    old = _old()
    made = new_rows(old, [(1,)] * 3, method=method, seed=1)
    assert torch.equal(made, new_rows(old, [(2,)] * 3, method=method, seed=1))
    others = [
        made[0],
        made[1],
        new_rows(old, [(1,)], method=method, seed=2)[0],
        new_rows(old, [(1,)], method=method, seed=1, side="output")[0],
        new_rows(old[:39], [(1,)], method=method, seed=1)[0],
    ]
    for one, other in pairwise(others):
        assert (one - other).abs().max() > 1e-3


def test_blocks_share_their_memory() -> None:
    """New memory for each block leaves a thread's heap in pieces: 2 GB for 128,000 rows."""
    rows = torch.randn(2500, 3)
    blocks = OldRows([rows[:700], rows[700:2100], rows[2100:]]).blocks()
    seen = [(start, block.clone(), block.data_ptr()) for start, block in blocks]
    assert [start for start, _, _ in seen] == [0, 1024, 2048]
    assert torch.equal(torch.cat([block for _, block, _ in seen]), rows)
    assert len({place for _, _, place in seen}) == 1


def test_no_new_tokens_make_no_rows() -> None:
    for method in METHODS:
        assert new_rows(_old(), [], method=method).shape == (0, 12)
