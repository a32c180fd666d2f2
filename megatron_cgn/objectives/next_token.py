"""Next-token prediction: continual pre-training and SFT differ only in labels and mask."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from megatron_cgn.batch import TokenBatch
from megatron_cgn.objectives.base import ForwardArgs, LossOutput, Ratio


class NextToken:
    r"""Cross-entropy of the next token.

    .. math:: L = -\frac{\sum_i m_i \log p(y_i \mid x_{\le i})}{\sum_i m_i}

    with labels :math:`y`, and mask :math:`m` from `TokenBatch.loss_mask`; the sums run over
    the whole global batch.
    """

    unit: Literal["token"] = "token"

    def __init__(self, source_names: Sequence[str] = ()) -> None:
        """Name the sources whose losses are reported one by one.

        Args:
            source_names: The run's sources, in the order of `TokenBatch.source_ids`. Batches
                without ``source_ids`` report none.
        """
        self._source_names = tuple(source_names)

    def forward_args(self, batch: TokenBatch) -> ForwardArgs:
        """Ask the model for the per-token negative log-likelihood of what counts.

        Args:
            batch: Sequences, ``[B, S]``.

        Returns:
            Arguments with labels.
        """
        return ForwardArgs(
            tokens=batch.tokens,
            position_ids=batch.position_ids,
            labels=batch.labels,
            cu_seqlens=batch.cu_seqlens,
            counted=batch.loss_mask > 0,
        )

    def loss(self, output: Tensor, batch: TokenBatch) -> LossOutput:
        """Sum the negative log-likelihood where the mask counts.

        Args:
            output: Per-token negative log-likelihood, ``[B, S]`` (this rank's part of S under
                context parallelism).
            batch: The same batch as in `forward_args`, cut the same way.

        Returns:
            Sum and number of counted tokens; the same of each source as
            ``train/<source>/loss``.
        """
        mask = batch.loss_mask.float()
        # Not nll * mask: an infinite loss of a token that does not count would become NaN.
        nll = torch.where(mask > 0, output.float(), 0.0) * mask
        return LossOutput(
            loss_sum=nll.sum(),
            count=mask.sum().to(torch.int),
            metrics=self._of_sources(nll.detach(), mask, batch.source_ids),
        )

    def _of_sources(self, nll: Tensor, mask: Tensor, ids: Tensor | None) -> dict[str, Ratio]:
        if ids is None or not self._source_names:
            return {}
        sources = torch.arange(len(self._source_names), device=ids.device)
        members = sources[:, None] == ids.flatten()
        sums = torch.where(members, nll.flatten(), 0.0).sum(1)
        counts = torch.where(members, mask.flatten(), 0.0).sum(1)
        return {
            f"train/{name}/loss": Ratio(total, count)
            for name, total, count in zip(self._source_names, sums, counts, strict=True)
        }
