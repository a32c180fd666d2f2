"""Losses of conversations in packed, unpacked and padded rows, against `transformers`.

The reference runs the model conversation by conversation and knows nothing of rows.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_runs import Case, build_engine
from torch import Tensor

from megatron_cgn.batch import TokenBatch
from megatron_cgn.config.schema import DataConfig, RunConfig, SourceConfig, TrainConfig
from megatron_cgn.data.sft import SftData, build_sft_data, plan_sft
from megatron_cgn.data.sft_loader import SftLoader
from megatron_cgn.engine.engine import Engine
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel.state import shutdown_parallel
from megatron_cgn.testing import tiny_hf_model
from tests.unit.sft_samples import chat_tokenizer, random_records, write_records
from tokenizer.chat import ChatTemplate, Message
from tokenizer.wrapper import Tokenizer

RECORDS = random_records("q", 24)
LENGTH = 192
LAYOUT_TOLERANCE = 1e-6
"""FP32 losses of one conversation in two rows, absolute and relative: matrix products of other
shapes may add in another order."""
HF_ATOL = 1e-5
"""FP32 losses against `transformers`: other kernels, the same equations."""
WAYS = {
    "packed": {"packing": True, "micro_batch_size": 1, "pad_to_full": False},
    "packed-3-padded": {"packing": True, "micro_batch_size": 3, "pad_to_full": True},
    "unpacked": {"packing": False, "micro_batch_size": 1, "pad_to_full": False},
    "unpacked-4": {"packing": False, "micro_batch_size": 4, "pad_to_full": False},
    "unpacked-2-padded": {"packing": False, "micro_batch_size": 2, "pad_to_full": True},
}


@dataclasses.dataclass(frozen=True)
class Files:
    """A model with a tokenizer, and a file of conversations."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def chat(self) -> ChatTemplate:
        return ChatTemplate.open(self.model)

    def data(self, *, packing: bool) -> SftData:
        run = RunConfig(
            stage="sft",
            data=DataConfig(
                sources=(SourceConfig(name="q", path=str(self.root / "q.jsonl")),),
                seq_length=LENGTH,
                packing=packing,
            ),
            train=TrainConfig(epochs=1, global_batch_size=12),
        )
        tokenizer = Tokenizer.from_pretrained(self.model)
        plan = plan_sft(run, chat=self.chat, tokenizer=tokenizer, cache=self.root / "cache")
        return build_sft_data(plan)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("rows")
    tiny_hf_model(root / "model", vocab_size=384)
    chat_tokenizer(root / "model")
    write_records(root / "q.jsonl", RECORDS)
    return Files(root)


@pytest.fixture(scope="module")
def engine(files: Files) -> Iterator[Engine]:
    torch.set_num_threads(1)
    engine = build_engine(Case(), files.model, prepare=False)
    yield engine
    shutdown_parallel()


def rows(data: SftData, *, micro_batch_size: int, pad_to_full: bool) -> list[TokenBatch]:
    loader = SftLoader(
        data.train,
        micro_batch_size=micro_batch_size,
        global_batch_size=12,
        dp_rank=0,
        dp_size=1,
        seq_length=LENGTH,
        pad_to_full=pad_to_full,
    )
    return [batch for step in loader for batch in step]


def losses(engine: Engine, data: SftData, batches: list[TokenBatch]) -> dict[str, Tensor]:
    """Losses of the counted tokens of each conversation, and the sum and count of all of them."""
    objective = NextToken()
    ids = iter(i for s in range(len(data.train)) for i in data.train.record_ids(s))
    found, totals = {}, torch.zeros(2, dtype=torch.float64)
    for batch, output in engine.score(batches, objective.forward_args):
        loss = objective.loss(output, batch)
        totals += torch.stack((loss.loss_sum.double(), loss.count.double()))
        assert batch.cu_seqlens is not None
        for begin, end in itertools.pairwise(batch.cu_seqlens.tolist()):
            counted = batch.loss_mask[0, begin:end] > 0
            if counted.any():
                found[next(ids)] = output[0, begin:end][counted].clone()
    assert next(ids, None) is None
    return {**found, "all": totals}


@pytest.fixture(scope="module")
def found(files: Files, engine: Engine) -> dict[str, dict[str, Tensor]]:
    result = {}
    for name, how in WAYS.items():
        way = dict(how)
        data = files.data(packing=bool(way.pop("packing")))
        result[name] = losses(engine, data, rows(data, **way))  # type: ignore[arg-type]
    return result


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_no_layout_changes_a_loss(found: dict[str, dict[str, Tensor]], way: str) -> None:
    assert found[way].keys() == found["packed"].keys()
    for name, expected in found["packed"].items():
        if name != "all":
            torch.testing.assert_close(
                found[way][name], expected, rtol=LAYOUT_TOLERANCE, atol=LAYOUT_TOLERANCE
            )
    (total, count), (expected_total, expected_count) = found[way]["all"], found["packed"]["all"]
    assert count == expected_count == sum(len(v) for k, v in found[way].items() if k != "all")
    assert float(total) == pytest.approx(float(expected_total), rel=LAYOUT_TOLERANCE)


def test_losses_are_those_of_conversations_one_by_one(
    files: Files, found: dict[str, dict[str, Tensor]]
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(files.model, dtype=torch.float32).eval()
    chat = files.chat
    for record in RECORDS:
        messages = [Message(m["role"], m["content"]) for m in record["messages"]]
        encoded = chat.encode(messages)
        ids = torch.tensor([encoded.ids])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        answers = [nll[begin - 1 : end - 1] for begin, end in encoded.turns]
        expected = torch.cat(answers)
        for way in WAYS:
            mine = found[way][record["id"]]
            torch.testing.assert_close(mine, expected, rtol=0, atol=HF_ATOL)


def test_no_conversation_sees_its_neighbour(files: Files, engine: Engine) -> None:
    data = files.data(packing=True)
    batches = rows(data, micro_batch_size=1, pad_to_full=False)
    batch = max(batches, key=lambda b: len(b.cu_seqlens))  # type: ignore[arg-type]
    bounds = batch.cu_seqlens.tolist()  # type: ignore[union-attr]
    assert len(bounds) > 4, "a pack with several conversations"
    for edited in range(len(bounds) - 2):  # the last may be padding
        tokens = batch.tokens.clone()
        tokens[0, bounds[edited] : bounds[edited + 1]] += 1
        changed = dataclasses.replace(batch, tokens=tokens)
        scores = [out for _, out in engine.score([batch, changed], NextToken().forward_args)]
        for place, (begin, end) in enumerate(itertools.pairwise(bounds)):
            same = torch.equal(scores[0][0, begin:end], scores[1][0, begin:end])
            assert same == (place != edited)


def test_the_template_of_the_test_has_several_turns() -> None:
    turns = {len(record["messages"]) for record in json.loads(json.dumps(RECORDS))}
    assert turns == {2, 4, 6}
