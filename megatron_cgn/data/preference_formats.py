"""What the records of preference data look like, and the answers in them.

A record is a prompt with answers to it. The prompt is given by one of

==================================  ===========================================================
``prompt``                          a text, or a list of messages
``instruction``                     alpaca's; with ``input`` and ``history``
``conversations``, ``messages``     a list of messages
none of these                       ``chosen`` and ``rejected`` are whole conversations: what
                                    they begin with alike is the prompt
==================================  ===========================================================

and the answers by one of

==================================  ===========================================================
``chosen``, ``rejected``            a *pair*; optionally ``margin``, by how much one is better
``answers``                         a *ranking*: texts or lists of messages, the best first; or
                                    objects of ``text`` (``answer``, ``content``) or ``messages``
                                    with ``rank``, 1 being the best, or ``score``, larger being
                                    better; answers of equal rank are not compared
``output``, a list                  a ranking of texts, the best first
``completion`` (``output``, or the  *unpaired*: one answer that is good or bad, for KTO
last message of ``messages``) and
``label`` (``kto_tag``)
==================================  ===========================================================

An answer is a text, a message, or a list of messages, which may begin with the prompt. Texts that
begin with an empty line and ``Human:`` are read as transcripts of ``Human:`` and ``Assistant:``.
``system`` and ``id`` are optional. Other fields are passed over, except those that instruction data
refuses too, such as tools and images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_cgn.data.conversation_formats import (
    FIELDS as CONVERSATION_FIELDS,
)
from megatron_cgn.data.conversation_formats import as_list, check_fields, with_system
from megatron_cgn.data.preference_parts import (
    EXAMPLE,
    as_number,
    behind,
    find_prompt,
    orders_of,
    require_prompt,
    said_by,
    said_in_ranking,
)
from megatron_cgn.errors import DataError
from tokenizer.chat import Message

FIELDS = (*CONVERSATION_FIELDS, "chosen", "rejected", "answers", "label", "kto_tag", "margin")
"""Fields that are looked at. The others of a table need not be read."""

Kind = Literal["pairs", "unpaired"]
"""What can be learned from answers: which of two is better, or whether one is good."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the answers to a prompt."""

    name: str
    """What messages call it: ``chosen``, ``answer 3``, …"""
    messages: tuple[Message, ...]
    """What is said behind the prompt: the assistant's turn, perhaps more of both sides."""
    value: float
    """Orders the answers of a record, larger being better; unpaired, 1 for a good one, else 0."""


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """A prompt and its answers as a record tells them; not yet held against a chat template."""

    form: Literal["pair", "ranking", "unpaired"]
    """What the record looked like."""
    prompt: tuple[Message, ...]
    """What all of them answer."""
    answers: tuple[Answer, ...]
    """The answers, those given twice only once."""
    margin: float = 0.0
    """By how much the better one of a pair is better; 0 if nobody says."""
    repeated: int = 0
    """Answers of a ranking that were given before, with the same rank."""

    @property
    def kind(self) -> Kind:
        """What can be learned from it."""
        return "unpaired" if self.form == "unpaired" else "pairs"


def read_answers(row: Any) -> AnswerRecord:
    """Find the prompt and the answers in a record.

    Args:
        row: What a line of JSON or a row of a table holds.

    Raises:
        DataError: If it is of no known form, or not as its form should be; says why, not where.
    """
    given = {name: value for name, value in check_fields(row).items() if value is not None}
    if given.get("messages") in (given.get("chosen"), given.get("rejected")):
        given.pop("messages", None)  # a copy, as in some published data
    form = _form(given)
    if form == "pair":
        record = _pair(given)
    elif form == "ranking":
        record = _ranking(given)
    else:
        record = _unpaired(given)
    _check_prompt(record)
    for answer in record.answers:
        _check_answer(answer)
    return _without_repetitions(record)


def _form(given: Mapping[str, Any]) -> str:
    fits = {
        "pair": "chosen" in given or "rejected" in given,
        "ranking": "answers" in given or isinstance(given.get("output"), list | tuple),
        "unpaired": "label" in given or "kto_tag" in given,
    }
    forms = [form for form, does in fits.items() if does]
    if len(forms) > 1:
        raise DataError(
            f"is of several forms at once ({', '.join(forms)}): keep the fields of one of them"
        )
    if forms:
        return forms[0]
    names = ", ".join(map(repr, given)) or "none"
    raise DataError(f"is of no known form, its fields being {names}: {EXAMPLE}")


def _pair(given: Mapping[str, Any]) -> AnswerRecord:
    for name, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if name not in given:
            raise DataError(f"{other} lacks its {name}: a pair has both")
    sides = {name: said_by(given[name], name) for name in ("chosen", "rejected")}
    prompt = find_prompt(given)
    if prompt is None:
        alike = _alike(sides["chosen"], sides["rejected"])
        prompt, sides = sides["chosen"][:alike], {n: s[alike:] for n, s in sides.items()}
        _check_implicit(prompt, sides)
        prompt = with_system(given, prompt)
    answers = [
        Answer(name, behind(prompt, side, name), value)
        for (name, side), value in zip(sides.items(), (1.0, 0.0), strict=True)
    ]
    return AnswerRecord("pair", tuple(prompt), tuple(answers), margin=_margin(given))


def _ranking(given: Mapping[str, Any]) -> AnswerRecord:
    if "margin" in given:
        raise DataError("has a margin, which only a pair of chosen and rejected has: remove it")
    if "answers" in given and isinstance(given.get("output"), list | tuple):
        raise DataError("has answers and a list of outputs: keep one of them")
    name = "answers" if "answers" in given else "output"
    items = as_list(given[name], name)
    if len(items) < 2:
        raise DataError(
            f"{name}: a ranking of {len(items)} has nothing to compare; give two answers or more"
        )
    prompt = require_prompt(given)
    values = orders_of(items)
    answers = []
    for number, (item, value) in enumerate(zip(items, values, strict=True), start=1):
        title = f"answer {number}"
        answers.append(Answer(title, behind(prompt, said_in_ranking(item, title), title), value))
    if len(set(values)) == 1:
        raise DataError(
            f"all {len(items)} answers have the same rank: there is no pair to learn from. Remove "
            "the record, or tell its answers apart"
        )
    return AnswerRecord("ranking", tuple(prompt), tuple(answers))


def _unpaired(given: Mapping[str, Any]) -> AnswerRecord:
    if "margin" in given:
        raise DataError("has a margin, which only a pair of chosen and rejected has: remove it")
    if "label" in given and "kto_tag" in given:
        raise DataError("has label and kto_tag: keep one of them")
    name = "label" if "label" in given else "kto_tag"
    label = given[name]
    if label not in (0, 1) or not isinstance(label, bool | int):
        raise DataError(f"{name}: expected true or false, found {label!r}")
    answer = next((n for n in ("completion", "output") if n in given), None)
    prompt = require_prompt(given)
    if answer is None:
        answer, prompt, own = _last_turn(prompt)
    else:
        own = said_by(given[answer], answer)
    answers = (Answer(answer, behind(prompt, own, answer), float(label)),)
    return AnswerRecord("unpaired", tuple(prompt), answers)


def _last_turn(messages: list[Message]) -> tuple[str, list[Message], list[Message]]:
    """The assistant's last message as the answer to those before it."""
    if messages[-1].role != "assistant":
        raise DataError(
            "has a label and no completion, and its messages do not end with the assistant's: "
            "there is no answer"
        )
    return "the last message", messages[:-1], messages[-1:]


def _alike(one: Sequence[Message], other: Sequence[Message]) -> int:
    """How many messages two conversations begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _check_implicit(prompt: Sequence[Message], sides: Mapping[str, Sequence[Message]]) -> None:
    """Refuse conversations without a prompt in common."""
    if sides["chosen"] == sides["rejected"]:
        raise DataError("chosen and rejected are equal: there is nothing to prefer")
    rest = {name: side[0].role if side else None for name, side in sides.items()}
    if not prompt and set(rest.values()) == {"assistant"}:
        raise DataError(
            "chosen and rejected are answers, and the record has no prompt: give it as prompt"
        )
    for name in (name for name, role in rest.items() if role is None):
        raise DataError(
            f"{name} is how the other conversation begins, and has no answer of its own"
        )
    for name, role in rest.items():
        if role != "assistant":
            raise DataError(
                f"chosen and rejected have different prompts: message {len(prompt) + 1} of {name} "
                f"({role}) is not in the other. Answers are compared to one prompt only"
            )


def _margin(given: Mapping[str, Any]) -> float:
    margin = as_number(given.get("margin", 0.0), "margin")
    if margin < 0:
        raise DataError(
            f"margin: {margin:g} says that rejected is the better one: swap the two, or mend it"
        )
    return margin


def _check_prompt(record: AnswerRecord) -> None:
    if not record.prompt or all(not m.content.strip() for m in record.prompt):
        raise DataError("the prompt is empty: answers must answer something")
    if record.prompt[-1].role == "assistant":
        raise DataError(
            "the prompt ends with a turn of the assistant, which the answers would go on from: end "
            "it with what is asked"
        )


def _check_answer(answer: Answer) -> None:
    if not answer.messages or not any(m.content.strip() for m in answer.messages):
        raise DataError(f"{answer.name} is empty: an answer must say something")
    for message, say in ((answer.messages[0], "begins"), (answer.messages[-1], "ends")):
        if message.role != "assistant":
            raise DataError(
                f"{answer.name} {say} with a message of the {message.role}: an answer begins and "
                "ends with the assistant's"
            )


def _without_repetitions(record: AnswerRecord) -> AnswerRecord:
    """Leave out answers that were given before with the same rank; refuse those with another."""
    seen: dict[tuple[tuple[str, str], ...], Answer] = {}
    for answer in record.answers:
        text = tuple((m.role, m.content.strip()) for m in answer.messages)
        before = seen.setdefault(text, answer)
        if before.value != answer.value:
            raise DataError(
                f"{before.name} and {answer.name} are equal: there is nothing to prefer. Remove "
                "one of them"
            )
    kept = tuple(seen.values())
    return AnswerRecord(
        record.form,
        record.prompt,
        kept,
        margin=record.margin,
        repeated=len(record.answers) - len(kept),
    )
