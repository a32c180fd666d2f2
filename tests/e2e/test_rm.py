"""Stage rm through train.py: it learns what is better, and its exports score alike anywhere."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chats import TinyChats
from tokenizers import AddedToken, Tokenizer
from train_runs import Ended, Zygote, records

from megatron_cgn.config.schema import ParallelConfig
from megatron_cgn.eval.rewards import BINS, CHOSEN_LONGER, PREFERS_LONGER
from megatron_cgn.parallel.state import initialize_parallel, shutdown_parallel
from megatron_cgn.rollout.open import find_model, open_engine
from megatron_cgn.rollout.score import score_conversations
from tokenizer.chat import ChatTemplate, Message

STEPS = 12
REWARD_ATOL = 1e-5
"""FP32 rewards of about 1: other kernels and sums in another order, one forward pass."""
MERGED_ATOL = 1e-4
"""The same with adapters added to FP32 weights, which are rounded once more."""
GOOD, BAD = ("coolant", "蒸汽"), ("valve", "book")
LORA = ("+lora=default", "optim.lr=2e-2", "lora.rank=4", "lora.alpha=8")
PP = ("parallel.pipeline_model_parallel_size=2",)


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Answers are the better, the more good words they have."""
    root, draw = tmp_path_factory.mktemp("data"), random.Random(3)

    def answer(good: int) -> str:
        words = [*draw.choices(GOOD, k=good), *draw.choices(BAD, k=3 - good)]
        return " ".join(draw.sample(words, 3))

    pairs = [
        {"prompt": f"{n}?", "chosen": answer(3), "rejected": answer(0)}
        | ({"margin": 0.5} if n % 2 else {})
        for n in range(30)
    ]
    rankings = [{"prompt": f"{n}!", "answers": [answer(k) for k in (3, 2, 0)]} for n in range(24)]
    return {
        "pairs": _write(root / "pairs.jsonl", pairs),
        "rankings": _write(root / "rankings.jsonl", rankings),
    }


@pytest.fixture(scope="module")
def model(chats: TinyChats, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny chat model, whose tokenizer has a token that pads."""
    path = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(chats.model, path)
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<|pad|>", special=True)])
    backend.save(str(path / "tokenizer.json"))
    return path


def _overrides(model: Path, sources: dict[str, Path], output: Path, *more: str) -> list[str]:
    base = {
        "model.hf_path": model,
        "precision": "fp32",
        "data.sources": "[{}]".format(
            ",".join(f"{{name: {name}, path: {path}}}" for name, path in sources.items())
        ),
        "data.seq_length": 128,
        "data.validation_fraction": 0.25,
        "train.micro_batch_size": 1,
        "train.global_batch_size": 4,
        "train.train_iters": STEPS,
        "train.validation_interval_steps": 6,
        "optim.lr": "1e-2",
        "output_dir": output,
    }
    given = {text.partition("=")[0] for text in more}
    kept = [f"{key}={value}" for key, value in base.items() if key not in given]
    return ["+stage=rm", *kept, *more]


@pytest.fixture(scope="module")
def done(
    model: Path,
    sources: dict[str, Path],
    zygote: Zygote,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Outputs of a run of all weights, and of one of adapters in two pipeline stages."""
    outputs = {}
    for name, ranks, more in (
        ("full", 1, ("loss.center_rewards=0.01",)),
        ("lora", 2, (*LORA, *PP)),
    ):
        outputs[name] = output = tmp_path_factory.mktemp(name)
        ended = zygote.run(
            _overrides(model, sources, output, *more), stderr=output / "stderr", ranks=ranks
        )
        assert ended.codes == [0] * ranks, ended.stderr
        assert "Traceback" not in ended.stderr
    return outputs


@pytest.mark.parametrize("name", ["full", "lora"])
def test_it_learns_which_answer_is_better(done: dict[str, Path], name: str) -> None:
    scores = [r for r in records(done[name]) if "val/pairs/accuracy" in r]
    assert [r["step"] for r in scores] == [0, 6, STEPS]
    before, after = scores[0], scores[-1]
    for source in ("pairs", "rankings"):
        assert after[f"val/{source}/accuracy"] > max(0.9, before[f"val/{source}/accuracy"])
        assert after[f"val/{source}/margin"] > before[f"val/{source}/margin"] + 1.0
        assert after[f"val/{source}/loss"] < 0.3 < before[f"val/{source}/loss"]
        assert 0 <= after[f"val/{source}/rewards/calibration_error"] <= 1
        if after[f"val/{source}/accuracy"] == 1:  # then rewards prefer what the data prefer
            longer = [after[f"val/{source}/{m}"] for m in (PREFERS_LONGER, CHOSEN_LONGER)]
            assert longer[0] == pytest.approx(longer[1])
    # With every pair the right way round, Kendall's tau is 1: twice the accuracy less one.
    tau, accuracy = (after[f"val/rankings/{m}"] for m in ("rewards/kendall_tau", "accuracy"))
    assert tau == pytest.approx(2 * accuracy - 1, abs=1e-6)
    assert "val/pairs/rewards/kendall_tau" not in after
    steps = [r for r in records(done[name]) if "train/rankings/accuracy" in r]
    assert steps[-1]["accuracy"] > 0.9 and "train/pairs/margin" in steps[-1]
    told = (done[name] / "stderr").read_text("utf-8")
    assert "rewards are read at the last token of each answer; margins of the data" in told


@pytest.mark.parametrize("name", ["full", "lora"])
def test_how_sure_it_is_is_written_down(done: dict[str, Path], name: str) -> None:
    table = json.loads((done[name] / "reliability.json").read_text("utf-8"))
    last = [r for r in records(done[name]) if "val/pairs/accuracy" in r][-1]
    assert table["step"] == last["step"] == STEPS
    for source, bins in table["sources"].items():
        assert 0 < len(bins) <= BINS
        total = sum(b["prompts"] for b in bins)
        right = sum(b["prompts"] * b["accuracy"] for b in bins)
        gaps = sum(b["prompts"] * abs(b["accuracy"] - b["confidence"]) for b in bins)
        # No two rewards are equal here, so both count alike.
        assert right / total == pytest.approx(last[f"val/{source}/accuracy"])
        error = last[f"val/{source}/rewards/calibration_error"]
        assert gaps / total == pytest.approx(error)


CONVERSATIONS = [
    [("user", "7?"), ("assistant", "coolant 蒸汽 coolant")],
    [("user", "7?"), ("assistant", "book")],
    [("system", "steam"), ("user", "1"), ("assistant", "valve"), ("user", "2"), ("assistant", "x")],
]


def _mine(model: Path, *, adapter: Path | None = None) -> list[float]:
    files = find_model(model, adapter=adapter)
    state = initialize_parallel(ParallelConfig())
    try:
        engine = open_engine(files, state, precision="fp32")
        return score_conversations(
            engine,
            [[Message(role, text) for role, text in said] for said in CONVERSATIONS],
            template=ChatTemplate.open(files.tokenizer),
        )
    finally:
        shutdown_parallel()


def _of_transformers(directory: Path, model: Any) -> list[float]:
    """All at once, so that the padding must be told from the text."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    said = [[{"role": r, "content": t} for r, t in c] for c in CONVERSATIONS]
    inputs = tokenizer.apply_chat_template(
        said, return_dict=True, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    assert logits.shape == (len(said), 1)
    return [float(value) for value in logits[:, 0]]


def test_the_export_scores_alike_everywhere(done: dict[str, Path]) -> None:
    from transformers import AutoModelForSequenceClassification

    output = done["full"]
    model: Any = AutoModelForSequenceClassification.from_pretrained(output / "export")
    assert model.config.num_labels == 1
    expected = _of_transformers(output / "export", model)
    assert expected[0] > expected[1] + 1.0
    for directory in (output / "export", output / "checkpoints" / "latest"):
        assert _mine(directory) == pytest.approx(expected, rel=0, abs=REWARD_ATOL)


def test_an_adapter_has_its_head_with_it(done: dict[str, Path], model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    output = done["lora"]
    settings = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"] == ["score"]
    base: Any = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    pad = json.loads((output / "export" / "config.json").read_text())["pad_token_id"]
    base.config.pad_token_id = pad
    adapted = PeftModel.from_pretrained(base, str(output / "adapter"))
    expected = _of_transformers(output / "adapter", adapted)
    assert expected[0] > expected[1] + 1.0
    merged: Any = AutoModelForSequenceClassification.from_pretrained(output / "export")
    for found, tolerance in (
        (_of_transformers(output / "export", merged), MERGED_ATOL),
        (_mine(output / "export"), MERGED_ATOL),
        (_mine(output / "checkpoints" / "latest"), REWARD_ATOL),
        (_mine(model, adapter=output / "adapter"), REWARD_ATOL),
    ):
        assert found == pytest.approx(expected, rel=0, abs=tolerance)


def test_what_has_no_effect_is_refused(
    model: Path, sources: dict[str, Path], zygote: Zygote, tmp_path: Path
) -> None:
    without = {"rankings": sources["rankings"]}
    runs: list[tuple[dict[str, Path], str, str]] = [
        (sources, "loss.beta=0.1", "loss.beta: 0.1 has no effect with stage=rm"),
        (without, "loss.use_margins=true", "no record has a 'margin'"),
    ]
    started = []
    for number, (data, option, message) in enumerate(runs):
        stderr = tmp_path / f"stderr{number}"
        arguments = _overrides(model, data, tmp_path / str(number), option)
        started.append((zygote.start(arguments, stderr=stderr), message))
    for run, message in started:
        ended: Ended = run.wait()
        assert ended.codes == [2] and message in ended.stderr, ended.stderr
        assert "Traceback" not in ended.stderr
