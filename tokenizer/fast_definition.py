"""What the package `gigatoken` is given of a tokenizer, and which ones it is not given.

Tokenizers with options that it passes over are refused: it would give other ids without a word.
"""

import json
from pathlib import Path
from typing import Any


class NotEqual(Exception):
    """The package cannot do this tokenizer, or gives other ids. Says why; never a user's fault."""


def read_definition(directory: str | Path) -> dict[str, Any] | None:
    """Read ``tokenizer.json`` without opening the tokenizer.

    Args:
        directory: Hugging Face tokenizer directory.

    Returns:
        Its content, or None where the tokenizer might be another than it says: where it is missing,
        spelt as older versions did, or lacks tokens that ``tokenizer_config.json`` names.
    """
    try:
        definition: dict[str, Any] = _from_json((Path(directory) / "tokenizer.json").read_bytes())
        added, model = definition["added_tokens"], definition["model"]
        ids = {*model["vocab"].values(), *(token["id"] for token in added)}
        if not all(
            {"special", "normalized", "lstrip", "rstrip", "single_word"} <= {*t} for t in added
        ):
            return None
        config = Path(directory) / "tokenizer_config.json"
        if config.is_file():
            named = _from_json(config.read_bytes()).get("added_tokens_decoder") or {}
            if not ids.issuperset(map(int, named)):
                return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # whatever it is, the original tells
    return definition


def _from_json(text: bytes) -> Any:
    try:
        import orjson
    except ImportError:
        return json.loads(text)
    return orjson.loads(text)


def to_json(definition: dict[str, Any]) -> bytes:
    """Spell a definition, as the package reads it."""
    try:
        import orjson
    except ImportError:
        return json.dumps(definition).encode()
    return orjson.dumps(definition)


def definition_for(definition: dict[str, Any]) -> dict[str, Any]:
    """``tokenizer.json`` for the package: special tokens are left out, so text never becomes one.

    Raises:
        NotEqual: If it has options that the package passes over.
    """
    model = definition["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise NotEqual("it is used for byte-level BPE alone")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise NotEqual(f"the option {option!r} of the model is passed over")
    _check_splitting(definition.get("pre_tokenizer"), within_sequence=False)
    merged = _merged_ids(model)
    if merged != sorted(merged):
        raise NotEqual("ids are taken for ranks of the merges, and are in another order")
    ordinary = [token for token in definition.get("added_tokens") or () if not token["special"]]
    for token in ordinary:
        normalized = token["normalized"] and definition.get("normalizer") is not None
        if token["lstrip"] or token["rstrip"] or token["single_word"] or normalized:
            raise NotEqual(f"options of the added token {token['content']!r} are passed over")
    return definition | {"added_tokens": ordinary}


def _check_splitting(component: dict[str, Any] | None, *, within_sequence: bool) -> None:
    kind = None if component is None else component["type"]
    if component is not None and kind == "Sequence" and not within_sequence:
        for member in component["pretokenizers"]:
            _check_splitting(member, within_sequence=True)
    elif component is not None and kind == "Split":
        if component["behavior"] != "Isolated" or component["invert"]:
            raise NotEqual("the way in which the pre-tokenizer splits is passed over")
    elif component is not None and kind == "ByteLevel":
        if component["add_prefix_space"] or component["use_regex"] == within_sequence:
            raise NotEqual("options of the byte-level pre-tokenizer are passed over")
    else:
        raise NotEqual(f"the pre-tokenizer is a {kind}")


def _merged_ids(model: dict[str, Any]) -> list[int]:
    vocabulary, merges = model["vocab"], model["merges"]
    if merges and isinstance(merges[0], str):
        merges = (merge.split(" ", 1) for merge in merges)
    return [vocabulary[a + b] for a, b in merges]
