"""The files of an extended byte-level BPE tokenizer, all of which say the same.

``tokenizer.json`` keeps everything but its vocabulary, its merges and the list of added tokens as
it was in the source. Files of older kinds are written where the source has them.
"""

import copy
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as Backend

from megatron_cgn.errors import DataError
from tokenizer.extension import FILE_NAME, Extension, NewToken
from tokenizer.wrapper import Tokenizer

log = logging.getLogger(__name__)

_COPIED = ("tokenizer_config.json", "special_tokens_map.json", "chat_template*", "tokenization_*")
_OTHER_VOCABULARIES = ("tokenizer.model*", "*.tiktoken", "tekken.json", "spiece.model")
"""Of the same old vocabulary in formats that are not written: left out rather than left behind."""


@dataclass(frozen=True, slots=True)
class Definition:
    """A definition of a tokenizer, as read or extended."""

    content: Mapping[str, Any]
    """Of ``tokenizer.json``, in the style in which it is written."""
    actual: Mapping[str, Any]
    """The same as the library understands it."""
    name: str

    @classmethod
    def read(cls, directory: Path, tokenizer: Tokenizer) -> Self:
        """Read the definition of an opened tokenizer.

        Args:
            directory: Where it was opened.
            tokenizer: The tokenizer.

        Returns:
            Its definition. The file's own content, if the file alone is the tokenizer; else, e.g.
            when ``tokenizer_config.json`` names more tokens, what the library made of all files.
        """
        actual = tokenizer.definition()
        path = directory / "tokenizer.json"
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if _ids_of_added(content) == _ids_of_added(actual):
                return cls(content, actual, tokenizer.name)
        return cls(actual, actual, tokenizer.name)

    def extended(
        self,
        tokens: Sequence[NewToken],
        merges: Sequence[tuple[str, str]],
        added: Mapping[str, int],
    ) -> Self:
        """Add tokens.

        Args:
            tokens: New tokens, by id.
            merges: New merges, in order.
            added: Terms that become added tokens, with their ids.

        Returns:
            The extended definition; itself, if nothing is added.
        """
        if not tokens and not added:
            return self
        content = copy.copy(dict(self.content))
        model = dict(content["model"])
        old = self.actual.get("added_tokens") or []
        # First of all, added tokens go to their old places in the vocabulary: those that are not
        # in it get the ids behind its last one whenever the file is read.
        vocabulary = dict(model["vocab"]) | {token["content"]: token["id"] for token in old}
        vocabulary |= {token.token: token.id for token in tokens}
        listed = list(model["merges"])
        as_text = bool(listed) and isinstance(listed[0], str)
        listed += [f"{a} {b}" if as_text else [a, b] for a, b in merges]
        content["model"] = model | {"vocab": vocabulary, "merges": listed}
        new = [added_token(text) | {"id": token_id} for text, token_id in added.items()]
        content["added_tokens"] = [*(content.get("added_tokens") or ()), *new]
        return type(self)(content, content, self.name)

    def normalize(self, text: str) -> str:
        """Give what the normaliser makes of a text."""
        part = self.actual.get("normalizer")
        if part is None:
            return text
        model = {"type": "BPE", "vocab": {}, "merges": []}
        backend = Backend.from_str(json.dumps({"normalizer": part, "model": model}))
        return str(backend.normalizer.normalize_str(text))

    def open(self) -> Tokenizer:
        """Make the tokenizer of this definition."""
        backend = Backend.from_str(json.dumps(self.content))
        return Tokenizer(backend, name=self.name, eos_token=None)


def added_token(text: str) -> dict[str, Any]:
    """An added token that is found everywhere in a text as it stands, and is not special."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"content": text} | flags


def write_files(
    definition: Definition, extension: Extension, *, source: Path, directory: Path
) -> None:
    """Write the files of a tokenizer.

    Args:
        definition: The extended one.
        extension: What it is, for ``vocab_extension.json``.
        source: Directory of the old tokenizer.
        directory: Exists, and is published by the caller when all is well.

    Raises:
        DataError: If a file of the source cannot be read.
    """
    added = {t.text: t.id for t in extension.terms if t.way == "added_token"}
    _write(directory / "tokenizer.json", definition.content)
    model = definition.content["model"]
    for file in sorted(path for path in source.iterdir() if path.is_file()):
        target = directory / file.name
        if file.name == "vocab.json":
            _write(target, model["vocab"], indent=None)
        elif file.name == "merges.txt":
            target.write_text(_merges_text(file, model["merges"]), encoding="utf-8")
        elif file.name == "added_tokens.json":
            _write(target, _read(file) | added)
        elif file.name == "tokenizer_config.json":
            _write(target, _config(_read(file), added))
        elif any(fnmatchcase(file.name, pattern) for pattern in _COPIED):
            shutil.copyfile(file, target)
        elif any(fnmatchcase(file.name, pattern) for pattern in _OTHER_VOCABULARIES):
            log.warning(
                "%s is not written: it holds the old vocabulary, and this format is not extended. "
                "tokenizer.json says the same.",
                file.name,
            )
    for folder in sorted(path for path in source.glob("chat_template*") if path.is_dir()):
        shutil.copytree(folder, directory / folder.name, dirs_exist_ok=True)
    _write(directory / FILE_NAME, extension.to_json())


def _config(config: Mapping[str, Any], added: Mapping[str, int]) -> dict[str, Any]:
    listed = config.get("added_tokens_decoder")
    if listed is None or not added:
        return dict(config)
    new = {str(token_id): added_token(text) for text, token_id in added.items()}
    return dict(config) | {"added_tokens_decoder": listed | new}


def _merges_text(file: Path, merges: Iterable[str | Sequence[str]]) -> str:
    """As in the source, with its heading."""
    with file.open(encoding="utf-8") as stream:
        first = stream.readline()
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    heading = first if first.startswith("#version") else ""
    return heading + "".join(f"{line}\n" for line in lines)


def _ids_of_added(content: Mapping[str, Any]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in content.get("added_tokens") or ()}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Restore the file.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def _write(path: Path, content: Mapping[str, Any], *, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
