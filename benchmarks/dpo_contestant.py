"""One contestant of `dpo.py`: scores the reference and trains, a step for every line that it reads.

python benchmarks/dpo_contestant.py ours|trl-precomputed|trl-reference SETTINGS.json

Settings are a `Settings` as JSON. A report is a line of standard output behind `MARK`. Ours and
TRL with a precomputed reference first score all pairs, in ``scored_steps`` steps.
"""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contestant import (
    Reporter,
    Settings,
    adapters,
    hugging_face,
    reporting,
    run_contestant,
    trl_arguments,
)
from records import read_records


def ours(settings: Settings, reporter: Reporter) -> None:
    """The engine of this project on packed rows, after scoring the reference with it."""
    from dpo_ours import score_and_train

    score_and_train(settings, reporter)


def trl(settings: Settings, reporter: Reporter, *, precompute: bool) -> None:
    """TRL's trainer as it comes, but for gradient checkpointing, which nobody here does."""
    os.environ["TQDM_DISABLE"] = "1"
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    pairs = read_records(Path(settings.records))
    counting, taking = reporting(DPOTrainer, reporter)
    scored = itertools.count()
    each = len(pairs) // settings.padded_batch // max(1, settings.scored_steps)

    class Scoring(counting):  # type: ignore[misc,valid-type]
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset  # token ids already

        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            number = next(scored) % each
            if number == 0:
                reporter.wait()
            reporter.count(int(inputs["attention_mask"].sum()), inputs["input_ids"].numel())
            found = super().compute_ref_log_probs(model, inputs)
            if number == each - 1:
                reporter.report()
            return found

    trainer = Scoring(
        model=hugging_face(settings),
        args=DPOConfig(**trl_arguments(settings), precompute_ref_log_probs=precompute),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(settings.model),
        peft_config=adapters() if settings.mode == "lora" else None,
        callbacks=[taking],
    )
    trainer.train()


CONTESTANTS: dict[str, Callable[[Settings, Reporter], None]] = {
    "ours": ours,
    "trl-precomputed": lambda settings, reporter: trl(settings, reporter, precompute=True),
    "trl-reference": lambda settings, reporter: trl(settings, reporter, precompute=False),
}


if __name__ == "__main__":
    run_contestant(CONTESTANTS, Settings)
