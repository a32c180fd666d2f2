"""The output directory while a run writes to it: made, locked, and its faults told."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_cgn.data.lock import locked
from megatron_cgn.errors import DataError

WORK = ".work"
"""Name of the work directory in it."""

_ENVIRONMENT = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
)


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Hold an output directory for one run.

    Args:
        output: The directory; made if it is not there, and removed if nothing came into it.

    Raises:
        DataError: If it is a file, if another run writes there, or if the disk is full or the like.
    """
    with _faults(output), _made(output), _alone(output):
        yield


@contextmanager
def _made(output: Path) -> Iterator[None]:
    """Make the output directory; take it away again if nothing came into it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{output}: cannot be made ({error.strerror}). Choose another --output."
        ) from error
    try:
        yield
    finally:
        try:
            output.rmdir()
        except OSError:
            pass  # there is something in it


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    try:
        with locked(output / ".lock"):
            yield
    except BlockingIOError as error:
        raise DataError(
            f"{output}: another run is writing there. Wait for its end, or choose another --output."
        ) from error


@contextmanager
def _faults(output: Path) -> Iterator[None]:
    """Tell a full disk and the like as what they are: no fault of the program."""
    try:
        yield
    except OSError as error:
        if error.errno not in _ENVIRONMENT:
            raise
        raise DataError(
            f"{error.filename or output}: {error.strerror or error}. Mend that and run the same "
            f"command again: what is done stays in {output / WORK}, and the run goes on there."
        ) from error
