"""Division of sources, epochs as sequences, and every contradiction in the settings."""

from pathlib import Path

import pytest

from megatron_cgn.config.schema import DataConfig, SourceConfig
from megatron_cgn.data.blend import (
    account_for,
    count_tokens,
    plan_sources,
    train_sequences_for_epochs,
)
from megatron_cgn.errors import ConfigError, DataError
from tests.unit.data_samples import FINGERPRINT, numbered_documents, write_index


def config(*sources: SourceConfig, fraction: float = 0.0) -> DataConfig:
    return DataConfig(sources=sources, seq_length=8, validation_fraction=fraction)


@pytest.fixture
def ten(tmp_path: Path) -> str:
    """Ten documents of 1, 2, … 10 tokens."""
    return write_index(tmp_path / "ten", numbered_documents(range(1, 11)))


@pytest.fixture
def three(tmp_path: Path) -> str:
    return write_index(tmp_path / "three", numbered_documents([5, 5, 5]))


def test_the_last_documents_are_held_out(ten: str, three: str) -> None:
    data = config(
        SourceConfig(name="a", path=ten, weight=3),
        SourceConfig(name="b", path=three, weight=1),
        fraction=0.2,
    )
    a, b = plan_sources(data, tokenizer_fingerprint=FINGERPRINT)
    assert (a.training.start, a.training.stop, a.training.tokens) == (0, 8, 36)
    assert a.validation is not None
    assert (a.validation.start, a.validation.stop, a.validation.tokens) == (8, 10, 19)
    assert b.validation is not None
    assert (len(b.training), len(b.validation)) == (2, 1)  # at least one
    assert (a.share, b.share) == (0.75, 0.25)
    assert count_tokens((a, b)) == 46


def test_a_validation_path_is_held_out_whole(ten: str, three: str) -> None:
    data = config(SourceConfig(name="a", path=ten, validation_path=three))
    (plan,) = plan_sources(data)
    assert plan.validation is not None
    assert (len(plan.training), plan.validation.tokens) == (10, 15)


def test_a_source_may_be_validated_on_only(ten: str, three: str) -> None:
    data = config(
        SourceConfig(name="a", path=ten),
        SourceConfig(name="b", path=three, weight=0.0),
        fraction=0.999,
    )
    with pytest.raises(DataError, match="nothing is left to train on"):
        plan_sources(data)
    data = config(
        SourceConfig(name="a", path=ten),
        SourceConfig(name="b", path=three, weight=0.0),
        fraction=0.1,
    )
    plans = plan_sources(data)
    assert [plan.share for plan in plans] == [1.0, 0.0]
    assert count_tokens(plans) == 45


def test_epochs_to_sequences(ten: str) -> None:
    plans = plan_sources(config(SourceConfig(name="a", path=ten)))  # 55 tokens
    for epochs, seq_length, expected in [
        (1, 54, 1),  # 54 tokens and their 54 successors
        (1, 11, 4),  # 55 = 5 * 11, but the last token has no successor
        (2, 11, 9),
        (0.5, 9, 2),
    ]:
        found = train_sequences_for_epochs(plans, epochs=epochs, seq_length=seq_length)
        assert found == expected
    with pytest.raises(DataError, match=r"train.epochs=1 of 55 .* do not fill one sequence"):
        train_sequences_for_epochs(plans, epochs=1, seq_length=55)


def test_account(ten: str, three: str) -> None:
    data = config(
        SourceConfig(name="a", path=ten),
        SourceConfig(name="b", path=three, weight=0.0, validation_path=None),
        fraction=0.2,
    )
    a, b = account_for(plan_sources(data), sequences=[9, 0], seq_length=8)
    assert (a.sequences, a.epochs, a.training_tokens) == (9, 2.0, 36)
    assert (a.validation_documents, a.validation_tokens) == (2, 19)
    assert (b.sequences, b.epochs, b.validation_tokens) == (0, 0.0, 5)


def test_all_faulty_sources_are_named_at_once(tmp_path: Path, ten: str) -> None:
    other = write_index(tmp_path / "other", [[1, 2]], fingerprint="0" * 32)
    data = config(
        SourceConfig(name="good", path=ten),
        SourceConfig(name="gone", path=str(tmp_path / "absent")),
        SourceConfig(name="foreign", path=other),
    )
    with pytest.raises(DataError) as raised:
        plan_sources(data, tokenizer_fingerprint=FINGERPRINT)
    message = str(raised.value)
    assert "data.sources[gone]: " in message and "absent.bin: there is no such file" in message
    assert "data.sources[foreign]: " in message and "another tokenizer" in message
    assert "good" not in message


def test_settings_that_contradict_each_other(ten: str, three: str) -> None:
    def fault(*sources: SourceConfig, fraction: float = 0.0) -> str:
        with pytest.raises(ConfigError) as raised:
            plan_sources(config(*sources, fraction=fraction))
        return str(raised.value)

    a = SourceConfig(name="a", path=ten)
    assert "data.sources is empty" in fault()
    assert "the name 'a' is given 2 times" in fault(a, SourceConfig(name="a", path=three))
    same = f"{Path(ten).parent}/./{Path(ten).name}"
    assert "is given 2 times. Give it once" in fault(a, SourceConfig(name="b", path=same))
    leak = fault(a, SourceConfig(name="b", path=three, validation_path=ten))
    assert "data.sources[b].validation_path" in leak and "is also trained on" in leak
    many = fault(SourceConfig(name="a", path=ten, weight=-1), fraction=1.0)
    assert "weight=-1: must be 0 or more" in many and "validation_fraction=1.0" in many
    nothing = fault(SourceConfig(name="a", path=ten, weight=0.0))
    assert "it has no effect" in nothing and "every weight is 0" in nothing
    assert "weight=nan" in fault(SourceConfig(name="a", path=ten, weight=float("nan")))
