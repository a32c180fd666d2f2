"""Reward models as files: configuration, padding, adapters, conversions."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_samples import HIDDEN, write_adapter
from hf_samples import assert_same_bytes, read_tensors, write_sample
from safetensors.torch import save_file
from tiny_chats import CHATML, write_tiny_chats
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megatron_cgn.errors import ModelError
from megatron_cgn.hf.adapter_card import adapter_card
from megatron_cgn.hf.adapter_config import config_json, read_config
from megatron_cgn.hf.adapter_file import AdapterFile
from megatron_cgn.hf.config import read_architecture
from megatron_cgn.hf.merge import merge_adapter
from megatron_cgn.hf.score_files import padding_id, without_padding, write_score_files
from megatron_cgn.hf.to_hf import convert_to_hf
from megatron_cgn.hf.to_megatron import convert_to_megatron
from megatron_cgn.hf.vocabulary import check_config
from megatron_cgn.hf.weights import open_weights, stored_architecture

SCORE_ATOL = 1e-5
"""FP32 scores of one sequence alone and in a padded batch: other sizes, other kernels."""
LLAMA3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Conversations end with the end of a turn, without a line feed behind."""
CONVERSATIONS = [
    [{"role": "user", "content": "valve"}, {"role": "assistant", "content": "steam turbine"}],
    [
        {"role": "user", "content": "a river walks under"},
        {"role": "assistant", "content": "the city reads because 15.5 MPa"},
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "good"},
    ],
]


def _scorer(directory: Path, **config: Any) -> Path:
    """Make a sample of a language model one of a reward model, as `transformers` writes it."""
    tensors = read_tensors(directory)
    tensors.pop("lm_head.weight", None)
    generator = torch.Generator().manual_seed(9)
    score = torch.randn(1, HIDDEN, generator=generator)
    tensors["score.weight"] = score.to(tensors["model.norm.weight"].dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    fields = json.loads(path.read_text()) | {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }
    path.write_text(json.dumps(fields | config))
    return directory


@pytest.mark.parametrize("tied", [False, True])
def test_a_classifier_with_one_label_is_a_model_with_a_scalar_head(
    tmp_path: Path, tied: bool
) -> None:
    write_sample(tmp_path / "model", tied=tied)
    architecture = read_architecture(_scorer(tmp_path / "model"))
    assert architecture.head == "score" and not architecture.ties_output
    places = open_weights(tmp_path / "model", architecture).places
    assert places["score.weight"].shape == (1, HIDDEN)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {"0": "bad", "1": "good"}}, 'id2label = {"0": "bad", "1": "good"}: a model'),
        ({"id2label": None}, "num_labels = null: a model that sorts into classes"),
        ({"id2label": None, "num_labels": 3}, "num_labels = 3: a model that sorts"),
        ({"architectures": ["MistralForSequenceClassification"]}, "architectures = "),
    ],
)
def test_other_classifiers_are_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    write_sample(tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        read_architecture(_scorer(tmp_path / "model", **fields))
    assert message in str(caught.value)


def test_a_number_of_labels_may_say_it_too(tmp_path: Path) -> None:
    write_sample(tmp_path / "model")
    path = _scorer(tmp_path / "model", id2label=None, num_labels=1)
    assert read_architecture(path).head == "score"


def test_a_language_model_may_become_a_reward_model_but_not_the_reverse(tmp_path: Path) -> None:
    write_sample(tmp_path / "model")
    write_sample(tmp_path / "scorer")
    language = read_architecture(tmp_path / "model")
    scorer = read_architecture(_scorer(tmp_path / "scorer"))
    assert stored_architecture(tmp_path / "model", scorer) == language
    assert stored_architecture(tmp_path / "scorer", scorer) == scorer
    with pytest.raises(ModelError, match="scorer: is a reward model"):
        stored_architecture(tmp_path / "scorer", language)
    with pytest.raises(ModelError, match="a reward model; extend the vocabulary of the language"):
        check_config(json.loads((tmp_path / "scorer" / "config.json").read_text()), path=tmp_path)


def test_a_classifier_without_its_head_is_refused(tmp_path: Path) -> None:
    write_sample(tmp_path / "model", tied=True)
    path = _scorer(tmp_path / "model")
    tensors = read_tensors(path)
    del tensors["score.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"tensor 'score.weight' of shape \(1, 24\) is missing"):
        open_weights(path, read_architecture(path))


@pytest.mark.parametrize("tied", [False, True])
def test_conversion_gives_the_same_bytes_both_ways(tmp_path: Path, tied: bool) -> None:
    write_sample(tmp_path / "model", tied=tied)
    source = _scorer(tmp_path / "model", pad_token_id=5)
    convert_to_megatron(source, tmp_path / "checkpoint", make_vocab_size_divisible_by=16)
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "again")
    assert_same_bytes(read_tensors(tmp_path / "again"), read_tensors(source))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["pad_token_id"] == 5


def _chat_model(root: Path, *, template: str, pad: str | None, more: tuple[str, ...] = ()) -> Path:
    path = write_tiny_chats(root).model
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(text, special=True) for text in more])
    backend.save(str(path / "tokenizer.json"))
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    tokenizer |= {"eos_token": "<|im_end|>"} | ({"pad_token": pad} if pad else {})
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (path / "chat_template.jinja").write_text(template, "utf-8")
    return path


@pytest.mark.parametrize(
    ("template", "pad", "more", "expected"),
    [
        # A token of its own stays, though others would do.
        (CHATML, "<reserved>", ("<reserved>", "<|pad|>"), "<reserved>"),
        # One that ends turns does not, even where a line feed follows the last of them.
        (CHATML, "<|im_end|>", (), "<|endoftext|>"),
        (LLAMA3, "<|im_end|>", ("<|finetune_right_pad_id|>",), "<|finetune_right_pad_id|>"),
        (LLAMA3, None, (), "<|endoftext|>"),
    ],
)
def test_padding_is_a_token_that_no_conversation_holds(
    tmp_path: Path, template: str, pad: str | None, more: tuple[str, ...], expected: str
) -> None:
    path = _chat_model(tmp_path, template=template, pad=pad, more=more)
    torch.manual_seed(4)
    made: Any = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=torch.float32
    )
    made.save_pretrained(path)
    write_score_files(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForSequenceClassification.from_pretrained(path)
    assert tokenizer.pad_token == expected
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.num_labels == 1
    assert not (path / "generation_config.json").exists()
    # What was trained: the value at the very last token, whatever pads the row.
    for side in ("left", "right"):
        tokenizer.padding_side = side
        texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in CONVERSATIONS]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            found = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits[:, 0]
            for score, text in zip(found, texts, strict=True):
                ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
                hidden = model.model(ids).last_hidden_state[0, -1]
                assert float(score) == pytest.approx(
                    float(model.score.weight[0] @ hidden), abs=SCORE_ATOL
                )


def test_without_a_token_to_pad_with_batches_are_refused_by_transformers(tmp_path: Path) -> None:
    path = _chat_model(tmp_path, template=LLAMA3, pad=None)
    backend = json.loads((path / "tokenizer.json").read_text())
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["id"] != 0]
    (path / "tokenizer.json").write_text(json.dumps(backend))
    write_score_files(path)
    config = json.loads((path / "config.json").read_text())
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    assert config["pad_token_id"] is None and "pad_token" not in tokenizer


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|endoftext|>"])
def test_what_transformers_takes_for_padding_is_left_out(tmp_path: Path, pad: str) -> None:
    path = _chat_model(tmp_path, template=LLAMA3, pad=pad)
    made: Any = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=torch.float32
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    made.config.pad_token_id = tokenizer.pad_token_id
    # As an adapter's base has it, and as a reward model of its own.
    assert padding_id(path, tokenizer_dir=path) == tokenizer.pad_token_id
    made.save_pretrained(path)
    assert padding_id(path, tokenizer_dir=path) == tokenizer.pad_token_id
    text = tokenizer.apply_chat_template(CONVERSATIONS[1], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    kept = without_padding(ids, tokenizer.pad_token_id)
    assert len(kept) == len(ids) - (pad == "<|im_end|>")
    with torch.no_grad():
        hidden = made.model(torch.tensor([kept])).last_hidden_state[0, -1]
        expected = float(made(torch.tensor([ids])).logits)
    assert float(made.score.weight[0] @ hidden) == pytest.approx(expected, abs=SCORE_ATOL)
    assert without_padding([3, 3], 3) == [3, 3] and without_padding(ids, None) == ids


def test_an_adapter_brings_its_head_to_a_language_model(tmp_path: Path) -> None:
    base = write_sample(tmp_path / "model", tied=True)
    adapter = write_adapter(tmp_path / "adapter", score=True)
    merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    merged = read_tensors(tmp_path / "merged")
    assert merged.keys() == base.keys() | {"score.weight"}
    expected = adapter["base_model.model.score.weight"].to(torch.bfloat16)
    assert torch.equal(merged["score.weight"], expected)
    architecture = read_architecture(tmp_path / "merged")
    assert architecture.head == "score"
    assert not (tmp_path / "merged" / "generation_config.json").exists()
    # And to a reward model, whose head it replaces.
    write_sample(tmp_path / "scorer")
    _scorer(tmp_path / "scorer")
    merge_adapter(tmp_path / "scorer", tmp_path / "adapter", tmp_path / "replaced")
    assert torch.equal(read_tensors(tmp_path / "replaced")["score.weight"], expected)


def test_an_adapter_of_a_language_model_leaves_a_head_alone(tmp_path: Path) -> None:
    write_sample(tmp_path / "scorer")
    path = _scorer(tmp_path / "scorer")
    write_adapter(tmp_path / "adapter")
    merge_adapter(path, tmp_path / "adapter", tmp_path / "merged")
    merged = read_tensors(tmp_path / "merged")
    assert torch.equal(merged["score.weight"], read_tensors(path)["score.weight"])
    adapter = AdapterFile(tmp_path / "adapter")
    adapter.check(read_architecture(path))
    adapter.check_settings(adapter.lora, read_architecture(path))


def test_adapters_of_reward_models_are_checked(tmp_path: Path) -> None:
    write_sample(tmp_path / "scorer")
    scorer = read_architecture(_scorer(tmp_path / "scorer"))
    write_adapter(tmp_path / "adapter", score=True)
    adapter = AdapterFile(tmp_path / "adapter")
    adapter.check(scorer)
    assert adapter.lora.modules_to_save == ()
    shutil.rmtree(tmp_path / "scorer")
    write_sample(tmp_path / "scorer")
    with pytest.raises(ModelError, match="is an adapter of a reward model"):
        adapter.check(read_architecture(tmp_path / "scorer"))
    write_adapter(tmp_path / "headless", task_type="SEQ_CLS", modules_to_save=["score"])
    with pytest.raises(ModelError, match="head that gives the scores was not saved"):
        AdapterFile(tmp_path / "headless").check(scorer)
    # Trained without naming the task, as some programs do.
    write_adapter(tmp_path / "unnamed", score=True, task_type=None)
    assert read_config(tmp_path / "unnamed").head == "score"


def test_an_adapter_says_how_a_reward_model_is_opened(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", score=True)
    lora = AdapterFile(tmp_path / "adapter").lora
    written = config_json(lora, base="base", head="score", ties_weights=False)
    assert (written["task_type"], written["modules_to_save"]) == ("SEQ_CLS", ["score"])
    card = adapter_card(lora, base="base", head="score", types={})
    assert "AutoModelForSequenceClassification.from_pretrained('base', num_labels=1)" in card
    assert "matrices held whole: `score`" in card and "vllm serve" not in card
