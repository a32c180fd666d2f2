"""Preference data of every form, and runs on them, for the tests of preference learning."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from sft_samples import WORDS, Record, World, sft_run

from megatron_cgn.config.schema import LossConfig, RunConfig, SourceConfig
from megatron_cgn.data.preference import (
    PreferenceData,
    PreferencePlan,
    build_preference_data,
    plan_preference,
)
from megatron_cgn.data.preference_formats import AnswerRecord
from tokenizer.chat import ChatTemplate, EncodedChat


def words(draw: random.Random, most: int) -> str:
    """Some words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


def random_pairs(name: str, count: int, *, margins: bool = False) -> list[Record]:
    """Pairs of different lengths, whose prompts differ; every third has a longer prompt."""
    draw = random.Random(name)
    records: list[Record] = []
    for number in range(count):
        prompt: Any = f"{name} {number} {words(draw, 6)}"
        if number % 3 == 2:
            turns = [("user", prompt), ("assistant", words(draw, 4)), ("user", words(draw, 4))]
            prompt = [{"role": role, "content": text} for role, text in turns]
        record: Record = {
            "id": f"{name}-{number}",
            "prompt": prompt,
            "chosen": f"yes {words(draw, 10)}",
            "rejected": f"no {words(draw, 10)}",
        }
        if margins and number % 2:
            record["margin"] = number / 4
        records.append(record)
    return records


def random_rankings(name: str, count: int) -> list[Record]:
    """Rankings of two to five answers, some of equal rank, but never all."""
    draw = random.Random(name)
    records: list[Record] = []
    for number in range(count):
        ranks = [1, 2, *(draw.randint(1, 3) for _ in range(draw.randint(0, 3)))]
        draw.shuffle(ranks)
        answers = [{"text": f"{i} {words(draw, 8)}", "rank": r} for i, r in enumerate(ranks)]
        prompt = f"{name} {number} {words(draw, 6)}"
        records.append({"id": f"{name}-{number}", "prompt": prompt, "answers": answers})
    return records


def random_labels(name: str, count: int) -> list[Record]:
    """Single answers, a third of them bad."""
    draw = random.Random(name)
    return [
        {
            "id": f"{name}-{number}",
            "prompt": f"{name} {number} {words(draw, 6)}",
            "completion": words(draw, 10),
            "label": number % 3 != 0,
        }
        for number in range(count)
    ]


def preference_run(
    sources: Sequence[SourceConfig], *, stage: str = "dpo", loss: str | None = None, **how: Any
) -> RunConfig:
    """A run of preference learning."""
    run = sft_run(sources, **{"seq_length": 256, **how})
    settings = LossConfig(type=loss)  # type: ignore[arg-type]
    return dataclasses.replace(run, stage=stage, loss=settings)


def plan_of(world: World, run: RunConfig, *, whole: bool = False) -> PreferencePlan:
    """Plan a run."""
    return plan_preference(
        run, chat=world.chat, tokenizer=world.tokenizer, cache=world.root / "cache", whole=whole
    )


def data_of(world: World, run: RunConfig, *, whole: bool = False) -> PreferenceData:
    """Plan a run and open its data."""
    return build_preference_data(plan_of(world, run, whole=whole))


def encoded_answers(chat: ChatTemplate, record: AnswerRecord) -> list[EncodedChat]:
    """Answers with their prompt, encoded one by one as conversations."""
    return [chat.encode([*record.prompt, *answer.messages]) for answer in record.answers]
