"""Files of questions, and of answers: line by line, so that a run can go on where it was stopped.

A line of answers is the question's record with ``id`` and ``answer`` added, or ``answers`` and, in
``prompt_messages``, what they answer. Lines are appended whole; an incomplete one, of a machine
that went down, is cut off. Beside the answers, ``F.jsonl.settings.json`` says what they were made
with: other settings do not go on from them.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cgn.data.conversation_formats import listed, read_record
from megatron_cgn.errors import ConfigError, DataError
from tokenizer.chat import Message

PROMPT_MESSAGES = "prompt_messages"
"""Field with what is said before the answers, word for word; other fields do not matter then."""
_SHOWN = 5  # faults that are told one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A record to be answered.

    Attributes:
        id: Its own, or the file's name and its line.
        place: File and line, for messages.
        number: Place among the file's records, from 0.
        record: The record as it was read.
        messages: What is said before the answer.
    """

    id: str
    place: str
    number: int
    record: Mapping[str, Any]
    messages: tuple[Message, ...]


def read_questions(
    path: Path, *, system: str | None, raw: bool, outcome: str = "Nothing was generated."
) -> list[Question]:
    """Read JSON Lines: prompts, or conversations of any kind that can be trained on.

    What the assistant says last is left out, so that a file of held-out conversations is one of
    questions too.

    Args:
        path: The file.
        system: What the system says first where a record does not say.
        raw: Whether records are texts, in the field ``prompt``.
        outcome: What follows from a fault, for its message.

    Returns:
        All records.

    Raises:
        DataError: If the file or any record is faulty, naming file, line and reason.
    """
    found: list[Question] = []
    faults: list[str] = []
    ids: dict[str, int] = {}
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Give a file of JSON Lines.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record, messages = _read(line, system=system, raw=raw)
        except DataError as fault:
            faults.append(f"{path}:{number}: {fault}")
            continue
        own = record.get("id")
        name = f"{path.name}:{number}" if own is None or own == "" else str(own)
        if name in ids:
            faults.append(f"{path}:{number}: has the id {name!r} of line {ids[name]}")
        ids.setdefault(name, number)
        place = f"{path}:{number}"
        found.append(
            Question(id=name, place=place, number=len(found), record=record, messages=messages)
        )
    refuse(faults, outcome=outcome)
    if not found:
        raise DataError(f"{path}: holds no record. Give one JSON object a line.")
    return found


def refuse(faults: list[str], *, outcome: str = "Nothing was generated.") -> None:
    """Raise a `DataError` of these faults, if there are any."""
    if faults:
        more = f"\n… and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise DataError("\n".join(faults[:_SHOWN]) + more + f"\n{outcome}")


def settings_path(path: Path) -> Path:
    """Where it is told what a file of answers was made with."""
    return path.with_name(f"{path.name}.settings.json")


def _read(
    line: str, *, system: str | None, raw: bool
) -> tuple[dict[str, Any], tuple[Message, ...]]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError("expected an object")
    if raw:
        if not isinstance(record.get("prompt"), str):
            raise DataError("has no text in the field 'prompt', which --raw continues")
        return record, (Message("user", record["prompt"]),)
    if isinstance(record.get(PROMPT_MESSAGES), list):
        messages = listed(record[PROMPT_MESSAGES], PROMPT_MESSAGES)
    else:
        # Questions need no answers, but the formats of training data have them.
        blank = {}
        if "prompt" in record:
            blank = {"completion": ""}
        elif "instruction" in record:
            blank = {"output": ""}
        messages = list(read_record({**blank, **record}).messages)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if system is not None and not (messages and messages[0].role == "system"):
        messages.insert(0, Message("system", system))
    return record, tuple(messages)


class AnswerFile:
    """Answers on disk, to which lines are added.

    Args:
        path: The file.
        settings: What answers depend on, in values of JSON.
        overwrite: Whether to begin anew.

    Raises:
        ConfigError: If the file holds answers made with other settings.
        DataError: If it cannot be read or written.
    """

    def __init__(self, path: Path, *, settings: Mapping[str, Any], overwrite: bool) -> None:
        self.path = path
        self._settings_path = settings_path(path)
        self.done: set[str] = set()
        """Ids of the records that were answered before."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not overwrite:
                self._check(settings)
                self.done = self._read()
            else:
                path.unlink(missing_ok=True)
                partial = self._settings_path.with_suffix(".partial")
                partial.write_text(json.dumps(settings, ensure_ascii=False, indent=1), "utf-8")
                partial.replace(self._settings_path)
                path.touch()
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written ({error}). Give another --output."
            ) from error

    def append(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Add lines, which are on the disk when this returns.

        Returns:
            How many.

        Raises:
            DataError: If the disk refuses; what was there before stays.
        """
        content = b"".join(json_line(row) for row in rows)
        try:
            with self.path.open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be written ({error}). Free space; the same command goes on."
            ) from error
        return len(rows)

    def _check(self, settings: Mapping[str, Any]) -> None:
        remedy = "Give another --output, or --overwrite to begin anew."
        if not self._settings_path.is_file():
            raise ConfigError(
                f"{self.path}: exists, and there is no {self._settings_path.name} beside it that "
                f"says what it was made with. {remedy}"
            )
        try:
            before = json.loads(self._settings_path.read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{self._settings_path}: is damaged ({error}). {remedy}") from error
        changed = [
            f"{name} {before.get(name)!r} → {settings.get(name)!r}"
            for name in sorted({*before, *settings})
            if before.get(name) != settings.get(name)
        ]
        if changed:
            raise ConfigError(
                f"{self.path}: holds answers made with other settings: {', '.join(changed)}. "
                f"{remedy}"
            )

    def _read(self) -> set[str]:
        """Ids of the whole lines; an incomplete last one is cut off."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        try:
            return {str(json.loads(line)["id"]) for line in whole.splitlines()}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.path}: has a line that is no answer ({error!r}). Give another --output, "
                "or --overwrite to begin anew."
            ) from error


def json_line(row: Mapping[str, Any]) -> bytes:
    """A record as a line of JSON, readable where it can be."""
    try:
        text = json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a field has half a character, which only an escape can spell
        text = json.dumps(row).encode()
    return text + b"\n"
