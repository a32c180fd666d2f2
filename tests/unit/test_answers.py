"""Sums of held-out answers, and what a directory says of conversations, in closed form."""

import json
from pathlib import Path

import pytest
import torch

from megatron_cgn.batch import TokenBatch
from megatron_cgn.eval.answers import answer_sums
from megatron_cgn.hf.chat_files import write_chat_files


def test_only_counted_tokens_are_added_up() -> None:
    labels = torch.tensor([[3, 1, 4, 1, 5, 9]])
    batch = TokenBatch(
        tokens=torch.zeros(1, 6, dtype=torch.int64),
        labels=labels,
        loss_mask=torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0]]),
        position_ids=torch.arange(6)[None],
    )
    nll = torch.tensor([[100.0, 0.5, 1.25, float("inf"), 2.0, float("nan")]])
    # Right where nothing counts, too: these must not be seen.
    ids = torch.tensor([[3, 1, 0, 1, 5, 9]])
    sums = answer_sums(nll, ids, batch)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [3.75, 2.0, 3.0]


GENERATION = {
    "none": (None, [7, 2]),
    "one": ({"eos_token_id": 2, "temperature": 0.6}, [7, 2]),
    "known": ({"eos_token_id": [2, 7]}, [7, 2]),
    "made from config.json": ({"eos_token_id": 2, "_from_model_config": True}, [7, 2]),
    "no end": ({"temperature": 0.6}, [7]),
}


@pytest.mark.parametrize("name", GENERATION)
def test_a_directory_says_which_template_and_where_turns_end(tmp_path: Path, name: str) -> None:
    settings, ends = GENERATION[name]
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "bos_token_id": 1}')
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "old", "eos_token": "e"}')
    (tmp_path / "chat_template.json").write_text('{"chat_template": "older"}')
    (tmp_path / "additional_chat_templates").mkdir()
    if settings is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    write_chat_files(tmp_path, config_dir=tmp_path, template="{{ 核电 }}", end_of_turn_ids=(7,))

    assert (tmp_path / "chat_template.jinja").read_text("utf-8") == "{{ 核电 }}"
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert tokenizer == {"chat_template": "{{ 核电 }}", "eos_token": "e"}
    left = {path.name for path in tmp_path.iterdir()}
    assert not left & {"chat_template.json", "additional_chat_templates"}
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["eos_token_id"] == ends
    # With this mark transformers would forget what config.json does not say.
    assert "_from_model_config" not in written
    kept = {"bos_token_id": 1} if settings is None else settings
    for key in kept.keys() - {"eos_token_id", "_from_model_config"}:
        assert written[key] == kept[key]


def test_a_tokenizer_without_a_template_of_its_own_gets_none_in_its_settings(
    tmp_path: Path,
) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "e"}')
    write_chat_files(tmp_path, config_dir=tmp_path, template="t", end_of_turn_ids=(7, 8))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"eos_token": "e"}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [7, 8]}
