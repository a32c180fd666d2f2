"""Terms of the user: reading them, what cannot be a term, and how often a corpus has them.

How a term becomes a token is each kind of tokenizer's own affair; for merges, see
``term_merges.py``.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_cgn.errors import DataError
from tokenizer.words import Words

MAX_CHARACTERS = 64
"""Longest term. Each of its pieces costs an id."""

_SHOWN = 20
_WORDS_AT_ONCE = 1 << 17


def read_terms(path: str | Path) -> list[str]:
    """Read a list of terms.

    Args:
        path: UTF-8, a term a line. White space around it, empty lines, lines that begin with
            ``#`` and repeated terms are passed over.

    Returns:
        The terms, in the order of the file.

    Raises:
        DataError: If the file cannot be read, holds no term, or has lines that can be none; names
            all of these.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Give a UTF-8 text file.") from error
    terms: dict[str, None] = {}
    faults: list[str] = []
    for number, line in enumerate(lines, 1):
        term = line.strip()
        if not term or term.startswith("#"):
            continue
        fault = fault_of(term)
        if fault is None:
            terms[term] = None
        else:
            faults.append(f"line {number}, {_show(term)}: {fault}")
    if faults:
        raise DataError(f"{path}: {list_faults(faults)}. Correct or remove these lines.")
    if not terms:
        raise DataError(f"{path}: holds no term. Write one on a line, or leave the list out.")
    return list(terms)


def check_terms(
    terms: Sequence[str],
    *,
    normalize: Callable[[str], str],
    added: Collection[str],
    special: Collection[str] = (),
) -> list[str]:
    """Check terms against a tokenizer.

    Args:
        terms: As given by the user.
        normalize: What its normaliser does to a text.
        added: Its added tokens.
        special: Those of them that ordinary text never becomes.

    Returns:
        The terms without repetitions.

    Raises:
        DataError: If some cannot be single tokens; names all of them.
    """
    faults = []
    for term in dict.fromkeys(terms):
        fault = fault_of(term) or _fault_for(term, normalize, added, special)
        if fault is not None:
            faults.append(f"{_show(term)}: {fault}")
    if faults:
        raise DataError(
            f"Terms that cannot be single tokens: {list_faults(faults)}. Correct or remove them."
        )
    return list(dict.fromkeys(terms))


def fault_of(term: str) -> str | None:
    """Say why a text can be no term of any tokenizer, or None."""
    if not term.strip():
        return "it is empty"
    if term != term.strip():
        return "it has white space around it"
    if len(term) > MAX_CHARACTERS:
        return f"it has {len(term)} characters, at most {MAX_CHARACTERS} are allowed"
    if any("\ud800" <= character <= "\udfff" for character in term):
        return "it has a lone surrogate, which is no character"
    if "\ufffd" in term:
        return "it has U+FFFD, which stands for a character that was lost"
    if not all(character.isprintable() or character == "\u3000" for character in term):
        return "it has a control character or one that cannot be seen"
    return None


def _fault_for(
    term: str,
    normalize: Callable[[str], str],
    added: Collection[str],
    special: Collection[str],
) -> str | None:
    if term in special:
        return "it is a special token, which text never becomes"
    held = sorted(token for token in added if token in term and token != term)
    if held:
        return f"it holds the added token {held[0]!r}"
    normal = normalize(term)
    return None if normal == term else f"the tokenizer's normaliser makes {normal!r} of it"


def list_faults(faults: Sequence[str]) -> str:
    """Name faults on one line, the first of very many."""
    more = len(faults) - _SHOWN
    return "; ".join(faults[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _show(term: str) -> str:
    return ascii(term) if any("\ud800" <= c <= "\udfff" for c in term) else repr(term)


class TermFinder:
    """Finds terms in the words of a corpus.

    A term that begins or ends with a letter or digit of a script that puts spaces between words is
    found only where no such letter or digit goes on: ``rod`` is not in ``product``.
    """

    def __init__(self, terms: Sequence[str]) -> None:
        """Prepare to look for terms.

        Args:
            terms: Not empty strings.
        """
        self._starts: dict[str, list[tuple[int, str]]] = {}
        self._firsts = np.zeros(0x110000, dtype=bool)
        self._seconds = np.zeros(0x110000, dtype=bool)
        for number, term in enumerate(terms):
            self._starts.setdefault(term[:2], []).append((number, term))
            self._firsts[ord(term[0])] = True
            if len(term) > 1:
                self._seconds[ord(term[1])] = True
        self._has_single = any(len(term) == 1 for term in terms)

    def find(self, words: Words) -> Iterator[tuple[int, int]]:
        """Find terms.

        Args:
            words: Words of the corpus.

        Yields:
            Number of a word and number of a term in it, once for each time.
        """
        for start in range(0, len(words.spellings), _WORDS_AT_ONCE):
            part = words.spellings[start : start + _WORDS_AT_ONCE]
            # NUL ends a word: no term has it.
            text = "\0".join(part) + "\0\0"
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
            lengths = np.array([len(word) + 1 for word in part], dtype=np.int64)
            places = self._candidates(codes)
            owners = np.searchsorted(np.cumsum(lengths), places, side="right")
            for place, owner in zip(places.tolist(), owners.tolist(), strict=True):
                for term in self._at(text, place):
                    yield start + owner, term

    def _candidates(self, codes: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
        found = self._firsts[codes[:-1]]
        if not self._has_single:
            found &= self._seconds[codes[1:]]
        return np.flatnonzero(found)

    def _at(self, text: str, place: int) -> Iterator[int]:
        pair = text[place : place + 2]
        for key in (pair, pair[0]):
            for number, term in self._starts.get(key, ()):
                end = place + len(term)
                if text.startswith(term, place) and not (
                    (place and _go_together(text[place - 1], term[0]))
                    or _go_together(term[-1], text[end])
                ):
                    yield number


def _go_together(left: str, right: str) -> bool:
    return puts_spaces(left) and puts_spaces(right)


def puts_spaces(character: str) -> bool:
    """Whether it is a letter or digit of a script that puts spaces between words.

    Scripts from U+2E80 on (Chinese, Japanese) do not; Thai and its neighbours, which do not
    either, are not in use here.
    """
    return character < "\u2e80" and character.isalnum()
