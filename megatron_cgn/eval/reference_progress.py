"""How far the scoring of a reference is: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable

import torch.distributed as dist
from tqdm import tqdm

_TOLD_EVERY_S = 30.0

type Say = Callable[[str], None]
"""Told of a line."""


def tell(line: str) -> None:
    """Say a line on standard error, on rank 0."""
    if dist.get_rank() == 0:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class ScoringProgress:
    """Counts tokens that are scored. Says nothing but on rank 0."""

    def __init__(self, total_tokens: int, say: Say) -> None:
        """Start the clock.

        Args:
            total_tokens: Tokens to score, padding left out.
            say: Told of the progress.
        """
        self._say = say
        self._total = total_tokens
        self._done = 0
        self._started = self._told = time.monotonic()
        self._bar = tqdm(
            total=total_tokens,
            desc="reference",
            unit="tok",
            unit_scale=True,
            disable=dist.get_rank() != 0 or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def add(self, tokens: int) -> None:
        """Take note of tokens that have been scored and kept."""
        self._done += tokens
        self._bar.update(tokens)
        now = time.monotonic()
        if self._bar.disable and now - self._told >= _TOLD_EVERY_S:
            self._told = now
            left = (self._total - self._done) * (now - self._started) / max(1, self._done)
            self._say(
                f"reference: {self._done / self._total:.0%} of {self._total:,} tokens, "
                f"{self._rate():,.0f} tokens/s, {left / 60:.0f} min left"
            )

    def close(self) -> None:
        """Stop the clock, and say what was done."""
        self._bar.close()
        self._say(
            f"reference: scored {self._done:,} tokens in {time.monotonic() - self._started:.1f} s, "
            f"{self._rate():,.0f} tokens/s"
        )

    def _rate(self) -> float:
        return self._done / max(1e-9, time.monotonic() - self._started)
