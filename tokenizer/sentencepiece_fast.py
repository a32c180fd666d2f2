"""The fast tokenizer (``tokenizer.json``) of a SentencePiece model: its vocabulary, and a larger.

SentencePiece joins neighbours whose joined text is a piece, whatever the two are. The fast
tokenizer has a list of pairs instead, its merges; so a new piece needs every pair of pieces that
it can be made of.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend

from tokenizer.sentencepiece_model import Piece

# No choice of pieces is ever so bad: scores are logarithms of probabilities.
_NEVER = -1e6


def vocabulary_of(definition: Mapping[str, Any]) -> dict[str, int]:
    """Pieces of the model proper and their ids; added tokens only where the model has them too."""
    vocab = definition["model"]["vocab"]
    if isinstance(vocab, dict):
        return dict(vocab)
    return {entry[0]: token_id for token_id, entry in enumerate(vocab)}


def reserved_tokens(definition: Mapping[str, Any]) -> set[str]:
    """What no text is to become by way of the model: added and unknown tokens, and bytes."""
    model = definition["model"]
    tokens = {token["content"] for token in definition["added_tokens"]}
    if model.get("byte_fallback"):
        tokens |= {f"<0x{byte:02X}>" for byte in range(256)}
    if model.get("unk_token") is not None:
        tokens.add(model["unk_token"])
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        tokens.add(model["vocab"][model["unk_id"]][0])
    return tokens


def bare_backend(definition: Mapping[str, Any]) -> Backend:
    """The model proper: encodes what normaliser and pre-tokeniser give, without added tokens."""
    parts = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor"))
    return Backend.from_str(json.dumps(dict(definition) | parts | {"added_tokens": []}))


def extended_definition(
    definition: Mapping[str, Any], *, old_vocab_size: int, pieces: Sequence[Piece]
) -> dict[str, Any]:
    """Add pieces to a fast tokenizer.

    Added tokens keep their ids: the vocabulary gets them there before the new ones.

    Args:
        definition: Content of ``tokenizer.json``.
        old_vocab_size: Largest old id plus one, added tokens included: the first new id.
        pieces: New ones, in the order of their ids. Of a BPE model the order is that in which they
            are made from text, too.

    Returns:
        Content of the larger one. Old merges stay as they are, in front of all new ones.
    """
    model = dict(definition["model"])
    added = {
        token["id"]: token["content"]
        for token in definition["added_tokens"]
        if token["id"] >= len(model["vocab"])
    }
    if isinstance(model["vocab"], dict):
        vocab = dict(model["vocab"]) | {text: token_id for token_id, text in added.items()}
        vocab |= {piece.text: token_id for token_id, piece in enumerate(pieces, old_vocab_size)}
        model["merges"] = [*model["merges"], *_new_merges(definition, vocab, pieces)]
        model["vocab"] = dict(sorted(vocab.items(), key=lambda entry: entry[1]))
    else:
        ids = range(len(model["vocab"]), old_vocab_size)
        filling = [[added.get(token_id, f"<unused_id_{token_id}>"), _NEVER] for token_id in ids]
        model["vocab"] = [*model["vocab"], *filling, *([p.text, p.score] for p in pieces)]
    return dict(definition) | {"model": model}


def _new_merges(
    definition: Mapping[str, Any], vocab: Mapping[str, int], pieces: Sequence[Piece]
) -> list[list[str]]:
    """Pairs that new pieces are made of, and pairs with new pieces that make old ones.

    The latter matter only for old pieces that their own text does not become: whatever text
    becomes in its place between two others, it becomes alone, so parts of the others never meet.
    They come before all merges of new pieces, as SentencePiece prefers old ones.
    """
    allowed = vocab.keys() - reserved_tokens(definition)
    new = {piece.text for piece in pieces}
    old = [text for text in vocabulary_of(definition) if text in allowed]
    encodings = bare_backend(definition).encode_batch_fast(old, add_special_tokens=False)
    broken = [text for text, found in zip(old, encodings, strict=True) if len(found.ids) != 1]
    merges = []
    for text in broken:
        merges += [pair for pair in _pairs(text, allowed) if new.intersection(pair)]
    for piece in pieces:
        merges += _pairs(piece.text, allowed)
    return merges


def _pairs(text: str, allowed: Mapping[str, int] | set[str]) -> list[list[str]]:
    """Ways to make a text of two pieces, the shortest left one first, as transformers has them."""
    cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
    return [[left, right] for left, right in cuts if left in allowed and right in allowed]
