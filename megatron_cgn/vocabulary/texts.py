"""The documents of a run: those that tokens are made from, and those that they are measured on.

No document is both. Without files of its own, the held-out side is one in ten documents of the
corpus, chosen by a hash of their text: the same ones in every run and in whatever order they come.
With files, documents of the corpus that are in the held-out sample too are not counted.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from megatron_cgn.data.readers import check_inputs
from megatron_cgn.errors import DataError
from megatron_cgn.vocabulary.console import Console
from megatron_cgn.vocabulary.count import count_words
from megatron_cgn.vocabulary.held_out import HeldOut, NoDocuments, read_held_out
from megatron_cgn.vocabulary.settings import Settings
from tokenizer.words import Splitter, Words

ONE_IN = 10
"""One document of so many is held out, where no files are given."""


@dataclass(frozen=True, slots=True)
class Side:
    """Chooses documents of a corpus by a hash of their text."""

    is_held_out: bool
    """Which side is chosen."""

    def __call__(self, text: str) -> bool:
        """Whether a document is on the chosen side."""
        return (_hash(text) % ONE_IN == 0) == self.is_held_out


@dataclass(frozen=True, slots=True)
class NotAmong:
    """Chooses documents that are none of some others."""

    hashes: frozenset[int]
    """Of the others' texts."""

    def __call__(self, text: str) -> bool:
        """Whether a document is none of them."""
        return _hash(text) not in self.hashes


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What a run reads."""

    words: Words
    """Of the documents that tokens are made from."""
    corpus_bytes: int
    """UTF-8 bytes of these documents, and of those that a limit left uncounted."""
    domain: HeldOut
    """Held-out documents of the same kind."""
    general: HeldOut | None
    """Documents of another kind, if given."""


def read_texts(settings: Settings, *, split: Splitter, console: Console) -> Texts:
    """Read the corpus and what the result is measured on.

    Args:
        settings: What is asked for.
        split: Cuts a text into words.
        console: Shows progress.

    Returns:
        The corpus as words, and samples of the other documents.

    Raises:
        DataError: If an input is damaged, or there is nothing in it.
    """
    domain = _read_domain(settings, console)
    general = None
    if settings.general:
        with console.bar("general text", total=check_inputs(settings.general), unit="B") as advance:
            general = read_held_out(settings.general, field=settings.text_field, progress=advance)
    keep: Callable[[str], bool] = Side(is_held_out=False)
    if settings.held_out:
        keep = NotAmong(frozenset(map(_hash, domain.texts)))
    total: list[int] = []
    with console.bar("counting words", total=check_inputs(settings.corpus), unit="B") as advance:
        words = count_words(
            settings.corpus,
            split=split,
            field=settings.text_field,
            workers=settings.workers,
            max_bytes=settings.max_corpus_mb * 10**6,
            seed=settings.seed,
            keep=keep,
            report=advance,
            sampled=total.append,
        )
    return Texts(
        words=words,
        corpus_bytes=total[0] if total else words.text_bytes,
        domain=domain,
        general=general,
    )


def _read_domain(settings: Settings, console: Console) -> HeldOut:
    paths = settings.held_out or settings.corpus
    with console.bar("held-out text", total=check_inputs(paths), unit="B") as advance:
        if settings.held_out:
            return read_held_out(paths, field=settings.text_field, progress=advance)
        on_side, others = Side(is_held_out=True), 0

        def keep(text: str) -> bool:
            nonlocal others
            kept = on_side(text)
            others += not kept
            return kept

        try:
            return read_held_out(paths, field=settings.text_field, keep=keep, progress=advance)
        except NoDocuments as error:
            names = ", ".join(map(str, paths))
            if not others:
                raise DataError(
                    f"{names}: holds no document with text in the field {settings.text_field!r}. "
                    "Give documents of the domain."
                ) from error
            raise DataError(
                f"{names}: of its {others:,} documents, none falls "
                f"among the one in {ONE_IN} that are held out. Give documents to measure on with "
                "--held-out."
            ) from error


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"held out").digest()
    return int.from_bytes(digest, "little")
