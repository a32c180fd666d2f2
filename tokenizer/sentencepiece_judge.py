"""What a new piece of a SentencePiece vocabulary must not be, besides what `filters.Judge` says."""

from tokenizer.filters import MIXED, NUMBER, PARTIAL, SPACE, Judge, Rules
from tokenizer.sentencepiece_model import SPACE as SPACE_MARK
from tokenizer.sentencepiece_words import Cutter, is_number

RESERVED = "is a part of a special token"


class PieceJudge:
    """Says of a spelling why it shall be no piece."""

    def __init__(self, rules: Rules, *, cutter: Cutter, reserved: set[str], digits: bool) -> None:
        """Prepare.

        Args:
            rules: What is asked of a token.
            cutter: Of the old vocabulary: what it cuts, no old piece has side by side.
            reserved: Tokens that text must not become by way of pieces.
            digits: Whether the old vocabulary keeps digits apart.
        """
        self._judge = Judge(rules)
        self._cutter = cutter
        self._digits = digits
        # A piece "s>" would let the fast tokenizer join "<" and "s>" to the token "</s>".
        self._parts = {
            token[start:end]
            for token in reserved
            for start in range(len(token))
            for end in range(start + 2, len(token) + 1)
        }

    def __call__(self, spelling: bytes) -> str | None:
        """Judge a spelling.

        Args:
            spelling: Of a piece, with U+2581 for spaces.

        Returns:
            The reason against it, or None.
        """
        try:
            text = spelling.decode()
        except UnicodeDecodeError:
            return PARTIAL
        if SPACE_MARK in text[1:]:
            return SPACE
        if not self._cutter.is_word(text):
            return MIXED
        if self._digits and len(text) > 1 and any(map(is_number, text)):
            return NUMBER
        if text in self._parts:
            return RESERVED
        return self._judge.text(text.replace(SPACE_MARK, " "))
