"""Extensions of vocabularies for tests of models, which need no tokenizer."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizer.extension import FILE_NAME, Extension, NewToken

PIECES = [(3, 7), (11,), (5, 5, 9)]


def extension(pieces: Sequence[Sequence[int]] = PIECES, *, old: int = 70) -> Extension:
    """An extension of a vocabulary of `old` ids by one token for each list of pieces."""
    tokens = tuple(
        NewToken(
            id=old + i,
            token=f"new{i}",
            text=f"new{i}",
            old_ids=tuple(ids),
            frequency=9,
            spread=3,
            origin="corpus",
        )
        for i, ids in enumerate(pieces)
    )
    return Extension(
        old_vocab_size=old, new_tokens=tokens, old_fingerprint="old", new_fingerprint="new"
    )


def tokenizer_of(made: Extension) -> Callable[[Path], None]:
    """Write what stands for a tokenizer's files."""

    def write(directory: Path) -> None:
        (directory / "tokenizer.json").write_text('{"version": "new"}')
        (directory / FILE_NAME).write_text(json.dumps(made.to_json()))

    return write
