"""A map over processes: results in order, a bounded number under way, one fault ends it all."""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

from megatron_cgn.errors import DataError

# Tasks under way per worker: one that runs and one that waits, so that no worker is idle.
_TASKS_AHEAD = 2

_worker: Callable[[Any], Any] | None = None  # a process's own, made once when it starts


def map_in_order[T, R](
    make_worker: Callable[[], Callable[[T], R]],
    tasks: Iterable[T],
    *,
    workers: int,
    describe: Callable[[T], str] = str,
) -> Iterator[R]:
    """Apply a worker to every task.

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
    if workers == 1:
        yield from map(make_worker(), tasks)
        return
    # Spawned, not forked: a fork inherits locks of libraries' threads in whatever state they are.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(make_worker,),
    )
    pending: deque[tuple[str, Future[R]]] = deque()
    try:
        for task in tasks:
            while len(pending) >= workers * _TASKS_AHEAD:
                yield pending[0][1].result()
                pending.popleft()
            pending.append((describe(task), pool.submit(_run, task)))
        while pending:
            yield pending[0][1].result()
            pending.popleft()
    except BrokenProcessPool as error:
        names = "; ".join(dict.fromkeys(name for name, done in pending if not _finished(done)))
        raise DataError(
            "a worker process was killed, probably for want of memory, or by a file that its "
            f"parser cannot stand. Under way were: {names}. Run the same command again with fewer "
            "--workers, or without the file: what is done stays done."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(done: Future[Any]) -> bool:
    return done.done() and done.exception() is None


def _start(make_worker: Callable[[], Callable[[Any], Any]]) -> None:
    global _worker
    # Ctrl-C is the main process's to answer. SIGTERM ends this one, which is how the pool ends its
    # processes when one of them was killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    _worker = make_worker()


def _end_with_parent() -> None:
    """End this process when the main one is killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _run(task: Any) -> Any:
    assert _worker is not None
    return _worker(task)
