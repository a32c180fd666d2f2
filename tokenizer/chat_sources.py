"""Where a chat template comes from: the tokenizer's directory, one of ours, or a file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_cgn.errors import DataError

_BUNDLED = resources.files("tokenizer") / "chat_templates"
_SUFFIX = ".jinja"
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_BOS_LINE = "{{- bos_token }}\n"


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """Text of a chat template."""

    name: str
    """What to call it in messages."""
    text: str
    """Jinja."""


def bundled_templates() -> tuple[str, ...]:
    """Names of the chat templates that come with the project."""
    entries = _BUNDLED.iterdir()
    return tuple(sorted(e.name.removesuffix(_SUFFIX) for e in entries if e.name.endswith(_SUFFIX)))


def find_template(directory: Path, *, template: str | None, writes_bos: bool) -> TemplateSource:
    """Find a chat template.

    Args:
        directory: The tokenizer's. Its ``chat_template.jinja`` goes before the ``chat_template``
            of its ``tokenizer_config.json``, as in transformers.
        template: None for the directory's own (``default``, where it has several); or the name of
            one of the directory's, or else of a bundled one; or a Jinja file.
        writes_bos: Whether the tokenizer puts a BOS before a text by itself: the bundled template
            for base models begins with one exactly then.

    Raises:
        DataError: If there is none, of that name or at all; says which there are.
    """
    own = _own_templates(directory)
    if template is None:
        if "default" not in own:
            raise DataError(_without_template(directory, own))
        return own["default"]
    if template in own:
        return own[template]
    if template in bundled_templates():
        text = (_BUNDLED / (template + _SUFFIX)).read_text(encoding="utf-8")
        if template == "plain" and not writes_bos:
            text = text.replace(_BOS_LINE, "")
        return TemplateSource(template, text)
    path = Path(template)
    if path.suffix in (_SUFFIX, ".j2", ".txt") or path.is_file():
        return TemplateSource(str(path), _read_text(path))
    names = ", ".join([*sorted(own), *bundled_templates()])
    raise DataError(
        f"chat template {template!r}: there is none of that name. Set chat.template "
        f"(--chat-template) to one of {names}, or to a .jinja file."
    )


def special_tokens(directory: Path) -> dict[str, str]:
    """Texts of ``bos_token``, ``eos_token`` and the other tokens with a name, where set.

    Raises:
        DataError: If a file of the directory is damaged.
    """
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        content = _read_json(directory / file)
        for name in _NAMED_TOKENS:
            if name not in content:
                continue
            value = content[name]
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[name] = value
            else:
                found.pop(name, None)  # said to be none
    return found


def _own_templates(directory: Path) -> dict[str, TemplateSource]:
    """Templates of a directory by name; a single one is called ``default``."""
    config = directory / "tokenizer_config.json"
    given = _read_json(config).get("chat_template")
    found: dict[str, TemplateSource] = {}
    if isinstance(given, str):
        found["default"] = TemplateSource(f"of {config}", given)
    elif isinstance(given, list | dict):
        pairs = given.items() if isinstance(given, dict) else _named(given, config)
        for name, text in pairs:
            if not isinstance(name, str) or not isinstance(text, str):
                raise DataError(f"{config}: chat_template has an entry that is no text. Mend it.")
            found[name] = TemplateSource(f"{name!r} of {config}", text)
    elif given is not None:
        raise DataError(
            f"{config}: chat_template is a {type(given).__name__}, neither a text nor a list of "
            "named ones. Mend it."
        )
    file = directory / "chat_template.jinja"
    if file.is_file():
        found["default"] = TemplateSource(str(file), _read_text(file))
    more = directory / "additional_chat_templates"
    for file in sorted(more.glob(f"*{_SUFFIX}")) if more.is_dir() else ():
        found[file.stem] = TemplateSource(str(file), _read_text(file))
    return found


def _named(entries: list[Any], config: Path) -> list[tuple[Any, Any]]:
    try:
        return [(entry["name"], entry["template"]) for entry in entries]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{config}: chat_template is a list of which an entry lacks name or template. Mend it."
        ) from error


def _without_template(directory: Path, own: Mapping[str, TemplateSource]) -> str:
    bundled = ", ".join(bundled_templates())
    if own:
        return (
            f"{directory}: has chat templates of the names {', '.join(sorted(own))}, but none for "
            "default. Set chat.template (--chat-template) to one of them, to a bundled one "
            f"({bundled}) or to a .jinja file."
        )
    return (
        f"{directory}: has no chat template (neither chat_template.jinja nor chat_template in "
        "tokenizer_config.json), as is usual for base models. Set chat.template (--chat-template) "
        f"to a bundled one ({bundled}; plain needs no tokens of its own) or to a .jinja file."
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"chat template {path}: cannot be read ({error.strerror or error}). Check the path; "
            f"bundled ones are {', '.join(bundled_templates())}."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"chat template {path}: not valid UTF-8 ({error}). Mend it.") from error


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file reads as an empty one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}). Restore the file.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content
