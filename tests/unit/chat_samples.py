"""Tokenizers with chat tokens, and chat templates of several shapes that mark what is generated."""

import json
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from tests.unit.data_samples import byte_level_tokenizer, sentencepiece_tokenizer

DEMO = Path(__file__).parents[2] / ".cache" / "smollm2-135m-instruct"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}"
    "{% endfor %}"
)
CLOSED = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
"""Ends the text, whoever speaks last, with a token that ends turns, too; as Phi 3's does."""
# Thoughts stay in the last turn alone, and a last turn without any has an empty block of them.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% if loop.last %}{{ (parts[0] if parts | length > 1 else '<think>\\n\\n') + '</think>\\n\\n'"
    " }}{% endif %}"
    "{{ parts[-1] | trim + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def untagged(template: str) -> str:
    """Take out the marks of what is generated, as in most published templates."""
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def chat_tokenizer(
    directory: Path, *, template: str | None, specials: tuple[str, ...], **named: str
) -> Path:
    """Save a byte-level tokenizer with special tokens, e.g. ``eos_token="<|im_end|>"``."""
    byte_level_tokenizer(directory)
    return _finish(directory, template=template, specials=specials, named=named)


def chatml_tokenizer(directory: Path, *, template: str | None = CHATML) -> Path:
    """Save a tokenizer with ChatML's tokens and Qwen's ordinary ones for thoughts."""
    chat_tokenizer(
        directory,
        template=template,
        specials=("<|im_start|>", "<|im_end|>"),
        eos_token="<|im_end|>",
    )
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    backend.save(str(directory / "tokenizer.json"))
    return directory


def llama3_tokenizer(directory: Path, *, template: str | None = LLAMA3) -> Path:
    """Save a tokenizer with Llama 3's tokens."""
    return chat_tokenizer(
        directory,
        template=template,
        specials=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )


def mistral_tokenizer(directory: Path, *, template: str | None = MISTRAL) -> Path:
    """Save a SentencePiece-like tokenizer: ``<s>`` and ``</s>``, and no tokens for chats."""
    sentencepiece_tokenizer(directory)
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return _finish(directory, template=template, specials=("<s>", "</s>"), named=named)


def _finish(
    directory: Path, *, template: str | None, specials: tuple[str, ...], named: dict[str, str]
) -> Path:
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
