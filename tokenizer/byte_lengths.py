"""How many bytes of text each token stands for: what bits per byte is divided by."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cgn.errors import DataError


def token_byte_lengths(
    definition: dict[str, Any], *, vocab_size: int, name: str
) -> npt.NDArray[np.int32]:
    """UTF-8 bytes of the text that each id stands for.

    Byte-level vocabularies spell every byte as one character. SentencePiece-like ones spell a
    space as ``▁`` and, with byte fallback, single bytes as ``<0xNN>``.

    Args:
        definition: Content of ``tokenizer.json``.
        vocab_size: Largest id plus one.
        name: What to call the tokenizer in a message.

    Returns:
        Bytes of each id, int32 ``[vocab_size]``; 0 for special tokens and unused ids.

    Raises:
        DataError: If the tokenizer is of neither kind.
    """
    components = list(_components(definition))
    kinds = {component.get("type") for component in components}
    measure: Callable[[str], int]
    if "ByteLevel" in kinds:
        measure = len
    elif definition["model"]["type"] in ("BPE", "Unigram"):
        measure = _sentencepiece_measure(
            _space_mark(components), fallback=bool(definition["model"].get("byte_fallback"))
        )
    else:
        raise DataError(
            f"tokenizer {name}: a {definition['model']['type']} vocabulary does not say which "
            "bytes a token stands for. Use a byte-level or SentencePiece-like tokenizer."
        )
    lengths = np.zeros(vocab_size, dtype=np.int32)
    for token, token_id in _model_vocabulary(definition["model"]):
        lengths[token_id] = measure(token)
    for added in definition.get("added_tokens") or ():  # these are spelt as they stand
        lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return lengths


def _sentencepiece_measure(space: str, *, fallback: bool) -> Callable[[str], int]:
    """Bytes of a token in which ``space`` stands for a space and ``<0xNN>`` may for a byte."""

    def measure(token: str) -> int:
        if fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return 1
        return len(token.replace(space, " ").encode())

    return measure


def _components(definition: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The normaliser, pre-tokeniser and decoder, with sequences of them taken apart."""
    pending = [definition.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    while pending:
        component = pending.pop()
        if component is None:
            continue
        yield component
        for members in ("normalizers", "pretokenizers", "decoders"):
            pending.extend(component.get(members) or ())


def _space_mark(components: list[dict[str, Any]]) -> str:
    """The character that stands for a space, ``▁`` unless the tokenizer names another."""
    for component in components:
        if component.get("type") == "Metaspace":
            return str(component["replacement"])
    return "\N{LOWER ONE EIGHTH BLOCK}"


def _model_vocabulary(model: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Tokens and ids: BPE stores a mapping, Unigram a list of (token, score)."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    else:
        yield from ((entry[0], index) for index, entry in enumerate(vocabulary))
