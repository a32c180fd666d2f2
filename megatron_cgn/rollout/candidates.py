"""Candidates: several answers to one prompt, as `tools/generate.py --num-samples` writes them.

A record has ``answers``, and ``finish`` that says of each whether it ended (``stop``) or was cut
off (``length``). What was asked is in ``prompt_messages``, a list of messages; where that is
missing, as in candidates from elsewhere, in the fields of any kind of record that can be trained
on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_cgn.errors import DataError
from megatron_cgn.rollout.files import Question, read_questions, refuse, settings_path

LeftOut = Literal["empty", "cut off", "duplicate", "not fitting the model"]
"""Why an answer is not compared. The last one: the chat template refuses it, or it is too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """A prompt with its answers.

    Attributes:
        question: The record, and what is asked in it.
        answers: The answers, one or more.
        ended: Whether each answer ended of itself.
    """

    question: Question
    answers: tuple[str, ...]
    ended: tuple[bool, ...]


def read_candidates(path: Path) -> list[Candidates]:
    """Read JSON Lines of candidates.

    Args:
        path: The file.

    Returns:
        All records.

    Raises:
        DataError: If the file or any record is faulty, naming file, line and reason.
    """
    _check_has_template(path)
    found: list[Candidates] = []
    faults: list[str] = []
    outcome = "Nothing was ranked."
    for question in read_questions(path, system=None, raw=False, outcome=outcome):
        try:
            answers, ended = _answers(question.record)
        except DataError as fault:
            faults.append(f"{question.place}: {fault}")
            continue
        found.append(Candidates(question=question, answers=answers, ended=ended))
    refuse(faults, outcome=outcome)
    return found


def left_out(candidates: Candidates, *, keep_cut_off: bool) -> list[LeftOut | None]:
    """Say which answers are not worth comparing.

    An answer that was cut off would be read as one that ends there, and a model trained on it
    learns to break off.

    Args:
        candidates: The answers to a prompt.
        keep_cut_off: Whether answers that were cut off are compared too.

    Returns:
        For each answer why it is left out, or None. Of equal answers the first stays; space around
        an answer makes no other.
    """
    seen: set[str] = set()
    reasons: list[LeftOut | None] = []
    for answer, ended in zip(candidates.answers, candidates.ended, strict=True):
        text = answer.strip()
        reason: LeftOut | None = None
        if not text:
            reason = "empty"
        elif not (ended or keep_cut_off):
            reason = "cut off"
        elif text in seen:
            reason = "duplicate"
        else:
            seen.add(text)
        reasons.append(reason)
    return reasons


def _answers(record: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    if "answers" in record:
        answers, finish = record["answers"], record.get("finish")
    elif isinstance(record.get("answer"), str):
        answers, finish = [record["answer"]], record.get("finish")
        finish = None if finish is None else [finish]
    else:
        raise DataError(
            "has no field 'answers'. Candidates come from tools/generate.py --num-samples K"
        )
    if not _is_list(answers) or not answers or not all(isinstance(a, str) for a in answers):
        raise DataError("answers: expected a list of texts")
    if finish is None:
        return tuple(answers), (True,) * len(answers)
    if not _is_list(finish) or len(finish) != len(answers) or not {*finish} <= {"stop", "length"}:
        raise DataError(f"finish: expected 'stop' or 'length' for each of {len(answers)} answers")
    return tuple(answers), tuple(end == "stop" for end in finish)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _check_has_template(path: Path) -> None:
    """Refuse what was generated without a chat template, which is no answer to anyone."""
    try:
        settings = json.loads(settings_path(path).read_text("utf-8"))
    except (OSError, ValueError):
        return  # from elsewhere
    if isinstance(settings, dict) and settings.get("template") == "raw":
        raise DataError(
            f"{path}: was generated with --raw, as texts without roles. Rewards are of "
            "conversations: generate without --raw."
        )
