"""Warns of preference learning that goes wrong in one of the known ways, once of each.

The loss of a pair says only how far its answers have been pushed apart. It falls as well while both
become improbable, while answers grow longer and longer, and while pairs are learned by heart.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from megatron_cgn.engine.callbacks import SampleAnswer
from megatron_cgn.engine.engine import StepReport

RECENT = 64
"""Records that recent figures are means over, at least: an eighth of their noise is left."""
JUDGED = 200
"""Records before accuracy is judged: chance alone then stays below 0.535 five times in six."""
SETTLED = 0.25
"""Share of the run before accuracy is judged: warm-up is over."""
FALLEN_NATS = 0.1
"""Fall of a mean token's log-probability that is told: every token of a good answer has lost a
tenth of its probability, and an answer of 200 tokens is e²⁰ times less probable."""
EXPLODED = 10.0
"""Margin of rewards that is told: there the logistic loss is 5e-5, and teaches nothing more."""
LONGER = 1.5
"""Times the length that is told: of chosen answers beside rejected ones, and of answers to the
fixed prompts beside those before training."""
_FEW_TOKENS = 8
"""Growth of answers by fewer tokens is nothing."""
_ACCURACY = ("rewards/accuracies", "accuracy")
_MARGIN = ("rewards/margins", "margin")

type Finding = tuple[str, str]
"""Which of the known ways it is, and what is told."""


class PreferenceWatch:
    """A callback that tells what it finds; made on rank 0 alone.

    It sees only the steps whose metrics are logged, and works on whatever it sees: figures are
    means over records, not over steps.
    """

    def __init__(
        self,
        tell: Callable[[str], None],
        *,
        total_steps: int,
        beta: float | None = None,
        has_reference: bool = True,
        per_token: bool = False,
        first_samples: Sequence[int] = (),
    ) -> None:
        """Say what the figures mean.

        Args:
            tell: Tells a line.
            total_steps: Steps of the whole run.
            beta: Rewards are this times log-probabilities; None if they are a head's own values.
            has_reference: Whether these are of whole answers relative to a reference. If not, they
                are of a mean token, and the first ones that are seen take the reference's place.
            per_token: Whether the loss compares means of tokens; rewards relative to a reference
                are of whole answers nevertheless.
            first_samples: Tokens of each answer to the fixed prompts before training, if this run
                goes on from one that has asked them.
        """
        self._say = tell
        self._total_steps = total_steps
        self._beta = beta
        self._has_reference = has_reference
        self._margin_is_sum = has_reference and per_token
        self._recent: deque[StepReport] = deque()
        self._judged = 0
        self._right = 0.0
        self._start: tuple[float, float] | None = None
        self._samples = list(first_samples)
        self._told: set[str] = set()

    def on_step(self, report: StepReport) -> None:
        """Look at a step's figures, if they were logged."""
        if report.metrics:
            self._tell(report.step, self._findings(report))

    def on_validation(self, step: int, metrics: dict[str, float]) -> None:
        """Held-out figures are for people to judge."""

    def on_samples(self, step: int, samples: Sequence[SampleAnswer]) -> None:
        """Compare the answers' length with that of the first ones."""
        lengths = [sample.num_tokens for sample in samples]
        if not self._samples:
            self._samples = lengths
        self._tell(step, _of_samples(self._samples, samples))

    def on_message(self, message: str) -> None:
        """Nothing to judge."""

    def on_end(self) -> None:
        """Nothing to close."""

    def _tell(self, step: int, findings: Iterator[Finding]) -> None:
        for name, text in findings:
            if name not in self._told:
                self._told.add(name)
                self._say(f"warning: step {step:,}: {text}.")

    def _findings(self, report: StepReport) -> Iterator[Finding]:
        metrics = report.metrics
        if not math.isfinite(metrics["loss"]):
            yield (
                "finite",
                f"the loss is {metrics['loss']}, and nothing is learned from here on. Lower "
                "optim.lr or raise optim.warmup_steps, and go on from the checkpoint before",
            )
            return
        if report.count == 0 or metrics.get("empty_masks"):
            share = metrics.get("empty_masks", 1.0)
            yield (
                "empty",
                f"nothing counts in {share:.1%} of the answers, so that they are compared with "
                "nothing. Look at the data with tools/preprocess_data.py --preference --show, and "
                "raise data.seq_length",
            )
        if report.count == 0:
            return
        self._take(report)
        if sum(report.count for report in self._recent) >= RECENT:
            yield from self._of_lengths()
            yield from self._of_rewards()
        yield from self._of_accuracy()

    def _take(self, report: StepReport) -> None:
        """Let a step into the recent figures, and out of them what is older than needed."""
        self._recent.append(report)
        while sum(r.count for r in self._recent) - self._recent[0].count >= RECENT:
            self._recent.popleft()
        accuracy = next((report.metrics[n] for n in _ACCURACY if n in report.metrics), None)
        if accuracy is not None and report.step > SETTLED * self._total_steps:
            self._judged += report.count
            self._right += report.count * accuracy

    def _mean(self, *names: str) -> float | None:
        """Mean over recent records of the first figure that there is; None if there is none."""
        for name in names:
            found = [(r.count, r.metrics[name]) for r in self._recent if name in r.metrics]
            if found:
                return sum(n * value for n, value in found) / sum(n for n, _ in found)
        return None

    def _of_lengths(self) -> Iterator[Finding]:
        chosen, rejected = self._mean("lengths/chosen"), self._mean("lengths/rejected")
        if chosen is not None and rejected is not None and chosen >= LONGER * rejected:
            yield (
                "gap",
                f"chosen answers are longer than rejected ones, {chosen:.0f} and {rejected:.0f} "
                "counted tokens on average: the easiest thing to learn is to write more. Balance "
                "the lengths in the data, or try loss.length_normalized=true or loss.type=simpo",
            )

    def _of_rewards(self) -> Iterator[Finding]:
        chosen, rejected = self._mean("rewards/chosen"), self._mean("rewards/rejected")
        if self._beta is not None and chosen is not None and rejected is not None:
            yield from self._of_fall(chosen, rejected, self._beta)
        margin, unit = self._mean(*_MARGIN), ""
        if margin is not None and self._margin_is_sum:
            tokens = (self._mean("lengths/chosen"), self._mean("lengths/rejected"))
            margin, unit = margin / max(1.0, sum(n or 0.0 for n in tokens) / 2), " a token"
        if margin is not None and margin >= EXPLODED:
            yield (
                "exploded",
                f"the mean margin of rewards is {margin:.1f}{unit}: pairs are learned by heart. "
                "Stop here or earlier, lower optim.lr, or read fewer epochs",
            )

    def _of_fall(self, chosen: float, rejected: float, beta: float) -> Iterator[Finding]:
        if self._start is None:
            self._start = (0.0, 0.0) if self._has_reference else (chosen, rejected)
        tokens = (self._mean("lengths/chosen"), self._mean("lengths/rejected"))
        falls = [
            (before - now) / beta / (max(1.0, length or 1.0) if self._has_reference else 1.0)
            for before, now, length in zip(self._start, (chosen, rejected), tokens, strict=True)
        ]
        if min(falls) >= FALLEN_NATS:
            yield (
                "fallen",
                "chosen answers become less probable together with rejected ones: a mean token by "
                f"{falls[0]:.2f} and {falls[1]:.2f} nats (rewards {chosen:.3f} and "
                f"{rejected:.3f}). The margin may still grow, but the model learns to say other "
                "things. Lower optim.lr, raise loss.beta, or hold chosen answers up with "
                "loss.rpo_alpha=1",
            )

    def _of_accuracy(self) -> Iterator[Finding]:
        if self._judged < JUDGED:
            return
        accuracy = self._right / self._judged
        # One standard error above chance.
        if accuracy <= 0.5 + math.sqrt(0.25 / self._judged):
            yield (
                "accuracy",
                f"of the {self._judged:,} records seen since the first quarter of the run, "
                f"{accuracy:.1%} have their rewards the right way round, which is chance: nothing "
                "is learned. Raise optim.lr, and look whether chosen and rejected are mixed up in "
                "the data, or differ in nothing that can be learned",
            )


def _of_samples(before: Sequence[int], samples: Sequence[SampleAnswer]) -> Iterator[Finding]:
    if not before or not samples:
        return
    first = sum(before) / len(before)
    now = sum(sample.num_tokens for sample in samples) / len(samples)
    if now >= LONGER * first and now >= first + _FEW_TOKENS:
        ended = sum(sample.ended for sample in samples)
        yield (
            "growth",
            f"answers to the fixed prompts have grown from {first:.0f} to {now:.0f} tokens on "
            f"average; {ended} of {len(samples)} end by themselves. Read them in samples.jsonl; if "
            "they say no more than before, stop earlier, raise loss.beta, or try "
            "loss.length_normalized=true",
        )
