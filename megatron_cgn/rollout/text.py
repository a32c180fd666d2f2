"""Text of an answer while it is being generated, token by token."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"


class TextStream:
    """Gives out text as soon as it is settled.

    A character may take several tokens: as long as the last bytes make none, they are held back.
    Only the newest tokens are decoded again and again, with a few before them, because tokens at
    the very beginning of a text may be written without their space.

    Args:
        decode: Turns ids into text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # first token that is decoded
        self._settled = 0  # tokens whose text was given out

    def add(self, token: int) -> str:
        """The text that a further token settles; empty if it settles none."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        if text.endswith(_REPLACEMENT):
            return ""
        return self._settle(text)

    def end(self) -> str:
        """The text held back, which no further token completes."""
        return self._settle(self._decode(self._ids[self._start :]))

    def _settle(self, text: str) -> str:
        known = self._decode(self._ids[self._start : self._settled])
        self._start, self._settled = self._settled, len(self._ids)
        return text[len(known) :]
