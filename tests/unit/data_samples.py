"""Tiny tokenizers, texts and indices for the data tests."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megatron_cgn.data.index_writer import IndexWriter

TEXTS = (
    "The pressuriser keeps the primary circuit at 15.5 MPa.",
    "核电站一回路压力约为15.5兆帕。",
    "Wind 🌬 and sun ☀️ make power: 100 %\tof it\r\n",
    "control \x00\x01\x1f characters and a <|endoftext|> spelt out",
    "   leading, trailing   ",
    "naïve café, Zürich; e\u0301 decomposed",
)
FINGERPRINT = "f" * 32


def byte_level_tokenizer(directory: Path, *, vocab_size: int = 400) -> Path:
    """Save a byte-level BPE with ``<|endoftext|>`` and an ordinary added token ``<tool>``."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_tokens(["<tool>"])
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def sentencepiece_tokenizer(directory: Path) -> Path:
    """Save a BPE as converted from SentencePiece: ``▁``, byte fallback, ``</s>``."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=specials, show_progress=False)
    backend.train_from_iterator([TEXTS[0], TEXTS[4]], trainer)  # no Chinese: it falls back
    content = json.loads(backend.to_str())
    vocabulary = content["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return directory


def write_index(
    prefix: Path,
    documents: Sequence[Sequence[int]],
    *,
    vocab_size: int = 1000,
    fingerprint: str = FINGERPRINT,
    overwrite: bool = False,
) -> str:
    """Write an index of given ids; returns its prefix."""
    with IndexWriter(prefix, vocab_size=vocab_size, overwrite=overwrite) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64), [len(document)])
        writer.finish(
            tokenizer_fingerprint=fingerprint,
            tokenizer_name="tiny",
            eod_id=0,
            text_bytes=sum(map(len, documents)),
        )
    return str(prefix)


def numbered_documents(lengths: Sequence[int], *, start: int = 1) -> list[list[int]]:
    """Documents whose ids count up over all of them, so that every token can be recognised."""
    bounds = np.cumsum([start, *lengths])
    return [list(range(a, b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
