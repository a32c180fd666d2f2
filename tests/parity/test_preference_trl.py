"""Ten steps of preference learning against TRL's trainers: same model, same records, same order.

TRL is given the records, not the tokens: templates, masks, reference log-probabilities, losses,
gradients and the optimizer are all its own. The template of the test writes nothing behind the end
of a turn. (TRL counts what a template writes there; ours does not.)
"""

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trl_runs
from preference_runs import read_weights, write_score_model
from torch import Tensor
from trl_runs import BATCH, OPTIM, STEPS, TrlOutcome

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.config.schema import (
    DataConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from megatron_cgn.data.preference_kto import Mismatched
from megatron_cgn.data.preference_loader import PreferenceLoader
from megatron_cgn.engine.engine import Engine
from megatron_cgn.eval.kto import KtoBaseline, with_baselines
from megatron_cgn.eval.reference import reference_logps, reference_scores
from megatron_cgn.hf.export import export_weights
from megatron_cgn.objectives.preference import make_objective, needs_reference
from megatron_cgn.objectives.reward import BradleyTerry
from megatron_cgn.parallel.state import shutdown_parallel
from megatron_cgn.stages import preference
from megatron_cgn.testing import tiny_hf_model
from tests.unit.sft_samples import TEMPLATE, WORDS, chat_tokenizer, write_records

TOLERANCE = 1e-4
"""Of all that is logged, relative and absolute, and of trained weights relative to how far they
have moved: other kernels, the same equations, and up to ten steps of AdamW between them."""
PAD = "<|endoftext|>"
MODEL: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}

type Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Contest:
    """A loss of ours, and the trainer of TRL's that has it."""

    trainer: str
    ours: LossConfig
    theirs: dict[str, Any]
    metrics: tuple[str, ...] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )
    """What both log besides the loss."""


def _dpo(ours: LossConfig, **theirs: Any) -> Contest:
    return Contest("DPOTrainer", ours, {"precompute_ref_log_probs": True, **theirs})


CONTESTS: dict[str, Contest] = {
    "sigmoid": _dpo(LossConfig(type="sigmoid"), loss_type="sigmoid"),
    "sigmoid-per-token": _dpo(
        LossConfig(type="sigmoid", length_normalized=True, beta=2.0),
        loss_type="sigmoid_norm",
        beta=2.0,
    ),
    "hinge": _dpo(LossConfig(type="hinge"), loss_type="hinge"),
    "ipo": _dpo(LossConfig(type="ipo"), loss_type="ipo"),
    "robust": _dpo(
        LossConfig(type="robust", label_smoothing=0.2), loss_type="robust", label_smoothing=0.2
    ),
    "apo_zero": _dpo(LossConfig(type="apo_zero"), loss_type="apo_zero"),
    "apo_down": _dpo(LossConfig(type="apo_down"), loss_type="apo_down"),
    "simpo": Contest(
        "CPOTrainer",
        LossConfig(type="simpo", beta=2.0, gamma=0.8),
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8, "cpo_alpha": 0.0},
    ),
    "kto": Contest(
        "KTOTrainer",
        LossConfig(type="kto", beta=0.3, undesirable_weight=1.5),
        {"beta": 0.3, "undesirable_weight": 1.5, "precompute_ref_log_probs": True},
        metrics=("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl"),
    ),
    "rm": Contest(
        "RewardTrainer",
        LossConfig(center_rewards=0.05),
        {"center_rewards_coefficient": 0.05},
        metrics=("accuracy", "margin", "mean_reward"),
    ),
}


def pairs() -> list[Record]:
    """A step's records for every step; every third asks back first, and has a system prompt."""
    draw = random.Random(4)

    def said(role: str, most: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(1, most)))}

    found: list[Record] = []
    for number in range(STEPS * BATCH):
        prompt = [said("user", 6)]
        if number % 3 == 0:
            prompt = [said("system", 3), said("user", 3), said("assistant", 3), said("user", 3)]
        prompt[-1]["content"] += f" {number}"
        found.append(
            {
                "id": f"r{number}",
                "prompt": prompt,
                "chosen": [said("assistant", 12)],
                "rejected": [said("assistant", 8)],
                "margin": draw.choice([0.0, 0.5, 1.5]),
            }
        )
        found[-1]["rejected"][0]["content"] += "."
    return found


def unpaired() -> list[Record]:
    """One step's records. TRL mismatches answers within a batch, ours within a file."""
    return [
        {"id": p["id"], "prompt": p["prompt"], "completion": p["chosen"], "label": n != 2}
        for n, p in enumerate(pairs()[:BATCH])
    ]


@dataclasses.dataclass(frozen=True)
class Files:
    """A language model, a reward model on its layers, and records of both kinds."""

    root: Path

    def model(self, contest: Contest) -> Path:
        return self.root / ("score" if contest.trainer == "RewardTrainer" else "model")

    def records(self, contest: Contest) -> Path:
        return self.root / ("unpaired.jsonl" if contest.ours.type == "kto" else "pairs.jsonl")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    files = Files(tmp_path_factory.mktemp("trl"))
    write_score_model(tiny_hf_model(files.root / "model", **MODEL), files.root / "score")
    for name in ("model", "score"):
        path = chat_tokenizer(files.root / name) / "tokenizer_config.json"
        config = json.loads(path.read_text())
        assert config["chat_template"] == TEMPLATE
        config["chat_template"] = TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")
        path.write_text(json.dumps(config))
    write_records(files.root / "pairs.jsonl", pairs())
    write_records(files.root / "unpaired.jsonl", unpaired())
    return files


@dataclasses.dataclass(frozen=True)
class Steps:
    """What ours did: the records of each step, what was logged, and the weights at last."""

    records: list[list[str]]
    logs: list[dict[str, float]]
    weights: dict[str, Tensor]


def our_steps(files: Files, name: str) -> Steps:
    """Train as the stages do, two records in a row."""
    contest = CONTESTS[name]
    is_reward = contest.trainer == "RewardTrainer"
    run = RunConfig(
        stage="rm" if is_reward else "dpo",
        output_dir=str(files.root / "ours" / name),
        precision="fp32",
        model=ModelConfig(hf_path=str(files.model(contest))),
        data=DataConfig(
            sources=(SourceConfig(name="all", path=str(files.records(contest))),),
            seq_length=128,
            packing=False,
            cache_dir=str(files.root / "cache"),
        ),
        train=TrainConfig(micro_batch_size=2, global_batch_size=BATCH, train_iters=STEPS),
        optim=OPTIM,
        loss=contest.ours,
    )
    opened = preference.open_data(run)
    engine = preference.build(opened)
    data = opened.data
    steps = loader(opened, engine, has_reference=not is_reward and needs_reference(run.loss))
    objective = BradleyTerry(run.loss) if is_reward else make_objective(run.loss)
    reports = [engine.train_step(batches, objective) for batches in steps]
    export_weights(
        engine.chunks,
        Path(run.output_dir),
        architecture=engine.architecture,
        source_dir=files.model(contest),
        groups=engine.state.groups,
        dtype="fp32",
    )
    shutdown_parallel()
    ids = [data.train.record_ids(sequence) for sequence in range(STEPS * BATCH)]
    return Steps(
        records=[sum(step, []) for step in itertools.batched(ids, BATCH)],
        logs=[{**r.metrics, "grad_norm": r.grad_norm or 0.0} for r in reports],
        weights=read_weights(Path(run.output_dir)),
    )


def loader(
    opened: preference.Opened, engine: Engine, *, has_reference: bool
) -> Iterator[list[PreferenceBatch]]:
    """Score the reference, make the engine ready, and open the steps' micro-batches."""
    data, is_kto = opened.data, opened.data.kind == "unpaired"
    reference = (
        reference_logps(engine, data, cache=opened.cache, say=_silent) if has_reference else None
    )
    if is_kto:
        mismatched = Mismatched.of(data)
        read = data.records.read_answers
        scores = reference_scores(engine, mismatched, read, cache=opened.cache, say=_silent)
        baseline = KtoBaseline(engine, mismatched, scores)
    preference.prepare(engine)
    steps = PreferenceLoader(
        data.train,
        micro_batch_size=2,
        global_batch_size=BATCH,
        dp_rank=0,
        dp_size=1,
        seq_length=opened.run.data.seq_length,
        pad_to_full=False,
        ref_logps=reference,
    )
    if not is_kto:
        return iter(steps)
    numbers = [
        preference.answers_of(data.train, range(first, first + BATCH))
        for first in range(0, STEPS * BATCH, BATCH)
    ]
    return with_baselines(iter(steps), numbers, baseline)


def _silent(line: str) -> None:
    """Say nothing."""


def trl_steps(files: Files, name: str, order: Sequence[Sequence[str]]) -> TrlOutcome:
    """Train as TRL does, on the same records in the same order."""
    import trl
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    contest = CONTESTS[name]
    lines = files.records(contest).read_text("utf-8").splitlines()
    records = {record.pop("id"): record for record in map(json.loads, lines)}
    trainers = {
        "DPOTrainer": (trl.DPOTrainer, trl.DPOConfig),
        "KTOTrainer": (trl.KTOTrainer, trl.KTOConfig),
        "CPOTrainer": (CPOTrainer, CPOConfig),
        "RewardTrainer": (trl.RewardTrainer, trl.RewardConfig),
    }
    trainer, config = trainers[contest.trainer]
    is_reward = contest.trainer == "RewardTrainer"
    if contest.ours.type == "kto":
        rows = list(records.values())  # mismatched as they lie in the file, again and again
    else:
        rows = [records[i] for step in order for i in step]
    path = files.model(contest)
    return trl_runs.train(
        trainer(
            model=trl_runs.reward_model(path) if is_reward else trl_runs.language_model(path),
            args=config(**trl_runs.arguments(files.root / "trl" / name), **contest.theirs),
            train_dataset=trl_runs.data_set(rows),
            processing_class=trl_runs.tokenizer_of(path, pad_token=PAD),
        )
    )


@pytest.fixture(scope="module")
def outcomes(
    files: Files, monkeypatch_module: pytest.MonkeyPatch
) -> dict[str, tuple[Steps, TrlOutcome]]:
    torch.set_num_threads(1)
    found = {}
    for name in CONTESTS:
        ours = our_steps(files, name)
        found[name] = ours, trl_steps(files, name, ours.records)
    return found


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")  # TRL then tells nobody that it is used
        patch.setenv("TQDM_DISABLE", "1")
        yield patch


@pytest.mark.parametrize("name", CONTESTS)
def test_ten_steps_are_those_of_trl(
    outcomes: dict[str, tuple[Steps, TrlOutcome]], name: str
) -> None:
    ours, theirs = outcomes[name]
    for mine, other in zip(ours.logs, theirs.logs, strict=True):
        for metric in ("loss", "grad_norm", *CONTESTS[name].metrics):
            assert mine[metric] == pytest.approx(other[metric], rel=TOLERANCE, abs=TOLERANCE), (
                metric
            )


@pytest.mark.parametrize("name", CONTESTS)
def test_the_weights_after_them_are_those_of_trl(
    outcomes: dict[str, tuple[Steps, TrlOutcome]], files: Files, name: str
) -> None:
    ours, theirs = outcomes[name]
    before = read_weights(files.model(CONTESTS[name]))
    assert ours.weights.keys() == theirs.weights.keys()
    for key, weight in theirs.weights.items():
        moved = float((before[key] - weight).norm())
        assert float((ours.weights[key] - weight).norm()) < TOLERANCE * moved, key


def test_the_contests_are_no_formality(outcomes: dict[str, tuple[Steps, TrlOutcome]]) -> None:
    for ours, theirs in outcomes.values():
        norms = [log["grad_norm"] for log in theirs.logs]
        assert min(norms) < max(norms)
        assert len({log["loss"] for log in theirs.logs}) == STEPS
        assert all(len(set(step)) == BATCH for step in ours.records)
    norms = [log["grad_norm"] for _, theirs in outcomes.values() for log in theirs.logs]
    assert min(norms) < OPTIM.clip_grad < max(norms), "some steps are clipped, and some are not"
