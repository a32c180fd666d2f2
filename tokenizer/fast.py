"""The ids of a Hugging Face tokenizer, made ten times faster by the package `gigatoken`.

The package is young and does not do every tokenizer, so nothing is taken on trust. Tokenizers with
options that it ignores are refused (``fast_definition.py``); a fixed set of hard texts
(``hard_texts.py``) must come out equal; callers hold samples of their own data against the original
by `FastEncoder.prove`; and texts with characters that the two libraries may know from different
versions of Unicode never reach it.

Its speed comes from a cache of words, which Chinese has no use for: texts with ideographs are cut
into short pieces where that changes nothing, and a table gives their ids (``han_segments.py``).
"""

import ctypes
import logging
import os
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenizer.fast_definition import NotEqual as NotEqual
from tokenizer.fast_definition import definition_for, to_json
from tokenizer.han_cuts import CannotCut, HanCuts
from tokenizer.han_segments import Flat, HanSegments
from tokenizer.hard_texts import hard_texts
from tokenizer.wrapper import Tokenizer

log = logging.getLogger(__name__)

_HAN_BYTES = 1.2
"""Bytes per character of UTF-8 from which a text is taken for one with ideographs: 3 each."""
_CACHE_BYTES = 96 << 20
"""Memory by which a process may grow before the package's cache of words is emptied."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

# First bytes, in UTF-8, of characters that cannot be new: all below U+07C0, U+2000 to U+9FFF,
# U+B000 to U+FFFF, and every byte that follows a first one. `_is_settled` judges the others.
_SETTLED_BYTES = bytes(
    byte for byte in range(256) if byte < 0xDF or 0xE2 <= byte <= 0xE9 or 0xEB <= byte <= 0xEF
)


class FastIds:
    """The package's encoder with its cuts: fast, and not held against the original by itself.

    Copies of the process may go on using it.
    """

    def __init__(self, definition: dict[str, Any], *, name: str) -> None:
        """Open the package's tokenizer.

        Args:
            definition: Content of ``tokenizer.json``.
            name: What to call the tokenizer in messages.

        Raises:
            ImportError: If the package is not installed.
            NotEqual: If it cannot do this tokenizer.
        """
        from gigatoken import gigatoken_rs

        self._rust: Any = gigatoken_rs
        try:
            kept = definition_for(definition)
            added = sorted(definition.get("added_tokens") or (), key=lambda token: token["id"])
            self.added_tokens: list[str] = [token["content"] for token in added]
            self._segments = self._cut_at_ideographs(kept, name)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise NotEqual(f"tokenizer.json is not as it should be: {error!r}") from error
        self._definition = to_json(kept)
        self._backend: Any = None
        self._open()
        del kept
        _return_freed_memory()  # copies of the process would keep it

    def _cut_at_ideographs(self, definition: dict[str, Any], name: str) -> HanSegments | None:
        try:
            return HanSegments(HanCuts(definition), self._encode_whole)
        except CannotCut as reason:
            log.debug("%s: Chinese goes slower: %s", name, reason)
            return None

    def _open(self) -> None:
        try:
            with _panics_are_errors():
                self._backend = self._rust.load_hf_json(self._definition)
        except Exception as error:  # whatever the package raises, it means that it cannot
            raise NotEqual(_first_line(error)) from error
        self._opened_by = os.getpid()
        self._opened_bytes = _resident_bytes()

    def unsettled(self, texts: Sequence[str], utf8: Sequence[bytes]) -> list[int]:
        """Say which texts hold characters that only the original may judge.

        Args:
            texts: Valid Unicode.
            utf8: The same texts in UTF-8.

        Returns:
            Their places.
        """
        others = [i for i, text in enumerate(texts) if not text.isascii()]
        suspects = [i for i in others if utf8[i].translate(None, _SETTLED_BYTES)]
        return [i for i in suspects if not _is_settled(texts[i])]

    def encode(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Flat:
        """Encode texts, adding no special tokens.

        Args:
            texts: Valid Unicode, none of them `unsettled`.
            utf8: The same texts in UTF-8.

        Returns:
            Their ids.

        Raises:
            NotEqual: If the package fails on these.
        """
        if self._segments is None:
            return self._encode_whole(utf8)
        chosen = [i for i, t in enumerate(texts) if _HAN_BYTES * len(t) < len(utf8[i])]
        if not chosen:
            return self._encode_whole(utf8)
        some = self._segments.encode([texts[i] for i in chosen], [utf8[i] for i in chosen])
        if len(chosen) == len(texts):
            return some
        is_chosen = np.zeros(len(texts), dtype=bool)
        is_chosen[chosen] = True
        others = [t for t, is_other in zip(utf8, (~is_chosen).tolist(), strict=True) if is_other]
        return _interleave(is_chosen, some, self._encode_whole(others))

    def _encode_whole(self, utf8: Sequence[bytes]) -> Flat:
        if self.grown_bytes() > _CACHE_BYTES:
            # The package has no limit for its cache of words and no way to empty it.
            self._backend = None
            _return_freed_memory()
            self._open()
        with _panics_are_errors():
            try:
                # "Parallel" would start threads, which a copy of the process would lack.
                layout = self._backend.encode_batch(list(utf8), parallel=False).layout
            except Exception as error:
                raise NotEqual(f"it fails: {_first_line(error)}") from error
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)
        return ids[offsets[0] : offsets[-1]], np.diff(offsets)

    def grown_bytes(self) -> int:
        """Memory by which the process has grown since the tokenizer was opened, or it was forked.

        Most of it is the package's cache of words.
        """
        now = _resident_bytes()
        if self._opened_by != os.getpid():
            self._opened_by, self._opened_bytes = os.getpid(), now
        return now - self._opened_bytes


class FastEncoder:
    """Gives a tokenizer's own ids: by `FastIds` wherever that is known to be equal."""

    def __init__(self, tokenizer: Tokenizer, *, ids: FastIds | None = None) -> None:
        """Prove the package on the hard texts.

        Args:
            tokenizer: The original.
            ids: The package's encoder, where it is at hand.

        Raises:
            ImportError: If the package is not installed.
            NotEqual: If it cannot do this tokenizer.
        """
        self._original = tokenizer
        self._ids = ids or FastIds(tokenizer.definition(), name=tokenizer.name)
        self.prove(hard_texts(tokenizer.added_tokens()))

    def encode(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Flat:
        """Encode texts, adding no special tokens.

        Args:
            texts: Valid Unicode.
            utf8: The same texts in UTF-8.

        Returns:
            Their ids.

        Raises:
            NotEqual: If the package fails on these.
        """
        places = self._ids.unsettled(texts, utf8)
        fast_texts, fast = without(texts, utf8, places)
        own = self._original.encode_batch([texts[i] for i in places])
        return with_left(self._ids.encode(fast_texts, fast), places, own)

    def prove(self, texts: Sequence[str]) -> None:
        """Hold the ids of texts against the original's.

        Args:
            texts: Valid Unicode. Those that are always left to the original are passed over.

        Raises:
            NotEqual: If one differs.
        """
        compare(self._original, *sample_ids(self._ids, texts))


def without(
    texts: Sequence[str], utf8: Sequence[bytes], places: Sequence[int]
) -> tuple[Sequence[str], Sequence[bytes]]:
    """Put empty texts at some places."""
    if not places:
        return texts, utf8
    fewer_texts, fewer = list(texts), list(utf8)
    for i in places:
        fewer_texts[i], fewer[i] = "", b""
    return fewer_texts, fewer


def with_left(flat: Flat, places: Sequence[int], own: Sequence[Sequence[int]]) -> Flat:
    """Put the ids of texts to their places, which were left empty."""
    if not places:
        return flat
    ids, lengths = flat
    ends = np.cumsum(lengths)
    lengths = lengths.copy()
    parts, start = [], 0
    for i, given in zip(places, own, strict=True):
        parts += [ids[start : ends[i]], np.array(given, dtype=ids.dtype)]
        start, lengths[i] = int(ends[i]), len(given)
    return np.concatenate([*parts, ids[start:]]), lengths


def sample_ids(encoder: FastIds, texts: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """Encode samples, to `compare`; those that are always left to the original are passed over."""
    texts = [text for text in texts if _is_settled(text)]
    ids, lengths = encoder.encode(texts, [text.encode() for text in texts])
    ends = np.cumsum(lengths).tolist()
    return texts, [ids[a:b].tolist() for a, b in zip([0, *ends], ends, strict=False)]


def compare(original: Tokenizer, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
    """Hold ids of texts against the original's.

    Raises:
        NotEqual: If one differs.
    """
    for text, expected, found in zip(texts, original.encode_batch(texts), ids, strict=True):
        if list(found) != expected:
            shown = ascii(text if len(text) <= 60 else text[:60] + "…")
            raise NotEqual(f"it gives other ids for {shown}")


def _interleave(is_first: npt.NDArray[np.bool_], first: Flat, second: Flat) -> Flat:
    """Join the ids of two sets of texts in the order of the texts."""
    lengths = np.empty(len(is_first), dtype=np.int64)
    lengths[is_first], lengths[~is_first] = first[1], second[1]
    mask = np.repeat(is_first, lengths)
    ids = np.empty(len(mask), dtype=np.uint32)
    ids[mask], ids[~mask] = first[0], second[0]
    return ids, lengths


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """Rust's panics derive from BaseException, as if they were an interrupt."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise NotEqual(f"it fails: {_first_line(error)}") from error
        raise


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]


def _is_settled(text: str) -> bool:
    return text.isascii() or all(map(_is_settled_character, set(text)))


@cache
def _is_settled_character(character: str) -> bool:
    """Whether every version of Unicode in use says the same of a character.

    Those without a meaning yet become letters in a later version, and marks differ in how they are
    ordered, which decides normalisation: among them only those of Unicode 3.2 are settled.
    """
    kind = unicodedata.category(character)
    if kind[0] == "M":
        return unicodedata.ucd_3_2_0.category(character)[0] == "M"
    return kind != "Cn"


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0


def _return_freed_memory() -> None:
    """Let the C library give freed memory back, which it keeps for each thread otherwise."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        log.debug("no malloc_trim here")
