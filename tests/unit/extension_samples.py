"""Tiny byte-level tokenizers in the manner of known families, and a corpus to extend them on."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tests.unit.data_samples import TEXTS
from tests.unit.technical_texts import PROCEDURE_ZH

_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}NUMBERS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PARTS = (
    "反应堆 冷却剂 系统 压力容器 蒸汽发生器 稳压器 主泵 安全壳 控制棒 组件 燃料 锆合金 检查 运行 "
    "启动 温度 阀门 报警 确认 流量 凝汽器 给水 硼酸 堆芯 余热排出 应急柴油机 乏燃料 水池 仪控 "
    "汽轮机 定期试验 规程 隔离 泄漏"
).split()
_ENGLISH = "reactor coolant pressuriser valve turbine the of in alarm flow is Inconel steam".split()
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def documents(number: int, *, seed: int) -> list[str]:
    """Documents of Chinese sentences from few words, with some English and figures."""
    draw = random.Random(seed)
    texts = []
    for _ in range(number):
        lines = []
        for _ in range(8):
            chinese = ["".join(draw.choices(_PARTS, k=draw.randint(2, 6))) for _ in range(2)]
            lines.append(f"{draw.randint(1, 400)} {'，'.join(chinese)}。")
            lines.append(" ".join(draw.choices(_ENGLISH, k=6)) + ".")
        texts.append("\n".join(lines))
    return texts


def write_tokenizer(
    directory: Path,
    *,
    digits: str = "",
    nfc: bool = False,
    model: Mapping[str, Any] | None = None,
    added: Sequence[AddedToken] = (),
    merges_as_text: bool = False,
) -> Path:
    """Train a byte-level BPE on a little text and save it with every file that there can be.

    Args:
        directory: Where to; made.
        digits: Repetition of digits in one word, as in a regular expression.
        nfc: Whether it normalises.
        model: Options of the model.
        added: Added tokens; they are listed behind the vocabulary, not in it.
        merges_as_text: Whether merges are written as in older files.

    Returns:
        The directory.
    """
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC() if nfc else None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUT.replace("NUMBERS", digits)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    backend.train_from_iterator([*TEXTS, PROCEDURE_ZH], trainer)
    backend.add_tokens(list(added))
    content = json.loads(backend.to_str())
    content["model"] |= model or {}
    if merges_as_text:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    directory.mkdir(parents=True)
    _write_files(directory, content)
    return directory


def _write_files(directory: Path, content: Mapping[str, Any]) -> None:
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    listed = {
        str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in content["added_tokens"]
    }
    config = {
        "added_tokens_decoder": listed,
        "chat_template": CHAT,
        "eos_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    texts = {
        "tokenizer.json": json.dumps(content),
        "vocab.json": json.dumps(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *lines, ""]),
        "added_tokens.json": json.dumps({t["content"]: t["id"] for t in content["added_tokens"]}),
        "tokenizer_config.json": json.dumps(config),
        "special_tokens_map.json": json.dumps({"eos_token": "<|endoftext|>"}),
        "README.md": "not of the tokenizer",
    }
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")


def llama_like(directory: Path) -> Path:
    """256 special tokens behind the vocabulary, ``ignore_merges``, merges as text."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|free_{i}|>" for i in range(253))]
    return write_tokenizer(
        directory,
        digits="{1,3}",
        model={"ignore_merges": True},
        added=[AddedToken(name, special=True, normalized=False) for name in names],
        merges_as_text=True,
    )


def qwen_like(directory: Path) -> Path:
    """NFC, single digits, special and other added tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ordinary = ["<think>", "</think>", "<tool_call>"]
    return write_tokenizer(
        directory,
        nfc=True,
        added=[AddedToken(name, special=True, normalized=False) for name in special]
        + [AddedToken(name, special=False, normalized=False) for name in ordinary],
    )
