"""The file of a SentencePiece model: its pieces, and a copy with more of them.

The format is read and written by the classes that the sentencepiece package brings, which keep
what they do not know: normaliser, trainer settings and fields of later versions stay as they are.
Which pieces to add is decided in ``extend_sentencepiece.py``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cgn.errors import DataError

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""Stands for a space in pieces."""


class PieceType(IntEnum):
    """What a piece is; the numbers are those of the format."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    """Never made from text."""
    USER_DEFINED = 4
    """Found in text before anything else."""
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One entry of the vocabulary; its place in the list is its id."""

    text: str
    score: float
    type: PieceType = PieceType.NORMAL


class PieceModel:
    """A SentencePiece model.

    Attributes:
        name: Its path, for messages.
        pieces: In the order of their ids.
    """

    def __init__(self, content: bytes, *, name: str) -> None:
        """Parse a model.

        Args:
            content: Of the file.
            name: Its path, for messages.

        Raises:
            DataError: If it is no such file.
        """
        self.name = name
        self._message = _parse(content, name)
        self.pieces = [
            Piece(text=piece.piece, score=piece.score, type=PieceType(piece.type))
            for piece in self._message.pieces
        ]

    @classmethod
    def read(cls, path: Path) -> "PieceModel":
        """Read a ``tokenizer.model``.

        Args:
            path: The file.

        Returns:
            The model.

        Raises:
            DataError: If it cannot be read or is no such file.
        """
        try:
            return cls(path.read_bytes(), name=str(path))
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror or error}). Check its permissions."
            ) from error

    @cached_property
    def splits_digits(self) -> bool:
        """Whether the training of the model kept digits apart."""
        return bool(self._message.trainer_spec.split_digits)

    def extended(self, pieces: Iterable[Piece]) -> bytes:
        """Give the file with more pieces at the end.

        Args:
            pieces: New ones; their ids follow the old ones'.

        Returns:
            Content of the file. All else is as it was, but for the number of pieces, which the
            trainer settings repeat.
        """
        message = type(self._message)()
        message.CopyFrom(self._message)
        for piece in pieces:
            message.pieces.add(piece=piece.text, score=piece.score, type=int(piece.type))
        message.trainer_spec.vocab_size = len(message.pieces)
        content: bytes = message.SerializeToString(deterministic=True)
        return content


def descending_scores(scores: Iterable[float], count: int) -> list[float]:
    """Scores below all given ones, each below the one before it.

    Args:
        scores: Of the old pieces that text can become.
        count: How many.

    Returns:
        Numbers that differ in single precision, which is what the format holds. Some models have
        pieces at -1e9, where neighbouring numbers are 64 apart.
    """
    last = np.float32(min(scores, default=0.0))
    new = []
    for _ in range(count):
        last = min(last - np.float32(1), np.nextafter(last, np.float32(-np.inf)))
        new.append(float(last))
    return new


def placeholders(added: Sequence[tuple[str, bool] | None], *, first_id: int) -> list[Piece]:
    """Pieces for ids that tokens outside of the model have taken, so that new ones come after.

    Args:
        added: Text and whether it is special of the token at each id; None where no token has it.
        first_id: Id of the first.

    Returns:
        A piece for each. Special tokens never come from text, others always do: the sentencepiece
        library then treats them as the fast tokenizer does.
    """
    pieces = []
    for token_id, token in enumerate(added, first_id):
        if token is None:
            text, kind = f"<unused_id_{token_id}>", PieceType.UNUSED
        else:
            text, kind = token[0], PieceType.CONTROL if token[1] else PieceType.USER_DEFINED
        pieces.append(Piece(text=text, score=0.0, type=kind))
    return pieces


def _parse(content: bytes, name: str) -> Any:
    from sentencepiece import sentencepiece_model_pb2 as formats

    message = formats.ModelProto()  # type: ignore[attr-defined, unused-ignore]
    try:
        message.ParseFromString(content)
    except Exception as error:  # of the library that reads the format, which is no dependency
        raise DataError(
            f"{name}: not a SentencePiece model ({error}). Copy the file again from its model."
        ) from error
    if not message.pieces:
        raise DataError(f"{name}: has no pieces. Copy the file again from its model.")
    return message
