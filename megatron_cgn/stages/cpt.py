"""Stage ``cpt``: continual pre-training on a blend of indexed sources.

Wiring only: the batch source is a blend, the objective is the next token, validation is bits per
byte of every source.
"""

import contextlib
import itertools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_cgn.batch import TokenBatch
from megatron_cgn.config.data_rules import DOMAIN
from megatron_cgn.config.schema import RunConfig
from megatron_cgn.config.validate import validate_steps
from megatron_cgn.data.account import ACCOUNT_FILE, account_of, describe, write_account
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
from megatron_cgn.engine.schedule import learning_rate
from megatron_cgn.engine.trainer import Schedule, Trainer
from megatron_cgn.errors import ConfigError
from megatron_cgn.eval.bits_per_byte import HeldOutScore, score_held_out
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.reduce import first_problem
from megatron_cgn.parallel.state import ParallelState, initialize_parallel
from megatron_cgn.stages import common
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

    def write_beside(target: Path) -> None:
        """Fill a checkpoint's ``hf/``, and write what it has consumed next to it."""
        common.copy_hf_files(common.model_path(run), target)
        account = account_of(data.blend, consumed=engine.consumed_sequences)
        write_account(target.parent / ACCOUNT_FILE, account)

    trainer = Trainer[TokenBatch](
        engine,
        NextToken(data.source_names),
        schedule=Schedule(
            total_steps=engine.total_steps,
            log_interval=run.train.log_interval_steps,
            validation_interval=run.train.validation_interval_steps,
            checkpoint_interval=run.checkpoint.interval_steps,
        ),
        checkpoint_dir=common.checkpoint_dir(run),
        fit=_fit(engine, data, tokenizer),
        hf_files=write_beside,
        validate=validate,
    )
    resumed = trainer.resume(run.checkpoint.resume)
    callbacks = common.make_callbacks(
        engine,
        tokens_per_step=run.train.global_batch_size * run.data.seq_length,
        resumed_from=resumed,
    )
    messages = [
        common.describe_engine(engine),
        *common.describe_groups(engine),
        *_describe_epochs(engine),
        *describe(data.blend),
    ]
    if resumed is not None:
        messages += _describe_change(engine, data.blend, read_info(resumed).fit)
    for callback, message in itertools.product(callbacks, messages):
        callback.on_message(message)
    _write_plan(run, data.blend)
    loader = SequentialLoader(
        data.train,
        micro_batch_size=run.train.micro_batch_size,
        global_batch_size=run.train.global_batch_size,
        dp_rank=engine.state.dp_rank,
        dp_size=engine.state.dp_size,
        start_sequence=engine.consumed_sequences,
        num_workers=run.data.num_workers,
        eod_id=eod_id,
    )
    with contextlib.closing(iter(loader)) as steps:
        trainer.fit(steps, callbacks)


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


def _write_plan(run: RunConfig, blend: Blend) -> None:
    """Write what the run will read. Collective over all ranks."""
    problem: str | None = None
    if dist.get_rank() == 0:
        try:
            write_account(Path(run.output_dir) / ACCOUNT_FILE, account_of(blend))
        except OSError as error:
            problem = str(error)
    if first := first_problem(problem):
        raise ConfigError(
            f"output_dir: {run.output_dir}/{ACCOUNT_FILE} cannot be written ({first}). Free space, "
            "or choose another directory."
        )


def _describe_epochs(engine: Engine) -> Iterator[str]:
    """Say how many steps ``train.epochs`` makes."""
    run = engine.run
    if run.train.epochs is None:
        return
    mixed = run.data.mix is not None or run.data.phases
    name = repr(run.data.epochs_of or DOMAIN) if mixed else "all sources together"
    yield (
        f"train.epochs={run.train.epochs:g} of {name}: {engine.total_steps:,} whole steps of "
        f"{run.train.global_batch_size:,} sequences"
    )


def _describe_change(engine: Engine, blend: Blend, fit: Mapping[str, Any]) -> Iterator[str]:
    """Say what another length than the checkpoint's changes from here on."""
    before = Blend.from_record(fit[_PLAN])
    steps = before.sequences // before.global_batch_size
    if steps == engine.total_steps:
        return
    old, new = (
        learning_rate(engine.step, engine.run.optim, total_steps=total)
        for total in (steps, engine.total_steps)
    )
    yield (
        f"the run now has {engine.total_steps:,} steps instead of {steps:,}: the learning rate "
        f"follows the schedule of the new length, and is {new:.3g} at step {engine.step + 1:,} "
        + ("as before" if new == old else f"instead of {old:.3g}")
    )


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
