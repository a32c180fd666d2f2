"""The files of a SentencePiece tokenizer: ``tokenizer.model``, ``tokenizer.json`` and beside them.

Each is written where the source has it. From ``tokenizer.model`` alone, transformers makes the fast
tokenizer whenever it is opened, before and after.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_cgn.errors import DataError
from tokenizer.extension import FILE_NAME, Extension, NewToken
from tokenizer.sentencepiece_fast import extended_definition, reserved_tokens, vocabulary_of
from tokenizer.sentencepiece_model import (
    Piece,
    PieceModel,
    PieceType,
    descending_scores,
    placeholders,
)
from tokenizer.sentencepiece_unigram import unigram_scores
from tokenizer.sentencepiece_words import is_number
from tokenizer.wrapper import Tokenizer

MODEL_FILE = "tokenizer.model"
_JSON_FILE = "tokenizer.json"
_COPIED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "tokenization_*",
)


class SentencePieceFiles:
    """Reads the files of one tokenizer and writes those of a larger one.

    Attributes:
        definition: Content of ``tokenizer.json``, or what transformers makes where there is none.
        model: The SentencePiece model, where there is one.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer) -> None:
        """Read the files.

        Args:
            directory: Where they are.
            tokenizer: Opened there.

        Raises:
            DataError: If they contradict each other.
        """
        self._directory = directory
        self._old_vocab_size = tokenizer.vocab_size
        self.definition: dict[str, Any] = tokenizer.definition()
        path = directory / MODEL_FILE
        self.model = PieceModel.read(path) if path.is_file() else None
        if self.model is not None:
            self._check_ids(self.model)

    @property
    def splits_digits(self) -> bool:
        """Whether the old vocabulary keeps digits apart."""
        if self.model is not None and self.model.splits_digits:
            return True
        pieces = vocabulary_of(self.definition).keys() - reserved_tokens(self.definition)
        return not any(len(p) > 1 and any(map(is_number, p)) for p in pieces)

    def opened(self, extension: Extension) -> Tokenizer:
        """Open the extended tokenizer, as it will be opened where it is written."""
        with tempfile.TemporaryDirectory() as directory:
            self._write_vocabulary(extension, Path(directory))
            return Tokenizer.from_pretrained(directory)

    def write(self, extension: Extension, directory: Path, *, num_tokens: int | None) -> None:
        """Write all files.

        Args:
            extension: Of this tokenizer.
            directory: Exists.
            num_tokens: How many new tokens to take; None for all.

        Raises:
            DataError: If terms would be cut off.
        """
        taken = _first(extension, num_tokens)
        self._write_vocabulary(extension, directory, num_tokens=len(taken.new_tokens))
        opened = Tokenizer.from_pretrained(directory)
        taken = replace(taken, new_fingerprint=opened.fingerprint())
        text = json.dumps(taken.to_json(), ensure_ascii=False, indent=1)
        (directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    def _write_vocabulary(
        self, extension: Extension, directory: Path, *, num_tokens: int | None = None
    ) -> None:
        pieces = self._pieces(extension)[:num_tokens]
        for file in sorted(self._directory.iterdir()):
            if not any(fnmatchcase(file.name, pattern) for pattern in _COPIED):
                continue
            if file.is_dir():
                shutil.copytree(file, directory / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, directory / file.name)
        if self.model is not None:
            content = self.model.extended([*self._filling, *pieces] if pieces else ())
            (directory / MODEL_FILE).write_bytes(content)
        if (self._directory / _JSON_FILE).is_file():
            definition = self._as_in_file(pieces)
            text = json.dumps(definition, ensure_ascii=False, indent=2)
            (directory / _JSON_FILE).write_text(text + "\n", encoding="utf-8")

    def _as_in_file(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Extended ``tokenizer.json``, with what a tokenizer opened here has turned off."""
        content = json.loads((self._directory / _JSON_FILE).read_text(encoding="utf-8"))
        kept = {part: content.get(part) for part in ("truncation", "padding")}
        if not pieces:
            return self.definition | kept
        return kept | {
            part: value
            for part, value in extended_definition(
                self.definition, old_vocab_size=self._old_vocab_size, pieces=pieces
            ).items()
            if part not in kept
        }

    def _pieces(self, extension: Extension) -> list[Piece]:
        """New tokens with their scores, which are the same however many are taken."""
        tokens: Sequence[NewToken] = extension.new_tokens
        if self.definition["model"]["type"] == "Unigram":
            scores = unigram_scores(
                tokens,
                old=self._old_scores,
                corpus_tokens=extension.settings["corpus_tokens"],
            )
        else:
            old = self.model.pieces if self.model is not None else []
            normal = [piece.score for piece in old if piece.type == PieceType.NORMAL]
            scores = descending_scores(normal, len(tokens))
        return [
            Piece(text=token.token, score=score)
            for token, score in zip(tokens, scores, strict=True)
        ]

    @property
    def _old_scores(self) -> Mapping[str, float]:
        reserved = reserved_tokens(self.definition)
        vocab = self.definition["model"]["vocab"]
        return {text: score for text, score in vocab if text not in reserved}

    @cached_property
    def _filling(self) -> list[Piece]:
        """What the model needs at ids that only added tokens have."""
        assert self.model is not None
        first = len(self.model.pieces)
        added = {
            token["id"]: (token["content"], bool(token["special"]))
            for token in self.definition["added_tokens"]
        }
        ids = range(first, self._old_vocab_size)
        return placeholders([added.get(token_id) for token_id in ids], first_id=first)

    def _check_ids(self, model: PieceModel) -> None:
        vocabulary = vocabulary_of(self.definition)
        text_like = (PieceType.NORMAL, PieceType.BYTE)
        for token_id, piece in enumerate(model.pieces):
            if piece.type in text_like and vocabulary.get(piece.text) != token_id:
                raise DataError(
                    f"{self._directory}: {MODEL_FILE} has {piece.text!r} as id {token_id}, the "
                    f"fast tokenizer as {vocabulary.get(piece.text)}. Only tokenizers whose files "
                    "agree can be extended: remove the file that is not of this model."
                )


def _first(extension: Extension, num_tokens: int | None) -> Extension:
    """Cut an extension to its first tokens."""
    if num_tokens is None or num_tokens >= len(extension.new_tokens):
        return extension
    for_terms = sum(token.origin != "corpus" for token in extension.new_tokens)
    if 0 < num_tokens < for_terms:
        raise DataError(
            f"num_tokens: {num_tokens:,}, but the terms alone take {for_terms:,}. Take at least as "
            "many, or 0 for the old tokenizer."
        )
    terms = extension.terms if num_tokens else ()
    return replace(extension, new_tokens=extension.new_tokens[:num_tokens], terms=terms)
