"""What the stages of preference learning share: data, rows, held-out sets, and the training part.

Wiring only. A stage opens its data, builds the model, and trains on an objective:

    opened = open_data(run)                       # all that can be refused without a model
    engine = build(opened)                        # the model as it starts
    prepare(engine)
    train(engine, opened, Lesson(objective=…))
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.config.schema import RunConfig
from megatron_cgn.config.validate import validate_steps
from megatron_cgn.data.preference import PreferenceData, build_preference_data, plan_preference
from megatron_cgn.data.preference_loader import PreferenceLoader, PreferenceValidationLoader
from megatron_cgn.data.preference_rows import PreferenceRow
from megatron_cgn.data.sft_account import SftHistory, account_of, describe
from megatron_cgn.data.sft_sequences import PackedSequences
from megatron_cgn.engine.callbacks import Callback, SampleAnswer
from megatron_cgn.engine.checkpoint import read_info
from megatron_cgn.engine.engine import Engine
from megatron_cgn.hf.chat_files import write_chat_files
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.objectives.base import Objective
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
from tokenizer.chat import ChatTemplate
from tokenizer.wrapper import Tokenizer

ACCOUNT_FILE = "preference.json"
"""Name of the account, in a run's directory as planned and in a checkpoint as consumed."""

type RefLogps = npt.NDArray[np.float32] | None
"""Log-probability of every answer of the run under the reference, float32 ``[answers]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A run of preference learning before its model is built.

    Attributes:
        run: The configuration.
        architecture: The model.
        tokenizer: Its tokenizer.
        chat: Its chat template.
        state: This process's place in the layout.
        data: What the run reads.
        cache: Directory that every rank sees.
    """

    run: RunConfig
    architecture: Architecture
    tokenizer: Tokenizer
    chat: ChatTemplate
    state: ParallelState
    data: PreferenceData
    cache: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What a stage makes of preference data; see `training.Course` for what is named there too.

    Attributes:
        objective: What to minimise.
        validate: Scores held-out data, by the names of its metrics. Collective.
        ref_logps: What the reference says of every answer of the run; None without a reference.
        wrap: Adds to each step's micro-batches what only the model can say, right before the
            step. None: nothing.
        fit: What a checkpoint must share with this run besides the model and the data.
        describe: Lines about the objective.
        answer: As `training.Course.answer`.
        derive: As `training.Course.derive`.
        check: As `training.Course.check`.
        watch: As `training.Course.watch`.
    """

    objective: Objective[PreferenceBatch]
    validate: Callable[[], dict[str, float]]
    ref_logps: RefLogps = None
    wrap: Callable[[Generator[list[PreferenceBatch]]], Generator[list[PreferenceBatch]]] | None = (
        None
    )
    fit: Mapping[str, Any]
    describe: Sequence[str] = ()
    answer: Callable[[], Sequence[SampleAnswer]] | None = None
    derive: Callable[[dict[str, float]], dict[str, float]] | None = None
    check: Callable[[Sequence[PreferenceBatch]], str] | None = None
    watch: Callable[[Callable[[str], None]], Callback] | None = None


def open_data(run: RunConfig) -> Opened:
    """Check what can be checked without a model, and open the data. Collective over all ranks.

    A reward model reads answers to their very last token, every other model what counts.

    Args:
        run: The validated configuration.

    Returns:
        The run, ready for its model.

    Raises:
        UserError: If the model, the template or the data is not usable.
    """
    architecture = common.open_architecture(run)
    tokenizer = Tokenizer.from_pretrained(common.model_path(run))
    chat = ChatTemplate.open(common.model_path(run), template=run.chat.template)
    common.check_start(run, architecture, tokenizer)
    check_rows(run)
    state = initialize_parallel(run.parallel)
    plan = plan_preference(
        run,
        chat=chat,
        tokenizer=tokenizer,
        cache=cache_dir(run),
        whole=architecture.head == "score",
        report=common.Progress("encoding"),
    )
    validate_steps(run, plan.total_steps)
    return Opened(
        run=run,
        architecture=architecture,
        tokenizer=tokenizer,
        chat=chat,
        state=state,
        data=build_preference_data(plan),
        cache=cache_dir(run),
    )


def build(opened: Opened) -> Engine:
    """Build the model with the weights that training starts from. Collective over all ranks."""
    engine = Engine(
        opened.run,
        opened.architecture,
        opened.state,
        total_steps=opened.data.plan.total_steps,
    )
    common.load_start(engine)
    return engine


def prepare(engine: Engine) -> None:
    """Make the model ready to be trained. Collective over all ranks."""
    engine.prepare_training()
    common.start_optimizer(engine)


def train(engine: Engine, opened: Opened, lesson: Lesson) -> None:
    """Train to the last step, and export. Collective over all ranks.

    Args:
        engine: Prepared.
        opened: Its data.
        lesson: What it learns of them.

    Raises:
        UserError: If a checkpoint does not fit, or files cannot be written.
        StoppedBySignal: After saving, if a signal asked for it.
    """
    chat, data = opened.chat, opened.data
    write_beside = partial(
        write_chat_files,
        config_dir=common.model_path(opened.run),
        template=chat.source,
        end_of_turn_ids=chat.end_of_turn_ids,
    )
    wrap = lesson.wrap or _unchanged
    training.train(
        engine,
        training.Course(
            objective=lesson.objective,
            fit=_fit(engine, opened, lesson),
            batches=lambda: wrap(training_batches(engine, data, lesson.ref_logps)),
            tokens_after=TokensRead(data),
            validate=lesson.validate,
            answer=lesson.answer,
            derive=lesson.derive,
            account_file=ACCOUNT_FILE,
            account=lambda consumed: account_of(data, consumed=consumed),
            describe=lambda resumed: _describe(engine, opened, lesson, resumed),
            check=lesson.check,
            watch=lesson.watch,
            fill=write_beside,
        ),
    )
    common.show_outcome(opened.run, common.export(engine, write_beside=write_beside))


def held_out(
    engine: Engine, data: PreferenceData, ref_logps: RefLogps = None
) -> dict[str, PreferenceValidationLoader]:
    """This rank's share of every source's held-out records.

    Args:
        engine: The model.
        data: What the run reads.
        ref_logps: As `Lesson.ref_logps`.

    Returns:
        Loaders by source, to be read any number of times.
    """
    run, state = engine.run, engine.state
    return {
        name: PreferenceValidationLoader(
            sequences,
            kind=data.kind,
            micro_batch_size=run.train.micro_batch_size,
            dp_rank=state.dp_rank,
            dp_size=state.dp_size,
            seq_length=run.data.seq_length,
            pad_to_full=full_rows(run),
            ref_logps=ref_logps,
            max_sequences=run.train.validation_sequences,
        )
        for name, sequences in data.validation.items()
    }


def answers_of(
    sequences: PackedSequences[PreferenceRow], read: Iterable[int]
) -> npt.NDArray[np.int64]:
    """Numbers of the answers that some sequences hold, int64 ``[A]``."""
    return np.concatenate([sequences[index].answers for index in read])


def answers_of_first_step(engine: Engine, data: PreferenceData) -> list[npt.NDArray[np.int64]]:
    """Numbers of the answers of each of this rank's micro-batches of the run's first step."""
    run, state = engine.run, engine.state
    share = run.train.global_batch_size // state.dp_size
    size = run.train.micro_batch_size
    first = state.dp_rank * share
    return [
        answers_of(data.train, range(begin, begin + size))
        for begin in range(first, first + share, size)
    ]


def training_batches(
    engine: Engine, data: PreferenceData, ref_logps: RefLogps
) -> Generator[list[PreferenceBatch]]:
    """This rank's micro-batches of every step from where the engine is, to the end."""
    run = engine.run
    return iter(
        PreferenceLoader(
            data.train,
            micro_batch_size=run.train.micro_batch_size,
            global_batch_size=run.train.global_batch_size,
            dp_rank=engine.state.dp_rank,
            dp_size=engine.state.dp_size,
            seq_length=run.data.seq_length,
            pad_to_full=full_rows(run),
            ref_logps=ref_logps,
            start_sequence=engine.consumed_sequences,
            num_workers=run.data.num_workers,
        )
    )


def _unchanged(steps: Generator[list[PreferenceBatch]]) -> Generator[list[PreferenceBatch]]:
    return steps


def _describe(
    engine: Engine, opened: Opened, lesson: Lesson, resumed: Path | None
) -> Iterator[str]:
    """Say what is trained on, and what differs from the run before."""
    yield describe_template(opened.chat)
    yield from lesson.describe
    yield from describe(opened.data.plan)
    if resumed is not None:
        before = read_info(resumed).fit[PLAN]
        steps = -(-before["sequences"] // before["global_batch_size"])
        yield from training.describe_length(engine, steps)


def _fit(engine: Engine, opened: Opened, lesson: Lesson) -> dict[str, Any]:
    """Everything that decides which answers come when, and what is made of them."""
    encoding = encoding_of(opened.tokenizer, opened.chat)
    return common.base_fit(
        engine.architecture,
        **encoding,
        **lesson.fit,
        **{
            "train.global_batch_size": engine.run.train.global_batch_size,
            PLAN: SftHistory(opened.data.plan, encoding="/".join(encoding.values())),
        },
    )
