"""From settings and checked sources to the plan of a run: shares, phases, and its length."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from megatron_cgn.config.data_rules import DOMAIN
from megatron_cgn.config.schema import DataConfig, RunConfig
from megatron_cgn.data.blend import Blend, BlendSource, phases_of
from megatron_cgn.data.sources import Source, exact, mixes_of
from megatron_cgn.errors import ConfigError, DataError


def plan_run(run: RunConfig, sources: Sequence[Source]) -> Blend:
    """Plan a run.

    With ``train.epochs`` the run is as long as its epochs, cut down to whole steps, at least one:
    the longest that reads the source ``data.epochs_of`` no more often than ``epochs`` times under
    a mix; without one, the longest that reads as many tokens as all sources have in ``epochs``
    passes.

    Args:
        run: The validated configuration.
        sources: From `check_sources`.

    Returns:
        The plan.

    Raises:
        ConfigError: If a phase has no step in a run of this length.
        DataError: If the epochs do not fill one sequence.
    """
    planner = _Planner(run, sources)
    steps = run.train.train_iters or planner.steps_for_epochs()
    planner.check_phases(steps)
    return planner.blend(steps)


class _Planner:
    def __init__(self, run: RunConfig, sources: Sequence[Source]) -> None:
        self._run = run
        self._sources = tuple(BlendSource.of(source) for source in sources)
        self._mixes = mixes_of(run.data)

    def blend(self, steps: int) -> Blend:
        """The plan of a run of so many steps."""
        run = self._run
        return Blend(
            sources=self._sources,
            phases=phases_of(
                self._mixes,
                _ends(run.data, steps),
                global_batch_size=run.train.global_batch_size,
            ),
            seq_length=run.data.seq_length,
            global_batch_size=run.train.global_batch_size,
            seed=run.seed,
        )

    def check_phases(self, steps: int) -> None:
        """Refuse phases that the run does not have."""
        begin = 0
        for index, end in enumerate(_ends(self._run.data, steps)):
            if end <= begin:
                raise ConfigError(
                    f"data.phases.{index}: has no step: it would begin behind step {begin:,} of "
                    f"the run's {steps:,}. Remove it, change its until, or train longer."
                )
            begin = end

    def steps_for_epochs(self) -> int:
        """Whole steps that ``train.epochs`` hold, at least one."""
        data, batch = self._run.data, self._run.train.global_batch_size
        if data.mix is None and not data.phases:
            names = {name for mix in self._mixes for name in mix}
            tokens = sum(source.tokens for source in self._sources if source.name in names)
            return max(1, self._sequences(tokens, "all sources") // batch)
        name = data.epochs_of or DOMAIN
        (place,) = (p for p, source in enumerate(self._sources) if source.name == name)
        limit = self._sequences(self._sources[place].tokens, f"the source {name!r}")

        def reads(steps: int) -> int:
            drawn = self.blend(steps).drawn(0, steps * batch)
            return sum(number for (source, _), number in drawn.items() if source == place)

        return max(1, _last_within(reads, limit))

    def _sequences(self, tokens: int, what: str) -> int:
        """Sequences in ``train.epochs`` passes over so many tokens.

        The last token has no successor to predict, hence the one less: without it, one epoch of
        tokens that divide evenly would begin a second.
        """
        epochs, seq_length = self._run.train.epochs, self._run.data.seq_length
        assert epochs is not None, "configuration validation demands it or train_iters"
        sequences = math.floor((exact(epochs) * tokens - 1) / seq_length)
        if sequences < 1:
            raise DataError(
                f"train.epochs={epochs:g} of the {tokens:,} training tokens of {what} do not fill "
                f"one sequence of data.seq_length={seq_length:,}. Give more data, more epochs or "
                "shorter sequences."
            )
        return sequences


def _ends(data: DataConfig, steps: int) -> list[int]:
    """Step after which each phase is over. A fraction is rounded to a step, halves up."""
    ends = []
    for phase in data.phases[:-1]:
        assert phase.until is not None, "configuration validation demands it"
        until = exact(phase.until)
        end = int(until) if until > 1 else math.floor(until * steps + Fraction(1, 2))
        ends.append(min(end, steps))
    return [*ends, steps]


def _last_within(reads: Callable[[int], int], limit: int) -> int:
    """A number of steps that reads no more than ``limit`` while one more would; may be 0."""
    low, high = 0, 1
    while reads(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reads(middle) <= limit else (low, middle)
    return low
