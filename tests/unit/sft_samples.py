"""Conversations, a tokenizer with a chat template, and runs on them, for the tests of SFT data."""

import dataclasses
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_cgn.config.schema import (
    ChatConfig,
    DataConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from megatron_cgn.data.sft import SftData, SftPlan, build_sft_data, plan_sft
from tokenizer.chat import ChatTemplate
from tokenizer.wrapper import Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QUESTION, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "valve pump steam core rod 压力 堆芯 冷却剂 check report".split()

type Record = dict[str, Any]


def chat_tokenizer(directory: Path) -> Path:
    """Save a byte-level BPE whose chat template is ChatML."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def record(name: str, *turns: tuple[str, str]) -> Record:
    """A record of questions and answers."""
    messages = []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return {"id": name, "messages": messages}


def random_records(name: str, count: int, *, seed: int = 0, turns: int = 3) -> list[Record]:
    """Records of different lengths, whose questions differ."""
    draw = random.Random(f"{name}/{seed}")

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    return [
        record(
            f"{name}-{number}",
            *((f"{name} {number} {words(8)}", words(12)) for turn in range(draw.randint(1, turns))),
        )
        for number in range(count)
    ]


def write_records(path: Path, records: Iterable[Record]) -> str:
    """Write records as JSON Lines; returns the path."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return str(path)


@dataclasses.dataclass(frozen=True)
class World:
    """A folder with a tokenizer, and a cache."""

    root: Path
    chat: ChatTemplate
    tokenizer: Tokenizer

    @classmethod
    def make(cls, root: Path) -> "World":
        """Write the tokenizer and open it."""
        directory = chat_tokenizer(root / "tokenizer")
        return cls(root, ChatTemplate.open(directory), Tokenizer.from_pretrained(directory))

    def write(self, name: str, records: Iterable[Record]) -> str:
        """Write a file of records."""
        return write_records(self.root / f"{name}.jsonl", records)

    def plan(self, run: RunConfig, *, cache: str = "cache") -> SftPlan:
        """Plan a run."""
        return plan_sft(run, chat=self.chat, tokenizer=self.tokenizer, cache=self.root / cache)

    def open(self, run: RunConfig, *, cache: str = "cache") -> SftData:
        """Plan a run and open its data."""
        return build_sft_data(self.plan(run, cache=cache))


def sft_run(
    sources: Sequence[SourceConfig],
    *,
    seq_length: int = 128,
    micro_batch_size: int = 1,
    global_batch_size: int = 4,
    epochs: float | None = None,
    train_iters: int | None = None,
    seed: int = 1,
    chat: ChatConfig | None = None,
    **data: Any,
) -> RunConfig:
    """A run of stage sft."""
    return RunConfig(
        stage="sft",
        seed=seed,
        data=DataConfig(sources=tuple(sources), seq_length=seq_length, **data),
        train=TrainConfig(
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            epochs=epochs,
            train_iters=train_iters,
        ),
        chat=chat or ChatConfig(),
    )


def source(name: str, path: str, **fields: Any) -> SourceConfig:
    """A source of one file."""
    return SourceConfig(name=name, path=path, **fields)


def all_ids(data: SftData) -> list[list[str]]:
    """Ids of the records of every sequence in order."""
    return [data.train.record_ids(sequence) for sequence in range(len(data.train))]
