"""A process of a pool, and what it has to do: see ``pool.py``."""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, Protocol

LARGE_BYTES = 1 << 14
"""A task as large as this is given only to a process that has nothing else.

Were both sides to write more than a pipe holds (64 KiB), each would wait for the other to read.
"""


class _Process(Protocol):
    sentinel: int
    pid: int | None

    def start(self) -> None: ...
    def kill(self) -> None: ...
    def join(self) -> None: ...


class Member:
    """A process, and what it has to do."""

    def __init__(self, context: Any, make_worker: Callable[[], Callable[[Any], Any]]) -> None:
        """Start the process, in which a worker is made."""
        self.pipe, theirs = context.Pipe()
        self.tasks: dict[int, str] = {}
        self.holds_large = False
        self.spent = False
        # Not a daemon: those may not start processes, which parsers of files do.
        self._process: _Process = context.Process(
            target=_work, args=(theirs, make_worker), daemon=False
        )
        self._process.start()
        theirs.close()  # or its end would go unnoticed

    def give(self, number: int, name: str, message: Any) -> None:
        """Hand it a pickled task; the name is for messages."""
        self.tasks[number] = name
        self.holds_large = len(message) > LARGE_BYTES
        self.pipe.send(number)
        self.pipe.send_bytes(message)

    def receive(self) -> tuple[int, bool, Any, bool]:
        """Read an answer: number, whether it is a result or a fault, it, whether all is spent."""
        answer: tuple[int, bool, Any, bool] = self.pipe.recv()
        del self.tasks[answer[0]]
        self.holds_large = False
        return answer

    def end(self, *, at_once: bool) -> None:
        """Let it end, after its tasks or in the midst of them."""
        if at_once:
            self._process.kill()
        else:  # in words: the copies of this process that came later hold the pipe open
            with contextlib.suppress(OSError):
                self.pipe.send(None)
        self.pipe.close()

    def join(self) -> None:
        """Wait for its end."""
        self._process.join()


def _work(pipe: Connection, make_worker: Callable[[], Callable[[Any], Any]]) -> None:
    """What a process does: tasks, until the pipe is closed."""
    # Ctrl-C is the main process's to answer, as is SIGTERM, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    worker: Callable[[Any], Any] | None = None
    while True:
        try:
            number = pipe.recv()
            if number is None:
                return
            message = pipe.recv_bytes()
        except EOFError:
            return
        spent = False
        try:
            worker = worker or make_worker()
            result, is_result = worker(pickle.loads(message)), True
            spent = worker.spent() if hasattr(worker, "spent") else False
        except BaseException as error:  # a panic of Rust's is no Exception
            error.add_note("".join(traceback.format_exception(error)))
            result, is_result = error, False
        del message
        answer = (number, is_result, result, spent)
        try:
            pipe.send(answer)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            pipe.send((number, False, RuntimeError(f"{result!r} cannot be sent: {error}"), spent))
        del result, answer


def _end_with_parent() -> None:
    """End this process when the main one is killed; it would go on with its task first."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
