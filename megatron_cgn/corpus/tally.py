"""Counts and examples that can be added up: the same total however the parts are grouped.

A tally is plain JSON: nested dictionaries whose leaves are whole numbers, and lists of examples.
Adding two adds the numbers, and keeps those examples whose key is smallest; a key is a hash of the
document's id, so examples are a sample that does not depend on the order of work.
"""

import hashlib
from typing import Any

Tally = dict[str, Any]

MAX_EXAMPLES = 6
"""Examples kept of each kind."""
EXCERPT_CHARS = 400
"""Characters of a text that an example shows."""


def add(total: Tally, more: Tally) -> None:
    """Add a tally to another, in place.

    Args:
        total: Gets the sum.
        more: Stays as it is.
    """
    for key, value in more.items():
        if isinstance(value, dict):
            add(total.setdefault(key, {}), value)
        elif isinstance(value, list):
            both = total.get(key, []) + value
            total[key] = sorted(both, key=lambda example: str(example["key"]))[:MAX_EXAMPLES]
        else:
            total[key] = total.get(key, 0) + value


def count(total: Tally, *path: str, by: int = 1) -> None:
    """Add to a number, making the way to it.

    Args:
        total: The tally.
        path: Keys from the outside in.
        by: What to add.
    """
    for key in path[:-1]:
        total = total.setdefault(key, {})
    total[path[-1]] = total.get(path[-1], 0) + by


def key_of(document_id: str) -> str:
    """Where a document stands in the order in which examples are chosen."""
    return hashlib.blake2b(document_id.encode(), digest_size=8, person=b"examples").hexdigest()


def wanted(total: Tally, kind: str, key: str) -> bool:
    """Tell whether an example would be kept; making one costs more than asking."""
    held = total.get("examples", {}).get(kind, [])
    return len(held) < MAX_EXAMPLES or key < str(held[-1]["key"])


def add_example(total: Tally, kind: str, *, key: str, **shown: Any) -> None:
    """Add an example of a kind.

    Args:
        total: The tally.
        kind: What it is an example of, e.g. a reason.
        key: From `key_of`.
        shown: What to show of it.
    """
    add(total, {"examples": {kind: [{"key": key, **shown}]}})
