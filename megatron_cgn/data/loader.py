"""Samples to batches: which rank reads which sequences, in which order.

No shuffling here: the dataset's order is the order of training, and a position is the number of
sequences consumed. Nothing depends on how many ranks read, except which of them reads what.
"""

import functools
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_cgn.batch import TokenBatch
from megatron_cgn.data.boundaries import separate_documents
from megatron_cgn.data.windows import Sample
from megatron_cgn.errors import ConfigError

type Collate[B] = Callable[[Sequence[Any]], B]
"""Makes a micro-batch of what a dataset gives."""


class StepLoader[B]:
    """Training batches of one data-parallel rank.

    Step t of a run that starts at sequence 0 consumes the sequences ``[t * G, (t + 1) * G)`` with
    G the global batch size. Data-parallel rank r of D takes the r-th D-th of them, contiguous, and
    cuts it into micro-batches in order. A run may therefore go on at any number of consumed
    sequences with any micro-batch size and any D, and the steps hold the same sequences.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        make_batch: Collate[B],
        start_sequence: int = 0,
        num_workers: int = 0,
    ) -> None:
        """Set the position; nothing is read yet.

        Args:
            dataset: Sequences in training order.
            micro_batch_size: Sequences of one micro-batch on one rank.
            global_batch_size: Sequences of one step over all ranks.
            dp_rank: This rank's place in the data-parallel group.
            dp_size: Size of that group.
            make_batch: Makes a batch of what the dataset gives.
            start_sequence: Sequences consumed already.
            num_workers: Processes that read ahead; 0 reads in this one. The order is the same.

        Raises:
            ConfigError: If the global batch does not divide into micro-batches.
        """
        if global_batch_size % (micro_batch_size * dp_size):
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} is not divisible by "
                f"train.micro_batch_size={micro_batch_size} x {dp_size} data-parallel ranks. "
                f"Take a multiple of {micro_batch_size * dp_size}."
            )
        self.consumed_sequences = start_sequence
        """Sequences handed out so far, over all ranks, those before the start included."""
        self._dataset = dataset
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._num_workers = num_workers
        self._collate = make_batch

    @property
    def steps_left(self) -> int:
        """Whole steps that the dataset still holds."""
        total = len(self._dataset)  # type: ignore[arg-type]  # Dataset declares no __len__
        return max(0, total - self.consumed_sequences) // self._global_batch_size

    def __iter__(self) -> Generator[list[B]]:
        """Yield the micro-batches of each step, from the current position to the end.

        Close it rather than leave it to the collector. Its worker processes ignore the signal by
        which Python ends those that are left at exit, so Python would wait for them for ever.
        """
        steps = self.steps_left
        share = self._global_batch_size // self._dp_size
        micro_batches = iter(
            _loader(self._dataset, self._batches(steps), self._num_workers, self._collate)
        )
        for _ in range(steps):
            step_batches = [next(micro_batches) for _ in range(share // self._micro_batch_size)]
            self.consumed_sequences += self._global_batch_size
            yield step_batches

    def _batches(self, steps: int) -> Iterator[list[int]]:
        """Sequences of each micro-batch of this rank, for so many steps from the position on."""
        share = self._global_batch_size // self._dp_size
        first = self.consumed_sequences + self._dp_rank * share
        for begin in range(first, first + steps * self._global_batch_size, self._global_batch_size):
            for start in range(begin, begin + share, self._micro_batch_size):
                yield list(range(start, start + self._micro_batch_size))


class SequentialLoader(StepLoader[TokenBatch]):
    """Training batches of samples of one length."""

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        start_sequence: int = 0,
        num_workers: int = 0,
        eod_id: int | None = None,
    ) -> None:
        """Set the position; nothing is read yet.

        Args:
            dataset: As for `StepLoader`, with what follows.
            micro_batch_size: Likewise.
            global_batch_size: Likewise.
            dp_rank: Likewise.
            dp_size: Likewise.
            start_sequence: Likewise.
            num_workers: Likewise.
            eod_id: Separate documents at this end-of-document token; None leaves them joined.

        Raises:
            ConfigError: As `StepLoader`.
        """
        super().__init__(
            dataset,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            make_batch=functools.partial(collate, eod_id=eod_id),
            start_sequence=start_sequence,
            num_workers=num_workers,
        )


class OnceLoader[B]:
    """Micro-batches of one data-parallel rank that together cover a dataset exactly once.

    Micro-batch i of rank r holds the sequences from ``(i * D + r) * micro_batch_size`` on. Every
    rank runs equally many: past the end, rows are blank with ``loss_mask`` 0.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        make_batch: Collate[B],
        make_blank: Callable[[], Any],
        max_sequences: int | None = None,
        num_workers: int = 0,
    ) -> None:
        """Divide the dataset; nothing is read yet.

        Args:
            dataset: Sequences in order; at least one.
            micro_batch_size: Sequences of one micro-batch on one rank.
            dp_rank: This rank's place in the data-parallel group.
            dp_size: Size of that group.
            make_batch: Makes a batch of what the dataset gives.
            make_blank: Makes a sequence that counts nothing.
            max_sequences: Read only this many, from the start. None: all.
            num_workers: Processes that read ahead; 0 reads in this one.
        """
        total = len(dataset)  # type: ignore[arg-type]  # Dataset declares no __len__
        assert total > 0, "an empty source is refused when it is checked"
        self.num_sequences = total if max_sequences is None else min(total, max_sequences)
        """Sequences read over all ranks, blank rows not counted."""
        stride = micro_batch_size * dp_size
        self._batches = [
            list(range(start, start + micro_batch_size))
            for start in range(dp_rank * micro_batch_size, self._padded(stride), stride)
        ]
        self._dataset: Dataset[Any] = _Padded(dataset, self.num_sequences, make_blank)
        self._num_workers = num_workers
        self._collate = make_batch

    def _padded(self, stride: int) -> int:
        return -(-self.num_sequences // stride) * stride

    def __len__(self) -> int:
        """Micro-batches of this rank: equal on every rank."""
        return len(self._batches)

    def __iter__(self) -> Iterator[B]:
        """Yield the micro-batches in order."""
        return iter(_loader(self._dataset, self._batches, self._num_workers, self._collate))


class ValidationLoader(OnceLoader[TokenBatch]):
    """Held-out batches of samples of one length."""

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        max_sequences: int | None = None,
        num_workers: int = 0,
        eod_id: int | None = None,
    ) -> None:
        """Divide the dataset; nothing is read yet.

        Args:
            dataset: As for `OnceLoader`, with what follows.
            micro_batch_size: Likewise.
            dp_rank: Likewise.
            dp_size: Likewise.
            max_sequences: Likewise.
            num_workers: Likewise.
            eod_id: As for `SequentialLoader`.
        """
        super().__init__(
            dataset,
            micro_batch_size=micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            make_batch=functools.partial(collate, eod_id=eod_id),
            make_blank=functools.partial(_blank_like, dataset),
            max_sequences=max_sequences,
            num_workers=num_workers,
        )


def collate(samples: Sequence[Sample], *, eod_id: int | None = None) -> TokenBatch:
    """Stack samples into a batch on the CPU.

    Args:
        samples: B samples.
        eod_id: Separate documents at this end-of-document token; None leaves them joined.

    Returns:
        Rows ``[B, S]``; one packed row ``[1, B * S]`` if documents are separated.
    """

    def stack(name: str) -> torch.Tensor:
        return torch.stack([sample[name] for sample in samples])

    tokens = stack("tokens")
    batch = TokenBatch(
        tokens=tokens,
        labels=stack("labels"),
        loss_mask=stack("loss_mask"),
        position_ids=stack("position_ids"),
        source_ids=stack("source")[:, None].expand_as(tokens).contiguous()
        if "source" in samples[0]
        else None,
    )
    return batch if eod_id is None else separate_documents(batch, eod_id=eod_id)


def _blank_like(dataset: Dataset[Sample]) -> Sample:
    """A sample that counts nothing."""
    return {
        name: value if name == "position_ids" else torch.zeros_like(value)
        for name, value in dataset[0].items()
    }


class _Padded[R](Dataset[R]):
    """A dataset that goes on with blank sequences after ``length``."""

    def __init__(self, dataset: Dataset[R], length: int, make_blank: Callable[[], R]) -> None:
        self._dataset = dataset
        self._length = length
        self._make_blank = make_blank

    def __getitem__(self, index: int) -> R:
        return self._dataset[index] if index < self._length else self._make_blank()


def _leave_signals_to_the_run(worker: int) -> None:
    """Ignore signals that ask the run to stop: sent to the whole job, they reach workers too.

    The run still reads what it needs for its last step, and then ends its workers itself.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _loader[B](
    dataset: Dataset[Any],
    batches: Iterable[list[int]],
    num_workers: int,
    make_batch: Collate[B],
) -> DataLoader[B]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=make_batch,
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_the_run,
        # Without its own generator, a loader draws a seed from the global one, and a resumed run
        # would no longer drop out what the uninterrupted run does.
        generator=torch.Generator(),
    )
