"""One process that starts all runs of the session."""

from collections.abc import Iterator

import pytest
from tiny_chats import TinyChats, write_tiny_chats
from train_runs import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Starts train.py without its import time."""
    started = Zygote()
    yield started
    started.close()


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> TinyChats:
    """A tiny model with a template and two files of conversations; read only."""
    return write_tiny_chats(tmp_path_factory.mktemp("chats"))
