"""A tiny model with a chat template, and files of conversations, for tests of whole runs."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from tiny_files import WORDS, byte_level_tokenizer
from tokenizers import AddedToken, Tokenizer

from megatron_cgn.testing import tiny_hf_model

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyChats:
    """What a tiny run of instruction tuning needs; read only."""

    model: Path
    """Hugging Face directory of a two-layer Llama with tokenizer and chat template, FP32."""
    domain: Path
    """30 conversations as instruction and output, of 10 to 40 tokens."""
    general: Path
    """20 conversations as messages, some of two turns."""

    def sources(self) -> str:
        """``data.sources`` with both."""
        return (
            f"data.sources=[{{name: domain, path: {self.domain}}},"
            f"{{name: general, path: {self.general}}}]"
        )


def write_tiny_chats(root: Path, *, seed: int = 7) -> TinyChats:
    """Write a model with its tokenizer and template, and two files of conversations."""
    model = tiny_hf_model(
        root / "model",
        vocab_size=390,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
    )
    byte_level_tokenizer(model)
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|im_start|>", END_OF_TURN)]
    )
    backend.save(str(model / "tokenizer.json"))
    (model / "chat_template.jinja").write_text(CHATML, "utf-8")
    draw = random.Random(seed)

    def text(name: str) -> str:
        return " ".join(draw.choices(WORDS[name], k=draw.randint(2, 8)))

    domain = [{"instruction": f"{i} {text('domain')}", "output": text("domain")} for i in range(30)]
    general = [
        {
            "messages": [
                message
                for turn in range(1 + i % 2)
                for message in (
                    {"role": "user", "content": f"{i}.{turn} {text('general')}"},
                    {"role": "assistant", "content": text("general")},
                )
            ]
        }
        for i in range(20)
    ]
    for name, records in (("domain", domain), ("general", general)):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (root / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    return TinyChats(model=model, domain=root / "domain.jsonl", general=root / "general.jsonl")
