"""The interface between a loss and the engine.

An objective never sees process groups, micro-batch schedules or optimizers. It returns *sums* and
*counts*; the engine divides once, by the global count over micro-batches and data-parallel ranks,
so that a loss does not depend on how a batch was cut up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ratio:
    """A mean before its division: both are scalar tensors on the device, this rank's share.

    Attributes:
        sum: Sum over this rank's units.
        count: Number of those units.
    """

    sum: Tensor
    count: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardArgs:
    """What the model is called with.

    Attributes:
        tokens: Input ids, int64 ``[B, S]``.
        position_ids: RoPE positions, int64 ``[B, S]``.
        labels: Ids to predict, int64 ``[B, S]``; then the model's output is the per-token negative
            log-likelihood, float32 ``[B, S]``. None: the output is the head's own.
        cu_seqlens: Starts of packed sequences and the end, int32 ``[N + 1]`` on the CPU, or None;
            see `TokenBatch`.
        counted: Where a label's loss is asked for, bool ``[B, S]``: elsewhere the output is 0,
            and the head costs nothing. None: everywhere.
    """

    tokens: Tensor
    position_ids: Tensor
    labels: Tensor | None = None
    cu_seqlens: Tensor | None = None
    counted: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A loss before its division.

    Attributes:
        loss_sum: Scalar float32: sum of the loss over this rank's units.
        count: Scalar integer on the device: how many units.
        metrics: Further means to report under their names; the same names for every micro-batch
            of a step. One whose count is 0 over the whole step is not reported.
    """

    loss_sum: Tensor
    count: Tensor
    metrics: Mapping[str, Ratio] = field(default_factory=dict)


class Objective[B](Protocol):
    """A training objective over batches of one type."""

    @property
    def unit(self) -> Literal["token", "pair", "sequence"]:
        """What `LossOutput.count` counts.

        Unless it is tokens, `loss` is given whole rows also under context parallelism.
        """
        ...

    def forward_args(self, batch: B) -> ForwardArgs:
        """What the model is called with. Runs on every pipeline stage."""
        ...

    def loss(self, output: Tensor, batch: B) -> LossOutput:
        """The loss of the model's output. Runs on the last pipeline stage only."""
        ...
