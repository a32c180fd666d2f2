"""Steps of TRL's trainers, with every setting that a comparison needs to be the same.

Batches come in the order of the data set, and one is a step: TRL takes means over micro-batches.
AdamW, its decay (of matrices alone) and clipping are those of ours; rates are constant, since TRL
counts warm-up steps from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cgn.config.schema import OptimConfig

STEPS = 10
BATCH = 4
"""Records of a step."""
OPTIM = OptimConfig(
    lr=2e-3, min_lr=2e-3, schedule="constant", weight_decay=0.1, adam_beta2=0.97, clip_grad=0.8
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlOutcome:
    """What a trainer logged in each step, and the weights after the last."""

    logs: list[dict[str, float]]
    weights: dict[str, Tensor]


def arguments(directory: Path) -> dict[str, Any]:
    """Arguments of every trainer."""
    return {
        "output_dir": str(directory),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "optim": "adamw_torch",
        "learning_rate": OPTIM.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": OPTIM.weight_decay,
        "adam_beta1": OPTIM.adam_beta1,
        "adam_beta2": OPTIM.adam_beta2,
        "adam_epsilon": OPTIM.adam_eps,
        "max_grad_norm": OPTIM.clip_grad,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def language_model(path: Path) -> Any:
    """The model that ours starts from."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def reward_model(path: Path) -> Any:
    """The reward model that ours starts from."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)


def tokenizer_of(path: Path, *, pad_token: str) -> Any:
    """The tokenizer of ours, with a padding token.

    TRL would pad with the end of a turn, and a sequence classification model then looks for the
    last token in front of it.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = pad_token
    return tokenizer


def data_set(records: Sequence[dict[str, Any]]) -> Any:
    """Records as TRL takes them."""
    from datasets import Dataset

    return Dataset.from_list(list(records))


def train(trainer: Any) -> TrlOutcome:
    """Take the steps."""
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == STEPS
    weights = {name: p.detach().clone() for name, p in trainer.model.state_dict().items()}
    return TrlOutcome(logs=logs, weights=weights)
