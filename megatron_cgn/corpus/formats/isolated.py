"""Parses files in a process of its own: what a parser does there ends neither a run nor its time.

Parsers of PDF, HTML and DOCX are large, and some files make them crash or go round for ever. The
limit is one of processor time, which a busy machine does not use up: so whether a file comes out
depends little on what else runs. One whose parsing takes about as long as the limit may differ.
"""

import multiprocessing
import resource
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_cgn.corpus.formats import read_file
from megatron_cgn.corpus.formats.unreadable import Unreadable
from megatron_cgn.errors import ConfigError, DataError

_PLAIN = (".txt", ".text", ".md", ".markdown", ".rst")  # which are decoded, and not parsed
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


class FileReader:
    """Reads files that are one document each, as `read_file` does."""

    def __init__(self, *, max_parse_s: int) -> None:
        """Start nothing yet.

        Args:
            max_parse_s: Seconds of processor time that the parsing of a file may take.
        """
        self._max_parse_s = max_parse_s
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def __call__(self, path: str) -> str:
        """Read a document.

        Args:
            path: A file whose suffix tells its kind.

        Returns:
            Its text.

        Raises:
            Unreadable: If it has none that can be read, or if its parser crashed or took too long.
            ConfigError: If a parser's package is missing.
            DataError: If the parser was killed, which is no fault of the file.
        """
        if Path(path).suffix.lower() in _PLAIN:
            return read_file(path)
        if self._connection is None:
            self._start()
        assert self._connection is not None
        try:
            self._connection.send(path)
            kind, first, second = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise self._explain(path) from error
        if kind == "config":
            raise ConfigError(first)
        if kind == "unreadable":
            raise Unreadable(first, second)
        text: str = first
        return text

    def close(self) -> None:
        """End the process, if there is one."""
        if self._connection is not None and self._process is not None:
            self._connection.close()
            self._process.join()
        self._connection = self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._max_parse_s), daemon=True
        )
        self._process.start()
        theirs.close()
        # Without this, a process that cannot even start would look like a file that crashes it.
        if self._connection.recv() != "ready":
            raise AssertionError("the process of the parsers says something else")

    def _explain(self, path: str) -> Exception:
        """Why the process is gone."""
        assert self._process is not None
        self._process.join()
        number = -(self._process.exitcode or 0)
        self.close()
        if number == signal.SIGXCPU:
            return Unreadable(
                "too_slow",
                f"its parser took longer than read.max_parse_s, which is {self._max_parse_s}",
            )
        if number in _CRASHES:
            return Unreadable("damaged", f"its parser crashed ({signal.Signals(number).name})")
        return DataError(
            f"{path}: its parser was killed, probably for want of memory. Run the same command "
            "again with fewer --workers, or without the file: what is done stays done."
        )


def _serve(connection: Connection, max_parse_s: int) -> None:
    # Ctrl-C is the main process's to answer; when that is gone, there is nothing more to receive.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    try:
        connection.send("ready")
        while True:
            path = connection.recv()
            usage = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(usage.ru_utime + usage.ru_stime) + 1 + max_parse_s
            if hard == resource.RLIM_INFINITY or limit < hard:
                resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
            connection.send(_read(path))
    except (EOFError, ConnectionError):
        return


def _read(path: str) -> tuple[str, str, str]:
    try:
        return "text", read_file(path), ""
    except Unreadable as fault:
        return "unreadable", fault.reason, fault.evidence
    except ConfigError as error:
        return "config", str(error), ""
    # Whatever else a parser raises is about this one file, which must not stop the others.
    except Exception as error:
        return "unreadable", "damaged", f"its parser failed ({type(error).__name__}: {error})"
