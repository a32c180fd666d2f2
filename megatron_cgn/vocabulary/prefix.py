"""The tokenizer of the first new tokens, made in memory from the files of all of them.

It is the tokenizer that `Extender.write` gives for as many tokens, without writing its files.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

from tokenizer.wrapper import Tokenizer


def first_ids(definition: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Leave out the last tokens of a tokenizer.

    Args:
        definition: Content of ``tokenizer.json``.
        vocab_size: Ids to keep: all below it.

    Returns:
        A definition without the other tokens, and without merges that make or need them.
    """
    model = dict(definition["model"])
    if isinstance(model["vocab"], list):  # a unigram model's pieces lie in the order of their ids
        model["vocab"] = model["vocab"][:vocab_size]
    else:
        ids = model["vocab"]
        model["vocab"] = {token: i for token, i in ids.items() if i < vocab_size}
        model["merges"] = [
            merge
            for merge in model["merges"]
            if all(ids[token] < vocab_size for token in _tokens(merge))
        ]
    added = [token for token in definition["added_tokens"] if token["id"] < vocab_size]
    return dict(definition) | {"model": model, "added_tokens": added}


def first_tokens_only(definition: Mapping[str, Any], vocab_size: int, *, name: str) -> Tokenizer:
    """Open the tokenizer that `first_ids` defines.

    Args:
        definition: As for `first_ids`.
        vocab_size: As for `first_ids`.
        name: What to call it.
    """
    text = json.dumps(first_ids(definition, vocab_size), ensure_ascii=False)
    return Tokenizer(Backend.from_str(text), name=name, eos_token=None)


def _tokens(merge: str | list[str]) -> tuple[str, str, str]:
    """Both sides of a merge, which older files write as one text, and what it makes."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right
