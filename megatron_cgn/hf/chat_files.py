"""What a Hugging Face directory says of conversations: its chat template, and where answers end.

A model that was trained on one template and is served with another answers badly, and one whose
end-of-turn token no file names never stops. So both go with the weights, wherever they go.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_cgn.hf.files import write_json

TEMPLATE_FILE = "chat_template.jinja"
_GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILE = "tokenizer_config.json"
_OTHER_TEMPLATES = ("chat_template.json", "additional_chat_templates", "chat_templates")
"""Where versions of transformers have kept templates besides."""
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_chat_files(
    directory: Path, *, config_dir: Path, template: str, end_of_turn_ids: Sequence[int]
) -> None:
    """Make a directory say which template its model was trained with, and where it stops.

    Args:
        directory: With tokenizer and generation settings, of which these are brought up to date.
        config_dir: Where ``config.json`` is, whose tokens hold where nothing else is said.
        template: Jinja text.
        end_of_turn_ids: Tokens that end a turn; they come before the model's own end tokens.

    Raises:
        OSError: If the disk refuses.
    """
    (directory / TEMPLATE_FILE).write_text(template, "utf-8")
    for name in _OTHER_TEMPLATES:
        other = directory / name
        if other.is_dir():
            shutil.rmtree(other)
        else:
            other.unlink(missing_ok=True)
    tokenizer = _read(directory / _TOKENIZER_FILE)
    if "chat_template" in tokenizer:
        write_json(directory / _TOKENIZER_FILE, {**tokenizer, "chat_template": template})
    settings = _read(directory / _GENERATION_FILE)
    if not settings:
        config = _read(config_dir / "config.json")
        settings = {name: config[name] for name in _TOKENS if config.get(name) is not None}
    # With this mark transformers makes the settings anew from config.json, and forgets the rest.
    settings.pop("_from_model_config", None)
    known = settings.get("eos_token_id")
    before = known if isinstance(known, list) else [] if known is None else [known]
    settings["eos_token_id"] = list(dict.fromkeys((*end_of_turn_ids, *before)))
    write_json(directory / _GENERATION_FILE, settings)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text("utf-8"))
    return content if isinstance(content, dict) else {}
