"""Division of sources, and every contradiction in the settings."""

from fractions import Fraction
from pathlib import Path

import pytest

from megatron_cgn.config.schema import DataConfig, FileConfig, SourceConfig
from megatron_cgn.data.sources import check_sources
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
    a, b = check_sources(data, tokenizer_fingerprint=FINGERPRINT)
    (training,), (validation,) = a.training, a.validation
    assert (training.start, training.stop, training.tokens) == (0, 8, 36)
    assert (validation.start, validation.stop, validation.tokens) == (8, 10, 19)
    assert (len(b.training[0]), len(b.validation[0])) == (2, 1)  # at least one
    assert sum(documents.tokens for documents in a.training) == 36


def test_every_file_of_a_source_gives_up_its_end(ten: str, three: str) -> None:
    files = (FileConfig(path=ten), FileConfig(path=three))
    (source,) = check_sources(config(SourceConfig(name="a", files=files), fraction=0.2))
    assert [len(documents) for documents in source.training] == [8, 2]
    assert [documents.tokens for documents in source.validation] == [19, 5]
    assert source.weights == (Fraction(36), Fraction(10))  # the tokens to train on
    files = (FileConfig(path=ten, weight=0.1), FileConfig(path=three, weight=2))
    (source,) = check_sources(config(SourceConfig(name="a", files=files)))
    assert source.weights == (Fraction(1, 10), Fraction(2))
    one = (FileConfig(path=three), FileConfig(path=ten))
    with pytest.raises(DataError, match=r"three: nothing is left to train on"):
        check_sources(config(SourceConfig(name="a", files=one), fraction=0.9))


def test_a_validation_path_is_held_out_whole(ten: str, three: str) -> None:
    data = config(SourceConfig(name="a", path=ten, validation_path=three))
    (plan,) = check_sources(data)
    assert (len(plan.training[0]), plan.validation[0].tokens) == (10, 15)


def test_a_source_may_be_validated_on_only(ten: str, three: str) -> None:
    data = config(
        SourceConfig(name="a", path=ten),
        SourceConfig(name="b", path=three, weight=0.0),
        fraction=0.999,
    )
    with pytest.raises(DataError, match="nothing is left to train on"):
        check_sources(data)
    data = config(
        SourceConfig(name="a", path=ten),
        SourceConfig(name="b", path=three, weight=0.0),
        fraction=0.1,
    )
    tokens = [sum(part.tokens for part in source.training) for source in check_sources(data)]
    assert tokens == [45, 10]


def test_all_faulty_sources_are_named_at_once(tmp_path: Path, ten: str) -> None:
    other = write_index(tmp_path / "other", [[1, 2]], fingerprint="0" * 32)
    data = config(
        SourceConfig(name="good", path=ten),
        SourceConfig(name="gone", path=str(tmp_path / "absent")),
        SourceConfig(name="foreign", path=other),
    )
    with pytest.raises(DataError) as raised:
        check_sources(data, tokenizer_fingerprint=FINGERPRINT)
    message = str(raised.value)
    assert "data.sources[gone]: " in message and "absent.bin: there is no such file" in message
    assert "data.sources[foreign]: " in message and "another tokenizer" in message
    assert "good" not in message


def test_copies_of_an_index_are_refused(tmp_path: Path, ten: str, three: str) -> None:
    """Above all a held-out pair that is a copy of what is trained on."""
    copy = write_index(tmp_path / "copy", numbered_documents(range(1, 11)))
    a, b = SourceConfig(name="a", path=ten), SourceConfig(name="b", path=three)
    check_sources(config(a, b, fraction=0.1))
    for sources in (
        (SourceConfig(name="a", path=ten, validation_path=copy),),
        (b, SourceConfig(name="a", files=(FileConfig(path=ten), FileConfig(path=copy)))),
        (a, SourceConfig(name="a2", path=copy)),
        (
            SourceConfig(name="b", path=three, validation_path=ten),
            SourceConfig(name="a", path=copy),
        ),
    ):
        with pytest.raises(DataError, match=r"data.sources\[a2?\]: .* exactly the documents of .*"):
            check_sources(config(*sources))


def test_settings_that_contradict_each_other(ten: str, three: str) -> None:
    def fault(*sources: SourceConfig, fraction: float = 0.0) -> str:
        with pytest.raises(ConfigError) as raised:
            check_sources(config(*sources, fraction=fraction))
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
