"""Folders of a cache: each appears whole or not at all, and never changes afterwards."""

import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_cgn.errors import DataError

_VISIBLE_WITHIN_S = 60.0  # a network file system may show another node's new files late
_ABANDONED_AFTER_S = 86_400.0  # nobody fills one folder for a day without writing to it
_TEMPORARY = re.compile(r".+\.tmp-[0-9a-f]{32}")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder beside ``folder``, make it durable, and rename it in one step.

    Its name stands for its content: if another run was faster, that run's folder stays. What
    killed processes left behind beside it more than a day ago is removed.

    Args:
        folder: Where it shall be.

    Yields:
        The empty folder to fill. If the block raises, nothing of it is left.

    Raises:
        OSError: If the disk refuses.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    _remove_abandoned(folder.parent)
    try:
        yield temporary
        for path in temporary.iterdir():
            _sync(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was faster, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def wait_for_folder(folder: Path) -> None:
    """Wait until this node sees a folder that exists.

    Raises:
        DataError: If it does not within a minute.
    """
    deadline = time.monotonic() + _VISIBLE_WITHIN_S
    while not folder.is_dir():
        if time.monotonic() > deadline:
            raise DataError(
                f"{folder}: not visible on this node. Set data.cache_dir to a directory that all "
                "nodes share."
            )
        time.sleep(0.2)


def _remove_abandoned(cache: Path) -> None:
    before = time.time() - _ABANDONED_AFTER_S
    for path in cache.iterdir():
        if _TEMPORARY.fullmatch(path.name) and _last_written(path) < before:
            shutil.rmtree(path, ignore_errors=True)


def _last_written(folder: Path) -> float:
    """When a folder or a file in it was last written; now, if it is gone meanwhile."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return time.time()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
