"""One run at a time may write a set of files; a killed run's lock is free at once."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_NOT_SUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on ``path`` for as long as the block lasts.

    The file is made, and removed at the end. The kernel frees the lock of a process that dies,
    so a file that is left over stops nobody.

    Args:
        path: The lock's own file, in the directory of what it protects.

    Yields:
        True; False where the file system has no locks, after a warning.

    Raises:
        BlockingIOError: If another process holds the lock.
        OSError: If the file cannot be made.
    """
    descriptor = _open_current(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # while it is ours: see _open_current
            os.close(descriptor)


def _open_current(path: Path) -> int | None:
    """Lock the file that is at ``path`` now, not one that its last holder has just removed."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                os.close(descriptor)
                raise
            os.close(descriptor)
            path.unlink(missing_ok=True)
            log.warning("%s: no locks here; start no second run with this output", path.parent)
            return None
        os.close(descriptor)
