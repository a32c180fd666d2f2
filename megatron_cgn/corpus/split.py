"""Which documents are held out: decided by the id alone, so that adding data moves none.

A document is held out exactly if the hash of its group, as a number from 0 to 1, is below the
fraction. So a larger fraction holds out all that a smaller one does, and a document stays where it
is whatever else is in the corpus, in whatever order.
"""

import hashlib
import re
from typing import Literal

from megatron_cgn.config.corpus import SplitConfig

Split = Literal["train", "validation"]

# Keeps this choice independent of other uses of a hash of ids. Changing it moves every document.
_KEY = b"held-out documents"


class Splitter:
    """Decides for each document on which side it is."""

    def __init__(self, settings: SplitConfig) -> None:
        """Fix the rule.

        Args:
            settings: Fraction and grouping.
        """
        self._limit = int(settings.validation_fraction * 2**64)
        self._group = re.compile(settings.group_by) if settings.group_by else None

    def __call__(self, document_id: str, *, own_id: bool = True) -> Split:
        """Tell the side of a document.

        Args:
            document_id: Its id, before any suffix that made it unique.
            own_id: Whether the document brought the id; otherwise it is a group of its own.

        Returns:
            ``train`` or ``validation``.
        """
        group = self.group(document_id) if own_id else document_id
        hashed = hashlib.blake2b(group.encode(), digest_size=8, key=_KEY).digest()
        return "validation" if int.from_bytes(hashed) < self._limit else "train"

    def group(self, document_id: str) -> str:
        """Name what is held out together with a document."""
        match = self._group.search(document_id) if self._group else None
        return document_id if match is None or match[1] is None else match[1]
