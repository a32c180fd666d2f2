r"""Where a text with ideographs can be cut so that its pieces have the ids of the whole.

A byte-level BPE merges only what a token holds. Let two neighbours ``a`` and ``b`` lie in one
piece of the pre-tokenizer. If no token holds the last bytes of ``a`` followed by the first bytes
of ``b``, no merge ever joins them: ``ids(A + B) == ids(A) + ids(B)`` for every ``A`` that ends
with ``a`` and every ``B`` that begins with ``b``. Tokens may begin and end in the middle of a
character; such a token stands for every character that it could be a part of. If ``a`` and ``b``
lie in different pieces they can be cut whatever the tokens are, as long as ``A`` and ``B`` are
still split as they were together. That one of the two is an ideograph settles it:

- An ideograph is a letter. The patterns here take letters as ``\p{L}+``, which runs over ``a`` and
  ``b`` alike, ends with ``A``, and begins anew with ``B``.
- Behind an ideograph that run ends at the first character that is no letter, and the next match
  begins there, as it does in ``B`` alone.
- Before one, digits and marks are matched as they are in ``A`` alone. In the pattern of Llama 3 a
  single mark joins the letters behind it, so there the tokens decide. White space looks ahead to
  what follows, so there is no cut behind it, except behind the end of a line where the pattern has
  a rule for line ends alone.

With ``ignore_merges``, a piece that is a token becomes it even where merges would not make it. No
cut may bring such a piece about: see `_unreachable`.

Normalisation (NFC) leaves all these characters alone and joins nothing to them. The ideographs are
those that every version of Unicode in use knows as letters.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from tokenizer.joined_pairs import JoinedPairs, byte_characters

Units = npt.NDArray[np.uint16]
"""A text in UTF-16."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LIKE_LLAMA3 = (_LLAMA3, _LLAMA3.replace("{1,3}", ""))  # the second is Qwen's

_OTHER, _SPACE, _LINE_END, _DIGIT, _MARK, _LETTER, _HAN = range(7)
_HAN_CODES = (*range(0x4E00, 0x9FA6), *range(0x3400, 0x4DB6))
_MARKS = "·—‘’“”…、。〈〉《》「」『』【】〔〕〖〗！（），．：；？［］％～"
_WIDE_DIGITS = "０１２３４５６７８９"
_MOST_CELLS = 1 << 25
"""Bytes of the largest table of pairs, where a known tokenizer takes 6 million."""


class CannotCut(Exception):
    """Nothing is proven for this tokenizer. Says why; never a user's fault."""


class HanCuts:
    """The places at which texts can be cut, for one tokenizer."""

    def __init__(self, definition: dict[str, Any]) -> None:
        """Work out which neighbours some token joins.

        Args:
            definition: ``tokenizer.json`` of a byte-level BPE.

        Raises:
            CannotCut: If nothing is known of the way in which it splits or changes texts.
        """
        like_llama3 = _is_like_llama3(definition)
        _check_surroundings(definition)
        model = definition["model"]
        alphabet, left_kinds = _alphabet()
        if model.get("ignore_merges"):
            # Latin tokens that merges do not make would be many to find: no cuts beside letters.
            left_kinds[left_kinds == _LETTER] = _OTHER
        right_kinds = left_kinds
        joined = JoinedPairs(model["vocab"], alphabet)
        # A piece that was cut begins or ends at a cut: with none there, it is none of these.
        tokens = _unreachable(model) if model.get("ignore_merges") else []
        first, last = (np.isin(alphabet, [ord(t[end]) for t in tokens]) for end in (0, -1))
        joined.left_traits[last] = joined.right_traits[first] = -1
        left, left_class = _classes(joined.left_traits, left_kinds)
        right, right_class = _classes(joined.right_traits, right_kinds)
        if len(left) * len(right) > _MOST_CELLS:
            raise CannotCut(f"its tokens join {len(left):,} × {len(right):,} kinds of characters")
        free, by_tokens = _rules(like_llama3=like_llama3)
        kinds = np.ix_(left_kinds[left], right_kinds[right])
        free, by_tokens = free[kinds], by_tokens[kinds]
        uncut = ~(free | by_tokens)
        uncut[left_class[joined.before], right_class[joined.after]] = True
        for before, after in joined.groups:
            uncut[np.ix_(np.unique(left_class[before]), np.unique(right_class[after]))] = True
        uncut[left_class[last]] = True
        uncut[:, right_class[first]] = True
        uncut &= ~free
        self._cut = ~uncut.ravel()
        self._row, self._column = np.zeros((2, 0x10000), dtype=np.int32)
        self._row[:], self._column[:] = left_class[0] * uncut.shape[1], right_class[0]
        self._row[alphabet] = left_class * uncut.shape[1]
        self._column[alphabet] = right_class

    def find(self, units: Units) -> npt.NDArray[np.intp]:
        """Find all places at which a text can be cut.

        Args:
            units: The text in UTF-16, ``[n]``.

        Returns:
            The unit before which each cut is, ascending, ``[cuts]``.
        """
        return np.flatnonzero(self.bounds(units)[1:-1]) + 1

    def bounds(self, units: Units) -> npt.NDArray[np.bool_]:
        """Say before which units a text can be cut; at its two ends, it can.

        Args:
            units: The text in UTF-16, ``[n]``.

        Returns:
            For each unit, and for the end, ``[n + 1]``.
        """
        is_bound = np.ones(len(units) + 1, dtype=bool)
        cells = self._row.take(units[:-1])
        cells += self._column.take(units[1:])
        # "clip" only spares a copy: cells are always within the table.
        self._cut.take(cells, out=is_bound[1:-1], mode="clip")
        return is_bound


def _is_like_llama3(definition: dict[str, Any]) -> bool:
    """Whether the pre-tokenizer's pattern is Llama 3's or Qwen's; else it is GPT-2's."""
    component = definition.get("pre_tokenizer") or {}
    if component.get("type") == "ByteLevel" and component["use_regex"]:
        return False
    members = component.get("pretokenizers") or []
    if [member["type"] for member in members] == ["Split", "ByteLevel"]:
        split, bytes_ = members
        isolated = split["behavior"] == "Isolated" and not split["invert"]
        plain = not bytes_["use_regex"] and not bytes_["add_prefix_space"]
        if split["pattern"].get("Regex") in _LIKE_LLAMA3 and isolated and plain:
            return True
    raise CannotCut("its pre-tokenizer is neither GPT-2's nor Llama 3's nor Qwen's")


def _check_surroundings(definition: dict[str, Any]) -> None:
    normalizer = definition.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise CannotCut(f"its normalizer is {normalizer['type']}")
    han = frozenset(map(chr, _HAN_CODES))
    for token in definition.get("added_tokens") or ():
        if not token["special"] and not han.isdisjoint(token["content"]):
            raise CannotCut(f"the added token {token['content']!r} has ideographs")


def _alphabet() -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """Code points and kinds of all characters at which texts are cut; at 0 stands any other."""
    kinds = {0: _OTHER, 0x20: _SPACE, 0x09: _SPACE, 0x0D: _LINE_END, 0x0A: _LINE_END}
    for code in range(0x21, 0x7F):
        letter = _LETTER if chr(code).isalpha() else _MARK
        kinds[code] = _DIGIT if chr(code).isdigit() else letter
    kinds |= dict.fromkeys(map(ord, _WIDE_DIGITS), _DIGIT)
    kinds |= dict.fromkeys(map(ord, _MARKS), _MARK)
    kinds |= dict.fromkeys(_HAN_CODES, _HAN)
    return np.array([*kinds], dtype=np.uint32), np.array([*kinds.values()], dtype=np.uint8)


def _rules(*, like_llama3: bool) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Kinds of neighbours between which there always is a cut, and where the tokens decide."""
    free, by_tokens = np.zeros((2, _HAN + 1, _HAN + 1), dtype=bool)
    free[_HAN, [_SPACE, _LINE_END, _DIGIT, _MARK]] = True
    free[_DIGIT, _HAN] = True
    by_tokens[[_HAN, _HAN, _LETTER], [_HAN, _LETTER, _HAN]] = True
    (by_tokens if like_llama3 else free)[_MARK, _HAN] = True
    free[_LINE_END, _HAN] = like_llama3
    return free, by_tokens


def _classes(
    traits: npt.NDArray[np.int64], kinds: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """Characters that all tokens treat alike: one of each class, and each character's class."""
    _, some, classes = np.unique(traits << 3 | kinds, return_index=True, return_inverse=True)
    return some, classes.astype(np.uint32)


def _unreachable(model: dict[str, Any]) -> list[str]:
    """Tokens beside which there might be a cut and that merges do not make of their own text."""
    merges = (m if isinstance(m, list) else m.split(" ", 1) for m in model["merges"])
    ranks = {
        (a, b): rank for rank, (a, b) in enumerate(merges) if not (a.isascii() and b.isascii())
    }
    spelling = byte_characters()
    to_byte = {character: byte for byte, character in enumerate(spelling)}
    ends, leads = frozenset(map(chr, _HAN_CODES)), frozenset(spelling[0xC2:0xF0])
    found = []
    for token in model["vocab"]:
        if not (token[:1] in leads or token[-3:-2] in leads):
            continue
        if any(character not in to_byte for character in token):
            continue
        text = bytes(map(to_byte.__getitem__, token)).decode(errors="replace")
        if (text[0] in ends or text[-1] in ends or text in _MARKS) and "\ufffd" not in text:
            if not _merges_to_one(token, ranks):
                found.append(text)
    return found


def _merges_to_one(token: str, ranks: dict[tuple[str, str], int]) -> bool:
    parts = list(token)
    while len(parts) > 1:
        pairs = zip(parts, parts[1:], strict=False)
        rank, place = min((ranks.get(pair, len(ranks) << 8), i) for i, pair in enumerate(pairs))
        if rank == len(ranks) << 8:
            return False
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return True
