"""Work given to processes: results in order, a bounded number under way, one fault ends it all.

The main process has no threads for this, so it may fork at any time: processes may be started one
by one, and one that has grown too large is replaced by a fresh copy of the main process. What a
process does is in ``pool_member.py``.
"""

import atexit
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing import connection
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, Literal, Self

from megatron_cgn.data.pool_member import LARGE_BYTES, Member
from megatron_cgn.errors import DataError

# Tasks a process holds: one that runs and one that waits, so that it is never idle.
_TASKS_HELD = 2


class Pool[T, R]:
    """Processes that apply a callable to tasks. Use as a context manager.

    With no processes the work is done at once, in this one.
    """

    def __init__(
        self,
        make_worker: Callable[[], Callable[[T], R]],
        *,
        processes: int,
        start: Literal["spawn", "fork"] = "spawn",
        describe: Callable[[T], str] = str,
        remedy: str = "Run the same command again with fewer --workers.",
    ) -> None:
        """Settle what to do; nothing is started yet.

        Args:
            make_worker: Makes the callable, once in every process. If what it makes has a method
                ``spent`` that says so after a task, a new process takes the place of its own.
            processes: How many; 0 works in this one.
            start: "spawn" gives each process an interpreter of its own: ``make_worker`` must be
                picklable. "fork" copies this one with all it has loaded; libraries must have no
                threads at work that a copy would miss.
            describe: Names a task, for the message if its process is killed.
            remedy: What to do then, for the message.
        """
        self._make_worker = make_worker
        self._num_processes = processes
        self._context: Any = multiprocessing.get_context(start)
        self._describe = describe
        self._remedy = remedy
        self._here: Callable[[T], R] | None = None
        self._members: list[Member] = []
        self._waiting: deque[tuple[int, str, Any]] = deque()
        self._done: dict[int, tuple[bool, Any]] = {}
        self._num_given = self._num_taken = 0

    def __enter__(self) -> Self:
        """Start the processes."""
        if not self._num_processes:
            self._here = self._make_worker()
        # An error that nobody catches keeps this open; the interpreter would wait for them then.
        atexit.register(self._end_at_exit)
        try:
            for _ in range(self._num_processes):
                self._members.append(Member(self._context, self._make_worker))
        except BaseException:
            self._end(at_once=True)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the processes: after their tasks if all is well, else at once."""
        self._end(at_once=kind is not None or self.pending > 0)

    def _end_at_exit(self) -> None:
        self._end(at_once=True)

    def _end(self, *, at_once: bool) -> None:
        atexit.unregister(self._end_at_exit)
        for member in self._members:
            member.end(at_once=at_once)
        for member in self._members:
            member.join()
        self._members = []

    @property
    def pending(self) -> int:
        """Tasks given whose results were not taken."""
        return self._num_given - self._num_taken

    @property
    def ready(self) -> bool:
        """Whether the result of the oldest pending task is here; does not wait."""
        if self.pending and self._num_taken not in self._done:
            self._attend()
        return self._num_taken in self._done

    def give(self, task: T) -> None:
        """Let a process do a task."""
        number = self._num_given
        self._num_given += 1
        if self._here is not None:
            self._done[number] = (True, self._here(task))
            return
        self._waiting.append((number, self._describe(task), ForkingPickler.dumps(task)))
        self._attend()

    def _attend(self) -> None:
        """Read what is finished and hand on what waits, without waiting oneself."""
        self._receive(timeout_s=0)
        self._hand_on()

    def take(self) -> R:
        """Give the result of the oldest task of those pending; waits for it.

        Raises:
            DataError: If a process was killed; names what it may have been working on.
            Exception: What the task raised.
        """
        while self._num_taken not in self._done:
            self._receive(timeout_s=None)
            self._hand_on()
        is_result, result = self._done.pop(self._num_taken)
        self._num_taken += 1
        if not is_result:
            raise result
        taken: R = result
        return taken

    def map(
        self,
        tasks: Iterable[T],
        *,
        tasks_ahead: int,
        size_of: Callable[[T], int] | None = None,
        bytes_ahead: int = 0,
    ) -> Generator[R]:
        """Apply the callable to every task.

        Args:
            tasks: Read only as far as needed to keep the processes busy.
            tasks_ahead: Most tasks under way.
            size_of: Bytes a task holds, where these are to be bounded too.
            bytes_ahead: Most bytes under way, unless a single task is larger.

        Yields:
            Results, in the order of the tasks.

        Raises:
            DataError: If a process was killed; names what it may have been working on.
            Exception: What a task raised.
        """
        if self._here is not None:
            yield from map(self._here, tasks)
            return
        sizes: deque[int] = deque()
        for task in tasks:
            size = size_of(task) if size_of is not None else 0
            while sizes and (len(sizes) >= tasks_ahead or sum(sizes) + size > bytes_ahead):
                yield self.take()
                sizes.popleft()
            sizes.append(size)
            self.give(task)
            del task
        while self.pending:
            yield self.take()

    def _hand_on(self) -> None:
        for place, member in enumerate(self._members):
            if member.spent and not member.tasks:
                member.end(at_once=False)
                member.join()
                self._members[place] = Member(self._context, self._make_worker)
        while self._waiting:
            number, name, message = self._waiting[0]
            free = [m for m in self._members if not m.spent and len(m.tasks) < _TASKS_HELD]
            chosen = min(free, key=lambda m: len(m.tasks), default=None)
            is_large = len(message) > LARGE_BYTES
            if chosen is None or (chosen.tasks and (is_large or chosen.holds_large)):
                return
            self._waiting.popleft()
            try:
                chosen.give(number, name, message)
            except OSError:
                self._fail(chosen)

    def _receive(self, *, timeout_s: float | None) -> None:
        ready = connection.wait([member.pipe for member in self._members], timeout_s)
        for member in [m for m in self._members if m.pipe in ready]:
            try:
                number, is_result, result, spent = member.receive()
            except (EOFError, OSError):
                self._fail(member)
            self._done[number] = (is_result, result)
            member.spent |= spent

    def _fail(self, member: "Member") -> None:
        names = "; ".join(dict.fromkeys(member.tasks.values()))
        raise DataError(
            "a worker process was killed, probably for want of memory, or by a file that its "
            f"parser cannot stand. Under way were: {names or 'nothing'}. {self._remedy}"
        )


def map_in_order[T, R](
    make_worker: Callable[[], Callable[[T], R]],
    tasks: Iterable[T],
    *,
    workers: int,
    describe: Callable[[T], str] = str,
) -> Iterator[R]:
    """Apply a worker to every task, in spawned processes.

    Args:
        make_worker: Makes the callable, once in every process; must be picklable.
        tasks: Read only as far as needed to keep the workers busy.
        workers: Processes; 1 works in this one.
        describe: Names a task, for the message if its process is killed.

    Yields:
        Results, in the order of the tasks.

    Raises:
        DataError: If a process was killed; names what it may have been working on.
    """
    pool = Pool(
        make_worker,
        processes=workers if workers > 1 else 0,
        describe=describe,
        remedy="Run the same command again with fewer --workers, or without the file: what is "
        "done stays done.",
    )
    with pool:
        yield from pool.map(tasks, tasks_ahead=workers * _TASKS_HELD)
