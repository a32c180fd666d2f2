"""How a run tells what it does, without knowing whether a terminal listens."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

Advance = Callable[[int], object]
"""Told how much more is done."""


class Console(Protocol):
    """Where a run says what it does."""

    def say(self, text: str) -> None:
        """Show a line or several."""

    def bar(self, title: str, *, total: int, unit: str) -> AbstractContextManager[Advance]:
        """Show how far one step has come.

        Args:
            title: What is done.
            total: How much there is to do.
            unit: Of what; ``B`` for bytes.

        Returns:
            Entered while the step lasts; gives what is told of progress.
        """
        ...
