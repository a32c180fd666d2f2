"""Fixtures that several kinds of tests share."""

import hypothesis
import pytest
from tiny_files import TinyFiles, write_tiny_files

# How long an example takes says something about the machine and what else runs on it.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFiles:
    """A tiny model with a tokenizer and two indexed sources, made once a session; read only."""
    return write_tiny_files(tmp_path_factory.mktemp("tiny"))
