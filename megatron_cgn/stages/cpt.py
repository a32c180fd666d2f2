"""Stage ``cpt``: continual pre-training on a blend of indexed sources.

Wiring only: the batch source is a blend, the objective is the next token, validation is bits per
byte of every source.
"""

import logging
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_cgn.batch import TokenBatch
from megatron_cgn.config.schema import RunConfig
from megatron_cgn.config.validate import validate_steps
from megatron_cgn.data.account import ACCOUNT_FILE, account_of, describe
from megatron_cgn.data.blend import Blend
from megatron_cgn.data.collective import together
from megatron_cgn.data.history import BlendHistory
from megatron_cgn.data.loader import SequentialLoader, ValidationLoader
from megatron_cgn.data.pretrain import (
    PretrainingData,
    build_pretraining_data,
    plan_pretraining,
)
from megatron_cgn.engine.checkpoint import read_info
from megatron_cgn.engine.engine import Engine
from megatron_cgn.eval.bits_per_byte import HeldOutScore, score_held_out
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.state import ParallelState, initialize_parallel
from megatron_cgn.stages import common, training
from tokenizer.wrapper import Tokenizer

logger = logging.getLogger(__name__)

_PLAN = "data.plan"


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
    plan = together(lambda: plan_pretraining(run, tokenizer=tokenizer), None)
    validate_steps(run, plan.total_steps)
    data = build_pretraining_data(
        plan,
        eod_id=tokenizer.eod_id,
        cache_dir=run.data.cache_dir or Path(run.output_dir) / "cache",
    )
    engine = Engine(run, architecture, state, total_steps=plan.total_steps)
    common.load_start(engine)
    engine.prepare_training()
    common.start_optimizer(engine)
    _train(engine, data, tokenizer)
    common.show_outcome(run, common.export(engine))


def _train(engine: Engine, data: PretrainingData, tokenizer: Tokenizer) -> None:
    run = engine.run
    byte_lengths = torch.from_numpy(tokenizer.token_byte_lengths().copy())
    eod_id = tokenizer.eod_id if run.data.reset_attention_mask else None

    def validate() -> dict[str, float]:
        scores: dict[str, HeldOutScore] = {
            name: score_held_out(engine, loader, byte_lengths)
            for name, loader in _validation_loaders(run, data, engine.state, eod_id).items()
        }
        return {
            f"val/{name}/{metric}": getattr(score, metric)
            for name, score in scores.items()
            for metric in ("loss", "bits_per_byte")
        }

    def batches() -> Generator[list[TokenBatch]]:
        return iter(
            SequentialLoader(
                data.train,
                micro_batch_size=run.train.micro_batch_size,
                global_batch_size=run.train.global_batch_size,
                dp_rank=engine.state.dp_rank,
                dp_size=engine.state.dp_size,
                start_sequence=engine.consumed_sequences,
                num_workers=run.data.num_workers,
                eod_id=eod_id,
            )
        )

    training.train(
        engine,
        training.Course(
            objective=NextToken(data.source_names),
            fit=_fit(engine, data, tokenizer),
            batches=batches,
            tokens_after=(run.train.global_batch_size * run.data.seq_length).__mul__,
            validate=validate,
            account_file=ACCOUNT_FILE,
            account=lambda consumed: account_of(data.blend, consumed=consumed),
            describe=lambda resumed: _describe(engine, data.blend, resumed),
        ),
    )


def _validation_loaders(
    run: RunConfig, data: PretrainingData, state: ParallelState, eod_id: int | None
) -> dict[str, ValidationLoader]:
    return {
        name: ValidationLoader(
            windows,
            micro_batch_size=run.train.micro_batch_size,
            dp_rank=state.dp_rank,
            dp_size=state.dp_size,
            max_sequences=run.train.validation_sequences,
            eod_id=eod_id,
        )
        for name, windows in data.validation.items()
    }


def _describe(engine: Engine, blend: Blend, resumed: Path | None) -> Iterator[str]:
    """Say how long the run is, what it reads, and what differs from the run before."""
    yield from training.describe_epochs(engine)
    yield from describe(blend)
    if resumed is not None:
        before = Blend.from_record(read_info(resumed).fit[_PLAN])
        steps = before.sequences // before.global_batch_size
        yield from training.describe_length(engine, steps)


def _fit(engine: Engine, data: PretrainingData, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that decides which sequences come when and how they are read.

    Of the plan only what has been consumed must stay, hence its own rule. Whether documents see
    one another changes what a loss measures, and the closing table compares the first with the
    last.
    """
    run = engine.run
    return common.base_fit(
        engine.architecture,
        **{
            "tokenizer": tokenizer.fingerprint(),
            "seed": run.seed,
            "data.seq_length": run.data.seq_length,
            "data.reset_attention_mask": run.data.reset_attention_mask,
            "train.global_batch_size": run.train.global_batch_size,
            _PLAN: BlendHistory(data.blend),
        },
    )
