"""Which documents of which source are trained on and which are held out, and for how long.

Arithmetic over checked indices only: the datasets themselves are built in ``pretrain.py``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cgn.config.schema import DataConfig, SourceConfig
from megatron_cgn.config.validate import data_faults
from megatron_cgn.data.indexed import IndexInfo, check_index
from megatron_cgn.errors import ConfigError, DataError, UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """A range of documents of one index."""

    index: IndexInfo
    """The index."""
    start: int
    """First document."""
    stop: int
    """One past the last document."""

    def __len__(self) -> int:
        """Number of documents."""
        return self.stop - self.start

    @property
    def identity(self) -> str:
        """Equal for the same documents, whatever files hold them."""
        return f"{self.index.sidecar.digest}[{self.start}:{self.stop}]"

    @property
    def tokens(self) -> int:
        """Number of tokens in them."""
        return self.index.tokens_of(self.start, self.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """One source, divided. Training and held-out documents never overlap."""

    name: str
    """Its name."""
    share: float
    """Share of the training sequences, 0 to 1; 0 for a source that is only validated on."""
    training: Documents
    """Documents to train on."""
    validation: Documents | None
    """Documents held out, if any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceAccount:
    """How much of a source a run reads."""

    name: str
    """Its name."""
    share: float
    """Share of the training sequences, 0 to 1."""
    training_documents: int
    """Documents to train on."""
    training_tokens: int
    """Tokens in them."""
    sequences: int
    """Training sequences drawn from it over the run."""
    epochs: float
    """How many times it is read over the run."""
    validation_documents: int
    """Documents held out."""
    validation_tokens: int
    """Tokens in them."""
    digest: str
    """Identity of the documents, those to train on and those held out."""


def plan_sources(
    data: DataConfig, *, tokenizer_fingerprint: str | None = None
) -> tuple[SourcePlan, ...]:
    """Check every source and divide it into training and held-out documents.

    Args:
        data: The settings; ``validation_fraction`` applies to sources without
            ``validation_path`` and takes the last documents, rounded, at least one.
        tokenizer_fingerprint: Identity of the tokenizer in use; None skips that check.

    Returns:
        One plan per source, in order.

    Raises:
        ConfigError: If names, paths or weights contradict each other.
        DataError: If an index is unusable; all faulty sources are named at once.
    """
    _check_settings(data)
    total = sum(source.weight for source in data.sources)
    plans, faults = [], []
    for source in data.sources:
        try:
            plans.append(_plan_source(source, data, total, tokenizer_fingerprint))
        except UserError as error:
            faults.append(f"data.sources[{source.name}]: {error}")
    if faults:
        raise DataError("\n".join(faults))
    return tuple(plans)


def count_tokens(plans: Sequence[SourcePlan]) -> int:
    """Training tokens of all sources that are trained on."""
    return sum(plan.training.tokens for plan in plans if plan.share > 0)


def train_sequences_for_epochs(
    plans: Sequence[SourcePlan], *, epochs: float, seq_length: int
) -> int:
    """Turn a number of epochs into a number of training sequences.

    ``floor((epochs * tokens - 1) / seq_length)``, with the training tokens of all sources
    together. The last token of a pass has no successor to predict, hence the one less: without
    it, one epoch of a source whose tokens divide evenly would begin a second.

    Args:
        plans: The sources.
        epochs: Passes over the training tokens.
        seq_length: Tokens of one sequence.

    Returns:
        Sequences, at least one.

    Raises:
        DataError: If that is less than one sequence.
    """
    tokens = count_tokens(plans)
    sequences = math.floor((epochs * tokens - 1) / seq_length)
    if sequences < 1:
        raise DataError(
            f"train.epochs={epochs:g} of {tokens:,} training tokens do not fill one sequence of "
            f"data.seq_length={seq_length:,}. Give more data, more epochs or shorter sequences."
        )
    return sequences


def account_for(
    plans: Sequence[SourcePlan], *, sequences: Sequence[int], seq_length: int
) -> tuple[SourceAccount, ...]:
    """Say how often each source is read.

    Args:
        plans: The sources.
        sequences: Training sequences drawn from each of them.
        seq_length: Tokens of one sequence.

    Returns:
        One account per source, in order.
    """
    return tuple(
        SourceAccount(
            name=plan.name,
            share=plan.share,
            training_documents=len(plan.training),
            training_tokens=plan.training.tokens,
            sequences=count,
            epochs=count * seq_length / max(1, plan.training.tokens),
            validation_documents=len(plan.validation) if plan.validation else 0,
            validation_tokens=plan.validation.tokens if plan.validation else 0,
            digest="/".join(d.identity for d in (plan.training, plan.validation) if d),
        )
        for plan, count in zip(plans, sequences, strict=True)
    )


def _check_settings(data: DataConfig) -> None:
    """Refuse settings that are wrong whatever the files hold; all faults at once."""
    faults = list(data_faults(data))
    if faults:
        raise ConfigError("\n".join(faults))


def _plan_source(
    source: SourceConfig, data: DataConfig, total_weight: float, fingerprint: str | None
) -> SourcePlan:
    index = check_index(source.path, tokenizer_fingerprint=fingerprint)
    bound = index.documents
    validation: Documents | None = None
    if source.validation_path is not None:
        held_out = check_index(source.validation_path, tokenizer_fingerprint=fingerprint)
        validation = Documents(index=held_out, start=0, stop=held_out.documents)
    elif data.validation_fraction:
        bound -= max(1, round(data.validation_fraction * index.documents))
        validation = Documents(index=index, start=bound, stop=index.documents)
    training = Documents(index=index, start=0, stop=bound)
    if source.weight > 0 and not len(training):
        raise DataError(
            f"{source.path}: nothing is left to train on: data.validation_fraction="
            f"{data.validation_fraction} holds out all of its {index.documents} document(s). "
            "Lower the fraction, add documents, or give a validation_path."
        )
    return SourcePlan(
        name=source.name,
        share=source.weight / total_weight,
        training=training,
        validation=validation,
    )
