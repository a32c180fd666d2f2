"""What a proof is: one thing that was checked on what was written, before it is published.

Those of a tokenizer are in ``proof_tokenizer.py`` and ``proof_files.py``, those of a model in
``proof_model.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

_MOST = 5
_LONGEST = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """One thing that was checked."""

    name: str
    """A word or two."""
    ok: bool
    """Whether it holds."""
    text: str
    """What was checked, with figures; or what is wrong, with examples."""

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'FAILED'}: {self.name}: {self.text}"


def show(examples: Sequence[str]) -> str:
    """A few of many, each on one line and not too long."""
    cut = [repr(text if len(text) <= _LONGEST else text[:_LONGEST] + "…") for text in examples]
    more = f" and {len(cut) - _MOST:,} more" if len(cut) > _MOST else ""
    return ", ".join(cut[:_MOST]) + more


def judge(name: str, wrong: Sequence[str], *, good: str, bad: str) -> Proof:
    """A proof that holds where nothing is wrong.

    Args:
        name: Of the proof.
        wrong: What contradicts it.
        good: What to say if nothing does.
        bad: What to say otherwise, in front of examples.

    Returns:
        The proof.
    """
    return Proof(name=name, ok=not wrong, text=f"{bad}: {show(wrong)}" if wrong else good)
