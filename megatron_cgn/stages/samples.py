"""Answers to fixed prompts, so that people see what a model has become."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any

from megatron_cgn.config.schema import RunConfig
from megatron_cgn.data.packed_plan import PackedData
from megatron_cgn.engine.callbacks import SampleAnswer
from megatron_cgn.engine.engine import Engine
from megatron_cgn.errors import ConfigError
from megatron_cgn.rollout.generate import complete
from megatron_cgn.rollout.sampling import Sampling
from tokenizer.chat import ChatTemplate, Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is asked at every validation."""

    text: str
    """For people."""
    ids: list[int]
    """For the model, the generation prompt included."""
    reference: str | None
    """What a held-out conversation, or its best answer, says."""


def sample_prompts(
    run: RunConfig, chat: ChatTemplate, data: PackedData[Any], *, max_positions: int
) -> list[Prompt]:
    """What is asked: ``samples.prompts``, or how held-out conversations begin.

    Args:
        run: The configuration.
        chat: Encodes prompts.
        data: What it holds out is taken from all sources in turn; those that leave no
            room for an answer are passed over.
        max_positions: Longest sequence the model can read, in tokens.

    Returns:
        The prompts; none if nobody gives any and nothing is held out.

    Raises:
        DataError: If the template refuses a prompt.
        ConfigError: If a prompt leaves no room for an answer.
    """
    samples = run.samples
    if not samples.prompts:
        sources = (sequences.beginnings() for sequences in data.validation.values())
        in_turn = (one for group in zip_longest(*sources) for one in group if one is not None)
        room = max_positions - samples.max_new_tokens
        return [
            Prompt(
                text=chat.decode(one.prompt, skip_special_tokens=False),
                ids=one.prompt,
                reference=chat.decode(one.answer).strip(),
            )
            for one in islice((o for o in in_turn if len(o.prompt) <= room), samples.count)
        ]
    prompts = []
    for index, text in enumerate(samples.prompts):
        ids = chat.encode_prompt([Message(role="user", content=text)])
        if len(ids) + samples.max_new_tokens > max_positions:
            raise ConfigError(
                f"samples.prompts.{index}: {len(ids):,} tokens and samples.max_new_tokens="
                f"{samples.max_new_tokens:,} are more than the model's max_position_embeddings="
                f"{max_positions:,}; shorten either."
            )
        prompts.append(Prompt(text=text, ids=ids, reference=None))
    return prompts


def answer_samples(
    engine: Engine, chat: ChatTemplate, prompts: Sequence[Prompt]
) -> list[SampleAnswer]:
    """Answer the prompts greedily. Collective over all ranks.

    Args:
        engine: The model, in training.
        chat: Says where an answer ends, and turns it into text.
        prompts: Equal on all ranks.

    Returns:
        The answers, equal on all ranks.
    """
    answers = complete(
        engine,
        [prompt.ids for prompt in prompts],
        sampling=Sampling(
            max_new_tokens=engine.run.samples.max_new_tokens, stop_ids=chat.end_of_turn_ids
        ),
    )
    return [
        SampleAnswer(
            prompt=prompt.text,
            answer=chat.decode(answer.ids).strip(),
            reference=prompt.reference,
            num_tokens=len(answer.ids),
            ended=answer.finish == "stop",
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
