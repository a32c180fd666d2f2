"""An index made with one tokenizer, made again with another, without the documents' files.

Ids are turned back into text by the old tokenizer and encoded by the new one. Nothing may be lost
on the way, so every document's text must give its old ids again. Where the new tokenizer is an
extension of the old one that needs no second encoding: new tokens, replaced by the old ones that
they stand for, must be the document as it was.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cgn.data.index_writer import IndexWriter
from megatron_cgn.data.indexed import IndexInfo, Sidecar, check_index
from megatron_cgn.data.portions import Portion, read_portions
from megatron_cgn.errors import DataError
from tokenizer.extension import FILE_NAME, Extension
from tokenizer.wrapper import Tokenizer

Ids = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retokenized:
    """What a run did."""

    sidecar: Sidecar
    """What was written to ``Q.json``."""
    old_tokens: int
    """Tokens of the documents before."""
    extension: bool
    """Whether the new tokenizer is known to extend the old one."""


def retokenize(
    prefix: str | Path,
    *,
    old_tokenizer: str | Path,
    tokenizer: str | Path,
    output_prefix: str | Path,
    overwrite: bool = False,
    report: Callable[[int], object] | None = None,
) -> Retokenized:
    """Write an index's documents with the ids of another tokenizer.

    Order, lineage, bytes of text and inputs stay; documents end with the new tokenizer's
    end-of-document token if they ended with the old one's.

    Args:
        prefix: The index, without suffix.
        old_tokenizer: Directory of the tokenizer that made it.
        tokenizer: Directory of the other one.
        output_prefix: The new index, without suffix.
        overwrite: Replace an existing index.
        report: Called with the old tokens done since its last call.

    Returns:
        What was done.

    Raises:
        DataError: If the index is damaged or of another tokenizer, if the two tokenizers are the
            same, if documents cannot be turned back into the text that they were, or if the
            output is in the way. Nothing is left behind.
    """
    old, new = Tokenizer.from_pretrained(old_tokenizer), Tokenizer.from_pretrained(tokenizer)
    index = _checked(prefix, old, new, output_prefix)
    expansion = _expansion(Path(tokenizer), old, new)
    sidecar = index.sidecar
    work = _Work(
        index=index,
        old=old,
        new=new,
        expansion=expansion,
        eod_id=None if sidecar.eod_id is None else new.eod_id,
    )
    with IndexWriter(output_prefix, vocab_size=new.vocab_size, overwrite=overwrite) as writer:
        for portion in read_portions(index):
            documents = work.documents(portion)
            lengths = [len(document) for document in documents]
            flat = np.fromiter((i for ids in documents for i in ids), np.int64, count=sum(lengths))
            writer.add(flat, lengths, lineage=portion.lineage)
            if report is not None:
                report(len(portion.tokens))
        work.refuse_lost()
        written = writer.finish(
            tokenizer_fingerprint=new.fingerprint(),
            tokenizer_name=new.name,
            eod_id=work.eod_id,
            text_bytes=sidecar.text_bytes,
            sources=sidecar.sources,
        )
    return Retokenized(sidecar=written, old_tokens=sidecar.tokens, extension=expansion is not None)


@dataclass(slots=True, kw_only=True)
class _Work:
    """Turns portions into new ids, and remembers what could not be."""

    index: IndexInfo
    old: Tokenizer
    new: Tokenizer
    expansion: "_Expansion | None"
    eod_id: int | None
    lost: int = 0
    first_lost: int | None = None
    _ends: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._ends = [] if self.eod_id is None else [self.eod_id]

    def documents(self, portion: Portion) -> list[list[int]]:
        """New ids of a portion's documents."""
        bounds = np.cumsum(portion.lengths)[:-1]
        before = [self._body(ids) for ids in np.split(portion.tokens, bounds)]
        texts = [self.old.decode(ids.tolist()) for ids in before]
        after = self.new.encode_batch(texts)
        unproven = [
            place
            for place, ids in enumerate(after)
            if self.expansion is None or not np.array_equal(self.expansion(ids), before[place])
        ]
        again = self.old.encode_batch([texts[place] for place in unproven])
        for place, ids in zip(unproven, again, strict=True):
            if not np.array_equal(ids, before[place]):
                self.lost += 1
                if self.first_lost is None:
                    self.first_lost = portion.first + place
        return [ids + self._ends for ids in after]

    def refuse_lost(self) -> None:
        """Refuse the index if a document was not the text that was encoded."""
        if self.lost:
            raise DataError(
                f"{self.index.prefix}: {self.lost:,} of {self.index.documents:,} documents, the "
                f"first of them number {self.first_lost}, cannot be made again from their ids: "
                "their text gives the old tokenizer other ids. Index the documents themselves with "
                "tools/preprocess_data.py."
            )

    def _body(self, ids: Ids) -> Ids:
        """A document without its end."""
        end = self.index.sidecar.eod_id
        if end is None:
            return ids
        if not len(ids) or ids[-1] != end:
            raise DataError(
                f"{self.index.prefix}: a document does not end with {end}, as its sidecar says. "
                "Make the index again with tools/preprocess_data.py."
            )
        return ids[:-1]


class _Expansion:
    """Replaces new tokens by the old ones that they stand for."""

    def __init__(self, extension: Extension) -> None:
        spelled: list[Sequence[int]] = [(i,) for i in range(extension.old_vocab_size)]
        spelled += [token.old_ids for token in extension.new_tokens]
        self._counts = np.fromiter(map(len, spelled), np.int64, count=len(spelled))
        self._starts = np.cumsum(self._counts) - self._counts
        self._old = np.fromiter((i for ids in spelled for i in ids), np.int64)

    def __call__(self, ids: Sequence[int]) -> npt.NDArray[np.int64]:
        """Old ids of new ones, which are below the extension's ``new_vocab_size``."""
        new = np.asarray(ids, dtype=np.int64)
        counts = self._counts[new]
        ends = np.cumsum(counts)
        shifts = np.repeat(self._starts[new] - (ends - counts), counts)
        return self._old[shifts + np.arange(len(shifts))]


def _checked(
    prefix: str | Path, old: Tokenizer, new: Tokenizer, output_prefix: str | Path
) -> IndexInfo:
    """The index, if the two tokenizers and the output fit it."""
    index = check_index(prefix)
    made_with = index.sidecar.tokenizer_fingerprint
    if made_with == new.fingerprint():
        raise DataError(
            f"{prefix}: has the ids of tokenizer {new.name!r} already (fingerprint {made_with}). "
            "Use it as it is."
        )
    if made_with != old.fingerprint():
        raise DataError(
            f"{prefix}: made with another tokenizer: {index.sidecar.tokenizer_name!r} (fingerprint "
            f"{made_with}), but --old-tokenizer {old.name!r} has {old.fingerprint()}. Give the "
            "directory of the one that made it."
        )
    if Path(f"{output_prefix}.bin").resolve() == Path(f"{prefix}.bin").resolve():
        raise DataError(f"{output_prefix}: is the input. Choose another --output-prefix.")
    return index


def _expansion(directory: Path, old: Tokenizer, new: Tokenizer) -> _Expansion | None:
    """What the new tokenizer's directory says of its new tokens, if they extend the old one."""
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Extend the vocabulary again."
        ) from error
    extension = Extension.from_json(content, name=str(path))
    if (extension.old_fingerprint, extension.new_fingerprint) != (
        old.fingerprint(),
        new.fingerprint(),
    ):
        return None  # of another step: both encodings are compared instead
    return _Expansion(extension)
