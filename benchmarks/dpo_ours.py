"""What `dpo_contestant.py` does for this project: score the reference, then train.

Apart from TRL's part, so that a process of TRL's does not have our libraries in memory.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from contestant import Reporter, Settings, our_engine
from records import read_records

from megatron_cgn.config.schema import LossConfig
from megatron_cgn.data.packing import first_fit_decreasing
from megatron_cgn.data.preference_loader import lay_out_preferences
from megatron_cgn.data.preference_rows import PreferenceRow
from megatron_cgn.data.reference import ScoredFile
from megatron_cgn.data.sft_loader import ConversationRow
from megatron_cgn.engine.engine import Engine
from megatron_cgn.eval.reference import answer_sums, scoring_rows
from megatron_cgn.model.lora import adapters_off
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.objectives.preference import make_objective

Pair = dict[str, list[int]]


class Answers:
    """The answers of all pairs: of pair k the chosen one is number 2k, the rejected one 2k + 1."""

    name = "answers"
    files: Sequence[ScoredFile] = ()

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.ids = [
            (np.array(p["prompt_ids"] + p[name]), len(p["prompt_ids"]))
            for p in pairs
            for name in ("chosen_ids", "rejected_ids")
        ]

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Places that each takes of a row."""
        return np.array([len(ids) - 1 for ids, _ in self.ids], dtype=np.int32)

    def row(self, numbers: Sequence[int]) -> ConversationRow:
        """Answers end to end."""
        ids, prompts = zip(*(self.ids[n] for n in numbers), strict=True)
        return ConversationRow(
            tokens=np.concatenate([i[:-1] for i in ids]),
            labels=np.concatenate([i[1:] for i in ids]),
            loss_mask=np.concatenate(
                [np.arange(1, len(i)) >= p for i, p in zip(ids, prompts, strict=True)]
            ),
            lengths=tuple(len(i) - 1 for i in ids),
            sources=(0,) * len(ids),
        )

    def pairs(self, numbers: Sequence[int]) -> PreferenceRow:
        """Whole pairs end to end."""
        answers = np.array([n for k in numbers for n in (2 * k, 2 * k + 1)])
        row = self.row(answers.tolist())
        even = np.arange(0, len(answers), 2)
        return PreferenceRow(
            **{field.name: getattr(row, field.name) for field in dataclasses.fields(row)},
            chosen=even,
            rejected=even + 1,
            weights=np.ones(len(even), dtype=np.float32),
            margins=np.zeros(len(even), dtype=np.float32),
            desirable=None,
            answers=answers,
        )

    def tokens(self, numbers: Sequence[int]) -> int:
        """Tokens of answers, as TRL counts them: a place fewer is read."""
        return sum(len(self.ids[n][0]) for n in numbers)


def score_and_train(settings: Settings, reporter: Reporter) -> None:
    """The engine of this project on packed rows, after scoring the reference with it."""
    engine = our_engine(settings)
    objective = make_objective(LossConfig(type="sigmoid"))
    answers = Answers(read_records(Path(settings.records)))
    reference = score(settings, reporter, engine, answers)
    lengths = answers.lengths.reshape(-1, 2).sum(axis=1)
    packs = first_fit_decreasing(lengths, capacity=settings.seq_length)
    rows = [
        answers.pairs(packs.items[packs.bounds[i] : packs.bounds[i + 1]].tolist())
        for i in np.random.default_rng(0).permutation(len(packs)).tolist()
    ]
    endless = itertools.cycle(rows)
    for number in itertools.count():
        reporter.wait()
        if number == 0:
            engine.prepare_training()
        batches = []
        for row in itertools.islice(endless, settings.accumulation):
            batches.append(
                lay_out_preferences([row], seq_length=settings.seq_length, ref_logps=reference)
            )
            reporter.count(answers.tokens(row.answers.tolist()), batches[-1].tokens.numel())
        reporter.loss = engine.train_step(batches, objective).metrics["loss"]
        reporter.report()


def score(
    settings: Settings, reporter: Reporter, engine: Engine, answers: Answers
) -> npt.NDArray[np.float32]:
    """Log-probabilities of all answers under the model as it is, float32 ``[A]``."""
    numbers = np.arange(len(answers.ids))
    rows = scoring_rows(engine, answers, numbers)
    found = np.zeros(len(numbers), dtype=np.float32)
    batches = list(rows)
    for places in np.array_split(np.arange(len(batches)), max(1, settings.scored_steps)):
        if settings.scored_steps:
            reporter.wait()
        with adapters_off(engine.chunks):
            outputs = engine.score([batches[p] for p in places], NextToken().forward_args)
            for place, (batch, nll) in zip(places.tolist(), outputs, strict=True):
                mine = rows.numbers[rows.mine(place)]
                found[mine] = -answer_sums(nll, batch, len(mine)).numpy()
                reporter.count(answers.tokens(mine.tolist()), batch.tokens.numel())
        if settings.scored_steps:
            reporter.report()
    return found
