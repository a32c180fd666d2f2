"""What the quickstart says of exports and adapters, held against a small model made here."""

import importlib
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / ".cache/smollm2-135m-instruct"
FP32_SUMMATION = 1e-4
"""Nats: merging changes only the order of FP32 additions."""
ASKED = [("什么是临界？", "中子的产生与损失相等。"), ("What is a pump?", "It moves fluid.")]


@pytest.fixture(scope="module")
def models() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("quickstart_models")
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``adapter`` of rank 2, and ``merged``, made by transformers and peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    for name in ("base", "merged"):
        for file in TOKENIZER.glob("tokenizer*"):
            shutil.copy(file, folder / name)
    return folder


def test_an_adapter_is_what_was_merged(models: ModuleType, directories: Path) -> None:
    check = models.check_adapter(
        directories / "base", directories / "adapter", directories / "merged", ASKED
    )
    assert check.difference < FP32_SUMMATION
    # Two layers: q_proj is 32 × 32, down_proj 32 × 48.
    assert (check.rank, check.parameters) == (2, 2 * 2 * (32 + 32 + 32 + 48))
    base = models.Reopened(directories / "base").model
    assert check.model_parameters == sum(p.numel() for p in base.parameters())


def test_an_export_without_the_adapter_is_noticed(models: ModuleType, directories: Path) -> None:
    base = directories / "base"
    check = models.check_adapter(base, directories / "adapter", base, ASKED)
    assert check.difference > 100 * FP32_SUMMATION


def test_logprobs_are_those_of_the_whole_conversation(
    models: ModuleType, directories: Path
) -> None:
    opened = models.Reopened(directories / "base")
    question, answer = ASKED[1]
    found = opened.logprobs(question, answer)
    text = opened.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        tokenize=False,
    )
    ids = opened.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = opened.model(ids, labels=ids).loss
    torch.testing.assert_close(-found.mean(), mean)


def test_an_answer_says_whether_it_ended(
    models: ModuleType, directories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = models.Reopened(directories / "base")
    cut = opened.answer(ASKED[0][0])
    assert not cut.ended
    messages = [{"role": "user", "content": ASKED[0][0]}]
    prompt = opened.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    first = int(opened.model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1])
    # A model that ends its turn with what it says first.
    monkeypatch.setattr(opened.model.generation_config, "eos_token_id", [2, first])
    answer = opened.answer(ASKED[0][0])
    assert answer.ended and len(answer.text) < len(cut.text)


def test_an_answer_is_scored_with_its_end_and_without_its_prompt(
    models: ModuleType, directories: Path
) -> None:
    opened = models.Reopened(directories / "base")
    question, answer = ASKED[0]
    prompt = [{"role": "user", "content": question}]
    found = opened.score_answer(prompt, answer)
    counted = opened.tokenizer(answer + "<|im_end|>")["input_ids"]
    beginning = opened.tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=False
    )
    ids = opened.tokenizer(beginning)["input_ids"] + counted
    labels = [-100] * (len(ids) - len(counted)) + counted
    with torch.no_grad():
        mean = opened.model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
    assert found.tokens == len(counted)
    assert found.mean == pytest.approx(-float(mean), abs=FP32_SUMMATION)
    assert found.logprob == pytest.approx(found.mean * found.tokens)
