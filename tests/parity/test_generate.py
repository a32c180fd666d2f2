"""Generation against `transformers`, on every kind of layout, and in the middle of training."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import VOCABULARY, Case, build_engine, train, write_models
from torch import Tensor, nn

from megatron_cgn.batch import TokenBatch
from megatron_cgn.config.schema import ParallelConfig
from megatron_cgn.engine.engine import Engine
from megatron_cgn.errors import DataError
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.seed import rng_state
from megatron_cgn.parallel.state import shutdown_parallel
from megatron_cgn.rollout.generate import Answer, complete, generate
from megatron_cgn.rollout.sampling import Sampling
from megatron_cgn.testing import run_distributed

LOGPROB_ATOL = 1e-5
"""FP32 log-probabilities: other kernels and sums in another order, one forward pass."""
NEW_TOKENS = 10
PROMPTS: list[list[int]] = [[3, 4, 5], [7] * 21, [1], [9, 8, 7, 6, 5, 4, 3, 2, 1], [500, 60, 999]]
GREEDY = Sampling(max_new_tokens=NEW_TOKENS)
DRAWN = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.8, top_k=80, top_p=0.9, seed=3)

TWO_RANKS: dict[str, Case] = {
    "tp2": Case(parallel=ParallelConfig(tensor_model_parallel_size=2), model="qwen3-qk-norm"),
    "tp2-sp": Case(parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2-tied-bias": Case(
        parallel=ParallelConfig(pipeline_model_parallel_size=2), model="qwen2-tied-bias"
    ),
    "pp2-interleaved": Case(
        parallel=ParallelConfig(
            pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
        )
    ),
    "cp2": Case(parallel=ParallelConfig(context_parallel_size=2), model="qwen3-qk-norm"),
    "dp2": Case(),
}
FOUR_RANKS: dict[str, Case] = {
    "tp2-pp2-sp": Case(
        parallel=ParallelConfig(
            tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True
        )
    )
}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
TRAINED: dict[str, Case] = {
    "bf16-dp2-overlap": Case(parallel=ParallelConfig(**OVERLAP), precision="bf16"),
    "pp2-interleaved-recompute": Case(
        parallel=TWO_RANKS["pp2-interleaved"].parallel, recompute="full"
    ),
}


def _answers(engine: Engine, **options: Any) -> list[list[dict[str, Any]]]:
    """What is said to the prompts, greedily and drawn; three slots, so that some prompts wait."""
    return [
        [
            dataclasses.asdict(answer)
            for answer in complete(engine, PROMPTS, sampling=s, batch_size=3, **options)
        ]
        for s in (GREEDY, DRAWN)
    ]


def _run_layouts(cases: dict[str, Case], models: dict[str, Path]) -> dict[str, Any]:
    torch.set_num_threads(1)
    found = {
        name: _answers(build_engine(case, models[case.model], prepare=False))
        for name, case in cases.items()
    }
    shutdown_parallel()
    return found


def _run_two_ranks(models: dict[str, Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    trained = {name: _trained(case, models[case.model]) for name, case in TRAINED.items()}
    return _run_layouts(TWO_RANKS, models), trained


def _trained(case: Case, path: Path) -> dict[str, Any]:
    """Three steps, then the same with answers before each; and what the answers left behind."""
    plain = train(build_engine(case, path), steps=range(3))
    engine = build_engine(case, path)
    interrupted = []
    untouched = True
    for step in range(3):
        before = _fingerprint(engine)
        _answers(engine)
        untouched = untouched and _fingerprint(engine) == before
        interrupted += train(engine, steps=[step])
    return {
        "plain": [dataclasses.asdict(r) for r in plain],
        "interrupted": [dataclasses.asdict(r) for r in interrupted],
        "untouched": untouched,
    }


def _fingerprint(engine: Engine) -> str:
    """Modes, random states, weights and gradients."""
    chunks = engine.chunks
    modes = [module.training for chunk in chunks for module in chunk.modules()]
    sums = [p.double().sum().item() for chunk in chunks for p in chunk.parameters()]
    grads = [
        p.main_grad.double().abs().sum().item()
        for chunk in chunks
        for p in chunk.parameters()
        if hasattr(p, "main_grad")
    ]
    states = rng_state()
    tensors = {name: value.tolist() for name, value in states.pop("tracker").items()}
    return repr((modes, sums, grads, states["torch"].tolist(), states["python"], tensors))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def alone(models: dict[str, Path]) -> dict[str, Any]:
    return _run_layouts({name: Case(model=name) for name in models}, models)


@pytest.fixture(scope="module")
def two_ranks(models: dict[str, Path]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return run_distributed(_run_two_ranks, 2, models, warm=True)


def _transformers(path: Path, prompts: Sequence[Sequence[int]]) -> tuple[Any, list[list[int]]]:
    """The model of `transformers`, and its greedy answers, prompt by prompt."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=VOCABULARY + 1,
            pad_token_id=0,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return model, answers


@pytest.mark.parametrize("name", ["llama", "qwen2-tied-bias", "qwen3-qk-norm"])
def test_greedy_answers_are_those_of_transformers(
    models: dict[str, Path], alone: dict[str, Any], name: str
) -> None:
    model, expected = _transformers(models[name], PROMPTS)
    greedy, drawn = alone[name]
    assert [answer["ids"] for answer in greedy] == expected
    assert [answer["ids"] for answer in drawn] != expected
    for prompt, answer in [*zip(PROMPTS, greedy, strict=True), *zip(PROMPTS, drawn, strict=True)]:
        ids = torch.tensor([prompt + answer["ids"]])
        with torch.no_grad():
            logprobs = model(ids, use_cache=False).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        mine = logprobs.gather(-1, torch.tensor(answer["ids"])[:, None])[:, 0]
        _close(mine, answer["logprobs"])


def _close(found: Tensor | Sequence[float], expected: Sequence[float]) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found).double(),
        torch.tensor(expected).double(),
        rtol=LOGPROB_ATOL,
        atol=LOGPROB_ATOL,
    )


def _same(found: list[Any], expected: list[Any]) -> None:
    for mine, reference in zip(found, expected, strict=True):
        for answer, other in zip(mine, reference, strict=True):
            assert (answer["ids"], answer["finish"]) == (other["ids"], other["finish"])
            _close(answer["logprobs"], other["logprobs"])


@pytest.mark.parametrize("name", TWO_RANKS)
def test_layouts_of_two_ranks_answer_alike(
    alone: dict[str, Any], two_ranks: list[tuple[dict[str, Any], Any]], name: str
) -> None:
    for answers, _ in two_ranks:
        _same(answers[name], alone[TWO_RANKS[name].model])


def test_a_layout_of_four_ranks_answers_alike(
    models: dict[str, Path], alone: dict[str, Any]
) -> None:
    for answers in run_distributed(_run_layouts, 4, FOUR_RANKS, models, warm=True):
        for name, case in FOUR_RANKS.items():
            _same(answers[name], alone[case.model])


@pytest.mark.parametrize("name", TRAINED)
def test_training_goes_on_as_if_nothing_had_been_said(
    two_ranks: list[tuple[Any, dict[str, Any]]], name: str
) -> None:
    for _, trained in two_ranks:
        assert trained[name]["untouched"]
        assert trained[name]["interrupted"] == trained[name]["plain"]


def test_an_engine_alone(models: dict[str, Path], alone: dict[str, Any]) -> None:
    """What needs one process, on one engine."""
    torch.set_num_threads(1)
    engine = build_engine(Case(), models["llama"], prepare=False)
    _batches_do_not_matter(engine, alone["llama"])
    _logprobs_are_those_of_scoring(engine, alone["llama"][1])
    _stop_tokens_end_answers(engine, alone["llama"][0])
    _other_core_attention_is_set_aside(engine, alone["llama"])
    _faulty_prompts_are_refused(engine)
    shutdown_parallel()


def _batches_do_not_matter(engine: Engine, expected: list[Any]) -> None:
    for sampling, answers in zip((GREEDY, DRAWN), expected, strict=True):
        together = complete(engine, PROMPTS, sampling=sampling)
        one_by_one = [
            complete(engine, [prompt], sampling=sampling, seeds=[number])[0]
            for number, prompt in enumerate(PROMPTS)
        ]
        backwards = complete(
            engine, PROMPTS[::-1], sampling=sampling, seeds=[4, 3, 2, 1, 0], batch_size=2
        )[::-1]
        for found in (together, one_by_one, backwards):
            assert [answer.ids for answer in found] == [answer["ids"] for answer in answers]
    tokens: list[tuple[int, int]] = []
    generate(engine, PROMPTS, sampling=GREEDY, on_token=lambda *told: tokens.append(told))
    for index, answer in enumerate(expected[0]):
        assert [token for i, token in tokens if i == index] == answer["ids"]


def _logprobs_are_those_of_scoring(engine: Engine, answers: list[dict[str, Any]]) -> None:
    """Without a cache: the whole row at once, through the engine's own scoring."""
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt + answer["ids"]])
        length = ids.size(1) - 1
        batch = TokenBatch(
            tokens=ids[:, :-1].contiguous(),
            labels=ids[:, 1:].contiguous(),
            loss_mask=torch.ones(1, length),
            position_ids=torch.arange(length)[None],
        )
        ((_, nll),) = engine.score([batch], NextToken().forward_args)
        _close(-nll[0, len(prompt) - 1 :], answer["logprobs"])


def _stop_tokens_end_answers(engine: Engine, answers: list[dict[str, Any]]) -> None:
    stop = answers[0]["ids"][4]
    sampling = dataclasses.replace(GREEDY, stop_ids=(stop, VOCABULARY - 1))
    for answer, whole in zip(
        complete(engine, PROMPTS, sampling=sampling, batch_size=2), answers, strict=True
    ):
        length = whole["ids"].index(stop) + 1 if stop in whole["ids"] else NEW_TOKENS
        assert answer.ids == whole["ids"][:length]
        assert len(answer.logprobs) == length
        assert answer.finish == ("stop" if stop in whole["ids"] else "length")


class _Refusing(nn.Module):
    """Core attention that knows nothing of our cache."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("generation must not come here")


def _other_core_attention_is_set_aside(engine: Engine, expected: list[Any]) -> None:
    layers = engine.chunks[0].decoder.layers
    own = [layer.self_attention.core_attention for layer in layers]
    others = [_Refusing() for _ in layers]
    for layer, other in zip(layers, others, strict=True):
        layer.self_attention.core_attention = other
    _same(_answers(engine), expected)
    assert [layer.self_attention.core_attention for layer in layers] == others
    for layer, core in zip(layers, own, strict=True):
        layer.self_attention.core_attention = core


def _faulty_prompts_are_refused(engine: Engine) -> None:
    longest = engine.architecture.max_position_embeddings
    for prompt, reason in (
        ([], "prompt 2: is empty"),
        ([VOCABULARY], f"has id {VOCABULARY}"),
        ([1] * longest, f"{longest} tokens"),
    ):
        with pytest.raises(DataError, match=reason):
            complete(engine, [[1], prompt], sampling=GREEDY)
    (answer,) = complete(engine, [[1] * (longest - 2)], sampling=GREEDY)
    assert (len(answer.ids), answer.finish) == (2, "length")
    nothing: list[Answer] = complete(engine, [], sampling=GREEDY)
    assert nothing == []
