"""What an objective of preference learning makes of held-out data: its loss, and its metrics."""

from collections.abc import Iterable

import torch

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.engine.engine import Engine
from megatron_cgn.engine.forward_step import LOSS, sum_reports
from megatron_cgn.objectives.base import Objective, Ratio
from megatron_cgn.parallel.reduce import sum_over_data


def score_preferences(
    engine: Engine, batches: Iterable[PreferenceBatch], objective: Objective[PreferenceBatch]
) -> dict[str, float]:
    """Score held-out answers as training does, without a step. Collective over all ranks.

    Sums and counts are added up before they are divided, so that neither the number of ranks nor
    the size of micro-batches matters.

    Args:
        engine: The model.
        batches: This data-parallel rank's micro-batches, at least one; as many on every rank.
        objective: Of one source, so made without names of sources.

    Returns:
        ``loss`` and the objective's metrics by their names, equal on every rank; those that no
        answer belongs to are absent.
    """
    names: list[str] = []
    totals = torch.zeros(0)
    for batch, output in engine.score(batches, objective.forward_args):
        result = objective.loss(output.cpu(), batch)
        report = {LOSS: Ratio(result.loss_sum, result.count), **result.metrics}
        found, sums = sum_reports([report])
        assert not names or names == found, "an objective's metrics have the same names each time"
        totals = sums if not names else totals + sums
        names = found
    # Every rank of a model-parallel group has the whole output, also under context parallelism.
    reduced = sum_over_data(totals / engine.state.cp_size, engine.state).tolist()
    return {
        name: total / count
        for name, (total, count) in zip(names, reduced, strict=True)
        if count  # nothing to compare: no score is better than a made-up one
    }
