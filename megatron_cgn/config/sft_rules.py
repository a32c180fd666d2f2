"""Rules of conversations: how they are read, which tokens count, what is answered.

Instruction tuning reads them, and preference learning, whose answers are conversations too.
"""

import dataclasses
from collections.abc import Iterator

from megatron_cgn.config.schema import ChatConfig, DataConfig, RunConfig, SamplesConfig

CONVERSATION_STAGES = ("sft", "dpo", "rm")
"""Stages that read conversations; in every other one their settings have no effect."""
CONVERSATION_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".jsonl.zst")
"""How names of files with conversations end."""


def conversation_faults(run: RunConfig) -> Iterator[str]:
    """Find what is wrong with the settings of conversations whatever their files hold.

    Args:
        run: The configuration.

    Yields:
        A message a fault.
    """
    if run.stage not in CONVERSATION_STAGES:
        yield from _without_effect(run)
        return
    yield from _data(run.data)
    yield from _chat(run.chat)
    if run.stage != "rm":  # whose model writes nothing: `preference_rules` tells of it
        yield from _samples(run.samples, can_answer=_can_answer(run))
    cp = run.parallel.context_parallel_size
    if run.model.backend == "te" and cp > 1:
        yield (
            "model.backend: te; Transformer Engine cannot keep conversations apart with "
            f"parallel.context_parallel_size={cp}. Set model.backend=native, or "
            "parallel.context_parallel_size=1."
        )


def conversation_model_faults(run: RunConfig, *, max_positions: int) -> Iterator[str]:
    """Find what of the settings of conversations does not fit the model.

    Args:
        run: The configuration.
        max_positions: Longest sequence the model can read, in tokens.

    Yields:
        A message a fault.
    """
    longest = run.samples.max_new_tokens
    answers = run.stage in CONVERSATION_STAGES and run.stage != "rm" and _can_answer(run)
    if answers and longest >= max_positions:
        yield (
            f"samples.max_new_tokens: {longest} leaves no room for a prompt in the model's "
            f"max_position_embeddings={max_positions}; use less."
        )


def _without_effect(run: RunConfig) -> Iterator[str]:
    """Settings of conversations that a stage without them would ignore."""
    given = [
        f"{section}.{field.name}"
        for section, default in (("chat", ChatConfig()), ("samples", SamplesConfig()))
        for field in dataclasses.fields(default)
        if getattr(getattr(run, section), field.name) != getattr(default, field.name)
    ]
    if run.data.packing != DataConfig().packing:
        given.append("data.packing")
    for path in given:
        yield (
            f"{path}: has no effect with stage={run.stage}, which reads no conversations; remove "
            f"it, or start with +stage={CONVERSATION_STAGES[0]}."
        )


def _data(data: DataConfig) -> Iterator[str]:
    if data.reset_attention_mask:
        yield (
            "data.reset_attention_mask: true has no effect on conversations, which never see one "
            "another; remove it."
        )
    if data.phases:
        yield (
            "data.phases: conversations are read in one mix from beginning to end; give data.mix, "
            "or run the phases one after another, each from the checkpoint of the one before."
        )
    for source in data.sources:
        where = f"data.sources[{source.name}]"
        paths = [("path", source.path), ("validation_path", source.validation_path)]
        paths += [(f"files.{i}.path", file.path) for i, file in enumerate(source.files)]
        for name, path in paths:
            if path is not None and not path.lower().endswith(CONVERSATION_SUFFIXES):
                yield (
                    f"{where}.{name}: {path!r} is no file of conversations (an index made for "
                    "stage cpt has no turns); give one whose name ends in "
                    f"{', '.join(CONVERSATION_SUFFIXES)}."
                )


def _chat(chat: ChatConfig) -> Iterator[str]:
    if chat.train_on_prompt and chat.last_turn_only:
        yield (
            "chat.train_on_prompt, chat.last_turn_only: both true, but one counts every token and "
            "the other only those of the last answer; set one of them to false."
        )
    if chat.template is not None and not chat.template.strip():
        yield "chat.template: is empty; give a name or a file, or null for the tokenizer's own."


def _samples(samples: SamplesConfig, *, can_answer: bool) -> Iterator[str]:
    default = SamplesConfig()
    if samples.count < 0:
        yield f"samples.count: {samples.count}; must be at least 0."
    elif samples.count not in (0, default.count) and not can_answer:
        yield (
            f"samples.count: {samples.count} has no effect, since nothing is held out; set "
            "data.validation_fraction or a source's validation_path, or give samples.prompts."
        )
    elif samples.prompts and samples.count != default.count:
        yield (
            f"samples.count: {samples.count} has no effect beside samples.prompts, which are all "
            "answered; remove it."
        )
    for index, prompt in enumerate(samples.prompts):
        if not prompt.strip():
            yield f"samples.prompts.{index}: is empty; say what the user asks, or remove it."
    if samples.max_new_tokens < 1:
        yield f"samples.max_new_tokens: {samples.max_new_tokens}; must be at least 1."
    elif not can_answer and samples.max_new_tokens != default.max_new_tokens:
        yield (
            f"samples.max_new_tokens: {samples.max_new_tokens} has no effect, since nothing is "
            "answered; give samples.prompts, or hold conversations out and raise samples.count."
        )


def _can_answer(run: RunConfig) -> bool:
    """Whether there is anything to answer, as far as settings say."""
    data, samples = run.data, run.samples
    held_out = data.validation_fraction > 0 or any(s.validation_path for s in data.sources)
    # Without sources, as in a recipe, nobody knows yet.
    return bool(samples.prompts) or (samples.count > 0 and (held_out or not data.sources))
