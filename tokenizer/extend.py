"""Vocabulary extension, whatever the kind of tokenizer: which kinds there are, and what each does.

The kinds themselves are in ``extend_bpe.py`` and ``extend_sentencepiece.py``.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from megatron_cgn.errors import ConfigError, DataError
from tokenizer.extension import Extension
from tokenizer.filters import Rules
from tokenizer.wrapper import Tokenizer

if TYPE_CHECKING:
    from tokenizer.words import Splitter, Words

Kind = Literal["byte_level_bpe", "sentencepiece_bpe", "sentencepiece_unigram"]
"""What can be extended."""

_REMEDY = f"Kinds that can be extended: {', '.join(get_args(Kind))}."


class Extender(Protocol):
    """One tokenizer, ready to be extended."""

    kind: Kind
    tokenizer: Tokenizer
    """The old one."""

    def splitter(self, terms: Sequence[str] = ()) -> "Splitter":
        """Give what cuts texts into the words that `extend` counts.

        Args:
            terms: The terms that `extend` will get. Those that become added tokens are cut out
                first, as the extended tokenizer will do.

        Returns:
            A picklable function from a text to its words.

        Raises:
            DataError: If terms cannot be made; names all of them.
        """
        ...

    def extend(
        self,
        words: "Words",
        *,
        num_tokens: int,
        rules: Rules,
        terms: Sequence[str] = (),
        progress: Callable[[int], object] | None = None,
        allow_fewer: bool = False,
    ) -> Extension:
        """Choose new tokens.

        Args:
            words: Words of the corpus, as `splitter` with the same terms cuts them.
            num_tokens: How many new ids, steps and terms included.
            rules: What a token of the corpus must satisfy. Terms need not.
            terms: Texts that shall be single tokens; they come first.
            progress: Told how many tokens there are, now and then.
            allow_fewer: Give fewer tokens where the corpus and the rules do not yield as many.

        Returns:
            The extension. Its first n tokens are an extension too, for every n from the number of
            ids that the terms take.

        Raises:
            DataError: If there are fewer tokens than wanted, or terms cannot be made.
        """
        ...

    def write(
        self, extension: Extension, directory: Path, *, num_tokens: int | None = None
    ) -> None:
        """Write the files of the extended tokenizer, and ``vocab_extension.json``.

        Args:
            extension: From `extend`.
            directory: Exists; files in it that belong to a tokenizer are overwritten.
            num_tokens: Take only the first new tokens; 0 gives the old tokenizer.

        Raises:
            ConfigError: If the terms take more than `num_tokens`, or there are fewer.
            DataError: If the extension is of another tokenizer.
        """
        ...


def kind_of(directory: str | Path) -> Kind:
    """Tell what kind of tokenizer a directory holds.

    Args:
        directory: Hugging Face directory.

    Returns:
        The kind.

    Raises:
        DataError: If there is no tokenizer, or one of a kind that cannot be extended, by name.
    """
    path = Path(directory)
    has_pieces = (path / "tokenizer.model").is_file()
    if (path / "tokenizer.json").is_file():
        definition = _read_definition(path / "tokenizer.json")
        if "type" not in definition["model"]:  # old files; the library finds it out
            definition = Tokenizer.from_pretrained(path).definition()
        return _kind_of_definition(definition, path, has_pieces)
    if has_pieces:
        return _kind_of_pieces(path / "tokenizer.model")
    _refuse_named_otherwise(path)
    tiktoken = sorted(path.glob("*.tiktoken")) if path.is_dir() else []
    if tiktoken and not (path / "vocab.json").is_file():
        raise DataError(
            f"{tiktoken[0]}: a vocabulary for tiktoken, which says nothing of how text is cut. "
            "Save the tokenizer as tokenizer.json (AutoTokenizer.from_pretrained(…), then "
            "save_pretrained) and extend that."
        )
    return _kind_of_definition(Tokenizer.from_pretrained(path).definition(), path, has_pieces)


def open_extender(directory: str | Path) -> Extender:
    """Open a tokenizer to extend it.

    Args:
        directory: Hugging Face directory.

    Returns:
        The extender of its kind.

    Raises:
        DataError: If it cannot be read or is of a kind that cannot be extended.
    """
    kind = kind_of(directory)
    if kind == "byte_level_bpe":
        from tokenizer.extend_bpe import ByteLevelExtender

        return ByteLevelExtender(Path(directory))
    from tokenizer.extend_sentencepiece import SentencePieceExtender

    return SentencePieceExtender(Path(directory), kind=kind)


def first_tokens(extension: Extension, num_tokens: int | None) -> Extension:
    """Take the first new tokens only.

    Args:
        extension: Any.
        num_tokens: How many; None for all, 0 for none, terms included.

    Returns:
        The smaller extension. Its `new_fingerprint` is still that of the larger one.

    Raises:
        ConfigError: If terms need more, or there are fewer.
    """
    tokens = extension.new_tokens
    if num_tokens is None or num_tokens == len(tokens):
        return extension
    if num_tokens == 0:
        old = tuple(term for term in extension.terms if term.way == "existing")
        return replace(extension, new_tokens=(), terms=old)
    needed = 1 + max((i for i, t in enumerate(tokens) if t.origin == "term"), default=-1)
    if not needed <= num_tokens <= len(tokens):
        raise ConfigError(
            f"num_tokens: {num_tokens:,}, but the extension has {len(tokens):,} new tokens, the "
            f"first {needed:,} of which are needed for the terms. Give a number in this range, or "
            "0 for the old tokenizer."
        )
    return replace(extension, new_tokens=tokens[:num_tokens])


def _kind_of_definition(definition: dict[str, Any], path: Path, has_pieces: bool) -> Kind:
    model = (definition.get("model") or {}).get("type")
    if model == "BPE":
        if _has_byte_level(definition.get("pre_tokenizer")):
            return "byte_level_bpe"
        if _has_byte_level(definition.get("normalizer")):
            raise DataError(
                f"{path}: its normaliser spells text in bytes, its pre-tokeniser does not; only "
                f"the reverse is supported. {_REMEDY}"
            )
        if has_pieces:
            return _kind_of_pieces(path / "tokenizer.model")
        return "sentencepiece_bpe"
    if model == "Unigram" and has_pieces:
        return _kind_of_pieces(path / "tokenizer.model")
    if model == "Unigram":
        _refuse_named_otherwise(path)
        raise DataError(
            f"{path}: a Unigram tokenizer without its tokenizer.model. Put the SentencePiece "
            "model file, from which tokenizer.json was converted, beside it."
        )
    raise DataError(f"{path}: a {model} tokenizer cannot be extended. {_REMEDY}")


def _refuse_named_otherwise(path: Path) -> None:
    """Refuse the SentencePiece models whose file has another name, for what each name means."""
    if (path / "sentencepiece.bpe.model").is_file():
        raise DataError(
            f"{path / 'sentencepiece.bpe.model'}: its ids are not those of the tokenizer, which "
            "moves them to make room for special tokens (XLM-RoBERTa, CamemBERT, mBART). Such a "
            f"tokenizer cannot be extended. {_REMEDY}"
        )
    if (path / "spiece.model").is_file():
        raise DataError(
            f"{path / 'spiece.model'}: a SentencePiece model of T5, ALBERT or XLNet, whose files "
            "are not written under this name. Copy it to tokenizer.model beside tokenizer.json, "
            "and extend that."
        )


def _has_byte_level(component: dict[str, Any] | None) -> bool:
    if component is None:
        return False
    members = component.get("pretokenizers") or component.get("normalizers") or ()
    return component.get("type") == "ByteLevel" or any(map(_has_byte_level, members))


def _kind_of_pieces(path: Path) -> Kind:
    from sentencepiece import sentencepiece_model_pb2  # its own copy of the format

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # the parser's errors have no common ancestor of their own
        raise DataError(
            f"{path}: not a SentencePiece model ({error}). Copy the file again from its model."
        ) from error
    names = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
    name = names.get(model.trainer_spec.model_type)
    if name == "bpe":
        return "sentencepiece_bpe"
    if name == "unigram":
        return "sentencepiece_unigram"
    raise DataError(f"{path}: a SentencePiece {name} model cannot be extended. {_REMEDY}")


def _read_definition(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Restore the file.") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise DataError(f"{path}: not a tokenizer: it has no model. Restore the file.")
    return content
