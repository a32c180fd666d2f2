"""A function applied to a stream of items by several threads, in order and in bounded memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor


def map_in_order[T, R](
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int,
    size_of: Callable[[T], int],
    items_ahead: int,
    bytes_ahead: int,
) -> Generator[R]:
    """Apply ``function`` to every item; results come in the order of the items.

    Args:
        function: Must be safe to call from several threads, and leave the interpreter's lock most
            of the time, or threads gain nothing.
        items: Read here, in the calling thread, as results are taken.
        workers: Threads; with 1 the calling thread does everything.
        size_of: Bytes an item holds.
        items_ahead: Most items under way.
        bytes_ahead: Most bytes under way, unless a single item is larger.

    Yields:
        ``function(item)`` of every item.

    Raises:
        Exception: What ``function`` or ``items`` raise. What is under way is waited for.
    """
    if workers == 1:
        yield from map(function, items)
        return
    pending: deque[tuple[int, Future[R]]] = deque()
    under_way = 0
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            size = size_of(item)
            while pending and (len(pending) >= items_ahead or under_way + size > bytes_ahead):
                held, done = pending.popleft()
                yield done.result()
                under_way -= held
                del done  # the result is the caller's now
            pending.append((size, pool.submit(function, item)))
            under_way += size
            del item
        while pending:
            yield pending.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)
