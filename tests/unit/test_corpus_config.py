"""Settings of ``prepare_corpus.py``."""

from pathlib import Path

import pytest

from megatron_cgn.config.corpus import CorpusConfig
from megatron_cgn.config.load import CONFIG_DIR, load_corpus_config
from megatron_cgn.errors import ConfigError


def test_nothing_given_is_the_defaults() -> None:
    assert load_corpus_config([]) == CorpusConfig()


def test_the_defaults_have_no_faults() -> None:
    assert list(CorpusConfig().faults()) == []


def test_overrides_win_over_the_file_and_options_over_both(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "split: {validation_fraction: 0.1}\nclean: {min_characters: 7}\nread:\n"
        "write: {shard_mib: 3}\n"
    )
    settings = load_corpus_config(
        ["clean.min_characters=8", "clean.languages=[zh, en]", "write.shard_mib=4"],
        file=file,
        values={"write.shard_mib": 5, "deduplicate.prior": ["a", "b"]},
    )
    assert settings.split.validation_fraction == 0.1
    assert settings.clean.min_characters == 8
    assert settings.clean.languages == ("zh", "en")
    assert settings.write.shard_mib == 5
    assert settings.deduplicate.prior == ("a", "b")
    assert settings.read == CorpusConfig().read


SUPPLIED = sorted(
    path.stem for path in (CONFIG_DIR / "corpus").glob("*.yaml") if "." not in path.stem
)


@pytest.mark.parametrize("name", SUPPLIED)
def test_supplied_settings(name: str) -> None:
    settings = load_corpus_config([], file=name)
    assert settings != CorpusConfig()
    assert list(settings.faults()) == []


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        (["clean.min_chars=1"], ("clean.min_chars: unknown key", "clean.min_characters")),
        (["min_characters=1"], ("min_characters: unknown key", "clean.min_characters")),
        (["clean.min_characters=x"], ("clean.min_characters", "'x'")),
        (["clean.min_characters"], ("step.name=value",)),
        (["write.format=csv"], ("write.format", "jsonl.zst", "csv")),
        (["clean=5"], ("clean", "5")),
        (["clean.languages=[zh"], ("clean.languages=[zh",)),
        (["a.b=1", "clean.min_chars=1"], ("a: unknown", "clean.min_chars: unknown")),
    ],
)
def test_faults(overrides: list[str], texts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_corpus_config(overrides)
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize("content", ["- a\n", "a: [", "\xff"])
def test_files_that_hold_no_settings(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        load_corpus_config([], file=tmp_path / "a.yaml")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError) as caught:
        load_corpus_config([], file="recrods")
    assert "recrods" in str(caught.value) and "records" in str(caught.value)
