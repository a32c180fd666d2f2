"""Fixtures that several kinds of tests share."""

import sys
from collections.abc import Iterator

import hypothesis
import pytest
from tiny_files import TinyFiles, write_tiny_files

# How long an example takes says something about the machine and what else runs on it.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="module", autouse=True)
def no_groups_left() -> Iterator[None]:
    """Blame the file that leaves process groups behind, not the one that trips over them."""
    yield
    if "megatron.core.parallel_state" in sys.modules:
        import torch.distributed as dist
        from megatron.core import parallel_state

        left = dist.is_initialized() or parallel_state.model_parallel_is_initialized()
        assert not left, "a test of this file started process groups and did not end them"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    """A tiny model with a tokenizer and two indexed sources, made once a session; read only."""
    return write_tiny_files(tmp_path_factory.mktemp("tiny"))
