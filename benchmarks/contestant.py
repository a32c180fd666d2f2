"""What contestants of training benchmarks share: settings, reports, models, TRL's arguments.

A contestant takes a step for every line that it reads, and says what it took: one line of standard
output behind `MARK`. Settings are a `Settings` as JSON.
"""

import dataclasses
import json
import select
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hardware import memory_kib

if TYPE_CHECKING:
    from megatron_cgn.engine.engine import Engine

MARK = "@@report "
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, RATE = 16, 32, 1e-4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all contestants share."""

    model: str
    """Hugging Face directory."""
    records: str
    """File of examples as token ids; contestants may write beside it."""
    mode: str
    """``lora`` or ``full``."""
    precision: str
    """``bf16`` or ``fp32``."""
    threads: int
    seq_length: int
    """Tokens of a pack."""
    padded_batch: int
    """Examples of a padded micro-batch."""
    accumulation: int
    """Micro-batches of a step."""
    scored_steps: int = 0
    """Steps in which DPO's reference is scored before training; 0 scores it before the first."""


class Reporter:
    """Waits for a line before each step, and reports after it."""

    def __init__(self) -> None:
        self.tokens = self.places = 0
        self.loss = 0.0
        self._started = self._cpu = 0.0

    def wait(self) -> None:
        """Read a line; the end of the input ends the process."""
        if not sys.stdin.readline():
            sys.exit(0)
        self.tokens = self.places = 0
        self.loss = 0.0
        self._started, self._cpu = time.perf_counter(), time.process_time()

    def count(self, tokens: int, places: int) -> None:
        """Add a micro-batch: tokens that are no padding, and all places."""
        self.tokens += tokens
        self.places += places

    def report(self) -> None:
        """Say what the step took, and do nothing until the next line is there.

        What comes between two steps would take the machine from the other contestant's step.
        """
        facts = {
            "seconds": time.perf_counter() - self._started,
            "cpu_s": time.process_time() - self._cpu,
            "tokens": self.tokens,
            "places": self.places,
            "loss": self.loss,
            "peak_mib": memory_kib()["VmHWM"] / 1024,
        }
        print(MARK + json.dumps(facts), flush=True)
        select.select([sys.stdin], [], [])


def our_engine(settings: Settings) -> "Engine":
    """The engine of this project with the model's weights, before it prepares for training."""
    from megatron_cgn.config.schema import (
        DataConfig,
        LoraConfig,
        ModelConfig,
        OptimConfig,
        RunConfig,
        TrainConfig,
    )
    from megatron_cgn.engine.engine import Engine
    from megatron_cgn.hf.config import read_architecture
    from megatron_cgn.hf.load import load_weights
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
    return engine


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


def trl_arguments(settings: Settings) -> dict[str, Any]:
    """Arguments of TRL's trainers: its own, but for gradient checkpointing, which nobody does."""
    return {
        "output_dir": str(Path(settings.records).parent / "trl"),
        "max_steps": 10_000,
        "per_device_train_batch_size": settings.padded_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "max_length": settings.seq_length,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "bf16": settings.precision == "bf16",
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def reporting(trainer: type, reporter: Reporter) -> tuple[type, Any]:
    """A trainer of TRL's that counts what it reads, and the callback that makes it wait."""
    from transformers import TrainerCallback

    class Counting(trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            places = inputs["input_ids"].numel()
            mask = inputs.get("attention_mask")
            reporter.count(places if mask is None else int(mask.sum()), places)
            loss = super().training_step(model, inputs, *args, **kwargs)
            reporter.loss += float(loss)
            return loss

    class Taking(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            reporter.wait()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            reporter.report()

    return Counting, Taking()


def run_contestant[S: Settings](
    contestants: Mapping[str, Callable[[S, Reporter], None]], read: Callable[..., S]
) -> None:
    """Train for as long as lines come, as the command line says: ``NAME SETTINGS.json``."""
    settings = read(**json.loads(Path(sys.argv[2]).read_text()))
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    contestants[sys.argv[1]](settings, Reporter())
