"""One contestant of `sft.py`: trains a step for every line that it reads, and says what it took.

python benchmarks/sft_contestant.py ours|trl-padded|trl-packed|plain SETTINGS.json

Settings are a `Settings` as JSON. A report is a line of standard output behind `MARK`.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from contestant import (
    RATE,
    Reporter,
    Settings,
    adapters,
    hugging_face,
    our_engine,
    reporting,
    run_contestant,
    trl_arguments,
)
from records import read_records


def packs(settings: Settings) -> Iterator[list[dict[str, list[int]]]]:
    """Packs of whole conversations, in an order of their own, again and again."""
    from megatron_cgn.data.packing import first_fit_decreasing

    records = read_records(Path(settings.records))
    lengths = np.array([len(r["input_ids"]) for r in records])
    packed = first_fit_decreasing(lengths, capacity=settings.seq_length)
    order = np.random.default_rng(0).permutation(len(packed) - 1)  # but the last: it is not full
    for i in itertools.cycle(order.tolist()):
        yield [records[k] for k in packed.items[packed.bounds[i] : packed.bounds[i + 1]]]


def ours(settings: Settings, reporter: Reporter) -> None:
    """The engine of this project on packed rows."""
    from megatron_cgn.data.sft_loader import ConversationRow, lay_out
    from megatron_cgn.objectives.next_token import NextToken

    engine = our_engine(settings)
    engine.prepare_training()

    def row(record: dict[str, list[int]]) -> ConversationRow:
        ids, labels = np.array(record["input_ids"]), np.array(record["labels"])
        return ConversationRow(
            tokens=ids,
            labels=np.append(ids[1:], 0),
            loss_mask=np.append(labels[1:] != -100, False),
            lengths=(len(ids),),
            sources=(0,),
        )

    rows = packs(settings)
    while True:
        reporter.wait()
        batches = []
        for pack in itertools.islice(rows, settings.accumulation):
            batches.append(
                lay_out([row(record) for record in pack], seq_length=settings.seq_length)
            )
            tokens = sum(len(record["input_ids"]) for record in pack)
            reporter.count(tokens, batches[-1].tokens.numel())
        reporter.loss = engine.train_step(batches, NextToken()).metrics["loss"]
        reporter.report()


def plain(settings: Settings, reporter: Reporter) -> None:
    """A bare loop of `transformers` and PyTorch on rows full of tokens, without any padding.

    A token sees the whole row before it, which costs nothing here; a mask of blocks would.
    """
    model = hugging_face(settings)
    if settings.mode == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, adapters())
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.1, fused=True)
    rows = packs(settings)
    while True:
        reporter.wait()
        for pack in itertools.islice(rows, settings.accumulation):
            ids = torch.tensor([[i for r in pack for i in r["input_ids"]]])
            labels = torch.tensor([[i for r in pack for i in r["labels"]]])
            reporter.count(ids.numel(), ids.numel())
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            (loss / settings.accumulation).backward()
            reporter.loss += float(loss.detach()) / settings.accumulation
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        reporter.report()


def trl(settings: Settings, reporter: Reporter, *, packing: bool) -> None:
    """TRL's trainer as it comes, but for gradient checkpointing, which nobody here does."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    trainer_class, taking = reporting(SFTTrainer, reporter)
    own = {"per_device_train_batch_size": 1} if packing else {}
    trainer = trainer_class(
        model=hugging_face(settings),
        args=SFTConfig(**trl_arguments(settings) | own, packing=packing, packing_strategy="bfd"),
        train_dataset=Dataset.from_list(read_records(Path(settings.records))),
        processing_class=AutoTokenizer.from_pretrained(settings.model),
        peft_config=adapters() if settings.mode == "lora" else None,
        callbacks=[taking],
    )
    trainer.train()


CONTESTANTS: dict[str, Callable[[Settings, Reporter], None]] = {
    "ours": ours,
    "trl-padded": lambda settings, reporter: trl(settings, reporter, packing=False),
    "trl-packed": lambda settings, reporter: trl(settings, reporter, packing=True),
    "plain": plain,
}


if __name__ == "__main__":
    run_contestant(CONTESTANTS, Settings)
