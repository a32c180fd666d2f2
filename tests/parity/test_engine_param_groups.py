"""Groups of parameters and rows against plain PyTorch, on every kind of layout.

The plain loop imports nothing of the engine: rows that are trained apart are leaves of their own
there, joined to the weight of a `transformers` model by `torch.func.functional_call`, and PyTorch's
AdamW has a group for each. Of what is frozen it takes the gradient away, and does nothing else.
"""

import dataclasses
import fnmatch
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import (
    OPTIM,
    Case,
    Outcome,
    build_engine,
    differences,
    global_batch,
    plain_rate,
    train,
    write_models,
)
from safetensors.torch import load_file
from torch import Tensor

from megatron_cgn.config.schema import OptimConfig, ParallelConfig, ParamGroupConfig
from megatron_cgn.engine.engine import Engine
from megatron_cgn.hf.export import export_weights
from megatron_cgn.parallel.state import shutdown_parallel
from megatron_cgn.testing import FP32_PARALLEL_RTOL, release_engine, run_distributed

STEPS = 6
FROZEN = 3
"""Steps of the warm-up."""
FIRST_NEW = 900
"""Rows from here on are new. Of two tensor-parallel ranks with 512 rows each, the second has all of
them, and of their neighbours; about 4 of the 128 tokens of a batch are new."""
WEIGHTS_RTOL = 2e-4
"""Of a tensor's norm after six steps. The first steps of AdamW move every weight by the learning
rate whatever its gradient's size, so rounding of the smallest gradients shows; here the layers'
first steps are at the full rate. Without weight decay they would differ by 6e-4."""


def _warm_up(*parameters: str) -> tuple[ParamGroupConfig, ...]:
    return (
        ParamGroupConfig(name="new", parameters=parameters, rows="new", rows_from=FIRST_NEW),
        ParamGroupConfig(name="rest", parameters=("others",), frozen_until_step=FROZEN),
    )


GROUPS: dict[str, tuple[ParamGroupConfig, ...]] = {
    "warm-up": _warm_up("embeddings", "output"),
    "warm-up-tied": _warm_up("embeddings"),
    # A cut within the first tensor-parallel rank's rows, and every setting at once.
    "rates": (
        ParamGroupConfig(
            name="new", parameters=("embeddings",), rows="new", rows_from=300, lr_mult=3.0
        ),
        ParamGroupConfig(
            name="old",
            parameters=("embeddings",),
            rows="old",
            rows_from=300,
            lr=5e-4,
            weight_decay=0.0,
        ),
        ParamGroupConfig(
            name="mlp", parameters=("model.layers.*.mlp.*",), weight_decay=0.5, trained_until_step=4
        ),
        ParamGroupConfig(
            name="head", parameters=("output", "model.norm.weight"), frozen_until_step=2
        ),
        ParamGroupConfig(name="last", parameters=("model.layers.3.self_attn.*",), lr_mult=0.5),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """A group as the plain loop knows it: written out, not derived from the configuration."""

    names: str
    rows: slice = slice(0, None)
    lr_mult: float = 1.0
    weight_decay: float = 0.1
    trained: range = range(1, STEPS + 1)


PLAIN: dict[str, list[Plain]] = {
    "warm-up": [
        Plain(names="model.embed_tokens.weight", rows=slice(900, None)),
        Plain(names="lm_head.weight", rows=slice(900, None)),
        Plain(names="model.embed_tokens.weight", rows=slice(0, 900), trained=range(4, 7)),
        Plain(names="lm_head.weight", rows=slice(0, 900), trained=range(4, 7)),
        Plain(names="*", trained=range(4, 7)),
    ],
    "rates": [
        Plain(names="model.embed_tokens.weight", rows=slice(300, None), lr_mult=3.0),
        Plain(names="model.embed_tokens.weight", rows=slice(0, 300), lr_mult=0.5, weight_decay=0.0),
        Plain(names="*.mlp.*", weight_decay=0.5, trained=range(1, 5)),
        Plain(names="lm_head.weight", trained=range(3, 7)),
        Plain(names="model.norm.weight", trained=range(3, 7)),
        Plain(names="model.layers.3.self_attn.*", lr_mult=0.5),
        Plain(names="*"),
    ],
}
PLAIN["warm-up-tied"] = [group for group in PLAIN["warm-up"] if group.names != "lm_head.weight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A layout and the groups it is trained by."""

    groups: str
    case: Case


def _run_of(groups: str, model: str = "llama", precision: Any = "fp32", **parallel: Any) -> Run:
    sizes = {"tp": "tensor", "pp": "pipeline", "vp": "virtual_pipeline"}
    names = {short: f"{long}_model_parallel_size" for short, long in sizes.items()}
    names["cp"] = "context_parallel_size"
    layout = ParallelConfig(**{names.get(k, k): v for k, v in parallel.items()})
    optim: OptimConfig = dataclasses.replace(OPTIM, param_groups=GROUPS[groups])
    return Run(
        groups=groups,
        case=Case(parallel=layout, model=model, optim=optim, precision=precision),
    )


TIED = "qwen2-tied-bias"
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
ONE = {
    "one": _run_of("warm-up"),
    "one-rates-plain": _run_of("rates", distributed_optimizer=False),
    "one-tied": _run_of("warm-up-tied", TIED),
}
TWO = {
    "tp2-sp-rates": _run_of("rates", tp=2, sequence_parallel=True),
    "tp2-tied-plain": _run_of("warm-up-tied", TIED, tp=2, distributed_optimizer=False),
    "pp2-rates": _run_of("rates", pp=2),
    "pp2-interleaved-tied": _run_of("warm-up-tied", TIED, pp=2, vp=2),
    "cp2-rates": _run_of("rates", cp=2),
    "dp2-rates": _run_of("rates"),
    "dp2-overlap-tied": _run_of("warm-up-tied", TIED, **OVERLAP),
}
HALF = {
    "bf16-dp2": _run_of("warm-up", precision="bf16"),
    "bf16-tp2-plain": _run_of("warm-up", precision="bf16", tp=2, distributed_optimizer=False),
    "bf16-pp2-tied": _run_of("warm-up-tied", TIED, precision="bf16", pp=2),
    "fp16-dp2": _run_of("warm-up", precision="fp16"),
}
ALL = {**ONE, **TWO, **HALF}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run gave, the same on every rank but for the moments."""

    losses: list[float]
    norms: list[float]
    rates: list[dict[str, float]]
    frozen_moments: float
    """The largest moment of this rank, while frozen, of what is frozen."""


def _run(runs: dict[str, Run], models: dict[str, Path], root: Path) -> dict[str, Result]:
    """Run in turn on the processes at hand; this rank's results."""
    torch.set_num_threads(1)
    results = {}
    for name, run in runs.items():
        engine = build_engine(run.case, models[run.case.model])
        reports = train(engine, steps=range(FROZEN))
        _export(engine, models[run.case.model], root / name / "frozen")
        moments = _frozen_moments(engine)
        reports += train(engine, steps=range(FROZEN, STEPS))
        _export(engine, models[run.case.model], root / name / "end")
        results[name] = Result(
            losses=[r.metrics["loss"] for r in reports],
            norms=[-1.0 if r.grad_norm is None else r.grad_norm for r in reports],
            rates=[{k: v for k, v in r.metrics.items() if k.startswith("lr/")} for r in reports],
            frozen_moments=moments,
        )
        release_engine(engine)
        del engine
        gc.collect()
    shutdown_parallel()
    return results


def _export(engine: Engine, source: Path, target: Path) -> None:
    export_weights(
        engine.chunks,
        target,
        architecture=engine.architecture,
        source_dir=source,
        groups=engine.state.groups,
        dtype="fp32",
    )


def _frozen_moments(engine: Engine) -> float:
    """The largest moment in this rank's share of what the warm-up freezes."""
    largest = 0.0
    for slot in engine._slots:
        for piece in slot.pieces:
            if piece.group["name"] == "rest":
                part = slice(piece.start - slot.start, piece.end - slot.start)
                tensors = slot.tensors()
                largest = max(
                    largest,
                    *(float(tensors[n][part].abs().max()) for n in ("exp_avg", "exp_avg_sq")),
                )
    return largest


def plain_loop(path: Path, groups: list[Plain]) -> Outcome:
    """The same six steps with `transformers` and PyTorch alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.train()
    leaves: dict[str, list[tuple[int, torch.nn.Parameter]]] = {}
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    times: list[tuple[torch.nn.Parameter, range]] = []
    taken: set[str] = set()
    for group in groups:
        found = [
            (name, weight)
            for name, weight in model.named_parameters()
            if fnmatch.fnmatchcase(name, group.names)
            and (group.rows != slice(0, None) or name not in taken)
        ]
        assert found
        for name, weight in found:
            taken.add(name)
            leaf = torch.nn.Parameter(weight.detach()[group.rows].clone())
            leaves.setdefault(name, []).append((group.rows.start, leaf))
            decay = group.weight_decay if weight.dim() > 1 else 0.0
            optimizer.add_param_group(
                {"params": [leaf], "weight_decay": decay, "mult": group.lr_mult}
            )
            times.append((leaf, group.trained))
    losses, norms, counts = [], [], []
    for step in range(STEPS):
        batch = global_batch(step)
        weights = {
            name: torch.cat([leaf for _, leaf in sorted(parts, key=lambda part: part[0])])
            for name, parts in leaves.items()
        }
        arguments = {"input_ids": batch.tokens, "use_cache": False}
        logits = torch.func.functional_call(model, weights, (), arguments).logits
        nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), reduction="none"
        )
        mask = batch.loss_mask.flatten()
        loss = (nll * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        for leaf, trained in times:
            if step + 1 not in trained:
                leaf.grad = None
        moving = [leaf for leaf, _ in times if leaf.grad is not None]
        norms.append(float(torch.nn.utils.clip_grad_norm_(moving, 3.5)))
        for group in optimizer.param_groups:
            group["lr"] = plain_rate(step) * group.get("mult", 1.0)
        optimizer.step()
        losses.append(loss.item())
        counts.append(int(mask.sum()))
    final = {
        name: torch.cat([leaf.detach() for _, leaf in sorted(parts, key=lambda part: part[0])])
        for name, parts in leaves.items()
    }
    return Outcome(losses=losses, grad_norms=norms, counts=counts, weights=final)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(models: dict[str, Path]) -> dict[str, Outcome]:
    return {
        name: plain_loop(models[TIED if "tied" in name else "llama"], groups)
        for name, groups in PLAIN.items()
    }


class Runs:
    """All runs: ranks' results, and where the weights went."""

    def __init__(self, root: Path, models: dict[str, Path]) -> None:
        self._root = root
        self.start = {name: load_file(path / "model.safetensors") for name, path in models.items()}
        ranks = [_run(ONE, models, root), *run_distributed(_run, 2, {**TWO, **HALF}, models, root)]
        self.ranks = {name: [rank[name] for rank in ranks if name in rank] for name in ALL}

    def weights(self, name: str, when: str) -> dict[str, Tensor]:
        """Exported weights, ``frozen`` or at the ``end``."""
        return load_file(self._root / name / when / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), models)


def test_every_rank_took_part(runs: Runs) -> None:
    worlds = {**dict.fromkeys(ONE, 1), **dict.fromkeys([*TWO, *HALF], 2)}
    assert {name: len(ranks) for name, ranks in runs.ranks.items()} == worlds


@pytest.mark.parametrize("name", [*ONE, *TWO])
def test_steps_are_those_of_plain_pytorch(runs: Runs, plain: dict[str, Outcome], name: str) -> None:
    ranks = runs.ranks[name]
    assert all((r.losses, r.norms) == (ranks[0].losses, ranks[0].norms) for r in ranks)
    reference = plain[ALL[name].groups]
    outcome = Outcome(
        losses=ranks[0].losses,
        grad_norms=ranks[0].norms,
        counts=reference.counts,
        weights=runs.weights(name, "end"),
    )
    found = differences(outcome, reference)
    assert found["loss"] < FP32_PARALLEL_RTOL
    assert found["grad_norm"] < FP32_PARALLEL_RTOL
    assert found["weights"] < WEIGHTS_RTOL


@pytest.mark.parametrize("name", [n for n, run in ALL.items() if run.groups != "rates"])
def test_what_is_frozen_stays_bit_for_bit_and_then_moves(runs: Runs, name: str) -> None:
    start = runs.start[ALL[name].case.model]
    if name.startswith(("bf16", "fp16")):
        dtype = torch.bfloat16 if name.startswith("bf16") else torch.float16
        start = {key: weight.to(dtype).float() for key, weight in start.items()}
    frozen, end = runs.weights(name, "frozen"), runs.weights(name, "end")
    for key, weight in start.items():
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            assert frozen[key][:FIRST_NEW].equal(weight[:FIRST_NEW])
            assert not frozen[key][FIRST_NEW:].equal(weight[FIRST_NEW:])
            assert not end[key][:FIRST_NEW].equal(weight[:FIRST_NEW])
        else:
            assert frozen[key].equal(weight), key
            assert not end[key].equal(weight), key
    assert [r.frozen_moments for r in runs.ranks[name]] == [0.0] * len(runs.ranks[name])


class _FusedLike(torch.optim.Optimizer):
    """AdamW that keeps its books as the fused ones: one count a group, moments where needed."""

    def __init__(self, params: Any, **options: Any) -> None:
        assert options.pop("adam_w_mode")
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(param))
                state["exp_avg"].lerp_(param.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(param.grad, param.grad, value=1 - second)
                mean = state["exp_avg"] / (1 - first ** group["step"])
                root = (state["exp_avg_sq"] / (1 - second ** group["step"])).sqrt()
                update = mean / (root + group["eps"]) + group["weight_decay"] * param
                param.sub_(group["lr"] * update)


@pytest.mark.parametrize("name", ["one", "one-rates-plain"])
def test_optimizers_that_count_by_group(
    plain: dict[str, Outcome],
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Transformer Engine's and Apex's do, and run only on CUDA."""
    monkeypatch.setattr("megatron.core.optimizer.Adam", _FusedLike)
    monkeypatch.setattr("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", False)
    (result,) = _run({name: ONE[name]}, models, tmp_path).values()
    reference = plain[ONE[name].groups]
    assert result.losses == pytest.approx(reference.losses, rel=FP32_PARALLEL_RTOL)
    assert result.norms == pytest.approx(reference.grad_norms, rel=FP32_PARALLEL_RTOL)


def test_clipping_and_the_norm_know_only_what_trains(plain: dict[str, Outcome]) -> None:
    """The reference crosses the limit of 3.5 while everything trains and not before."""
    norms = plain["warm-up"].grad_norms
    assert max(norms[:FROZEN]) < 3.5 < max(norms[FROZEN:])


@pytest.mark.parametrize("name", ["one", "pp2-interleaved-tied", "dp2-rates"])
def test_rates_of_groups_are_recorded(runs: Runs, name: str) -> None:
    rates = runs.ranks[name][-1].rates
    run = [plain_rate(step) for step in range(STEPS)]
    if ALL[name].groups != "rates":
        expected: list[dict[str, float]] = [
            {"lr/rest": 0.0 if step < FROZEN else run[step]} for step in range(STEPS)
        ]
    else:
        expected = [
            {
                "lr/new": 3 * run[step],
                "lr/old": run[step] / 2,
                "lr/mlp": run[step] if step < 4 else 0.0,
                "lr/head": run[step] if step > 1 else 0.0,
                "lr/last": run[step] / 2,
            }
            for step in range(STEPS)
        ]
    assert rates == [pytest.approx(step, rel=1e-12) for step in expected]


@pytest.mark.parametrize("name", HALF)
def test_half_precision_stays_near(runs: Runs, plain: dict[str, Outcome], name: str) -> None:
    epsilon = 2.0**-8 if name.startswith("bf16") else 2.0**-11
    reference = plain[ALL[name].groups]
    (result, *_) = runs.ranks[name]
    # As in `test_engine_precision.py`: half an epsilon of the loss, four of the norm.
    assert result.losses == pytest.approx(reference.losses, rel=epsilon / 2)
    assert result.norms == pytest.approx(reference.grad_norms, rel=4 * epsilon)
