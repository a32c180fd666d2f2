"""The texts a vocabulary is judged by: read as an index reads them, a bounded sample of them kept.

Which documents are kept is decided by hashes of their texts, so neither their order nor how they
are spread over files matters.
"""

import hashlib
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cgn.corpus import characters
from megatron_cgn.data.documents import parse_block
from megatron_cgn.data.readers import check_inputs, read_blocks
from megatron_cgn.errors import DataError

MAX_BYTES = 16 << 20
"""Most UTF-8 bytes that are kept: enough for three digits, encoded in seconds."""

CHINESE, LATIN, OTHER = "zh", "en", "other"
"""Languages by script: mostly ideographs; mostly Latin letters (English, for most users); others,
and texts without letters."""

# As megatron_cgn/corpus/language.py: technical Chinese is full of Latin names and tags.
_HAN_SHARE = 0.2
_LETTERS_A_WORD = 5


class NoDocuments(DataError):
    """There is nothing to measure on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Documents that no new token was made from."""

    texts: tuple[str, ...]
    """Kept documents, in an order that does not depend on that of the files."""
    languages: tuple[str, ...]
    """Language of each."""
    documents: int
    """Documents in the files."""
    text_bytes: int
    """UTF-8 bytes of all documents in the files."""
    paths: tuple[str, ...]
    """The files."""

    @property
    def sampled(self) -> bool:
        """Whether documents were left out to bound the size."""
        return len(self.texts) < self.documents


def read_held_out(
    paths: Sequence[str | Path],
    *,
    field: str = "text",
    max_bytes: int = MAX_BYTES,
    keep: Callable[[str], bool] | None = None,
    progress: Callable[[int], object] | None = None,
) -> HeldOut:
    """Read documents, and keep those with the smallest hashes that fit.

    Args:
        paths: Files and directories that `data.readers.check_inputs` accepts.
        field: Name of the text's field.
        max_bytes: Most UTF-8 bytes to keep; one document is kept whatever its size.
        keep: Tells from a text whether the document counts at all; None for all.
        progress: Told the bytes read from the disk since the last call.

    Returns:
        The sample, the same in whatever order the documents come.

    Raises:
        DataError: If a file is missing or damaged.
        NoDocuments: If there is no document.
    """
    check_inputs(paths)
    # The largest hash on top: negated, as the heap gives the smallest.
    kept: list[tuple[int, str]] = []
    kept_bytes = documents = text_bytes = 0
    for block in read_blocks(paths, field=field):
        parsed = parse_block(block, field=field)
        for text, utf8 in zip(parsed.texts, parsed.utf8, strict=True):
            if keep is not None and not keep(text):
                continue
            documents += 1
            text_bytes += len(utf8)
            digest = hashlib.blake2b(utf8, digest_size=8, key=b"held-out sample").digest()
            heapq.heappush(kept, (-int.from_bytes(digest), text))
            kept_bytes += len(utf8)
            while kept_bytes > max_bytes and len(kept) > 1:
                kept_bytes -= len(heapq.heappop(kept)[1].encode())
        if progress is not None:
            progress(block.progress_bytes)
    if not kept:
        raise NoDocuments(
            f"{', '.join(map(str, paths))}: no document with text in the field {field!r}. A "
            "vocabulary is judged by held-out documents: give some that are no part of the corpus."
        )
    texts = tuple(text for _, text in sorted(kept, reverse=True))
    return HeldOut(
        texts=texts,
        languages=tuple(map(language, texts)),
        documents=documents,
        text_bytes=text_bytes,
        paths=tuple(map(str, paths)),
    )


def language(text: str) -> str:
    """Tell the language of a text by the share of ideographs; syllables of Japanese are others.

    Args:
        text: Valid Unicode.

    Returns:
        `CHINESE`, `LATIN` or `OTHER`.
    """
    counts = characters.counts(characters.classes(characters.code_points(text)))
    han, kana = int(counts[characters.HAN]), int(counts[characters.KANA])
    latin, letters = int(counts[characters.LATIN]), int(counts[characters.LETTER])
    words = latin / _LETTERS_A_WORD
    if han > _HAN_SHARE * (han + kana + words + letters) and han > kana:
        return CHINESE
    return LATIN if latin > letters + han + kana else OTHER
