"""What `tools/generate.py` does: answer prompts, a file of them, or a user on the terminal.

A task is made before processes join and models are built, and checks all that can be checked then.
"""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_cgn.data.collective import on_first_rank
from megatron_cgn.engine.engine import Engine
from megatron_cgn.errors import DataError
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.rollout.chat import HELP, converse
from megatron_cgn.rollout.files import (
    PROMPT_MESSAGES,
    AnswerFile,
    Question,
    read_questions,
    refuse,
)
from megatron_cgn.rollout.generate import complete, prompt_fault
from megatron_cgn.rollout.memory import fitting_batch
from megatron_cgn.rollout.open import ModelFiles
from megatron_cgn.rollout.prompts import Prompts
from megatron_cgn.rollout.sampling import Sampling
from megatron_cgn.rollout.text import TextStream
from tokenizer.chat import Message
from tokenizer.chat_message import as_dicts

_BATCHES_PER_WRITE = 4
"""Answers are written after so many full batches: between, sequences that end leave room for
others, and at the write there are none to fill it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every task is given.

    Attributes:
        files: The model.
        prompts: How it is spoken to.
        sampling: How it answers.
        precision: Type of its weights.
        system: What the system says first, if anything.
        num_samples: Answers to each prompt.
        batch_size: Answers at once; None for as many as memory holds.
    """

    files: ModelFiles
    prompts: Prompts
    sampling: Sampling
    precision: str
    system: str | None = None
    num_samples: int = 1
    batch_size: int | None = None

    def encode(self, messages: Sequence[Message], *, place: str) -> list[int]:
        """Tokens of a prompt that fits the model.

        Raises:
            DataError: Naming the place of a faulty prompt.
        """
        try:
            ids = self.prompts.encode(messages)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        if fault := prompt_fault(ids, read_architecture(self.files.hf)):
            raise DataError(f"{place}: {fault}")
        return ids


class PromptTask:
    """Prompts answered on standard output.

    Args:
        job: The model and its settings.
        texts: What the user says in each.

    Raises:
        DataError: If a prompt is faulty.
    """

    def __init__(self, job: Job, texts: Sequence[str]) -> None:
        self.job, self.texts = job, texts
        system = [] if job.system is None else [Message("system", job.system)]
        self.tokens = [
            job.encode((*system, Message("user", text)), place=f"--prompt {number}")
            for number, text in enumerate(texts, start=1)
        ]

    def __call__(self, engine: Engine) -> None:
        """Answer all, or stream the answer if there is only one. Collective over all ranks."""
        job = self.job
        batch = [ids for ids in self.tokens for _ in range(job.num_samples)]
        is_first = dist.get_rank() == 0
        if len(batch) == 1:
            stream = TextStream(job.prompts.decode)
            complete(
                engine,
                batch,
                sampling=job.sampling,
                on_token=lambda _, token: _write(stream.add(token)) if is_first else None,
            )
            if is_first:
                _write(f"{stream.end()}\n")
            return
        found = complete(engine, batch, sampling=job.sampling, batch_size=job.batch_size)
        for index, answer in enumerate(found if is_first else []):
            if index % job.num_samples == 0:
                _write(f"> {self.texts[index // job.num_samples]}\n")
            _write(f"{job.prompts.decode(answer.ids)}\n\n")


class ChatTask:
    """A conversation on the terminal of rank 0.

    Args:
        job: The model and its settings, with a template.
    """

    def __init__(self, job: Job) -> None:
        assert job.prompts.template is not None
        self.job, self.template = job, job.prompts.template

    def __call__(self, engine: Engine) -> None:
        """Answer until the user leaves; the other ranks do as rank 0 says. Collective."""
        alone = dist.get_world_size() == 1
        if dist.get_rank() > 0:
            while (ids := _from_first(None)) is not None:
                complete(engine, [ids], sampling=self.job.sampling)
            return

        def ask(ids: list[int], on_token: Callable[[int], None]) -> None:
            if fault := prompt_fault(ids, engine.architecture):
                raise DataError(f"the conversation {fault}")
            if not alone:
                _from_first(ids)
            complete(
                engine,
                [ids],
                sampling=self.job.sampling,
                on_token=lambda _, token: on_token(token),
            )

        if sys.stdin.isatty():
            sys.stderr.write(f"{HELP}\n")
        converse(
            _next_line,
            ask,
            _write,
            template=self.template,
            system=self.job.system,
            may_stop=alone,
        )
        if not alone:
            _from_first(None)


class FileTask:
    """A file of records answered into another.

    Args:
        job: The model and its settings.
        questions: File of records; see `files.read_questions`.
        output: File of answers.
        overwrite: Whether to begin it anew.

    Raises:
        DataError: If a record is faulty.
    """

    def __init__(self, job: Job, *, questions: Path, output: Path, overwrite: bool) -> None:
        self.job, self.path, self.output, self.overwrite = job, questions, output, overwrite
        raw = job.prompts.template is None
        self.questions = read_questions(questions, system=job.system, raw=raw)
        self.tokens: list[list[int]] = []
        faults = []
        for question in self.questions:
            try:
                self.tokens.append(job.encode(question.messages, place=question.place))
            except DataError as fault:
                faults.append(str(fault))
        refuse(faults)

    def __call__(self, engine: Engine) -> None:
        """Answer what was not answered yet, and write after every few batches. Collective.

        Raises:
            UserError: If the output cannot be written, or was made with other settings.
        """

        def open_output() -> AnswerFile:
            return AnswerFile(self.output, settings=self._settings(), overwrite=self.overwrite)

        answers = on_first_rank(open_output, None)
        left = [q for q in self.questions if q.id not in answers.done]
        longest = max(map(len, self.tokens)) + self.job.sampling.max_new_tokens
        size = self.job.batch_size or fitting_batch(engine, longest)
        copies = engine.state.groups.dp_cp.size()
        step = max(1, _BATCHES_PER_WRITE * size * copies // self.job.num_samples)
        is_first = dist.get_rank() == 0
        with tqdm(
            total=len(self.questions),
            initial=len(self.questions) - len(left),
            unit=" answers",
            disable=None if is_first else True,
        ) as bar:
            for start in range(0, len(left), step):
                group = left[start : start + step]
                rows = self._answer(engine, group, size)
                on_first_rank(functools.partial(answers.append, rows), None)
                bar.update(len(group))
        if is_first:
            before = f" ({len(answers.done)} of them before)" if answers.done else ""
            _write(f"wrote {len(self.questions)} answers{before} to {self.output}\n")

    def _answer(self, engine: Engine, group: list[Question], size: int) -> list[dict[str, Any]]:
        samples = self.job.num_samples
        found = complete(
            engine,
            [self.tokens[q.number] for q in group for _ in range(samples)],
            sampling=self.job.sampling,
            # By the place in the file, so that a run that was stopped and goes on draws the same.
            seeds=[q.number * samples + k for q in group for k in range(samples)],
            batch_size=size,
        )
        rows = []
        for index, question in enumerate(group):
            mine = found[index * samples : (index + 1) * samples]
            texts = [self.job.prompts.decode(answer.ids) for answer in mine]
            ends = [answer.finish for answer in mine]
            answers: dict[str, Any] = {"answer": texts[0], "finish": ends[0]}
            if samples > 1:
                answers = {"answers": texts, "finish": ends, **self._asked(question)}
            rows.append({**question.record, "id": question.id, **answers})
        return rows

    def _asked(self, question: Question) -> dict[str, Any]:
        """What candidates answer: their record may hold it in other words, or without a system."""
        if self.job.prompts.template is None:
            return {}
        return {PROMPT_MESSAGES: as_dicts(question.messages)}

    def _settings(self) -> dict[str, Any]:
        """What the answers depend on, so that no file holds answers of two kinds."""
        job, adapter = self.job, self.job.files.adapter
        return {
            "weights": str(job.files.weights.resolve()),
            "adapter": None if adapter is None else str(adapter.resolve()),
            "input": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            "template": job.prompts.identity(),
            "system": job.system,
            "precision": job.precision,
            "num_samples": job.num_samples,
            **dataclasses.asdict(job.sampling),
            "stop_ids": list(job.sampling.stop_ids),
        }


def _from_first(ids: list[int] | None) -> list[int] | None:
    """Hand a prompt, or None for the end, from rank 0 to all ranks. Collective."""
    shared = [ids]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _next_line() -> str | None:
    """The user's next line; None at its end, or if the user interrupts while being asked."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        _write("\n")
        return None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
