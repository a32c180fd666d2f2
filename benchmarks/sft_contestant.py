"""One contestant of `sft.py`: trains a step for every line that it reads, and says what it took.

python benchmarks/sft_contestant.py ours|trl-padded|trl-packed|plain SETTINGS.json

Settings are a `Settings` as JSON. A report is a line of standard output behind `MARK`.
"""

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import memory_kib
from sft_records import read_records

MARK = "@@report "
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, RATE = 16, 32, 1e-4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all contestants share."""

    model: str
    """Hugging Face directory."""
    records: str
    """From `write_records`."""
    mode: str
    """``lora`` or ``full``."""
    precision: str
    """``bf16`` or ``fp32``."""
    threads: int
    seq_length: int
    """Tokens of a pack."""
    padded_batch: int
    """Conversations of a padded micro-batch."""
    accumulation: int
    """Micro-batches of a step."""
    trl_site: str
    """Folder that has ``trl``."""


class Reporter:
    """Waits for a line before each step, and reports after it."""

    def __init__(self) -> None:
        self.tokens = self.places = 0
        self._started = self._cpu = 0.0

    def wait(self) -> None:
        """Read a line; the end of the input ends the process."""
        if not sys.stdin.readline():
            sys.exit(0)
        self.tokens = self.places = 0
        self._started, self._cpu = time.perf_counter(), time.process_time()

    def count(self, tokens: int, places: int) -> None:
        """Add a micro-batch: tokens that are no padding, and all places."""
        self.tokens += tokens
        self.places += places

    def report(self, loss: float) -> None:
        """Say what the step took."""
        facts = {
            "seconds": time.perf_counter() - self._started,
            "cpu_s": time.process_time() - self._cpu,
            "tokens": self.tokens,
            "places": self.places,
            "loss": loss,
            "peak_mib": memory_kib()["VmHWM"] / 1024,
        }
        print(MARK + json.dumps(facts), flush=True)


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
    from megatron_cgn.config.schema import (
        DataConfig,
        LoraConfig,
        ModelConfig,
        OptimConfig,
        RunConfig,
        TrainConfig,
    )
    from megatron_cgn.data.sft_loader import ConversationRow, lay_out
    from megatron_cgn.engine.engine import Engine
    from megatron_cgn.hf.config import read_architecture
    from megatron_cgn.hf.load import load_weights
    from megatron_cgn.objectives.next_token import NextToken
    from megatron_cgn.parallel.state import initialize_parallel
    from megatron_cgn.quiet import quiet_dependencies

    quiet_dependencies()
    run = RunConfig(
        precision="bf16" if settings.precision == "bf16" else "fp32",
        model=ModelConfig(hf_path=settings.model),
        data=DataConfig(seq_length=settings.seq_length, reset_attention_mask=True),
        train=TrainConfig(global_batch_size=settings.accumulation, train_iters=10_000),
        optim=OptimConfig(lr=RATE, min_lr=RATE, schedule="constant"),
        lora=LoraConfig(rank=RANK if settings.mode == "lora" else None, alpha=ALPHA),
    )
    state = initialize_parallel(run.parallel)
    architecture = read_architecture(settings.model)
    engine = Engine(run, architecture, state, total_steps=10_000)
    load_weights(engine.chunks, settings.model, architecture=architecture, groups=state.groups)
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
        reporter.report(engine.train_step(batches, NextToken()).metrics["loss"])


def hugging_face(settings: Settings) -> Any:
    """The model as `transformers` has it, in FP32: BF16 is autocast's."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)


def adapters() -> Any:
    """Adapters as `peft` has them."""
    from peft import LoraConfig

    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )  # fmt: skip


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
        total = 0.0
        for pack in itertools.islice(rows, settings.accumulation):
            ids = torch.tensor([[i for r in pack for i in r["input_ids"]]])
            labels = torch.tensor([[i for r in pack for i in r["labels"]]])
            reporter.count(ids.numel(), ids.numel())
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            (loss / settings.accumulation).backward()
            total += float(loss.detach()) / settings.accumulation
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        reporter.report(total)


def trl(settings: Settings, reporter: Reporter, *, packing: bool) -> None:
    """TRL's trainer as it comes, but for gradient checkpointing, which nobody here does."""
    sys.path.append(settings.trl_site)
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Counting(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            places = inputs["input_ids"].numel()
            mask = inputs.get("attention_mask")
            reporter.count(places if mask is None else int(mask.sum()), places)
            return super().training_step(model, inputs, *args, **kwargs)

    class Taking(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            reporter.wait()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            reporter.report(0.0)

    config = SFTConfig(
        output_dir=str(Path(settings.records).parent / "trl"),
        max_steps=10_000,
        per_device_train_batch_size=1 if packing else settings.padded_batch,
        gradient_accumulation_steps=settings.accumulation,
        packing=packing,
        packing_strategy="bfd",
        max_length=settings.seq_length,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        bf16=settings.precision == "bf16",
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Counting(
        model=hugging_face(settings),
        args=config,
        train_dataset=Dataset.from_list(read_records(Path(settings.records))),
        processing_class=AutoTokenizer.from_pretrained(settings.model),
        peft_config=adapters() if settings.mode == "lora" else None,
        callbacks=[Taking()],
    )
    trainer.train()


CONTESTANTS: dict[str, Callable[[Settings, Reporter], None]] = {
    "ours": ours,
    "trl-padded": lambda settings, reporter: trl(settings, reporter, packing=False),
    "trl-packed": lambda settings, reporter: trl(settings, reporter, packing=True),
    "plain": plain,
}


def main() -> None:
    """Train for as long as lines come."""
    settings = Settings(**json.loads(Path(sys.argv[2]).read_text()))
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    CONTESTANTS[sys.argv[1]](settings, Reporter())


if __name__ == "__main__":
    main()
