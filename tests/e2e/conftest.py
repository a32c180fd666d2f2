"""One process that starts all runs of the session."""

from collections.abc import Iterator

import pytest
from train_runs import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Starts train.py without its import time."""
    started = Zygote()
    yield started
    started.close()
