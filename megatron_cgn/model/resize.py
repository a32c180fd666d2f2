"""The rows that a matrix of the vocabulary gets for new tokens.

Arithmetic only: which matrices there are, where they lie and how they are written is the business
of ``hf/resize.py`` and ``hf/resize_checkpoint.py``. A row depends on the old rows, the token's
pieces, the seed, the token's id and on which side of the model the matrix is, and on nothing
else: not on a parallel layout, on shards or on what other tokens are made with it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

InitMethod = Literal["mean", "zero", "random", "gaussian", "weighted"]
"""How new rows are made.

- ``mean``: the mean of the rows of the token's old pieces (Gee et al. 2022, "Fast Vocabulary
  Transfer"). The model then sees a new token as a blur of what it saw before, and expects it
  about when it expected the pieces.
- ``zero``: nothing. What frameworks leave that only pad.
- ``random``: ``N(0, s²)`` with the standard deviation that the model was initialised with.
- ``gaussian``: one draw of the normal distribution with the mean and the covariance of the old
  rows (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
- ``weighted``: a mean in which pieces count twice as much from one to the next: towards the last
  on the side of the input, towards the first on the side of the output. After Nakash et al. 2025,
  "AdaptiVocab", who weigh exponentially; the base of 2 is this module's choice.
"""
METHODS: tuple[InitMethod, ...] = get_args(InitMethod)

Side = Literal["input", "output", "both"]
"""The embedding, the output layer, or the one matrix of a tied model that is both."""

_BLOCK_ROWS = 1024
"""Old rows taken at once where all of them count; a part of the seed of ``gaussian``."""
_BLOCK_TOKENS = 1024
"""New rows made at once."""
_UNTRAINED_NORM = 0.1
"""Rows shorter than this share of the median were not trained. Reserved tokens of Llama 3 are
zero in the model of 8 billion parameters, and below 1e-4 in that of 70 billion."""


class OldRows:
    """The real rows of an old matrix, in consecutive parts that may be mapped files."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        """Take the parts.

        Args:
            parts: ``[rows, width]`` each, of one width and type; together rows 0, 1, 2, …
        """
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        """Columns."""
        return self._parts[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows."""
        return self._parts[0].dtype

    def take(self, ids: Sequence[int]) -> Tensor:
        """Copy some rows, as FP32 ``[len(ids), width]``."""
        result = torch.empty(len(ids), self.width, dtype=torch.float32)
        wanted = np.asarray(ids, dtype=np.int64)
        for part, start in zip(self._parts, self._starts, strict=False):
            (here,) = np.nonzero((wanted >= start) & (wanted < start + len(part)))
            if len(here):
                rows = part[torch.from_numpy(wanted[here] - start)]
                result[torch.from_numpy(here)] = rows.float()
        return result

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """All rows in blocks of a fixed size, each with its first row, as FP32 copies.

        A block is valid until the next: large tensors made and freed block by block would leave
        gigabytes of a thread's heap in pieces.
        """
        buffer = torch.empty(min(_BLOCK_ROWS, len(self)), self.width)
        for start in range(0, len(self), _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, len(self))
            for part, first in zip(self._parts, self._starts, strict=False):
                low, high = max(start, first), min(stop, first + len(part))
                if low < high:
                    buffer[low - start : high - start] = part[low - first : high - first]
            yield start, buffer[: stop - start]


def new_rows(
    old: Tensor | OldRows,
    pieces: Sequence[Sequence[int]],
    *,
    method: InitMethod = "mean",
    seed: int = 1234,
    side: Side = "input",
    standard_deviation: float = 0.02,
) -> Tensor:
    """Make the rows of new tokens.

    Args:
        old: ``[V, h]``: the rows of the old vocabulary's ids and no others, without padding. The
            new tokens' ids are V, V + 1, ….
        pieces: The old ids that each new token stands for, in order.
        method: How.
        seed: Of ``random`` and ``gaussian``.
        side: What the matrix is. The two sides of an untied model draw different numbers.
        standard_deviation: Of ``random``.

    Returns:
        ``[len(pieces), h]`` of the old rows' type, computed in FP32 (``gaussian``: FP64).
    """
    old = old if isinstance(old, OldRows) else OldRows([old])
    blocks = list(
        iterate_new_rows(
            old,
            pieces,
            method=method,
            seed=seed,
            side=side,
            standard_deviation=standard_deviation,
        )
    )
    made = torch.cat(blocks) if blocks else torch.empty(0, old.width)
    return made.to(old.dtype)


def iterate_new_rows(
    old: OldRows,
    pieces: Sequence[Sequence[int]],
    *,
    method: InitMethod,
    seed: int,
    side: Side,
    standard_deviation: float,
) -> Iterator[Tensor]:
    """Make new rows a block at a time, in memory that their number does not change.

    Args:
        old: As for `new_rows`.
        pieces: As for `new_rows`.
        method: As for `new_rows`.
        seed: As for `new_rows`.
        side: As for `new_rows`.
        standard_deviation: As for `new_rows`.

    Yields:
        FP32 ``[at most 1024, h]``, in the order of the tokens.
    """
    assert all(ids and min(ids) >= 0 and max(ids) < len(old) for ids in pieces), "unknown pieces"
    normal = _Normal(old) if method == "gaussian" and pieces else None
    for start in range(0, len(pieces), _BLOCK_TOKENS):
        block = pieces[start : start + _BLOCK_TOKENS]
        ids = range(len(old) + start, len(old) + start + len(block))
        if normal is not None:
            yield normal.draw([f"{seed}/{side}/{token}" for token in ids])
        elif method == "zero":
            yield torch.zeros(len(block), old.width)
        elif method == "random":
            drawn = [_standard_normal(f"{seed}/{side}/{token}", old.width) for token in ids]
            yield torch.from_numpy(np.stack(drawn)) * standard_deviation
        else:
            yield _combine(old, block, [_weights(method, side, len(piece)) for piece in block])


def is_trained(old: OldRows) -> Tensor:
    """Tell rows that training has shaped from those of ids that no text has.

    Such a row is known by its length alone: one that kept its random start is not seen.

    Args:
        old: Rows.

    Returns:
        Bool ``[len(old)]``; all true if that rule would leave none.
    """
    norms = torch.empty(len(old))
    for start, rows in old.blocks():
        torch.linalg.vector_norm(rows, dim=1, out=norms[start : start + len(rows)])
    trained = norms > _UNTRAINED_NORM * norms.median()
    return trained if bool(trained.any()) else torch.ones_like(trained)


def _weights(method: InitMethod, side: Side, count: int) -> list[float]:
    """How much each of a token's pieces counts: powers of two, and sums of two of them."""
    if method == "mean":
        return [1.0] * count
    rising = [2.0 ** (i - count + 1) for i in range(count)]
    if side == "both":
        return [a + b for a, b in zip(rising, reversed(rising), strict=True)]
    return rising if side == "input" else rising[::-1]


def _combine(
    old: OldRows, pieces: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]
) -> Tensor:
    """Weighted means of old rows, added piece after piece so that each sum stands alone."""
    result = torch.zeros(len(pieces), old.width)
    for position in range(max(len(ids) for ids in pieces)):
        has = [number for number, ids in enumerate(pieces) if position < len(ids)]
        rows = old.take([pieces[number][position] for number in has])
        rows *= torch.tensor([weights[number][position] for number in has]).unsqueeze(1)
        result[torch.tensor(has)] += rows
    result /= torch.tensor([sum(shares) for shares in weights]).unsqueeze(1)
    return result


class _Normal:
    """The normal distribution with the mean and the covariance of the trained old rows.

    ``mean + Σ z_j (w_j - mean) / √n`` with standard normal ``z_j`` has them exactly. It needs no
    covariance matrix (512 MiB of FP64 at a width of 8,192) and no factor of one, which does not
    exist for fewer rows than columns.
    """

    def __init__(self, old: OldRows) -> None:
        self._old = old
        self._trained = is_trained(old)
        self._count = int(self._trained.sum())
        self._mean = torch.zeros(old.width, dtype=torch.float64)
        total = torch.zeros_like(self._mean)
        for _, rows in self._centred():
            total += rows.sum(dim=0)
        self._mean = total / self._count

    def draw(self, keys: Sequence[str]) -> Tensor:
        """One FP32 row for each key, which alone decides it."""
        # Rounding from FP64 hides in which order a matrix product adds.
        result = torch.zeros(len(keys), self._old.width, dtype=torch.float64)
        drawn = torch.empty(len(keys), _BLOCK_ROWS, dtype=torch.float64)
        for start, rows in self._centred():
            for number, key in enumerate(keys):
                some = _standard_normal(f"{key}/{start}", len(rows))
                drawn[number, : len(rows)] = torch.from_numpy(some)
            result.addmm_(drawn[:, : len(rows)], rows)
        row: Tensor = result / self._count**0.5 + self._mean
        return row.float()

    def _centred(self) -> Iterator[tuple[int, Tensor]]:
        """Blocks of rows less the mean, in FP64, zero where untrained; valid until the next."""
        buffer = torch.empty(_BLOCK_ROWS, self._old.width, dtype=torch.float64)
        for start, rows in self._old.blocks():
            centred = buffer[: len(rows)].copy_(rows).sub_(self._mean)
            centred[~self._trained[start : start + len(rows)]] = 0.0
            yield start, centred


def _standard_normal(key: str, count: int) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    """FP32 numbers of a stream of their own. NumPy's are the same on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little"))
    return np.random.Generator(bits).standard_normal(count, dtype=np.float32)
