"""A Hugging Face tokenizer directory as this project uses it: documents to ids, and identity.

Chat templates live in ``chat.py``, new vocabulary in ``extend_*.py``. Nothing here adds special
tokens to a text, truncates or pads, and importing it loads neither PyTorch nor transformers.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from megatron_cgn.errors import DataError
from tokenizer.byte_lengths import token_byte_lengths

END_OF_DOCUMENT_TOKENS = ("<|endoftext|>", "<|end_of_text|>")
"""Names under which model families separated the documents they were pre-trained on."""

_OTHER_PARTS = ("normalizer", "pre_tokenizer", "added_tokens")  # besides the model
_SLOW_FILES = ("tokenizer.model", "vocab.json", "spiece.model")


class Tokenizer:
    """A tokenizer that turns documents into ids.

    Text that spells an added token marked ``"special": true`` is encoded as ordinary text, so a
    document cannot smuggle such a token into the training data. Text that spells an added token
    without that mark becomes that token; in some families those include control-like ones, such
    as Qwen's ``<think>`` and ``<tool_call>``.

    Attributes:
        name: The directory's name, for messages and sidecar files.
        vocab_size: Largest id plus one; the number of tokens where ids have no gaps.
    """

    def __init__(self, backend: Backend, *, name: str, eos_token: str | None) -> None:
        """Wrap a backend; use `from_pretrained`.

        Args:
            backend: The tokenizer proper. Its truncation and padding are turned off.
            name: What to call it in messages.
            eos_token: The configured end-of-sequence token, if any.
        """
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.name = name
        self._backend = backend
        self._eos_token = eos_token
        self._fingerprint: str | None = None
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Open a Hugging Face tokenizer directory, without a network.

        ``tokenizer.json`` is read directly. A directory without it, or one whose
        ``tokenizer_config.json`` names tokens that it lacks, is converted by transformers.

        Args:
            directory: Directory with ``tokenizer.json`` or the files transformers converts.

        Returns:
            The tokenizer.

        Raises:
            DataError: If the directory or its files are missing or damaged.
        """
        path = Path(directory)
        try:
            return cls._open(path)
        except OSError as error:
            raise _unreadable(path, error) from error

    @classmethod
    def _open(cls, path: Path) -> Self:
        backend, config = _open_backend(path)
        return cls(backend, name=path.resolve().name, eos_token=_eos_token(config))

    @property
    def eod_id(self) -> int:
        """Id that ends a document.

        The token that separated documents when the model was pre-trained, where the vocabulary
        has one of the known names (`END_OF_DOCUMENT_TOKENS`); else the tokenizer's ``eos_token``.
        The names go first because a chat model's ``eos_token`` ends a turn, not a document.

        Raises:
            DataError: If the tokenizer has none of them.
        """
        for token in (*END_OF_DOCUMENT_TOKENS, self._eos_token):
            token_id = None if token is None else self._backend.token_to_id(token)
            if token_id is not None:
                return int(token_id)
        raise DataError(
            f"tokenizer {self.name}: no token ends a document: tokenizer_config.json has no "
            f"eos_token and the vocabulary none of {', '.join(END_OF_DOCUMENT_TOKENS)}. Name one "
            "as eos_token in tokenizer_config.json."
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode documents, adding no special tokens.

        Args:
            texts: Documents; valid Unicode (no lone surrogates).

        Returns:
            Ids of each document.
        """
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode(self, text: str) -> list[int]:
        """Encode one document, adding no special tokens."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Turn ids back into text."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def definition(self) -> dict[str, Any]:
        """Content of ``tokenizer.json``, parsed anew: it is large, and rarely wanted."""
        content: dict[str, Any] = json.loads(self._backend.to_str())
        return content

    def added_tokens(self) -> list[str]:
        """The added tokens, special ones too, in the order of their ids."""
        tokens = self._backend.get_added_tokens_decoder()
        return [tokens[token_id].content for token_id in sorted(tokens)]

    def fingerprint(self, *, definition: dict[str, Any] | None = None) -> str:
        """Hash of everything that decides which ids a text gets.

        These are the normaliser, the pre-tokeniser, the model (vocabulary, merges and options)
        and the added tokens. Left out, because they do not matter for that: truncation, padding,
        the post-processor (it only adds special tokens), the decoder, the file's layout and every
        option that is off. Equal tokenizers saved by different versions have equal fingerprints.

        Args:
            definition: What `definition` gave, where it is at hand; saves parsing it again.

        Returns:
            32 hexadecimal digits.
        """
        if self._fingerprint is None:
            definition = definition or self.definition()
            # Large, and nothing in them is ever None or False: kept as they are to save a second.
            model = definition["model"]
            lists = {part: model[part] for part in ("vocab", "merges") if part in model}
            options = {part: value for part, value in model.items() if part not in lists}
            parts = {part: _without_defaults(definition.get(part)) for part in _OTHER_PARTS}
            parts["model"] = _without_defaults(options) | lists
            text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
            self._fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return self._fingerprint

    def token_byte_lengths(self) -> npt.NDArray[np.int32]:
        """UTF-8 bytes of the text that each id stands for.

        Sums to the document's bytes for byte-level tokenizers, up to what the tokenizer itself
        changes: its normaliser (Qwen composes accents) and a space it puts in front.

        Returns:
            Bytes of each id, int32 ``[vocab_size]``; 0 for special tokens and unused ids.

        Raises:
            DataError: If the tokenizer is neither byte-level nor SentencePiece-like.
        """
        return token_byte_lengths(self.definition(), vocab_size=self.vocab_size, name=self.name)


def open_backend(directory: str | Path) -> Backend:
    """Open the tokenizer proper, which parses special tokens as its files say.

    `Tokenizer`, which does not, is for documents; this is for text that has them on purpose.

    Args:
        directory: As of `Tokenizer.from_pretrained`.

    Returns:
        The backend, neither truncating nor padding.

    Raises:
        DataError: If the directory or its files are missing or damaged.
    """
    path = Path(directory)
    try:
        backend, _ = _open_backend(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return backend


def _open_backend(path: Path) -> tuple[Backend, dict[str, Any]]:
    """The tokenizer of a directory, and its ``tokenizer_config.json``."""
    if not path.is_dir():
        raise DataError(
            f"{path}: there is no such directory. Give the Hugging Face directory that holds "
            "the tokenizer (tokenizer.json)."
        )
    config = _read_json(path / "tokenizer_config.json")
    if (path / "tokenizer.json").is_file():
        backend = _read_backend(path / "tokenizer.json")
        if not _lacks_tokens(backend, config, path / "tokenizer_config.json"):
            return backend, config
    elif not any((path / name).is_file() for name in _SLOW_FILES):
        raise DataError(
            f"{path}: no tokenizer here: found neither tokenizer.json nor any of "
            f"{', '.join(_SLOW_FILES)}. Give the directory of a Hugging Face tokenizer."
        )
    return _convert(path), config


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path}: cannot be read ({error.strerror or error}). Check the path and its permissions."
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file reads as an empty one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}). Restore the file.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def _read_backend(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise DataError(
            f"{path}: not a readable tokenizer ({error}). Copy the file again from its model."
        ) from error


def _convert(path: Path) -> Backend:
    """Let transformers build a fast tokenizer from the directory's older files."""
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers lets through whatever its converters raise
        raise DataError(
            f"{path}: transformers cannot open this tokenizer ({error}). Save it as "
            "tokenizer.json (a fast tokenizer) and try again."
        ) from error
    backend = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise DataError(
            f"{path}: {type(converted).__name__} has no fast version. Save it as tokenizer.json "
            "(a fast tokenizer) and try again."
        )
    return backend


def _lacks_tokens(backend: Backend, config: dict[str, Any], path: Path) -> bool:
    """Whether ``tokenizer_config.json`` adds tokens that ``tokenizer.json`` does not know."""
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise DataError(
            f"{path}: added_tokens_decoder is a {type(added).__name__}, not an object with ids as "
            "names. Restore the file."
        )
    for token_id in added:
        if not (token_id.isascii() and token_id.isdigit() and len(token_id) < 10):
            raise DataError(
                f"{path}: added_tokens_decoder names {token_id!r}, which is no id. Restore the "
                "file."
            )
    return any(backend.id_to_token(int(token_id)) is None for token_id in added)


def _eos_token(config: dict[str, Any]) -> str | None:
    """The configured end-of-sequence token, stored as a string or as an object."""
    token = config.get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _without_defaults(value: Any) -> Any:
    """Drop keys that hold None or False: versions differ in whether they write them."""
    if isinstance(value, dict):
        kept = {k: _without_defaults(v) for k, v in value.items()}
        return {k: v for k, v in kept.items() if v is not None and v is not False}
    if isinstance(value, list):
        return [_without_defaults(item) for item in value]
    return value
