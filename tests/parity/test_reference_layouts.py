"""Reference log-probabilities and KTO's baseline on every kind of layout, against `transformers`.

The expected values are computed answer by answer, without rows, caches or processes.
"""

import dataclasses
import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_runs import (
    EVERY,
    FIRST,
    LORA,
    MISMATCHED,
    MODEL,
    SHIFTS,
    SIZES,
    TIMES,
    ReferenceCase,
    ReferenceOutcome,
    Samples,
    build,
    run_cases,
)
from torch import Tensor

from megatron_cgn.config.schema import ParallelConfig
from megatron_cgn.eval import reference
from megatron_cgn.eval.reference import reference_scores
from megatron_cgn.parallel.state import shutdown_parallel
from megatron_cgn.testing import free_port, run_distributed, tiny_hf_model

ATOL = 1e-5
"""FP32 log-probability of a counted token against `transformers`: other kernels and row shapes,
the same equations."""
BASELINE_ATOL = 1e-4
"""The same of an answer of up to 64 tokens, twice: of the policy and of the reference."""


def layout(tp: int = 1, pp: int = 1, cp: int = 1, vp: int | None = None, **rest: Any) -> Any:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vp,
        **rest,
    )


CASES = {
    "one": ReferenceCase(),
    "dp4-wide": ReferenceCase(world=4, micro_batch_size=3),
    "tp2-sp": ReferenceCase(world=2, parallel=layout(tp=2, sequence_parallel=True)),
    "cp2": ReferenceCase(world=2, parallel=layout(cp=2), micro_batch_size=2),
    "pp2-interleaved": ReferenceCase(world=2, parallel=layout(pp=2, vp=2)),
    "tp2-pp2": ReferenceCase(world=4, parallel=layout(tp=2, pp=2)),
    "dp2-cp2": ReferenceCase(world=4, parallel=layout(cp=2)),
    "lora-off": ReferenceCase(world=2, parallel=layout(tp=2), lora=LORA),
}

SHARED = ReferenceCase(world=2, parallel=layout(pp=2), cache="tp2-pp2")
"""Finds what another layout has scored."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def model(root: Path) -> Path:
    return tiny_hf_model(root / "model", **MODEL)


@pytest.fixture(scope="module")
def adapter(root: Path, model: Path) -> Path:
    """An adapter directory, written by `peft`, that changes the model."""
    peft, net = __import__("peft"), _open(model)
    config = peft.LoraConfig(r=LORA.rank, lora_alpha=8, target_modules=list(LORA.targets))
    adapted = peft.get_peft_model(net, config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    adapted.save_pretrained(root / "adapter")
    return root / "adapter"


@pytest.fixture(scope="module")
def ranks(root: Path, model: Path, adapter: Path) -> list[dict[str, Any]]:
    adapted = ReferenceCase(world=2, parallel=layout(pp=2), adapted=True, lora=_with_path(adapter))
    cases = {**CASES, "shared": SHARED, "lora-on": adapted}
    found: list[dict[str, Any]] = run_distributed(run_cases, 4, cases, model, root, warm=True)
    return found


def _with_path(adapter: Path) -> Any:
    return dataclasses.replace(LORA, alpha=8.0, adapter_path=str(adapter))


def _open(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@torch.no_grad()
def _expected(net: Any) -> Tensor:
    """Log-probability of each answer of `Samples`, float64."""
    samples, found = Samples(), []
    for ids, prompt in zip(samples.ids, samples.prompts, strict=True):
        row = torch.from_numpy(ids)[None]
        logps = net(row, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        found.append(logps.gather(1, row[0, 1:, None])[prompt - 1 :].sum())
    return torch.stack(found)


@pytest.fixture(scope="module")
def base(model: Path) -> Tensor:
    return _expected(_open(model))


def _check(logps: np.ndarray, expected: Tensor) -> None:
    counted = np.concatenate([file.counted for file in Samples().files])
    assert np.abs((logps - expected.numpy()) / counted).max() < ATOL


@pytest.mark.parametrize("name", [*CASES, "lora-on"])
def test_scores_are_those_of_transformers_on_every_layout(
    ranks: list[dict[str, Any]], base: Tensor, model: Path, adapter: Path, name: str
) -> None:
    outcomes = [rank[name] for rank in ranks if name in rank]
    expected = base
    if name == "lora-on":
        peft = __import__("peft")
        expected = _expected(peft.PeftModel.from_pretrained(_open(model), adapter))
        assert (expected - base).abs().min() > 0.01
    for outcome in outcomes:
        assert outcome.every.dtype == np.float32
        _check(outcome.every, expected)
        # What is known is not scored again, and every rank has the same numbers.
        assert np.array_equal(outcome.first[FIRST], outcome.every[FIRST])
        assert np.isnan(np.delete(outcome.first, FIRST)).all()
        assert np.array_equal(outcome.again, outcome.every)
        assert np.array_equal(outcome.every, outcomes[0].every)


@pytest.mark.parametrize("name", CASES)
def test_what_is_scored_and_why_is_told_once(ranks: list[dict[str, Any]], name: str) -> None:
    first, *others = [rank[name] for rank in ranks if name in rank]
    assert all(not outcome.lines for outcome in others)
    lengths = Samples().lengths
    tokens, some = f"{lengths.sum():,}", f"{lengths[FIRST].sum():,}"
    rest = f"{lengths.sum() - lengths[FIRST].sum():,}"
    lines = [re.sub(r" in \S+/", " in ", line) for line in first.lines]
    cache = name
    begin = f"reference: {len(FIRST)} answers, {some} tokens; none found in {cache}, scoring all:"
    assert lines[0] == begin
    assert lines[1:3] == [
        f"  file-{n}.jsonl: {number} answers: not scored before" for n, number in ((0, 7), (1, 5))
    ]
    assert lines[3].startswith(f"reference: scored {some} tokens in ")
    assert lines[4] == (
        f"reference: {len(EVERY)} answers, {tokens} tokens; {len(FIRST)} found in {cache}, scoring "
        f"{len(EVERY) - len(FIRST)} more, {rest} tokens:"
    )
    assert "those that no run before needed or finished" in lines[5]
    assert lines[-1] == f"reference: {len(EVERY)} answers, {tokens} tokens: all found in {cache}"


def test_another_layout_uses_the_same_scores(ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]["shared"]
    assert all("all found in" in line for line in first.lines) and len(first.lines) == 3
    for outcome in (first, ranks[1]["shared"]):
        assert np.array_equal(outcome.every, ranks[0]["tp2-pp2"].every)
        assert np.array_equal(outcome.first, outcome.every)


def test_a_baseline_is_the_mean_over_mismatched_answers(
    ranks: list[dict[str, Any]], base: Tensor, model: Path
) -> None:
    net = _open(model)
    for parameter in net.parameters():
        parameter.data.mul_(TIMES)
    ratios = (_expected(net) - base)[MISMATCHED]
    means = [float(ratios.mean()) + shift for shift in SHIFTS]
    assert means[0] > 0 > means[1], "one is clamped"
    for rank in ranks:
        for name, outcome in rank.items():
            if isinstance(outcome, ReferenceOutcome) and not name.startswith("lora"):
                positive, negative = outcome.baselines
                assert positive == pytest.approx(means[0], abs=BASELINE_ATOL), name
                assert negative == 0.0


def test_what_happens_to_one_rank_is_told_on_both(ranks: list[dict[str, Any]]) -> None:
    told = [rank["faults"] for rank in ranks if "faults" in rank]
    assert told[0] == told[1] and len(told) == 2
    stopped, full, nan = told[0]
    kept = re.fullmatch(r"StoppedBySignal: .* the scores of (\d+) answers were kept", stopped)
    assert kept is not None and 0 < int(kept[1]) < len(EVERY)
    assert full.startswith("DataError: ") and "No space left" in full and "Make room" in full
    assert re.match(
        r"ModelError: model.hf_path: .*\(file-[01]\.jsonl:\d+\) is nan in precision=fp32", nan
    )


def _killed(model: Path, cache: Path, port: int) -> None:
    """Score until half of the fourth block is written, and die as a machine's power fails."""
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    reference._KEEP_S, write, blocks = 0.0, os.write, 0

    def dying(descriptor: int, data: Any) -> int:
        nonlocal blocks
        blocks += 1
        if blocks < 4:
            return write(descriptor, data)
        write(descriptor, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("dead")

    os.write = dying
    engine = build(ReferenceCase(), model)
    reference_scores(engine, Samples(), EVERY, cache=cache)


def test_a_killed_run_goes_on_where_it_was(
    root: Path, model: Path, base: Tensor, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_killed, args=(model, tmp_path, free_port()))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    lines: list[str] = []
    torch.set_num_threads(1)
    engine = build(ReferenceCase(micro_batch_size=2), model)
    try:
        logps = reference_scores(engine, Samples(), EVERY, cache=tmp_path, say=lines.append)
    finally:
        shutdown_parallel()
    _check(logps, base)
    told = re.match(r"reference: 23 answers, [\d,]+ tokens; (\d+) found in", lines[0])
    assert told is not None and 0 < int(told[1]) < sum(SIZES)
    # Those found are the killed run's, bit for bit: rows as the case "one" packed them.
    same = int((logps == ranks[0]["one"].every).sum())
    assert same >= int(told[1])
