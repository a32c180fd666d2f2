"""Checkpoints of one layout get new tokens, and training goes on from them under another.

What is read is saved again at once and compared bit for bit with what the resized checkpoint
holds; that in turn with the checkpoint before, and with NumPy's means for the new rows.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_runs import BEFORE, VOCABULARY, Layout, layout, read_tensors, unequal
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from resize_runs import EXTENSION, PIECES, Job, run_jobs
from resize_samples import tokenizer_of
from torch import Tensor

from megatron_cgn.config.schema import ParamGroupConfig
from megatron_cgn.hf.resize import resize_hf
from megatron_cgn.hf.to_hf import convert_to_hf
from megatron_cgn.testing import FP32_PARALLEL_RTOL, run_distributed, tiny_hf_model

HALF_PARALLEL_RTOL = 1e-2
"""Losses of BF16 runs on two layouts, whose sums are rounded to 8 bits in another order."""
ROWS, ALL_ROWS = 1152, 10_000
LAYOUTS: dict[str, Layout] = {
    "one": layout(1),
    "pp2": layout(2, pp=2),
    "pp2-interleaved": layout(2, pp=2, vp=2),
    "tp2": layout(2, tp=2),
    "tp2-pp2": layout(4, tp=2, pp=2),
}
PAIRS = [
    ("tp2-pp2", "bf16", "llama", ("one", "pp2")),
    ("one", "fp32", "llama", ("tp2",)),
    ("pp2-interleaved", "fp32", "tied", ("one", "tp2")),
]
WARM_UP = (
    ParamGroupConfig(
        name="new", parameters=("embeddings", "output"), rows="new", rows_from=VOCABULARY
    ),
    ParamGroupConfig(name="rest", parameters=("others",), lr_mult=0.5),
)
CASES = [(f"{p}-{m}", s, f"{p}-{m}-{o}") for s, p, m, others in PAIRS for o in others]
MATRICES = ("word_embeddings.weight", "output_layer.weight")
MASTER = "optimizer.state.fp32_param."


class Runs:
    """The checkpoints of all jobs and the losses of those that went on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        models = {}
        for name, family in (("llama", "llama"), ("tied", "qwen2")):
            models[name] = tiny_hf_model(
                root / name,
                family,
                vocab_size=VOCABULARY,
                hidden_size=32,
                num_hidden_layers=4,
                tie_word_embeddings=name == "tied",
            )
            models[f"{name}-resized"] = root / f"{name}-resized"
            resize_hf(
                models[name],
                models[f"{name}-resized"],
                EXTENSION,
                write_tokenizer=tokenizer_of(EXTENSION),
            )
        jobs = []
        for start, precision, model, others in PAIRS:
            name = f"{precision}-{model}"
            like = {"precision": precision, "model": model}
            jobs.append(Job(name=name, layout=LAYOUTS[start].of(**like)))
            jobs += [
                Job(name=f"{name}-{other}", layout=LAYOUTS[other].of(**like), start=name)
                for other in others
            ]
        jobs.append(
            Job(
                name="fp32-llama-anew",
                layout=LAYOUTS["tp2"].of(precision="fp32", model="llama", groups=WARM_UP),
                start="fp32-llama",
                resumes=False,
            )
        )
        self.losses: list[dict[str, list[float]]] = run_distributed(
            run_jobs, 4, root, models, jobs, timeout_s=1200
        )

    def tensors(self, name: str, rows: int = ALL_ROWS) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        return read_tensors(self.root / name, rows=rows)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("resized"))


@pytest.mark.parametrize("name", dict.fromkeys(start for start, _, _ in CASES))
def test_old_rows_and_other_tensors_stay_and_new_rows_are_means(runs: Runs, name: str) -> None:
    old, new = runs.tensors(name, VOCABULARY), runs.tensors(f"{name}-resized")
    # Weights, moments and, in BF16, masters.
    assert sum(key.endswith(MATRICES) for key in old) == (3 if "fp32" in name else 4) * (
        1 if "tied" in name else 2
    )
    assert unequal(runs.tensors(f"{name}-resized", VOCABULARY), old) == []
    for key, tensor in new.items():
        if not key.endswith(MATRICES):
            continue
        assert tensor.shape == (ROWS, 32)
        assert not tensor[VOCABULARY + len(PIECES) :].any(), "padding"
        made = tensor[VOCABULARY : VOCABULARY + len(PIECES)]
        if "exp_avg" in key:
            assert old[key].any(), "there were moments"
            assert not made.any()
            continue
        exact = old.get(f"{MASTER}{key}", old[key]).float().numpy()
        mean = np.stack([exact[list(ids)].mean(axis=0) for ids in PIECES])
        assert torch.equal(made, torch.from_numpy(mean).to(made.dtype))


@pytest.mark.parametrize(("start", "_", "name"), CASES)
def test_every_layout_reads_what_was_written(runs: Runs, start: str, _: str, name: str) -> None:
    written, read = runs.tensors(f"{start}-resized", ROWS), runs.tensors(name, ROWS)
    assert unequal(read, written) == []


def test_a_run_that_begins_anew_may_take_the_optimizer_over(runs: Runs) -> None:
    """As ``checkpoint.load_optimizer`` does it: the same tensors, at step 0."""
    name = "fp32-llama-anew"
    assert (runs.root / name / "step_0000000").is_dir()
    assert unequal(runs.tensors(name, ROWS), runs.tensors("fp32-llama-resized", ROWS)) == []
    # Adam's correction of the new rows begins; that of the others goes on.
    (saved,) = (runs.root / name).glob("step_*")
    record = load_common_state_dict(saved / "dist")["group_steps"]
    assert [entry["steps"] for entry in record] == [0, BEFORE]
    # Its rates are those of the first steps, and the moments are those of a run that resumes.
    losses = runs.losses[0]
    assert losses[name][0] == pytest.approx(losses["fp32-llama-tp2"][0], rel=FP32_PARALLEL_RTOL)


def test_training_goes_on_alike_on_every_layout(runs: Runs) -> None:
    for start, precision, model, others in PAIRS:
        if len(others) < 2:
            continue
        losses = [runs.losses[0][f"{precision}-{model}-{other}"] for other in others]
        tolerance = FP32_PARALLEL_RTOL if precision == "fp32" else HALF_PARALLEL_RTOL
        for other in losses[1:]:
            assert other == pytest.approx(losses[0], rel=tolerance), start


@pytest.mark.parametrize("name", ["fp32-llama", "fp32-tied"])
def test_the_same_as_resizing_the_exported_model(runs: Runs, name: str, tmp_path: Path) -> None:
    (old,) = (runs.root / name).glob("step_*")
    (new,) = (runs.root / f"{name}-resized").glob("step_*")
    convert_to_hf(old, tmp_path / "old")
    convert_to_hf(new, tmp_path / "new")
    resize_hf(tmp_path / "old", tmp_path / "hf", EXTENSION, write_tokenizer=tokenizer_of(EXTENSION))
    ours, theirs = (tmp_path / n / "model.safetensors" for n in ("new", "hf"))
    assert ours.read_bytes() == theirs.read_bytes()
