"""What a reference model says of every answer: scored once, and kept on disk.

The reference is the model as training starts: the weights of ``model.hf_path``, with the adapters
of ``lora.adapter_path`` if there are any, and else with adapters off. So a run that goes on, or
another one, finds in the cache what it needs, and one that was stopped half-way goes on there.
"""

import contextlib
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cgn.batch import TokenBatch
from megatron_cgn.config.schema import ParallelConfig
from megatron_cgn.data.collective import on_first_rank, together
from megatron_cgn.data.preference import PreferenceData
from megatron_cgn.data.reference import ReferenceCache, Scored, where
from megatron_cgn.data.reference_answers import Answers, wanted_answers
from megatron_cgn.data.reference_rows import ScoringRows
from megatron_cgn.engine.engine import Engine
from megatron_cgn.errors import ModelError, StoppedBySignal
from megatron_cgn.eval.reference_facts import model_about, model_facts
from megatron_cgn.eval.reference_progress import Say, ScoringProgress, tell
from megatron_cgn.model.lora import adapters_off
from megatron_cgn.objectives.next_token import NextToken
from megatron_cgn.parallel import cpu
from megatron_cgn.parallel.reduce import highest, sum_over_data

_KEEP_S = 5.0
"""Seconds between times that scores are collected and written: what a killed run loses."""
_MOST_ROWS = 1024
"""Rows of a rank between these times, at most."""
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

type Numbers = npt.NDArray[np.int64]
type Logps = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What rank 0 found in the cache."""

    logps: Logps
    missing: Numbers
    lines: list[str]


def reference_logps(
    engine: Engine, data: PreferenceData, *, cache: Path, say: Say | None = None
) -> npt.NDArray[np.float32]:
    """Log-probabilities of what a run reads under the reference. Collective over all ranks.

    See `reference_scores`, whose faults are the same.

    Args:
        engine: The model as training starts.
        data: What the run reads: of what the files hold, only this is scored.
        cache: Directory that rank 0 may write to.
        say: Told, on rank 0, of what is done; None for standard error.

    Returns:
        By the number of the answer, nats, float32 ``[A]``; NaN of answers that the run never reads.
    """
    wanted = wanted_answers(data, validation_sequences=engine.run.train.validation_sequences)
    return reference_scores(engine, Answers.of(data), wanted, cache=cache, say=say)


def reference_scores(
    engine: Engine, scored: Scored, wanted: Numbers, *, cache: Path, say: Say | None = None
) -> npt.NDArray[np.float32]:
    """Log-probabilities of answers under the reference. Collective over all ranks.

    Call it when the model has its first weights (`common.load_start`), before it is trained or
    goes on from a checkpoint; best before `Engine.prepare_training`, which takes much memory.
    Results depend on the layout by rounding alone.

    Args:
        engine: The model as training starts.
        scored: The answers of all files.
        wanted: Numbers of those that the run reads, each once, int64 ``[n]``.
        cache: Directory that rank 0 may write to.
        say: Told, on rank 0, of what is found, scored and why; None for standard error.

    Returns:
        The sum of the log-probabilities of what counts of each answer, nats, float32 ``[A]``,
        equal on every rank; NaN of answers that are neither wanted nor known.

    Raises:
        UserError: On every rank, if the cache cannot be read or written, weights cannot be read,
            or a log-probability is not finite.
        StoppedBySignal: On every rank, after keeping what was scored, if SIGTERM or SIGUSR1
            reached any.
    """
    assert engine.step == 0, "the reference is the model as training starts"
    say = (say or tell) if dist.get_rank() == 0 else _silent
    with contextlib.ExitStack() as stack:
        opened: list[ReferenceCache] = []  # on rank 0 alone

        def look() -> _Found:
            books = ReferenceCache(
                cache,
                scored,
                model=model_facts(engine.run, engine.architecture),
                about=model_about(engine.run),
            )
            opened.append(stack.enter_context(books))
            return _look(books, scored, wanted, cache)

        found = on_first_rank(look, None)
        for line in found.lines:
            say(line)
        if len(found.missing):
            progress = ScoringProgress(int(scored.lengths[found.missing].sum(dtype=np.int64)), say)
            scoring = _Scoring(engine, scored, found.missing, opened, progress)
            found.logps[scoring.rows.numbers] = scoring.run()
            progress.close()
        together(lambda: _closed(stack), None)
    return found.logps.astype(np.float32)


def answer_sums(values: Tensor, batch: TokenBatch, num_answers: int) -> Tensor:
    """Sum what counts of a row's first sequences, which are answers; those behind are padding.

    Args:
        values: Of every label, ``[1, T]``.
        batch: The row, with ``cu_seqlens``.
        num_answers: How many.

    Returns:
        The sums, float64 ``[num_answers]`` on the CPU.
    """
    assert batch.cu_seqlens is not None
    lengths = batch.cu_seqlens.diff()[:num_answers]
    owners = torch.repeat_interleave(torch.arange(num_answers), lengths)
    counted = torch.where(batch.loss_mask > 0, values.cpu().double(), 0.0)[0, : len(owners)]
    return torch.zeros(num_answers, dtype=torch.float64).index_add_(0, owners, counted)


def scoring_rows(engine: Engine, scored: Scored, numbers: Numbers) -> ScoringRows:
    """Pack answers into rows of this rank, as a run is laid out.

    Args:
        engine: The model.
        scored: All answers.
        numbers: Those to score, int64 ``[n]``.

    Returns:
        The rows.
    """
    run, state = engine.run, engine.state
    return ScoringRows(
        scored,
        numbers,
        micro_batch_size=run.train.micro_batch_size,
        seq_length=run.data.seq_length,
        pad_to_full=_full_rows(run.parallel),
        dp_rank=state.dp_rank,
        dp_size=state.dp_size,
    )


def _full_rows(p: ParallelConfig) -> bool:
    """Whether rows must have one length, to be sent or cut."""
    return p.pipeline_model_parallel_size > 1 or p.context_parallel_size > 1 or p.sequence_parallel


def _look(books: ReferenceCache, scored: Scored, wanted: Numbers, cache: Path) -> _Found:
    """See what is known, and say what is not and why."""
    logps = books.logps
    missing: Numbers = wanted[np.isnan(logps[wanted])]
    tokens, left = (int(scored.lengths[part].sum(dtype=np.int64)) for part in (wanted, missing))
    line = f"reference: {len(wanted):,} {scored.name}, {tokens:,} tokens"
    if not len(missing):
        return _Found(logps=logps, missing=missing, lines=[f"{line}: all found in {cache}"])
    if known := len(wanted) - len(missing):
        line += f"; {known:,} found in {cache}, scoring {len(missing):,} more, {left:,} tokens:"
    else:
        line += f"; none found in {cache}, scoring all:"
    return _Found(logps=logps, missing=missing, lines=[line, *books.reasons(missing)])


class _Scoring:
    """One pass over missing answers."""

    def __init__(
        self,
        engine: Engine,
        scored: Scored,
        missing: Numbers,
        books: list[ReferenceCache],
        progress: ScoringProgress,
    ) -> None:
        self._engine = engine
        self._scored = scored
        self._books = books
        self._progress = progress
        self._counted = np.concatenate([file.counted for file in scored.files])
        self.rows = scoring_rows(engine, scored, missing)
        self._values = torch.zeros(len(missing), dtype=torch.float64)

    def run(self) -> Logps:
        """Score and keep, row by row; the scores in the order of `rows.numbers`."""
        # Adapters that were not loaded add nothing, but for rounding.
        loaded = self._engine.run.lora.adapter_path is not None
        how = contextlib.nullcontext() if loaded else adapters_off(self._engine.chunks)
        with how, _StopRequests() as stop:
            self._run(stop)
        # What the others have added up may differ by rounding from what rank 0 has kept.
        values = self._values.to(cpu.device())
        dist.broadcast(values, src=0)
        scores: Logps = values.cpu().numpy()
        return scores

    def _run(self, stop: "_StopRequests") -> None:
        begin, end, since = 0, 1, time.monotonic()
        outputs = self._engine.score(self.rows, NextToken().forward_args)
        for place, (batch, nll) in enumerate(outputs):
            self._take(place, batch, nll)
            if place + 1 < end:
                continue
            self._keep(self.rows.between(begin, end))
            if end < len(self.rows) and stop.on_any_rank():
                raise StoppedBySignal(
                    f"stopped by a signal while the reference was scored; the scores of "
                    f"{self.rows.between(0, end).stop:,} answers were kept"
                )
            now = time.monotonic()
            fitting = int((end - begin) * _KEEP_S / max(1e-3, now - since))
            # One rank decides: all must collect at the same row.
            more = highest(min(max(1, fitting), _MOST_ROWS) if dist.get_rank() == 0 else 0)
            begin, end, since = end, min(end + more, len(self.rows)), now

    def _take(self, place: int, batch: TokenBatch, nll: Tensor) -> None:
        """Add up this rank's row. Of context-parallel ranks, which all have it, one counts."""
        mine = self.rows.mine(place)
        number = mine.stop - mine.start
        counts = answer_sums(torch.ones_like(batch.loss_mask), batch, number).numpy()
        assert np.array_equal(counts, self._counted[self.rows.numbers[mine]])
        if self._engine.state.cp_rank == 0:
            self._values[mine] = -answer_sums(nll, batch, number)

    def _keep(self, part: slice) -> None:
        """Collect the scores of all ranks' rows, and write them on rank 0."""
        numbers = self.rows.numbers[part]
        self._values[part] = sum_over_data(self._values[part], self._engine.state).cpu()
        scores = self._values[part].numpy()
        if not np.isfinite(scores).all():
            place = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ModelError(
                f"model.hf_path: the log-probability of an answer "
                f"({where(self._scored, int(numbers[place]))}) is {scores[place]} in precision="
                f"{self._engine.run.precision}. Weights are damaged, or overflow: try "
                "precision=fp32, and generate an answer with tools/generate.py."
            )

        def put() -> bool:
            for books in self._books:
                books.put(numbers, scores)
            return True

        together(put, None)
        self._progress.add(int(self._scored.lengths[numbers].sum(dtype=np.int64)))


class _StopRequests:
    """Remembers signals that ask a run to stop, while it is entered."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> Self:
        self._previous = {s: signal.signal(s, self._remember) for s in _STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def on_any_rank(self) -> bool:
        """Whether any rank was asked. Collective over all ranks."""
        return bool(highest(int(self._asked)))


def _closed(stack: contextlib.ExitStack) -> bool:
    stack.close()
    return True


def _silent(line: str) -> None:
    """Say nothing."""
