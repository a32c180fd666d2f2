"""Held-out documents cut into windows: every token is predicted exactly once, in order."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_cgn.data.blend import Documents
from megatron_cgn.data.indexed import map_tokens

Sample = Mapping[str, Tensor]
"""``tokens``, ``labels``, ``position_ids`` int64 ``[S]`` and ``loss_mask`` float32 ``[S]``."""


class WindowDataset(Dataset[Sample]):
    """Documents, concatenated, as consecutive windows of ``seq_length`` labels.

    Megatron's own dataset shuffles, repeats and drops; a measure must not. The first document
    follows an end-of-document token, as the others do, so that its first token counts too. The
    last window is padded with ``loss_mask`` 0.
    """

    def __init__(self, documents: Documents, *, seq_length: int, eod_id: int) -> None:
        """Map the documents' tokens.

        Args:
            documents: What is held out.
            seq_length: Tokens of one window.
            eod_id: Id in front of the first token, and in the padding.
        """
        index = documents.index
        start = index.tokens_of(0, documents.start)
        self._tokens = map_tokens(index)[start : start + documents.tokens]
        self._seq_length = seq_length
        self._eod_id = eod_id
        self.num_tokens = len(self._tokens)
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
        labels = self._tokens[first : first + self._seq_length]
        text[1 : 1 + len(labels)] = labels
        if first:
            text[0] = self._tokens[first - 1]
        loss_mask = torch.zeros(self._seq_length, dtype=torch.float32)
        loss_mask[: len(labels)] = 1.0
        return {
            "tokens": torch.from_numpy(text[:-1].copy()),
            "labels": torch.from_numpy(text[1:].copy()),
            "loss_mask": loss_mask,
            "position_ids": torch.arange(self._seq_length),
        }
