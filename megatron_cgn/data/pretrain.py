"""Pre-training data: a weighted blend to train on, and each source's held-out documents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch.utils.data import Dataset

from megatron_cgn.config.schema import DataConfig
from megatron_cgn.data.blend import SourceAccount, SourcePlan, account_for, plan_sources
from megatron_cgn.data.gpt_blend import BlendRecipe, fill_cache, open_cache
from megatron_cgn.data.windows import Sample, WindowDataset
from megatron_cgn.errors import DataError, UserError
from tokenizer.wrapper import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingData:
    """What a pre-training run reads."""

    train: Dataset[Sample]
    """Training sequences in the order of training."""
    validation: dict[str, WindowDataset]
    """Held-out windows by source name; sources without held-out documents are absent."""
    account: tuple[SourceAccount, ...]
    """How much of each source the run reads."""


def build_pretraining_data(
    data: DataConfig,
    *,
    tokenizer: Tokenizer,
    train_sequences: int,
    seed: int,
    cache_dir: str | Path,
    group: dist.ProcessGroup | None = None,
) -> PretrainingData:
    """Check the sources, and open the blend and the held-out windows.

    The order depends on the sources' documents, their weights, ``seq_length``, the number of
    sequences and the seed; never on paths or on the number of processes. Documents follow one
    another with nothing in between but their own end-of-document token.

    Collective over ``group`` where torch.distributed is up; every rank must call. The first rank
    builds the shuffled indices in ``cache_dir`` and the others open them. A fault on any rank is
    raised on all of them.

    Args:
        data: Sources and sequence length.
        tokenizer: The model's tokenizer; indices made with another are refused.
        train_sequences: Length of the training blend.
        seed: Seed of the order.
        cache_dir: Directory that every rank sees. What is cached there is keyed by the content
            of the sources, so a changed source is never read through an old index.
        group: The ranks that call, global rank 0 among them; None for all.

    Returns:
        The data.

    Raises:
        ConfigError: If settings contradict each other.
        DataError: If a source is unusable or the cache cannot be written or read.
    """
    assert train_sequences > 0, train_sequences
    fingerprint = tokenizer.fingerprint()
    plans = together(lambda: plan_sources(data, tokenizer_fingerprint=fingerprint), group)
    trained = [plan for plan in plans if plan.share > 0]
    recipe = BlendRecipe(
        plans=tuple(trained), num_sequences=train_sequences, seq_length=data.seq_length, seed=seed
    )
    folder = Path(cache_dir) / f"pretrain-{recipe.key()}"
    drawn = _on_first_rank(lambda: fill_cache(recipe, folder), group)
    sequences = dict(zip([plan.name for plan in trained], drawn, strict=True))
    return PretrainingData(
        train=together(lambda: open_cache(recipe, drawn, folder), group),
        validation=together(lambda: _windows(plans, data, eod_id=tokenizer.eod_id), group),
        account=account_for(
            plans,
            sequences=[sequences.get(plan.name, 0) for plan in plans],
            seq_length=data.seq_length,
        ),
    )


def _windows(
    plans: Sequence[SourcePlan], data: DataConfig, *, eod_id: int
) -> dict[str, WindowDataset]:
    return {
        plan.name: WindowDataset(plan.validation, seq_length=data.seq_length, eod_id=eod_id)
        for plan in plans
        if plan.validation is not None
    }


def together[T](step: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Run a step on every rank of ``group``; if it fails on one, fail on all. Collective."""
    if not dist.is_initialized():
        return step()
    result: T | None = None
    fault: UserError | None = None
    try:
        result = step()
    except UserError as error:
        fault = error
    except OSError as error:  # from a place that did not expect one: the others must not wait
        fault = DataError(f"cannot read or write the data: {error}")
    faults: list[UserError | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(faults, fault, group=group)
    for found in faults:
        if found is not None:
            raise found
    assert result is not None, "a step returns something"
    return result


def _on_first_rank[T](step: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Run a step on global rank 0 alone and share its result or its fault. Collective."""
    if not dist.is_initialized():
        return step()
    outcome: list[tuple[T | None, UserError | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(step(), None)]
        except UserError as error:
            outcome = [(None, error)]
        except OSError as error:
            outcome = [(None, DataError(f"cannot read or write the data: {error}"))]
    dist.broadcast_object_list(outcome, src=0, group=group)
    result, fault = outcome[0]
    if fault is not None:
        raise fault
    assert result is not None, "a step returns something"
    return result
