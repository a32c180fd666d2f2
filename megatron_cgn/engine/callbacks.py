"""Who watches a run. A callback sees reports; it never changes training."""

from typing import Protocol

from megatron_cgn.engine.engine import StepReport


class Callback(Protocol):
    """What may happen during a run. Called on every rank; only rank 0 usually acts."""

    def on_step(self, report: StepReport) -> None:
        """An optimizer step was taken."""
        ...

    def on_validation(self, step: int, metrics: dict[str, float]) -> None:
        """Held-out data was scored, after `step` steps."""
        ...

    def on_message(self, message: str) -> None:
        """Something worth a line was done, such as a saved checkpoint."""
        ...

    def on_end(self) -> None:
        """The run is over; called also when it fails."""
        ...
