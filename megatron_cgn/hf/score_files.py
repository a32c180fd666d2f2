"""What a Hugging Face directory of a reward model says beside its weights.

`transformers` scores the last token of a row that is not the padding's, and looks at nothing else
to find it. So the token that pads must be one that no conversation holds: where it ends answers as
well, as in many a tokenizer without padding of its own, another place is scored than was trained
(and by older versions and other programs the first turn's end). And the tokenizer must pad with
the token that ``config.json`` names, or padding itself is scored.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cgn.errors import DataError
from megatron_cgn.hf.config import read_config_json
from megatron_cgn.hf.config_fields import SCORE_FAMILIES
from megatron_cgn.hf.files import write_json
from tokenizer.chat import ChatTemplate, Message
from tokenizer.chat_sources import special_tokens
from tokenizer.wrapper import open_backend

logger = logging.getLogger(__name__)

_CONFIG, _TOKENIZER, _SPECIAL = "config.json", "tokenizer_config.json", "special_tokens_map.json"
_PAD, _PAD_ID = "pad_token", "pad_token_id"
_PADDING_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<unk>",
)
"""Names under which families have a token for padding, or one that no conversation holds."""
_PROBE = (
    Message("user", "Is the valve open?"),
    Message("assistant", "It is."),
    Message("user", "Since when?"),
    Message("assistant", "Since noon."),
)


def score_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Make a ``config.json`` that of a model with a scalar head.

    Args:
        config: Of a language model, or of a reward model already.

    Returns:
        All else as it was.
    """
    # With one label `transformers` refuses the problem of telling classes apart.
    others = {name: value for name, value in config.items() if name != "problem_type"}
    return {
        **others,
        "architectures": [SCORE_FAMILIES[config["model_type"]]],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "num_labels": 1,
    }


def write_score_files(directory: Path, *, keep_pad: bool = False) -> None:
    """Make a directory that of a reward model, when all its other files are there.

    ``config.json``, if there is one, names the class with a scalar head and the token that pads;
    the tokenizer's files name the same token. Generation settings go.

    Args:
        directory: Configuration and tokenizer of the model, of a checkpoint or an adapter.
        keep_pad: Whether the tokenizer's own padding stays whatever it is, if it has any: for a
            model that somebody trained with it.

    Raises:
        OSError: If the disk refuses.
    """
    (directory / "generation_config.json").unlink(missing_ok=True)
    pad = _padding(directory, keep=keep_pad)
    if pad is not None:
        _name_padding(directory, pad[0])
    path = directory / _CONFIG
    if path.is_file():
        config = score_config(json.loads(path.read_text("utf-8")))
        if _has_tokenizer(directory):
            config[_PAD_ID] = None if pad is None else pad[1]
        write_json(path, config)


def padding_id(config_dir: Path, *, tokenizer_dir: Path) -> int | None:
    """The token that a reward model takes for padding wherever it ends a row.

    Args:
        config_dir: Directory with the model's ``config.json``.
        tokenizer_dir: Directory with its tokenizer, whose padding is the model's where an adapter
            makes a reward model of a language model.

    Returns:
        Its id; None if there is none.

    Raises:
        ModelError: If ``config.json`` cannot be read.
        DataError: If the tokenizer cannot be read.
    """
    config = read_config_json(config_dir)
    if config.get("architectures") == [SCORE_FAMILIES.get(config.get("model_type", ""))]:
        token_id = config.get(_PAD_ID)
        return token_id if isinstance(token_id, int) else None
    token = special_tokens(tokenizer_dir).get(_PAD)
    found = None if token is None else open_backend(tokenizer_dir).token_to_id(token)
    return None if found is None else int(found)


def without_padding(ids: Sequence[int], pad_token_id: int | None) -> Sequence[int]:
    """Leave out what is padding to `transformers` at the end of a row, so that the rest is scored.

    Of a reward model of ours that is nothing. Others may pad with a token that ends answers too,
    and have learned to score the one before it.

    Args:
        ids: A conversation.
        pad_token_id: From `padding_id`.

    Returns:
        The ids up to the last that is none of padding's; all, if all are.
    """
    end = len(ids)
    while end and ids[end - 1] == pad_token_id:
        end -= 1
    return ids[:end] if end else ids


def _has_tokenizer(directory: Path) -> bool:
    return (directory / _TOKENIZER).is_file() or (directory / "tokenizer.json").is_file()


def _padding(directory: Path, *, keep: bool) -> tuple[str, int] | None:
    """The token to pad with and its id; None if every candidate may end an answer."""
    if not _has_tokenizer(directory):
        return None
    try:
        backend = open_backend(directory)
        named = special_tokens(directory)
    except DataError as fault:
        logger.warning("no token chosen for padding: %s", fault)
        return None
    own = named.get(_PAD)
    if keep and own is not None and (token_id := backend.token_to_id(own)) is not None:
        return own, int(token_id)
    taken = _conversation_ids(directory) | {backend.token_to_id(named.get("eos_token", ""))}
    tokens = backend.get_added_tokens_decoder()
    order = sorted(tokens, key=lambda token_id: (not tokens[token_id].special, token_id))
    added = {tokens[token_id].content: int(token_id) for token_id in order}
    for token in (*_candidates(named), *added):
        if token in added and added[token] not in taken:
            if own not in (None, token):
                logger.info("%s: pads with %s, since %s is in answers", directory, token, own)
            return token, added[token]
    logger.warning(
        "%s: the tokenizer has no token that could pad and is in no answer, so pad_token_id is "
        "null: score one answer at a time, or add a token for padding",
        directory,
    )
    return None


def _candidates(named: Mapping[str, str]) -> Iterator[str]:
    """Tokens to pad with, the likeliest first."""
    if _PAD in named:
        yield named[_PAD]
    yield from _PADDING_TOKENS
    yield from (named[name] for name in ("unk_token", "bos_token") if name in named)


def _conversation_ids(directory: Path) -> set[int]:
    """Ids of a conversation as the directory's template writes it; none without a template."""
    try:
        return set(ChatTemplate.open(directory).encode(_PROBE).ids)
    except DataError as fault:
        logger.debug("%s: no conversation to look at: %s", directory, fault)
        return set()


def _name_padding(directory: Path, token: str) -> None:
    """Make the tokenizer pad with a token that it has."""
    for name in (_TOKENIZER, _SPECIAL):
        path = directory / name
        if not path.is_file():
            continue
        content = json.loads(path.read_text("utf-8"))
        # The map is a copy of the other, which versions of transformers read in its place.
        if name == _TOKENIZER or _PAD in content:
            write_json(path, {**content, _PAD: token})
