"""What both directions of the streaming conversion share."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

Progress = Callable[[int], object]
"""Told how many bytes were done since it was told last. May be called by any thread."""

BLOCK_BYTES = 64 * 2**20
"""Bytes that a writing thread holds at once."""

_THREADS = 2
"""Files written at once: one is filled while the other is made durable."""


def run_in_threads[T](tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run tasks in a few threads, in order.

    After a failure no further task is started, and the first failure is raised once the
    running ones have ended.

    Args:
        tasks: What to run.

    Returns:
        The results, in order.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(cancel_futures=True)
        done = [future for future in futures if not future.cancelled()]
        return [future.result() for future in done]
