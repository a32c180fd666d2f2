"""Held-out documents cut into windows: every token is predicted exactly once, in order."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_cgn.data.indexed import map_tokens
from megatron_cgn.data.sources import Documents

Sample = Mapping[str, Tensor]
"""``tokens``, ``labels``, ``position_ids`` int64 ``[S]`` and ``loss_mask`` float32 ``[S]``; a
training sample also has ``source`` int64 ``[]``, the place of its source among the blend's."""


class WindowDataset(Dataset[Sample]):
    """Documents, concatenated, as consecutive windows of ``seq_length`` labels.

    The order of training shuffles and repeats; a measure must not. The first document follows an
    end-of-document token, as the others do, so that its first token counts too. The last window is
    padded with ``loss_mask`` 0.
    """

    def __init__(self, documents: Sequence[Documents], *, seq_length: int, eod_id: int) -> None:
        """Map the documents' tokens.

        Args:
            documents: What is held out, of one or several indices.
            seq_length: Tokens of one window.
            eod_id: Id in front of the first token, and in the padding.
        """
        self._parts = []
        for part in documents:
            start = part.index.tokens_of(0, part.start)
            self._parts.append(map_tokens(part.index)[start : start + part.tokens])
        self._seq_length = seq_length
        self._eod_id = eod_id
        self.num_tokens = sum(map(len, self._parts))
        """Tokens that count: labels with ``loss_mask`` 1 over all windows."""

    def __len__(self) -> int:
        """Number of windows."""
        return -(-self.num_tokens // self._seq_length)

    def __getitem__(self, window: int) -> Sample:
        """Window ``window``: see `Sample`."""
        if not 0 <= window < len(self):
            raise IndexError(window)
        first = window * self._seq_length
        text = np.full(self._seq_length + 1, self._eod_id, dtype=np.int64)
        count = min(self._seq_length, self.num_tokens - first)
        self._copy(first, text[1 : 1 + count])
        if first:
            self._copy(first - 1, text[:1])
        loss_mask = torch.zeros(self._seq_length, dtype=torch.float32)
        loss_mask[:count] = 1.0
        return {
            "tokens": torch.from_numpy(text[:-1].copy()),
            "labels": torch.from_numpy(text[1:].copy()),
            "loss_mask": loss_mask,
            "position_ids": torch.arange(self._seq_length),
        }

    def _copy(self, first: int, target: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Fill an array with the tokens from ``first`` on, over the ends of indices."""
        filled = 0
        for part in self._parts:
            taken = part[first : first + len(target) - filled]
            target[filled : filled + len(taken)] = taken
            filled += len(taken)
            first = max(0, first - len(part))
