"""The self-check before the first step: each of its causes is really made, and named.

One process: what is compared is gathered over data-parallel ranks, which whole runs test.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_chats import CHATML, TinyChats, write_tiny_chats
from tiny_preferences import write_tiny_preferences

from megatron_cgn.batch import PreferenceBatch
from megatron_cgn.config.preference_rules import preference_faults
from megatron_cgn.config.schema import (
    DataConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PreferenceLoss,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from megatron_cgn.data.preference import build_preference_data, plan_preference
from megatron_cgn.data.reference_answers import Answers
from megatron_cgn.errors import DataError, ModelError, UserError
from megatron_cgn.eval.preferences import score_preferences
from megatron_cgn.eval.reference import reference_scores
from megatron_cgn.eval.self_check import TOLERANCE, check_first_step, weights_sums
from megatron_cgn.model.lora import adapter_parameters
from megatron_cgn.objectives.preference import make_objective
from megatron_cgn.parallel.state import shutdown_parallel
from megatron_cgn.stages import preference
from megatron_cgn.testing import release_engine
from tokenizer.chat import ChatTemplate
from tokenizer.wrapper import Tokenizer


class World:
    """A run of DPO up to its first step."""

    def __init__(self, chats: TinyChats, pairs: Path, output: Path, *, lora: bool) -> None:
        self.run = RunConfig(
            stage="dpo",
            output_dir=str(output),
            precision="fp32",
            model=ModelConfig(hf_path=str(chats.model)),
            data=DataConfig(sources=(SourceConfig(name="pairs", path=str(pairs)),), seq_length=128),
            train=TrainConfig(micro_batch_size=2, global_batch_size=4, train_iters=2),
            optim=OptimConfig(lr=1e-3),
            lora=LoraConfig(rank=4) if lora else LoraConfig(),
        )
        self.opened = opened = preference.open_data(self.run)
        self.engine = preference.build(opened)
        self.data = opened.data
        plan = self.data.plan
        self.scored = Answers(
            self.data.records.files, [file.path for file in plan.files], plan.reading
        )
        self.reference = reference_scores(
            self.engine,
            self.scored,
            self.data.records.read_answers,
            cache=opened.cache,
            say=lambda line: None,
        )
        self.weights = weights_sums(self.engine.chunks)
        preference.prepare(self.engine)

    def batches(self) -> list[PreferenceBatch]:
        steps = preference.training_batches(self.engine, self.data, self.reference)
        first = next(steps)
        steps.close()
        return first

    def check(
        self,
        batches: list[PreferenceBatch] | None = None,
        answers: list[npt.NDArray[np.int64]] | None = None,
    ) -> str:
        return check_first_step(
            self.engine,
            self.batches() if batches is None else batches,
            make_objective(self.run.loss),
            answers=answers or preference.answers_of_first_step(self.engine, self.data),
            scored=self.scored,
            reference=self.reference,
            weights_before=self.weights,
            cache=self.opened.cache,
        )


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    made = World(
        write_tiny_chats(root),
        write_tiny_preferences(root).pairs,
        root / "run",
        lora=request.param,
    )
    yield made
    release_engine(made.engine)
    shutdown_parallel()


def test_a_policy_that_is_its_reference_has_a_loss_of_ln_2(world: World) -> None:
    line = world.check()
    assert "loss 0.6931, margin" in line and "answers agree with the reference" in line
    # Most of the bound is room, even of an answer of one token.
    distance = float(line.partition("agree with the reference to ")[2].split()[0])
    assert distance < TOLERANCE["fp32"] / 100


STARTS = {
    "sigmoid": math.log(2),
    "ipo": 25.0,
    "hinge": 1.0,
    "robust": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
}
"""The loss of a policy that is its reference, by each equation at log-ratios of 0: IPO's is
1 / (2 · 0.1) squared."""


@pytest.mark.parametrize("loss", [n for n in get_args(PreferenceLoss) if n != "kto"])
def test_every_loss_of_pairs_starts_where_its_equation_does(world: World, loss: Any) -> None:
    config = LossConfig(type=loss)
    faults = preference_faults(dataclasses.replace(world.run, loss=config))
    assert list(faults) == []
    scores = score_preferences(world.engine, world.batches(), make_objective(config))
    if loss in STARTS:
        assert scores["loss"] == pytest.approx(STARTS[loss], rel=1e-5)
        assert scores["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    else:
        assert scores["loss"] > 0 and scores["rewards/chosen"] < 0


def _refused(world: World, *texts: str, **read: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        world.check(**read)
    for text in ("self-check before the first step", "Nothing was trained", *texts):
        assert text in str(caught.value), caught.value
    return caught.value


def _mask(batch: PreferenceBatch) -> PreferenceBatch:
    """Count the place in front of each answer's first counted one too."""
    mask = batch.loss_mask.clone()
    mask[0, :-1] = torch.maximum(mask[0, :-1], mask[0, 1:])
    return dataclasses.replace(batch, loss_mask=mask)


def _tokens(batch: PreferenceBatch) -> PreferenceBatch:
    """Write another role, as another template would, in the prompt of the first answer."""
    tokens = batch.tokens.clone()
    tokens[0, 1] += 1
    return dataclasses.replace(batch, tokens=tokens)


def _labels(batch: PreferenceBatch) -> PreferenceBatch:
    """Forget to shift."""
    return dataclasses.replace(batch, labels=batch.tokens)


@pytest.mark.parametrize(
    ("change", "text"), [(_mask, "tokens instead of"), (_tokens, "tokens"), (_labels, "labels")]
)
def test_other_tokens_than_the_reference_scored(
    world: World, change: Callable[[PreferenceBatch], PreferenceBatch], text: str
) -> None:
    first, *rest = world.batches()
    error = _refused(
        world,
        "the template or the mask is likely to be wrong",
        text,
        batches=[change(first), *rest],
    )
    assert isinstance(error, DataError)


def test_scores_of_something_else(world: World) -> None:
    """As a cache of other weights would have them: one answer of eight is enough."""
    number = preference.answers_of_first_step(world.engine, world.data)[0][1]
    before = world.reference[number]
    world.reference[number] -= 0.5
    try:
        error = _refused(
            world,
            "the cache is likely to be wrong",
            "1 of 8 answers",
            f"answer {number:,} the most",
        )
    finally:
        world.reference[number] = before
    assert isinstance(error, DataError)
    assert str(world.opened.cache) in str(error)


def test_scores_that_nobody_made(world: World) -> None:
    number = preference.answers_of_first_step(world.engine, world.data)[0][0]
    before = world.reference[number]
    world.reference[number] = np.nan
    try:
        _refused(world, "the cache is likely to be wrong")
    finally:
        world.reference[number] = before


def test_weights_that_have_changed_since(world: World) -> None:
    parameter = next(world.engine.chunks[0].embedding.parameters())
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    try:
        error = _refused(world, "the weights are likely to be wrong", "matrices have changed since")
    finally:
        with torch.no_grad():
            parameter.copy_(before)
    assert isinstance(error, ModelError)


def test_weights_that_give_no_numbers(world: World) -> None:
    parameter = next(world.engine.chunks[0].embedding.parameters())
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(float("nan"))
    try:
        _refused(world, "the weights are likely to be wrong", "are no numbers")
    finally:
        with torch.no_grad():
            parameter.copy_(before)


@pytest.mark.parametrize("world", [True], ids=["lora"], indirect=True)
def test_adapters_that_change_something(world: World) -> None:
    before = [p.detach().clone() for _, p in adapter_parameters(world.engine.chunks)]
    with torch.no_grad():
        for _, parameter in adapter_parameters(world.engine.chunks):
            parameter += 0.05
    try:
        error = _refused(world, "the adapters are likely to be wrong")
    finally:
        with torch.no_grad():
            for (_, parameter), value in zip(
                adapter_parameters(world.engine.chunks), before, strict=True
            ):
                parameter.copy_(value)
    assert isinstance(error, ModelError)


def test_another_template_than_the_reference_read(world: World, tmp_path: Path) -> None:
    """Data encoded by another template, with the reference of the first."""
    template = tmp_path / "other.jinja"
    template.write_text(CHATML.replace("'\n' }}", "'\n\n' }}"), "utf-8")
    run, model = world.run, world.run.model.hf_path
    assert model is not None
    plan = plan_preference(
        run,
        chat=ChatTemplate.open(model, template=str(template)),
        tokenizer=Tokenizer.from_pretrained(model),
        cache=tmp_path,
    )
    other = build_preference_data(plan)
    steps = preference.training_batches(world.engine, other, world.reference)
    batches = next(steps)
    steps.close()
    answers = preference.answers_of_first_step(world.engine, other)
    text = "the template or the mask is likely to be wrong"
    _refused(world, text, batches=batches, answers=answers)
