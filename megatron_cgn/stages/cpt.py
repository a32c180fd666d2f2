"""Stage ``cpt``: continual pre-training on a blend of indexed sources.

Wiring only: the batch source is a blend, the objective is the next token, validation is bits per
byte of every source.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_cgn.batch import TokenBatch
from megatron_cgn.config.schema import RunConfig
from megatron_cgn.config.validate import validate_steps
from megatron_cgn.data.blend import SourceAccount, plan_sources, train_sequences_for_epochs
from megatron_cgn.data.loader import SequentialLoader, ValidationLoader
from megatron_cgn.data.pretrain import PretrainingData, build_pretraining_data, together
from megatron_cgn.engine.engine import Engine
from megatron_cgn.engine.trainer import Schedule, Trainer
from megatron_cgn.eval.bits_per_byte import HeldOutScore, score_held_out
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.state import ParallelState, initialize_parallel
from megatron_cgn.stages import common
from tokenizer.wrapper import Tokenizer

logger = logging.getLogger(__name__)


def run(run: RunConfig) -> None:
    """Run the stage from configuration to export. Collective over all ranks.

    Args:
        run: The validated configuration.

    Raises:
        UserError: If the model, the data or a checkpoint is not usable.
        StoppedBySignal: After saving, if a signal asked for it.
    """
    architecture = common.open_architecture(run)
    tokenizer = Tokenizer.from_pretrained(common.model_path(run))
    common.check_start(run, architecture, tokenizer)
    state = initialize_parallel(run.parallel)
    total_steps = together(lambda: count_steps(run, tokenizer), None)
    validate_steps(run, total_steps)
    data = build_pretraining_data(
        run.data,
        tokenizer=tokenizer,
        train_sequences=total_steps * run.train.global_batch_size,
        seed=run.seed,
        cache_dir=run.data.cache_dir or Path(run.output_dir) / "cache",
    )
    engine = Engine(run, architecture, state, total_steps=total_steps)
    common.load_start(engine)
    engine.prepare_training()
    _train(engine, data, tokenizer)
    common.show_outcome(run, common.export(engine))


def count_steps(run: RunConfig, tokenizer: Tokenizer) -> int:
    """Optimizer steps of the run.

    Args:
        run: The configuration, with ``train.train_iters`` or ``train.epochs``.
        tokenizer: Whose indices the sources must be.

    Returns:
        ``train.train_iters``, or the whole steps that ``train.epochs`` hold, at least one.
    """
    if run.train.train_iters is not None:
        return run.train.train_iters
    assert run.train.epochs is not None, "configuration validation demands one of them"
    plans = plan_sources(run.data, tokenizer_fingerprint=tokenizer.fingerprint())
    sequences = train_sequences_for_epochs(
        plans, epochs=run.train.epochs, seq_length=run.data.seq_length
    )
    return max(1, sequences // run.train.global_batch_size)


def _train(engine: Engine, data: PretrainingData, tokenizer: Tokenizer) -> None:
    run = engine.run
    byte_lengths = torch.from_numpy(tokenizer.token_byte_lengths().copy())

    def validate() -> dict[str, float]:
        scores: dict[str, HeldOutScore] = {
            name: score_held_out(engine, loader, byte_lengths)
            for name, loader in _validation_loaders(run, data, engine.state).items()
        }
        return {
            f"val/{name}/{metric}": getattr(score, metric)
            for name, score in scores.items()
            for metric in ("loss", "bits_per_byte")
        }

    source = common.model_path(run)
    trainer = Trainer[TokenBatch](
        engine,
        NextToken(),
        schedule=Schedule(
            total_steps=engine.total_steps,
            log_interval=run.train.log_interval_steps,
            validation_interval=run.train.validation_interval_steps,
            checkpoint_interval=run.checkpoint.interval_steps,
        ),
        checkpoint_dir=common.checkpoint_dir(run),
        fit=_fit(engine, data, tokenizer),
        hf_files=lambda target: common.copy_hf_files(source, target),
        validate=validate,
    )
    resumed = trainer.resume(run.checkpoint.resume)
    callbacks = common.make_callbacks(
        engine,
        tokens_per_step=run.train.global_batch_size * run.data.seq_length,
        resumed_from=resumed,
    )
    for callback in callbacks:
        callback.on_message(common.describe_engine(engine))
        callback.on_message(_describe(data.account))
    loader = SequentialLoader(
        data.train,
        micro_batch_size=run.train.micro_batch_size,
        global_batch_size=run.train.global_batch_size,
        dp_rank=engine.state.dp_rank,
        dp_size=engine.state.dp_size,
        start_sequence=engine.consumed_sequences,
        num_workers=run.data.num_workers,
    )
    trainer.fit(iter(loader), callbacks)


def _validation_loaders(
    run: RunConfig, data: PretrainingData, state: ParallelState
) -> dict[str, ValidationLoader]:
    return {
        name: ValidationLoader(
            windows,
            micro_batch_size=run.train.micro_batch_size,
            dp_rank=state.dp_rank,
            dp_size=state.dp_size,
            max_sequences=run.train.validation_sequences,
        )
        for name, windows in data.validation.items()
    }


def _describe(account: Sequence[SourceAccount]) -> str:
    """Say what the run will read of each source."""
    width = max(len(a.name) for a in account)
    return "\n".join(
        f"source {a.name:<{width}}  {a.share:6.1%} of training  {a.sequences:,} sequences, "
        f"{a.epochs:.2f} epochs of {a.training_tokens:,} tokens; "
        f"{a.validation_tokens:,} tokens held out"
        for a in account
    )


def _fit(engine: Engine, data: PretrainingData, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that decides which sequences come when, besides the model itself."""
    run = engine.run
    return common.base_fit(
        engine.architecture,
        **{
            "tokenizer": tokenizer.fingerprint(),
            "seed": run.seed,
            "data.seq_length": run.data.seq_length,
            "train.global_batch_size": run.train.global_batch_size,
            "train_sequences": engine.total_steps * run.train.global_batch_size,
            "data.sources": [
                [a.name, a.share, a.training_documents, a.training_tokens, a.digest]
                for a in data.account
            ],
        },
    )
