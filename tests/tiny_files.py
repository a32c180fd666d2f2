"""A tiny model's directory, its tokenizer and indexed sources, for tests of whole runs."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_cgn.data.index_writer import IndexWriter
from megatron_cgn.testing import tiny_hf_model
from tokenizer.wrapper import Tokenizer

WORDS = {
    "domain": "reactor coolant pressure steam turbine 核电站 一回路 蒸汽 valve 15.5 MPa".split(),
    "general": "the a river city book walks reads under morning 天气 很 好 because".split(),
}
"""Words of each source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyFiles:
    """What a tiny run needs; read only."""

    model: Path
    """Hugging Face directory of a four-layer Llama with its tokenizer, FP32."""
    domain: str
    """Prefix of an index of about 1,600 tokens in 30 documents."""
    general: str
    """Prefix of another one of about 1,100 tokens."""

    def sources(self) -> str:
        """``data.sources`` with both."""
        return (
            f"data.sources=[{{name: domain, path: {self.domain}, weight: 0.8}},"
            f"{{name: general, path: {self.general}, weight: 0.2}}]"
        )


def write_tiny_files(root: Path) -> TinyFiles:
    """Write a model with its tokenizer, and two indexed sources."""
    model = tiny_hf_model(
        root / "model",
        vocab_size=390,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
    )
    byte_level_tokenizer(model)
    tokenizer = Tokenizer.from_pretrained(model)
    draw = random.Random(5)
    prefixes = {
        name: index_texts(
            root / name,
            [" ".join(draw.choices(words, k=draw.randint(5, 20))) for _ in range(30)],
            tokenizer,
        )
        for name, words in WORDS.items()
    }
    return TinyFiles(model=model, **prefixes)


def byte_level_tokenizer(
    directory: Path, *, eos: str | None = "<|endoftext|>", vocab_size: int = 320
) -> None:
    """Save a byte-level BPE.

    Args:
        directory: Where to; made if missing.
        eos: The end-of-document token; None for a tokenizer without one.
        vocab_size: Ids at most.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[] if eos is None else [eos],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(words) for words in WORDS.values()] * 3, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def index_texts(prefix: Path, texts: list[str], tokenizer: Tokenizer) -> str:
    """Index documents, each with the tokenizer's end-of-document id; returns the prefix."""
    with IndexWriter(prefix, vocab_size=tokenizer.vocab_size) as writer:
        for ids in tokenizer.encode_batch(texts):
            writer.add(np.array([*ids, tokenizer.eod_id]), [len(ids) + 1])
        writer.finish(
            tokenizer_fingerprint=tokenizer.fingerprint(),
            tokenizer_name=tokenizer.name,
            eod_id=tokenizer.eod_id,
            text_bytes=sum(len(text.encode()) for text in texts),
        )
    return str(prefix)
