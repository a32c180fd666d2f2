"""Stage ``sft``: instruction tuning on conversations, of all weights or of adapters beside them.

Wiring only: the batch source is packed conversations, the objective is the next token of what
counts, validation is loss and accuracy of held-out answers, and fixed prompts are answered.
"""

import logging
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_cgn.batch import TokenBatch
from megatron_cgn.config.schema import RunConfig
from megatron_cgn.config.validate import validate_steps
from megatron_cgn.data.collective import together
from megatron_cgn.data.sft import SftData, build_sft_data, plan_sft
from megatron_cgn.data.sft_account import ACCOUNT_FILE, SftHistory, account_of, describe
from megatron_cgn.data.sft_loader import SftLoader, SftValidationLoader
from megatron_cgn.engine.checkpoint import read_info
from megatron_cgn.engine.engine import Engine
from megatron_cgn.eval.answers import score_answers
from megatron_cgn.hf.chat_files import write_chat_files
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.state import ParallelState, initialize_parallel
from megatron_cgn.stages import common, training
from megatron_cgn.stages.conversations import (
    PLAN,
    TokensRead,
    cache_dir,
    check_rows,
    describe_template,
    encoding_of,
    full_rows,
)
from megatron_cgn.stages.samples import answer_samples, sample_prompts
from tokenizer.chat import ChatTemplate
from tokenizer.wrapper import Tokenizer

logger = logging.getLogger(__name__)


def run(run: RunConfig) -> None:
    """Run the stage from configuration to export. Collective over all ranks.

    Args:
        run: The validated configuration.

    Raises:
        UserError: If the model, the template, the data or a checkpoint is not usable.
        StoppedBySignal: After saving, if a signal asked for it.
    """
    architecture = common.open_architecture(run)
    tokenizer = Tokenizer.from_pretrained(common.model_path(run))
    chat = ChatTemplate.open(common.model_path(run), template=run.chat.template)
    common.check_start(run, architecture, tokenizer)
    check_rows(run)
    state = initialize_parallel(run.parallel)
    plan = plan_sft(
        run,
        chat=chat,
        tokenizer=tokenizer,
        cache=cache_dir(run),
        report=common.Progress("encoding"),
    )
    validate_steps(run, plan.total_steps)
    data = build_sft_data(plan)
    prompts = together(
        lambda: sample_prompts(run, chat, data, max_positions=architecture.max_position_embeddings),
        None,
    )
    engine = Engine(run, architecture, state, total_steps=plan.total_steps)
    common.load_start(engine)
    engine.prepare_training()
    common.start_optimizer(engine)
    write_beside = partial(
        write_chat_files,
        config_dir=common.model_path(run),
        template=chat.source,
        end_of_turn_ids=chat.end_of_turn_ids,
    )
    training.train(
        engine,
        training.Course(
            objective=NextToken(data.source_names),
            fit=_fit(engine, data, tokenizer, chat),
            batches=lambda: _batches(engine, data),
            tokens_after=TokensRead(data),
            validate=lambda: _validate(engine, data),
            answer=partial(answer_samples, engine, chat, prompts) if prompts else None,
            account_file=ACCOUNT_FILE,
            account=lambda consumed: account_of(data, consumed=consumed),
            describe=lambda resumed: _describe(engine, data, chat, resumed),
            fill=write_beside,
        ),
    )
    common.show_outcome(run, common.export(engine, write_beside=write_beside))


def _batches(engine: Engine, data: SftData) -> Generator[list[TokenBatch]]:
    run = engine.run
    return iter(
        SftLoader(
            data.train,
            micro_batch_size=run.train.micro_batch_size,
            global_batch_size=run.train.global_batch_size,
            dp_rank=engine.state.dp_rank,
            dp_size=engine.state.dp_size,
            seq_length=run.data.seq_length,
            pad_to_full=full_rows(run),
            start_sequence=engine.consumed_sequences,
            num_workers=run.data.num_workers,
        )
    )


def _validate(engine: Engine, data: SftData) -> dict[str, float]:
    """Score every source's held-out conversations. Collective over all ranks."""
    scores = {
        name: score_answers(engine, loader)
        for name, loader in _validation_loaders(engine.run, data, engine.state).items()
    }
    return {
        f"val/{name}/{metric}": getattr(score, metric)
        for name, score in scores.items()
        for metric in ("loss", "token_accuracy")
    }


def _validation_loaders(
    run: RunConfig, data: SftData, state: ParallelState
) -> dict[str, SftValidationLoader]:
    return {
        name: SftValidationLoader(
            sequences,
            micro_batch_size=run.train.micro_batch_size,
            dp_rank=state.dp_rank,
            dp_size=state.dp_size,
            seq_length=run.data.seq_length,
            pad_to_full=full_rows(run),
            max_sequences=run.train.validation_sequences,
        )
        for name, sequences in data.validation.items()
    }


def _describe(
    engine: Engine, data: SftData, chat: ChatTemplate, resumed: Path | None
) -> Iterator[str]:
    """Say what is trained on, and what differs from the run before."""
    counted = (
        "every token counts"
        if engine.run.chat.train_on_prompt
        else "the last of the assistant's turns counts"
        if engine.run.chat.last_turn_only
        else "the assistant's turns count"
    )
    yield f"{describe_template(chat)}; {counted}"
    yield from describe(data.plan)
    if resumed is not None:
        before = read_info(resumed).fit[PLAN]
        steps = -(-before["sequences"] // before["global_batch_size"])
        yield from training.describe_length(engine, steps)


def _fit(engine: Engine, data: SftData, tokenizer: Tokenizer, chat: ChatTemplate) -> dict[str, Any]:
    """Everything that decides which conversations come when, and how they are read.

    What adapters must share, the engine tells itself.
    """
    encoding = encoding_of(tokenizer, chat)
    return common.base_fit(
        engine.architecture,
        **encoding,
        **{
            "train.global_batch_size": engine.run.train.global_batch_size,
            PLAN: SftHistory(data.plan, encoding="/".join(encoding.values())),
        },
    )
