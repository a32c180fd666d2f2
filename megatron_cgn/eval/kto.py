"""KTO's baseline: how far the policy has moved from the reference, on answers to other prompts.

Which prompts and answers these are is `data/preference_kto.py`'s.
"""

import contextlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.data.reference import Scored
from megatron_cgn.engine.engine import Engine
from megatron_cgn.eval.reference import scoring_rows
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel import cpu
from megatron_cgn.parallel.reduce import sum_over_data

type Numbers = npt.NDArray[np.int64]


class KtoBaseline:
    r"""KTO's estimate of the divergence of the policy from the reference.

    .. math:: z = \max\Bigl(0, \frac{1}{N} \sum_{i=1}^N
              \log\frac{\pi(y'_i|x_i)}{\pi_\mathrm{ref}(y'_i|x_i)}\Bigr)

    over mismatched answers :math:`y'_i` to :math:`N` prompts, without gradient. Ethayarajh et al.
    2024, https://arxiv.org/abs/2402.01306, section 4.1. Departure: the mean is over the prompts of
    the whole global batch, however it is cut into micro-batches.
    """

    def __init__(
        self, engine: Engine, mismatched: Scored, ref_logps: npt.NDArray[np.float32]
    ) -> None:
        """Bind the policy and what the reference says.

        Args:
            engine: The policy; its weights at the time of a call count.
            mismatched: The mismatched answers.
            ref_logps: What `reference_scores` gave of them, float32 ``[A]``.
        """
        self._engine = engine
        self._mismatched = mismatched
        self._ref_logps = ref_logps

    def __call__(self, answers: Numbers) -> Tensor:
        """Score the mismatched answers to some prompts. Collective over all ranks.

        Args:
            answers: Numbers of the answers whose prompts these are, over all ranks, int64
                ``[N]`` with N at least 1; one given twice counts twice.

        Returns:
            The baseline, float32 ``[1]`` on the model's device, equal on every rank.
        """
        state = self._engine.state
        reference = float(self._ref_logps[answers].sum(dtype=np.float64))
        assert np.isfinite(reference), "every answer of the run has been scored"
        total = torch.zeros(1, dtype=torch.float64, device=cpu.device())
        rows = scoring_rows(self._engine, self._mismatched, answers)
        for _, nll in self._engine.score(rows, NextToken().forward_args):
            # Context-parallel ranks all have the whole row; what does not count is 0.
            if state.cp_rank == 0:
                total -= nll.double().sum()
        mean = (sum_over_data(total, state) - reference) / len(answers)
        return mean.clamp(min=0.0).float()


def with_baselines(
    steps: Generator[Sequence[PreferenceBatch]],
    answers: Iterable[Numbers],
    baseline: KtoBaseline,
) -> Generator[list[PreferenceBatch]]:
    """Give the micro-batches of each step the baseline of the policy before it. Collective.

    Args:
        steps: Each step's micro-batches of this data-parallel rank; closed at the end.
        answers: Numbers of the answers of each step, over all ranks: as many as there are steps.
        baseline: Makes it.

    Yields:
        The micro-batches of a step; to be asked for right before it.
    """
    with contextlib.closing(steps):
        for batches, numbers in zip(steps, answers, strict=False):
            yield list(with_baseline(batches, baseline(numbers)))


def with_baseline(batches: Iterable[PreferenceBatch], value: Tensor) -> Iterator[PreferenceBatch]:
    """Give micro-batches their common baseline.

    Args:
        batches: Micro-batches of this data-parallel rank.
        value: What `KtoBaseline` says of the answers of all ranks, float32 ``[1]``.

    Yields:
        The micro-batches.
    """
    for batch in batches:
        yield replace(batch, baseline=value)
