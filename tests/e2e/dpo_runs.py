"""Arguments of runs of preference learning."""

from pathlib import Path

from tiny_chats import TinyChats
from tiny_preferences import TinyPreferences


def dpo_overrides(
    chats: TinyChats, preferences: TinyPreferences, output: Path, *more: str
) -> list[str]:
    """Arguments of a tiny run of eight steps."""
    base = {
        "model.hf_path": chats.model,
        "precision": "fp32",
        "data.seq_length": 128,
        "data.validation_fraction": 0.2,
        "train.micro_batch_size": 1,
        "train.global_batch_size": 2,
        "train.train_iters": 8,
        "train.validation_interval_steps": 4,
        "optim.lr": "1e-3",
        "samples.count": 1,
        "samples.max_new_tokens": 6,
        "output_dir": output,
    }
    given = {text.partition("=")[0] for text in more}
    kept = [f"{key}={value}" for key, value in base.items() if key not in given]
    sources = [] if "data.sources" in given else [preferences.sources()]
    return ["+stage=dpo", *sources, *kept, *more]
