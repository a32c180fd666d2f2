"""The ids of a Hugging Face tokenizer, made ten times faster by the package `gigatoken`.

The package is young and does not do every tokenizer, so nothing is taken on trust. Tokenizers with
options that it ignores are refused; a fixed set of hard texts (``hard_texts.py``) must come out
equal; callers hold samples of their own data against the original by `FastEncoder.prove`; and texts
with characters that the two libraries may know from different versions of Unicode never reach it.

Its speed comes from a cache of words, which Chinese has no use for: texts with ideographs are cut
into short pieces where that changes nothing, and a table gives their ids (``han_segments.py``).
"""

import ctypes
import json
import logging
import os
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenizer.han_cuts import CannotCut, HanCuts
from tokenizer.han_segments import Flat, HanSegments
from tokenizer.hard_texts import hard_texts
from tokenizer.wrapper import Tokenizer

log = logging.getLogger(__name__)

_HAN_BYTES = 1.2
"""Bytes per character of UTF-8 from which a text is taken for one with ideographs: 3 each."""
_CACHE_BYTES = 96 << 20
"""Memory per thread by which the package's cache of words may grow before it is emptied."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

# First bytes, in UTF-8, of characters that cannot be new: all below U+07C0, U+2000 to U+9FFF,
# U+B000 to U+FFFF, and every byte that follows a first one. `_is_settled` judges the others.
_SETTLED_BYTES = bytes(
    byte for byte in range(256) if byte < 0xDF or 0xE2 <= byte <= 0xE9 or 0xEB <= byte <= 0xEF
)


class NotEqual(Exception):
    """The package cannot do this tokenizer, or gives other ids. Says why; never a user's fault."""


class FastEncoder:
    """Encodes batches of texts; safe to call from several threads, and faster for it."""

    def __init__(self, tokenizer: Tokenizer, *, threads: int) -> None:
        """Open the package's tokenizer and prove it on the hard texts.

        Args:
            tokenizer: The original.
            threads: How many will call; bounds the memory.

        Raises:
            ImportError: If the package is not installed.
            NotEqual: If it cannot do this tokenizer.
        """
        from gigatoken import gigatoken_rs

        self._original = tokenizer
        self._rust: Any = gigatoken_rs
        definition = _definition_for(tokenizer)
        self._definition = json.dumps(definition).encode()
        self._segments = self._cut_at_ideographs(definition)
        self._limit_bytes = threads * _CACHE_BYTES
        self._turn = threading.Condition()
        self._active = 0
        self._emptying = False
        self._open()
        self.prove(hard_texts(tokenizer.added_tokens()))

    def _cut_at_ideographs(self, definition: dict[str, Any]) -> HanSegments | None:
        try:
            return HanSegments(HanCuts(definition), self._encode_whole)
        except CannotCut as reason:
            log.debug("%s: Chinese goes slower: %s", self._original.name, reason)
            return None

    def _open(self) -> None:
        try:
            with _panics_are_errors():
                self._backend: Any = self._rust.load_hf_json(self._definition)
        except Exception as error:  # whatever the package raises, it means that it cannot
            raise NotEqual(_first_line(error)) from error
        self._opened_bytes = _resident_bytes()

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
        suspects = [i for i, t in enumerate(utf8) if t.translate(None, _SETTLED_BYTES)]
        unsettled = [i for i in suspects if not _is_settled(texts[i])]
        if not unsettled:
            return self._encode(texts, utf8)
        fast_texts, fast = list(texts), list(utf8)
        for i in unsettled:
            fast_texts[i], fast[i] = "", b""
        ids, lengths = self._encode(fast_texts, fast)
        parts, start = [], 0
        ends = np.cumsum(lengths)
        for i in unsettled:
            own = np.array(self._original.encode(texts[i]), dtype=ids.dtype)
            parts += [ids[start : ends[i]], own]
            start, lengths[i] = int(ends[i]), len(own)
        return np.concatenate([*parts, ids[start:]]), lengths

    def prove(self, texts: Sequence[str]) -> None:
        """Hold the ids of texts against the original's.

        Args:
            texts: Valid Unicode. Those that are always left to the original are passed over.

        Raises:
            NotEqual: If one differs.
        """
        texts = [text for text in texts if _is_settled(text)]
        ids, lengths = self._encode(texts, [text.encode() for text in texts])
        start = 0
        for text, expected, length in zip(
            texts, self._original.encode_batch(texts), lengths.tolist(), strict=True
        ):
            if ids[start : start + length].tolist() != expected:
                shown = ascii(text if len(text) <= 60 else text[:60] + "…")
                raise NotEqual(f"it gives other ids for {shown}")
            start += length

    def _encode(self, texts: Sequence[str], utf8: Sequence[bytes]) -> Flat:
        """Encode those with ideographs piece by piece, the others as they are."""
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
        with self._using() as backend, _panics_are_errors():
            try:
                # "Parallel" shares one cache per thread; batches of a megabyte stay on this one.
                layout = backend.encode_batch(list(utf8), parallel=True).layout
            except Exception as error:
                raise NotEqual(f"it fails: {_first_line(error)}") from error
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)
        return ids[offsets[0] : offsets[-1]], np.diff(offsets)

    @contextmanager
    def _using(self) -> Iterator[Any]:
        """Lend the backend. Empties its cache first if it has grown too large.

        The package has no limit for it and no way to empty it: only to open the tokenizer again.
        """
        with self._turn:
            self._turn.wait_for(lambda: not self._emptying)
            grown = _resident_bytes() - self._opened_bytes
            if grown > self._limit_bytes:
                self._emptying = True
                self._turn.wait_for(lambda: not self._active)
                try:
                    self._backend = None
                    _return_freed_memory()
                    self._open()
                finally:
                    self._emptying = False
                    self._turn.notify_all()
            self._active += 1
        try:
            yield self._backend
        finally:
            with self._turn:
                self._active -= 1
                self._turn.notify_all()


def _interleave(is_first: npt.NDArray[np.bool_], first: Flat, second: Flat) -> Flat:
    """Join the ids of two sets of texts in the order of the texts."""
    lengths = np.empty(len(is_first), dtype=np.int64)
    lengths[is_first], lengths[~is_first] = first[1], second[1]
    mask = np.repeat(is_first, lengths)
    ids = np.empty(len(mask), dtype=np.uint32)
    ids[mask], ids[~mask] = first[0], second[0]
    return ids, lengths


def _definition_for(tokenizer: Tokenizer) -> dict[str, Any]:
    """``tokenizer.json`` for the package: special tokens are left out, so text never becomes one.

    Raises:
        NotEqual: If it has options that the package passes over.
    """
    definition = tokenizer.definition()
    tokenizer.fingerprint(definition=definition)  # it will be asked for, and this is the parsing
    model = definition["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise NotEqual("it is used for byte-level BPE alone")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise NotEqual(f"the option {option!r} of the model is passed over")
    _check_splitting(definition.get("pre_tokenizer"), within_sequence=False)
    merged = _merged_ids(model)
    if merged != sorted(merged):
        raise NotEqual("ids are taken for ranks of the merges, and are in another order")
    ordinary = [token for token in definition.get("added_tokens") or () if not token["special"]]
    for token in ordinary:
        normalized = token["normalized"] and definition.get("normalizer") is not None
        if token["lstrip"] or token["rstrip"] or token["single_word"] or normalized:
            raise NotEqual(f"options of the added token {token['content']!r} are passed over")
    return definition | {"added_tokens": ordinary}


def _check_splitting(component: dict[str, Any] | None, *, within_sequence: bool) -> None:
    kind = None if component is None else component["type"]
    if component is not None and kind == "Sequence" and not within_sequence:
        for member in component["pretokenizers"]:
            _check_splitting(member, within_sequence=True)
    elif component is not None and kind == "Split":
        if component["behavior"] != "Isolated" or component["invert"]:
            raise NotEqual("the way in which the pre-tokenizer splits is passed over")
    elif component is not None and kind == "ByteLevel":
        if component["add_prefix_space"] or component["use_regex"] == within_sequence:
            raise NotEqual("options of the byte-level pre-tokenizer are passed over")
    else:
        raise NotEqual(f"the pre-tokenizer is a {kind}")


def _merged_ids(model: dict[str, Any]) -> list[int]:
    vocabulary = model["vocab"]
    return [
        vocabulary[m[0] + m[1] if isinstance(m, list) else m.replace(" ", "", 1)]
        for m in model["merges"]
    ]


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
