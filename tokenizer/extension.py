"""What an extension of a vocabulary is: the new tokens, what they replace, and why others are not.

Made by ``extend_bpe.py`` and ``extend_sentencepiece.py``, written into ``vocab_extension.json``
beside the tokenizer, and read by whatever gives a model its new rows.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from megatron_cgn.errors import DataError

FILE_NAME = "vocab_extension.json"
"""The file of a tokenizer's directory that holds an `Extension`."""

Origin = Literal["corpus", "term", "step"]
"""Why a token is there: frequent in the corpus, wanted by the user, or on the way to another."""

Way = Literal["merges", "added_token", "existing", "piece"]
"""How a term became one token: by merges, as an added token, it was one, as a piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewToken:
    """One token that the old vocabulary has not."""

    id: int
    """Its id; new ids are consecutive."""
    token: str
    """Its spelling in the vocabulary: in the byte-level alphabet, or with U+2581 for spaces."""
    text: str | None
    """The text it stands for; None where its bytes are a part of a character (a step)."""
    old_ids: tuple[int, ...]
    """Ids that stood for it in the old vocabulary: what its row in a model is made of."""
    frequency: int
    """How often it was met in the corpus when it was made; 0 for a term that is not in it."""
    spread: int
    """Estimate of the documents it is in; saturates at a few hundred."""
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """What became of a term of the user."""

    text: str
    way: Way
    id: int
    """The single token that it is now."""
    occurrences: int
    """How often the corpus has it."""
    whole: int
    """How many of those come out as the single token; others are in a longer token, or are cut by
    what is around them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """An extended vocabulary, as seen from the old one."""

    old_vocab_size: int
    """Largest old id plus one, added tokens included: the first new id."""
    new_tokens: tuple[NewToken, ...]
    """In the order of their ids; the first n of them are an extension too (terms come first)."""
    old_fingerprint: str
    """`Tokenizer.fingerprint` of the tokenizer that was extended."""
    new_fingerprint: str
    """The same of the extended one."""
    terms: tuple[Term, ...] = ()
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Candidates that were frequent enough and not taken, by reason."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What was asked for, as plain values."""

    @property
    def new_vocab_size(self) -> int:
        """Largest new id plus one."""
        return self.old_vocab_size + len(self.new_tokens)

    def to_json(self) -> dict[str, Any]:
        """Give plain values for `json.dumps`."""
        return {"version": 1} | asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, name: str) -> Self:
        """Read what `to_json` gave.

        Args:
            content: The parsed file.
            name: Its path, for messages.

        Returns:
            The extension.

        Raises:
            DataError: If the content is of another version or damaged.
        """
        if content.get("version") != 1:
            raise DataError(
                f"{name}: version {content.get('version')!r} of the format, not 1. Extend the "
                "vocabulary again with this version of the tools."
            )
        fields = {key: value for key, value in content.items() if key != "version"}
        try:
            new_tokens = tuple(
                NewToken(**token | {"old_ids": tuple(token["old_ids"])})
                for token in fields.pop("new_tokens")
            )
            terms = tuple(Term(**term) for term in fields.pop("terms"))
            extension = cls(new_tokens=new_tokens, terms=terms, **fields)
        except (KeyError, TypeError) as error:
            raise DataError(f"{name}: damaged ({error}). Extend the vocabulary again.") from error
        first = extension.old_vocab_size
        if [t.id for t in new_tokens] != list(range(first, first + len(new_tokens))):
            raise DataError(f"{name}: damaged (new ids are not consecutive from {first}).")
        return extension
