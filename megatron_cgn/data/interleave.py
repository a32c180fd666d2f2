"""In which order sequences are drawn from several sources: exact arithmetic, nothing stored.

A binary tree has a source (any label) at each leaf. A node that has handed out n sequences has
taken ``round(n * share)`` of them, halves rounded up, from its left side and the rest from its
right side. That says which side sequence n comes from, and which sequence of that side it is,
without looking at those before it. Counts are integers and shares are fractions, so nothing
rounds differently on another machine, and what is drawn of n sequences does not depend on how
many follow.

A leaf that lies d nodes deep is never more than d / 2 sequences away from its exact share.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Node[L]:
    """Two sides that sequences are drawn from in turn."""

    left: "Tree[L]"
    """The one side."""
    right: "Tree[L]"
    """The other."""
    numerator: int
    """Share of the left side,"""
    denominator: int
    """as a fraction."""

    def from_left(self, total: int) -> int:
        """How many of the first ``total`` sequences come from the left side."""
        return (2 * total * self.numerator + self.denominator) // (2 * self.denominator)


type Tree[L] = Node[L] | L


def interleave[L](branches: Sequence[tuple[Fraction, Tree[L]]]) -> Tree[L]:
    """Draw from branches in proportion to their weights.

    Args:
        branches: At least one weight above 0 with what it draws from.

    Returns:
        A tree in which the branches are equally deep, give or take one.
    """
    if len(branches) == 1:
        return branches[0][1]
    half = len(branches) // 2
    left, right = branches[:half], branches[half:]
    weight = sum((w for w, _ in left), Fraction())
    share = weight / (weight + sum((w for w, _ in right), Fraction()))
    return Node(interleave(left), interleave(right), share.numerator, share.denominator)


def locate[L](tree: Tree[L], position: int) -> tuple[L, int]:
    """Find sequence ``position``: its source, and which sequence of that source it is."""
    while isinstance(tree, Node):
        before = tree.from_left(position)
        if tree.from_left(position + 1) > before:
            tree, position = tree.left, before
        else:
            tree, position = tree.right, position - before
    return tree, position


def count[L](tree: Tree[L], total: int) -> Iterator[tuple[L, int]]:
    """Say how many of the first ``total`` sequences come from each leaf, in order."""
    if isinstance(tree, Node):
        left = tree.from_left(total)
        yield from count(tree.left, left)
        yield from count(tree.right, total - left)
    else:
        yield tree, total
