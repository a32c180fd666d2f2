"""Proofs about the files of an extended tokenizer: options as they were, and all files agree."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_cgn.vocabulary.proof import Proof, judge
from tokenizer.extension import Extension
from tokenizer.wrapper import Tokenizer

_SAME_BYTES = ("special_tokens_map.json", "chat_template.jinja")
"""Files that know nothing of a vocabulary's size."""
_OF_THE_VOCABULARY = ("added_tokens_decoder", "vocab_size")
"""What may differ in ``tokenizer_config.json``."""

type Definition = Mapping[str, Any]


def prove_options(old: Definition, new: Definition, extension: Extension) -> Proof:
    """Everything in ``tokenizer.json`` but new tokens and new merges is as it was.

    Args:
        old: ``tokenizer.json`` of the tokenizer that was extended, parsed.
        new: The same of the extended one.
        extension: What the new one is said to be.

    Returns:
        The proof.
    """
    changed = _changed(_options(old), _options(new))
    if _merges_in_order(new, extension)[: len(merges(old))] != merges(old):
        changed.append("merges")
    if _scores(new)[: len(_scores(old))] != _scores(old):
        changed.append("scores")
    before, after = _added(old), _added(new)
    wanted = {term.text for term in extension.terms if term.way == "added_token"}
    changed += [name for name, token in before.items() if after.get(name) != token]
    changed += [name for name in after if name not in before and name not in wanted]
    special = sum(bool(token["special"]) for token in before.values())
    return judge(
        "options",
        changed,
        good=f"normaliser, pre-tokeniser, template and all {len(before):,} added tokens "
        f"({special:,} special) are as they were",
        bad="changed",
    )


def prove_files(old: Path, new: Path, definition: Definition, *, texts: Sequence[str]) -> Proof:
    """The other files of a directory say what its ``tokenizer.json`` says.

    Args:
        old: Directory of the tokenizer that was extended.
        new: Directory of the extended one.
        definition: ``tokenizer.json`` of the latter, parsed.
        texts: To hold a SentencePiece model against it.

    Returns:
        The proof.
    """
    checks: dict[str, Callable[[], bool]] = {
        "vocab.json": lambda: _vocabulary_agrees(new / "vocab.json", definition),
        "merges.txt": lambda: _merges_agree(new / "merges.txt", definition),
        "tokenizer.model": lambda: _sentencepiece_agrees(old, new, texts),
        "tokenizer_config.json": lambda: _config_agrees(old, new, definition),
    }
    for name in _SAME_BYTES:
        checks[name] = partial(_same_bytes, old / name, new / name)
    wrong, seen = [], ["tokenizer.json"]
    for name, agrees in checks.items():
        if (old / name).is_file() and not (new / name).is_file():
            wrong.append(f"{name} is missing")
        elif (new / name).is_file():
            seen.append(name)
            wrong += [] if agrees() else [f"{name} says something else"]
    return judge("files", wrong, good=", ".join(seen) + " fit together", bad="do not fit together")


def vocabulary(definition: Definition) -> dict[str, int]:
    """Every token of a ``tokenizer.json`` with its id, added ones too."""
    listed = definition["model"]["vocab"]
    if isinstance(listed, list):  # of Unigram: pieces and scores, in the order of ids
        listed = {piece: i for i, (piece, _) in enumerate(listed)}
    return dict(listed) | {name: token["id"] for name, token in _added(definition).items()}


def unknown_id(definition: Definition) -> int | None:
    """The id that stands for what has no token; None where everything has one, as bytes."""
    model = definition["model"]
    if model.get("byte_fallback"):
        return None
    if model["type"] == "Unigram":
        found: int | None = model.get("unk_id")
        return found
    token = model.get("unk_token")
    return None if token is None else vocabulary(definition).get(token)


def merges(definition: Definition) -> list[tuple[str, str]]:
    """Merges of a ``tokenizer.json``, from either way of writing them; none of Unigram."""
    pairs = definition["model"].get("merges") or []
    return [tuple(p if isinstance(p, list) else p.split(" ", 1)) for p in pairs]


def _merges_in_order(definition: Definition, extension: Extension) -> list[tuple[str, str]]:
    """Merges but for those that make an old token of new ones.

    `transformers` lists these beside the old ones when it converts a ``tokenizer.model``.
    """
    new = {token.token for token in extension.new_tokens}
    return [p for p in merges(definition) if "".join(p) in new or not new.intersection(p)]


def _scores(definition: Definition) -> list[Any]:
    """Pieces and scores of Unigram; none of BPE."""
    listed = definition["model"]["vocab"]
    return listed if isinstance(listed, list) else []


def _options(definition: Definition) -> dict[str, Any]:
    """What an extension must leave alone, by name."""
    parts = {
        name: part for name, part in definition.items() if name not in ("model", "added_tokens")
    }
    model = definition["model"]
    options = {k: v for k, v in model.items() if k not in ("vocab", "merges")}
    return parts | {f"model.{name}": value for name, value in options.items()}


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of what differs; absent, null and false are one."""
    return sorted(
        name for name in old.keys() | new if (old.get(name) or None) != (new.get(name) or None)
    )


def _added(definition: Definition) -> dict[str, dict[str, Any]]:
    return {token["content"]: token for token in definition.get("added_tokens") or ()}


def _vocabulary_agrees(file: Path, definition: Definition) -> bool:
    """Whether ``vocab.json`` holds the whole vocabulary, with or without the added tokens."""
    said, ids = json.loads(file.read_text(encoding="utf-8")), vocabulary(definition)
    missing = ids.keys() - said
    return missing <= _added(definition).keys() and all(ids.get(t) == i for t, i in said.items())


def _merges_agree(file: Path, definition: Definition) -> bool:
    lines = file.read_text(encoding="utf-8").split("\n")
    said = [line for line in lines if line and not line.startswith("#version")]
    return said == [f"{left} {right}" for left, right in merges(definition)]


def _config_agrees(old: Path, new: Path, definition: Definition) -> bool:
    """Whether ``tokenizer_config.json`` is as it was, but for what it lists of the ids."""
    before, after = (
        json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        for directory in (old, new)
    )
    kept = [{k: v for k, v in c.items() if k not in _OF_THE_VOCABULARY} for c in (before, after)]
    listed = after.get("added_tokens_decoder") or {}
    was = before.get("added_tokens_decoder") or {}
    ids = vocabulary(definition)
    return (
        kept[0] == kept[1]
        and all(listed.get(i) == token for i, token in was.items())
        and all(ids.get(token["content"]) == int(i) for i, token in listed.items())
    )


def _sentencepiece_agrees(old: Path, new: Path, texts: Sequence[str]) -> bool:
    """Whether the slow model gives the ids of the fast one wherever it did so before."""
    from sentencepiece import SentencePieceProcessor

    before, after = (_differences(d, SentencePieceProcessor, texts) for d in (old, new))
    return after <= before


def _differences(directory: Path, processor: Any, texts: Sequence[str]) -> set[int]:
    """Places of the texts whose ids the slow and the fast tokenizer of a directory disagree on.

    Unigram pieces in another order have the same score, so that either order is right: s|ss, ss|s.
    """
    slow = processor(model_file=str(directory / "tokenizer.model"))
    tokenizer = Tokenizer.from_pretrained(directory)
    fast = tokenizer.encode_batch(texts)
    in_order = tokenizer.definition()["model"]["type"] != "Unigram"
    found = set()
    for i, (text, ids) in enumerate(zip(texts, fast, strict=True)):
        other = slow.encode(text)
        if other != ids and (in_order or sorted(other) != sorted(ids)):
            found.add(i)
    return found


def _same_bytes(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()
