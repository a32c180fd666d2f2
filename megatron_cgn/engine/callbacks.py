"""Who watches a run. A callback sees reports; it never changes training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_cgn.engine.engine import StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleAnswer:
    """What the model says to a fixed prompt.

    Attributes:
        prompt: What was asked, as text.
        answer: What the model generated, as text.
        reference: What a held-out conversation answers; None for a prompt without an answer.
        num_tokens: Tokens generated.
        ended: Whether the model ended its turn, rather than being cut off.
    """

    prompt: str
    answer: str
    reference: str | None
    num_tokens: int
    ended: bool


class Callback(Protocol):
    """What may happen during a run. Called on every rank; only rank 0 usually acts."""

    def on_step(self, report: StepReport) -> None:
        """An optimizer step was taken."""
        ...

    def on_validation(self, step: int, metrics: dict[str, float]) -> None:
        """Held-out data was scored, after `step` steps."""
        ...

    def on_samples(self, step: int, samples: Sequence[SampleAnswer]) -> None:
        """Fixed prompts were answered, after `step` steps; the same ones each time."""
        ...

    def on_message(self, message: str) -> None:
        """Something worth a line was done, such as a saved checkpoint."""
        ...

    def on_end(self) -> None:
        """The run is over; called also when it fails."""
        ...
