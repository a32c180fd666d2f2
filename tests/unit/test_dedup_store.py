"""Signatures on disk: what is read is what was written, and anything else is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_cgn.config.corpus import DeduplicateConfig
from megatron_cgn.corpus.dedup import (
    Signatures,
    Signer,
    find_duplicates,
    load_signatures,
    save_signatures,
)
from megatron_cgn.errors import DataError

TEXTS = ["核电厂运行规程第一章总则", "The quick brown fox jumps over the lazy dog", "短", ""]


@pytest.fixture
def signer() -> Signer:
    return Signer(DeduplicateConfig())


@pytest.fixture
def saved(tmp_path: Path, signer: Signer) -> Path:
    parts = [signer.sign(TEXTS[:1]), signer.sign(TEXTS[1:])]
    save_signatures(tmp_path / "s", parts, num_documents=4, parameters=signer.parameters)
    return tmp_path / "s"


def test_what_is_written_is_read(saved: Path, signer: Signer) -> None:
    wanted, found = signer.sign(TEXTS), load_signatures(saved, parameters=signer.parameters)
    assert isinstance(found.minhashes, np.memmap)
    np.testing.assert_array_equal(found.hashes, wanted.hashes)
    np.testing.assert_array_equal(found.minhashes, wanted.minhashes)
    assert sorted(path.name for path in saved.iterdir()) == [
        "hashes.npy",
        "minhashes.npy",
        "parameters.json",
    ]
    # Plain numpy files.
    np.testing.assert_array_equal(np.load(saved / "hashes.npy"), wanted.hashes)


def test_saved_signatures_are_used_as_an_earlier_run(saved: Path, signer: Signer) -> None:
    prior = load_signatures(saved, parameters=signer.parameters)
    ours = signer.sign([TEXTS[1].upper(), "另一篇文档，内容完全不同"])
    decisions = find_duplicates([ours], DeduplicateConfig(), prior=[prior])
    assert decisions.kinds.tolist() == [1, 0]
    assert decisions.of.tolist() == [-3, 1]


def test_no_documents(tmp_path: Path, signer: Signer) -> None:
    save_signatures(tmp_path, [], num_documents=0, parameters=signer.parameters)
    found = load_signatures(tmp_path, parameters=signer.parameters)
    assert (found.hashes.shape, found.minhashes.shape) == ((0, 4), (0, 128))
    decisions = find_duplicates([found], DeduplicateConfig(), prior=[found])
    assert len(decisions.kinds) == len(decisions.of) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"ngram_tokens": 3}, "ngram_tokens 5 instead of 3"),
        ({"number_weight": 0}, "number_weight 20 instead of 0"),
        ({"num_permutations": 64}, "num_permutations 128 instead of 64"),
    ],
)
def test_other_parameters_are_refused(saved: Path, change: dict[str, int], message: str) -> None:
    ours = Signer(DeduplicateConfig(**change)).parameters  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message) as caught:
        load_signatures(saved, parameters=ours)
    assert str(saved) in str(caught.value)


def test_another_algorithm_is_refused(saved: Path, signer: Signer) -> None:
    with pytest.raises(DataError, match="rensa_algorithm 2 instead of 3"):
        load_signatures(saved, parameters={**signer.parameters, "rensa_algorithm": 3})


def test_threshold_and_protection_may_differ(saved: Path) -> None:
    settings = DeduplicateConfig(similarity_threshold=0.9, protect_numbers="none")
    assert len(load_signatures(saved, parameters=Signer(settings).parameters)) == 4


def test_missing_signatures(tmp_path: Path, signer: Signer) -> None:
    a_file = tmp_path / "file"
    a_file.touch()
    for path in (tmp_path / "none", a_file):
        with pytest.raises(DataError, match=r"parameters\.json: cannot be read: N.*prior"):
            load_signatures(path, parameters=signer.parameters)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"parameters": {}}', '{"parameters": 1}'])
def test_damaged_parameters(saved: Path, signer: Signer, content: str) -> None:
    (saved / "parameters.json").write_text(content)
    with pytest.raises(DataError, match=r"parameters\.json: damaged"):
        load_signatures(saved, parameters=signer.parameters)


@pytest.mark.parametrize("name", ["hashes.npy", "minhashes.npy"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "other"])
def test_damaged_arrays(saved: Path, signer: Signer, name: str, damage: str) -> None:
    path = saved / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        np.save(path, np.zeros((4, 4), dtype=np.float32))
    with pytest.raises(DataError, match=name):
        load_signatures(saved, parameters=signer.parameters)


def test_a_write_stopped_midway_leaves_nothing_valid(saved: Path, signer: Signer) -> None:
    def parts() -> Iterator[Signatures]:
        yield signer.sign(TEXTS[:1])
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_signatures(saved, parts(), num_documents=4, parameters=signer.parameters)
    with pytest.raises(DataError, match="No such file"):
        load_signatures(saved, parameters=signer.parameters)


def test_parameters_are_plain(saved: Path, signer: Signer) -> None:
    header = json.loads((saved / "parameters.json").read_text())
    assert header == {"num_documents": 4, "parameters": signer.parameters}


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"similarity_threshold": 0.0}, "deduplicate.similarity_threshold: 0.0;"),
        ({"similarity_threshold": 1.01}, "deduplicate.similarity_threshold: 1.01;"),
        ({"similarity_threshold": float("nan")}, "deduplicate.similarity_threshold: nan;"),
        ({"ngram_tokens": 0}, "deduplicate.ngram_tokens: 0;"),
        ({"num_permutations": 8}, "deduplicate.num_permutations: 8;"),
        ({"number_weight": -1}, "deduplicate.number_weight: -1;"),
        ({"seed": 2**32}, "deduplicate.seed: 4294967296;"),
        ({"protect_numbers": "yes"}, "deduplicate.protect_numbers: yes;"),
        ({"near": False, "similarity_threshold": 0.8}, "deduplicate.similarity_threshold: 0.8;"),
        ({"enabled": False, "prior": ("a",)}, "deduplicate.prior:"),
    ],
)
def test_faults_of_the_settings(change: dict[str, object], path: str) -> None:
    messages = list(DeduplicateConfig(**change).faults())  # type: ignore[arg-type]
    assert len(messages) == 1 and messages[0].startswith(path)
    assert not list(DeduplicateConfig().faults())
