"""Generation with a cache of keys and values, on the layout and in the middle of training.

Prompts are laid end to end and read in one row; then every step continues all sequences of the
batch by one token, in one row again. A sequence that ends makes room for the next prompt at once.
Copies of the model (data- and context-parallel ranks) share the prompts among them. How a row
passes through the stages is in `forward.py`, which token is taken in `sampling.py`.
"""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from megatron_cgn.engine.engine import Engine
from megatron_cgn.errors import DataError
from megatron_cgn.model.architecture import Architecture
from megatron_cgn.model.cache import KeyValueCache, decode_row, prefill_row
from megatron_cgn.rollout.forward import Forward, answering, share_from_source
from megatron_cgn.rollout.memory import fitting_batch
from megatron_cgn.rollout.sampling import Draws, Sampling, choose

_PREFILL_TOKENS = 4096
"""Prompts read in one row have at most so many tokens together, save a single longer one."""

OnToken = Callable[[int, int], object]
"""Called with a prompt's index and its answer's next token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model said to one prompt.

    Attributes:
        ids: Its tokens, the stop token included.
        logprobs: The tokens' log-probabilities under the model itself; see `choose`.
        finish: ``stop`` at a stop token; ``length`` at the longest answer, or where the model's
            positions end.
    """

    ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
    batch_size: int | None = None,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """The tokens that continue each prompt; see `complete`.

    Collective over all ranks, all of which bring the same prompts.

    Args:
        engine: The model.
        prompts: Tokens of each prompt.
        sampling: How tokens are taken.
        seeds: See `complete`.
        batch_size: See `complete`.
        on_token: See `complete`.

    Returns:
        Tokens of each answer, the stop token included; equal on every rank.

    Raises:
        DataError: As `complete`.
    """
    found = complete(
        engine,
        prompts,
        sampling=sampling,
        seeds=seeds,
        batch_size=batch_size,
        on_token=on_token,
    )
    return [answer.ids for answer in found]


def complete(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
    batch_size: int | None = None,
    on_token: OnToken | None = None,
) -> list[Answer]:
    """Continue each prompt.

    Collective over all ranks, all of which bring the same prompts. Neither the model nor any
    random state is changed, so that training goes on as if nothing had happened.

    Args:
        engine: The model, in training or not.
        prompts: Tokens of each prompt, at least one each.
        sampling: How tokens are taken.
        seeds: A number for each answer, which together with ``sampling.seed`` decides its draws,
            whatever else is in the batch. None: 0, 1, 2, …
        batch_size: Most sequences continued at once by one copy of the model. None: as many as
            fit into memory; see `fitting_batch`.
        on_token: Told of each token as soon as it is known, on the ranks of the copy that answers
            the prompt; the first prompt's is that of rank 0. An exception of it ends the call.

    Returns:
        An answer for each prompt; equal on every rank.

    Raises:
        DataError: If a prompt is empty, has an id that the model lacks, or leaves no place for a
            single new token.
    """
    for index, prompt in enumerate(prompts):
        if fault := prompt_fault(prompt, engine.architecture):
            raise DataError(f"prompt {index + 1}: {fault}")
    seeds = range(len(prompts)) if seeds is None else seeds
    assert len(seeds) == len(prompts), "one seed for each prompt"
    copies = engine.state.groups.dp_cp
    mine = range(copies.rank(), len(prompts), copies.size())
    jobs = [
        _Sequence(
            index=i,
            prompt=list(prompts[i]),
            draws=Draws(sampling.seed, seeds[i]),
            limit=min(
                sampling.max_new_tokens,
                engine.architecture.max_position_embeddings - len(prompts[i]),
            ),
        )
        for i in mine
    ]
    if batch_size is None:
        lengths = [len(p) + sampling.max_new_tokens for p in prompts]
        batch_size = fitting_batch(engine, max(lengths, default=1))
    # Also completes a gathering of weights, in which ranks without prompts take part too.
    chunks = engine.chunks
    with torch.no_grad(), answering(chunks):
        _Batch(engine, jobs, sampling=sampling, batch_size=batch_size, on_token=on_token).run()
    local = [job.answer() for job in jobs]
    shares: list[list[Answer]] = [local]
    if copies.size() > 1:
        shares = [[] for _ in range(copies.size())]
        dist.all_gather_object(shares, local, group=copies)
    return [shares[i % len(shares)][i // len(shares)] for i in range(len(prompts))]


def prompt_fault(prompt: Sequence[int], architecture: Architecture) -> str | None:
    """Say why a prompt cannot be continued.

    Args:
        prompt: Its tokens.
        architecture: The model.

    Returns:
        What is wrong with it, and the remedy; None if nothing is.
    """
    if not prompt:
        return "is empty; give at least one token."
    wrong = next((t for t in prompt if not 0 <= t < architecture.vocab_size), None)
    if wrong is not None:
        return (
            f"has id {wrong}, but the model's ids end at {architecture.vocab_size - 1}. Use the "
            "model's own tokenizer."
        )
    positions = architecture.max_position_embeddings
    if len(prompt) >= positions:
        return (
            f"has {len(prompt):,} tokens, but the model {positions:,} positions "
            "(max_position_embeddings), of which an answer needs some. Shorten it."
        )
    return None


@dataclass(slots=True, kw_only=True)
class _Sequence:
    """A prompt and its answer so far."""

    index: int
    prompt: list[int]
    draws: Draws
    limit: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def is_done(self) -> bool:
        return self.stopped or len(self.ids) >= self.limit

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are kept: all but the newest."""
        return len(self.prompt) + len(self.ids) - 1

    def answer(self) -> Answer:
        finish: Literal["stop", "length"] = "stop" if self.stopped else "length"
        return Answer(ids=self.ids, logprobs=self.logprobs, finish=finish)


class _Batch:
    """The sequences that one copy of the model continues."""

    def __init__(
        self,
        engine: Engine,
        jobs: Sequence[_Sequence],
        *,
        sampling: Sampling,
        batch_size: int,
        on_token: OnToken | None,
    ) -> None:
        self._forward = Forward(engine)
        self._state = engine.state
        self._sampling = sampling
        self._stops = frozenset(sampling.stop_ids)
        self._on_token = on_token
        self._waiting = deque(jobs)
        self._running: list[_Sequence] = []  # by slot
        longest = max((len(job.prompt) + job.limit for job in jobs), default=0)
        self._cache = KeyValueCache(slots=min(batch_size, len(jobs)), capacity=longest)

    def run(self) -> None:
        """Continue all sequences to their ends."""
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self._cache.slots:
                self._read_prompts()
            if self._running:
                self._step()

    def _read_prompts(self) -> None:
        """Take waiting prompts into free slots, as many as a row may have."""
        new: list[_Sequence] = []
        tokens = 0
        while self._waiting and len(self._running) < self._cache.slots:
            tokens += len(self._waiting[0].prompt)
            if new and tokens > _PREFILL_TOKENS:
                break
            new.append(self._waiting.popleft())
            self._running.append(new[-1])
        lengths = [len(job.prompt) for job in new]
        first = len(self._running) - len(new)
        slots = list(range(first, len(self._running)))
        row = prefill_row(self._cache, lengths, slots, multiple=self._forward.multiple)
        ends = [end - 1 for end in itertools.accumulate(lengths)]
        logits = self._forward([t for job in new for t in job.prompt], row, ends)
        self._take(new, logits)

    def _step(self) -> None:
        """Continue every running sequence by a token."""
        row = decode_row(
            self._cache, [job.cached for job in self._running], multiple=self._forward.multiple
        )
        last = [job.ids[-1] for job in self._running]
        self._take(self._running, self._forward(last, row, range(len(last))))

    def _take(self, jobs: Sequence[_Sequence], logits: torch.Tensor | None) -> None:
        """Choose a token for each of these sequences, and let go of those that end."""
        chosen = None
        if logits is not None:
            tokens, logprobs = choose(logits, self._sampling, [job.draws for job in jobs])
            chosen = torch.stack((tokens.double(), logprobs.double()))
        shared = share_from_source(chosen, (2, len(jobs)), self._state)
        for job, token, logprob in zip(jobs, *shared.tolist(), strict=True):
            job.ids.append(int(token))
            job.logprobs.append(logprob)
            job.stopped = int(token) in self._stops
            if self._on_token is not None:
                self._on_token(job.index, int(token))
        for slot in reversed(range(len(self._running))):
            if self._running[slot].is_done:
                self._free(slot)

    def _free(self, slot: int) -> None:
        """Take a sequence out; the last one moves into its slot."""
        last = self._running.pop()
        if slot < len(self._running):
            self._cache.move(len(self._running), slot, length=last.cached)
            self._running[slot] = last
