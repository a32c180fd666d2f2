"""What `tools/rank.py` does: score a file of candidates, and write which answers are better.

Scoring takes long and is kept, in ``OUTPUT.scores.jsonl`` beside the output: a run that was stopped
goes on there, and another choice of pairs scores nothing again. The output is made of it at the
end, and appears whole or not at all.
"""

import functools
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_cgn.data.collective import on_first_rank
from megatron_cgn.engine.engine import Engine
from megatron_cgn.errors import ConfigError, DataError, ModelError
from megatron_cgn.hf.adapter_config import WEIGHTS_FILE
from megatron_cgn.hf.fingerprint import weights_fingerprint
from megatron_cgn.hf.score_files import padding_id, without_padding
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.rollout.candidates import Candidates, left_out, read_candidates
from megatron_cgn.rollout.files import AnswerFile, json_line, refuse
from megatron_cgn.rollout.open import ModelFiles
from megatron_cgn.rollout.ranking import Keep, Tally, check_min_margin, prefer
from megatron_cgn.rollout.score import conversation_fault, score_tokens
from tokenizer.chat import ChatTemplate, Message

_ANSWERS_PER_WRITE = 256
"""Answers that each copy of the model scores between two writes."""
_SHOWN = 5  # answers that are told one by one
_REWARDS = "rewards"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """What becomes of scored candidates.

    Attributes:
        keep: What a prompt becomes.
        min_margin: Least difference of rewards of a pair.
        keep_cut_off: Whether answers that were cut off are compared too.
        overwrite: Whether an output that is there may be replaced, and other scores be lost.

    Raises:
        ConfigError: If the least margin is none.
    """

    keep: Keep = "best-worst"
    min_margin: float = 0.0
    keep_cut_off: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        check_min_margin(self.min_margin)


class RankTask:
    """A file of candidates made into one of preferences.

    Args:
        files: The reward model.
        template: Its chat template.
        candidates: File of candidates; see `candidates.read_candidates`.
        output: File of preferences.
        settings: What becomes of them.

    Raises:
        UserError: If a record is faulty, or the output is there already and not ours.
    """

    def __init__(
        self,
        files: ModelFiles,
        template: ChatTemplate,
        *,
        candidates: Path,
        output: Path,
        settings: RankSettings,
    ) -> None:
        self.files, self.template, self.settings = files, template, settings
        self.path, self.output = candidates, output
        self.scores_path = output.with_name(f"{output.name}.scores.jsonl")
        if output.exists() and not (settings.overwrite or self.scores_path.exists()):
            raise ConfigError(
                f"{output}: exists, and there is no {self.scores_path.name} beside it to go on "
                "from. Give another --output, or --overwrite to replace it."
            )
        self._padding = padding_id(files.hf, tokenizer_dir=files.tokenizer)
        self.candidates = read_candidates(candidates)
        faults = []
        for found in self.candidates:
            try:
                template.encode_prompt(found.question.messages)
            except DataError as fault:
                faults.append(f"{found.question.place}: {fault}")
        refuse(faults, outcome="Nothing was ranked.")

    def __call__(self, engine: Engine) -> None:
        """Score what was not scored yet, then write the output. Collective over all ranks.

        Raises:
            UserError: If files cannot be written or were made with other settings, a reward is
                not finite, or no two answers differ.
        """
        scores = on_first_rank(functools.partial(self._open_scores, engine.run.precision), None)
        left = [c for c in self.candidates if c.question.id not in scores.done]
        is_first, told = dist.get_rank() == 0, 0
        longest = max(len(c.answers) for c in self.candidates)
        step = max(1, _ANSWERS_PER_WRITE * engine.state.dp_size // longest)
        with tqdm(
            total=len(self.candidates),
            initial=len(self.candidates) - len(left),
            unit=" prompts",
            disable=None if is_first else True,
        ) as bar:
            for start in range(0, len(left), step):
                rows, unfit = self._score(engine, left[start : start + step])
                on_first_rank(functools.partial(scores.append, rows), None)
                bar.update(len(rows))
                for line in unfit[: max(0, _SHOWN - told)] if is_first else ():
                    bar.write(f"left out: {line}", file=sys.stderr)
                told += len(unfit)
        tally = on_first_rank(self._write, None)
        if is_first:
            sys.stdout.write(f"{tally.describe()}\nwrote {self.output}\n")
            sys.stdout.flush()

    def _open_scores(self, precision: str) -> AnswerFile:
        facts = {
            "weights": weights_fingerprint(self.files.weights),
            "adapter": _adapter_digest(self.files.adapter),
            "input": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            "template": self.template.fingerprint(),
            "precision": precision,
        }
        try:
            return AnswerFile(self.scores_path, settings=facts, overwrite=False)
        except ConfigError:
            if not self.settings.overwrite:
                raise
            return AnswerFile(self.scores_path, settings=facts, overwrite=True)

    def _score(
        self, engine: Engine, group: Sequence[Candidates]
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Lines of scores, and what is wrong with the answers that have none."""
        encoded, unfit = _encode(group, self.template, engine.architecture, self._padding)
        # An answer that is there twice has one reward, so that it is not better than itself.
        distinct = sorted({ids for answers in encoded for ids in answers if ids is not None})
        found = score_tokens(engine, distinct)
        rewards = dict(zip(distinct, found, strict=True))
        rows = []
        for candidates, answers in zip(group, encoded, strict=True):
            values = [None if ids is None else rewards[ids] for ids in answers]
            if not all(value is None or math.isfinite(value) for value in values):
                raise ModelError(
                    f"{candidates.question.place}: a reward is not finite ({values}): the reward "
                    "model is damaged, or its numbers too large for the --precision."
                )
            rows.append({"id": candidates.question.id, _REWARDS: values})
        return rows, unfit

    def _write(self) -> Tally:
        """Choose from all scores and write the output in one step."""
        with self.scores_path.open("rb") as file:
            rewards = {row["id"]: row[_REWARDS] for row in map(json.loads, file)}
        tally, lines = Tally(), []
        for candidates in self.candidates:
            values = rewards[candidates.question.id]
            reasons = left_out(candidates, keep_cut_off=self.settings.keep_cut_off)
            for place, value in enumerate(values):
                if value is None and reasons[place] is None:
                    reasons[place] = "not fitting the model"
            tally.left_out.update(reason for reason in reasons if reason is not None)
            records = prefer(
                candidates,
                [v if r is None else None for v, r in zip(values, reasons, strict=True)],
                keep=self.settings.keep,
                min_margin=self.settings.min_margin,
                tally=tally,
            )
            lines += [json_line(record) for record in records]
        if not lines:
            raise DataError(
                f"{self.path}: gives no preference, so {self.output} was not written.\n"
                f"{tally.describe()}\nGenerate more answers a prompt, at a higher --temperature or "
                "with a larger --max-new-tokens, or lower --min-margin."
            )
        self._replace(b"".join(lines))
        return tally

    def _replace(self, content: bytes) -> None:
        """Put the output in its place, unless that would lose another's work."""
        try:
            if self.output.exists() and not self.settings.overwrite:
                if self.output.read_bytes() == content:
                    return
                raise ConfigError(
                    f"{self.output}: holds other preferences, chosen with other settings or "
                    "changed by hand. Give another --output, or --overwrite to replace it; what "
                    "was scored is kept."
                )
            partial = self.output.with_name(f"{self.output.name}.partial")
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.output)
        except OSError as error:
            raise DataError(
                f"{self.output}: cannot be written ({error}). Free space; the same command goes on."
            ) from error


def _encode(
    group: Sequence[Candidates],
    template: ChatTemplate,
    architecture: Architecture,
    padding: int | None,
) -> tuple[list[list[tuple[int, ...] | None]], list[str]]:
    """Tokens of each answer with its prompt, or None; and what is wrong with those."""
    conversations, owners, unfit = [], [], []
    encoded: list[list[tuple[int, ...] | None]] = [[None] * len(c.answers) for c in group]
    for number, candidates in enumerate(group):
        for place, answer in enumerate(candidates.answers):
            if answer.strip():
                conversations.append((*candidates.question.messages, Message("assistant", answer)))
                owners.append((number, place))
    for (number, place), chat in zip(owners, template.encode_batch(conversations), strict=True):
        fault = (
            str(chat) if isinstance(chat, DataError) else conversation_fault(chat.ids, architecture)
        )
        if fault is None and not isinstance(chat, DataError):
            encoded[number][place] = tuple(without_padding(chat.ids, padding))
        else:
            unfit.append(f"{group[number].question.place}: answer {place + 1}: {fault}")
    return encoded, unfit


def _adapter_digest(adapter: Path | None) -> str | None:
    if adapter is None:
        return None
    weights = adapter / WEIGHTS_FILE
    if not weights.is_file():  # a checkpoint of adapters
        return weights_fingerprint(adapter)
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
