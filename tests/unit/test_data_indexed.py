"""The index on disk: Megatron's bytes, and every way in which a file can be wrong."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_cgn.data import index_writer
from megatron_cgn.data.index_writer import IndexWriter
from megatron_cgn.data.indexed import check_index, map_tokens, token_dtype
from megatron_cgn.errors import DataError
from tests.unit.data_samples import FINGERPRINT, numbered_documents, write_index


def theirs(prefix: Path, documents: list[list[int]], vocab_size: int) -> None:
    """Write the same documents with Megatron's builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    vocab_size=st.sampled_from([300, 65499, 65500, 151_936]),
    block=st.sampled_from([1, 3, 1 << 20]),
)
def test_bytes_equal_megatrons(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    vocab_size: int,
    block: int,
) -> None:
    monkeypatch.setattr(index_writer, "_BLOCK", block)
    rng = np.random.default_rng(sum(lengths))
    documents = [rng.integers(0, vocab_size, n).tolist() for n in lengths]
    write_index(tmp_path / "ours", documents, vocab_size=vocab_size, overwrite=True)
    theirs(tmp_path / "theirs", documents, vocab_size)
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"ours{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs{suffix}").read_bytes()


def test_megatron_reads_it(tmp_path: Path) -> None:
    documents = numbered_documents([3, 1, 7])
    dataset = IndexedDataset(write_index(tmp_path / "p", documents))
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]


def test_portions_do_not_matter(tmp_path: Path) -> None:
    documents = numbered_documents([3, 1, 7, 2])
    write_index(tmp_path / "one", documents)
    with IndexWriter(tmp_path / "two", vocab_size=1000) as writer:
        flat = np.array([token for document in documents for token in document])
        writer.add(flat, [3, 1, 7, 2])
        writer.finish(
            tokenizer_fingerprint=FINGERPRINT, tokenizer_name="tiny", eod_id=0, text_bytes=13
        )
    for suffix in (".bin", ".idx", ".json"):
        one = (tmp_path / f"one{suffix}").read_bytes()
        assert one == (tmp_path / f"two{suffix}").read_bytes()


def test_info(tmp_path: Path) -> None:
    prefix = write_index(tmp_path / "sub" / "p", numbered_documents([3, 1, 7]), vocab_size=70_000)
    info = check_index(prefix, tokenizer_fingerprint=FINGERPRINT)
    assert (info.documents, info.tokens, info.tokens_of(1, 3)) == (3, 11, 8)
    assert info.sidecar.dtype == "int32"
    assert info.sidecar.vocab_size == 70_000
    assert map_tokens(info).tolist() == list(range(1, 12))
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["p.bin", "p.idx", "p.json"]


def test_digest_follows_tokens_and_lengths(tmp_path: Path) -> None:
    def digest(documents: list[list[int]]) -> str:
        prefix = write_index(tmp_path / "p", documents, overwrite=True)
        return check_index(prefix).sidecar.digest

    first = digest([[1, 2], [3]])
    assert digest([[1, 2], [3]]) == first
    assert len({first, digest([[1], [2, 3]]), digest([[1, 2], [4]])}) == 3


def truncate(path: str, size: int) -> None:
    os.truncate(path, os.path.getsize(path) - size)


def patch(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def rewrite_sidecar(prefix: str, **changes: object) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FAULTS: dict[str, tuple[Callable[[str], object], str]] = {
    "no bin": (lambda p: os.unlink(f"{p}.bin"), r"p\.bin: there is no such file\. Check the path"),
    "no idx": (lambda p: os.unlink(f"{p}.idx"), r"p\.idx: there is no such file"),
    "no sidecar": (lambda p: os.unlink(f"{p}.json"), r"p\.json.*says which tokenizer made"),
    "short bin": (
        lambda p: truncate(f"{p}.bin", 2),
        r"p\.bin: truncated: 20 bytes, but .*p\.idx counts 11 tokens \(22 bytes\)",
    ),
    "long bin": (
        lambda p: Path(f"{p}.bin").open("ab").write(b"xx"),
        r"p\.bin: not the one the \.idx was written for: 24 bytes",
    ),
    "short idx": (lambda p: truncate(f"{p}.idx", 1), r"p\.idx: truncated: 101 bytes.*102 bytes"),
    "cut header": (lambda p: os.truncate(f"{p}.idx", 20), r"less than its header"),
    "empty idx": (
        lambda p: os.truncate(f"{p}.idx", 0),
        r"it starts with b''",
    ),
    "bad magic": (lambda p: patch(f"{p}.idx", 0, b"PARQUET"), r"not a Megatron index"),
    "bad version": (lambda p: patch(f"{p}.idx", 9, struct.pack("<Q", 2)), r"version 2 with token"),
    "bad type": (lambda p: patch(f"{p}.idx", 17, b"\x06"), r"token type 6; expected .* 4 or 8"),
    "bad lengths": (lambda p: patch(f"{p}.idx", 34, struct.pack("<i", 9)), r"p\.bin: truncated"),
    "not a sidecar": (lambda p: Path(f"{p}.json").write_text("{"), r"p\.json: not a sidecar"),
    "list": (lambda p: Path(f"{p}.json").write_text("[]"), r"p\.json: not a sidecar"),
    "format": (lambda p: rewrite_sidecar(p, format=9), r"its format is not 1"),
    "other sidecar": (lambda p: rewrite_sidecar(p, documents=4), r"belongs to another index"),
    "tokenizer": (
        lambda p: rewrite_sidecar(p, tokenizer_fingerprint="0" * 32),
        r"made with another tokenizer: 'tiny' \(1,000 ids, fingerprint 0{32}\).*f{32}.*--tokenizer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_before_training(tmp_path: Path, fault: str) -> None:
    prefix = write_index(tmp_path / "p", numbered_documents([3, 1, 7]))
    breaking, message = FAULTS[fault]
    breaking(prefix)
    with pytest.raises(DataError, match=message):
        check_index(prefix, tokenizer_fingerprint=FINGERPRINT)


def test_files_that_cannot_be_read_are_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = check_index(write_index(tmp_path / "p", [[1, 2]]))
    with pytest.raises(DataError, match="p{300}: the index cannot be read .*File name too long"):
        check_index(tmp_path / ("p" * 300))
    opened = Path.open

    def refuse(self: Path, *arguments: object, **options: object) -> object:
        if self.suffix == ".idx":  # to root everything is permitted
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="p: the index cannot be read .*Permission denied"):
        check_index(info.prefix)
    os.truncate(f"{info.prefix}.bin", 0)
    with pytest.raises(DataError, match="p: the index cannot be read"):
        map_tokens(info)
    os.unlink(f"{info.prefix}.bin")
    with pytest.raises(DataError, match="p: the index cannot be read .*No such file"):
        map_tokens(info)


def test_an_empty_source_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the source is empty \(0 documents, 0 tokens\)"):
        check_index(write_index(tmp_path / "p", []))


def test_a_file_instead_of_a_prefix_is_explained(tmp_path: Path) -> None:
    prefix = write_index(tmp_path / "p", [[1]])
    with pytest.raises(DataError, match=r"Give the prefix alone: '.*/p'"):
        check_index(f"{prefix}.bin")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("{}")
    with pytest.raises(DataError, match=r"run tools/preprocess_data.py on it first"):
        check_index(corpus)


def test_existing_files_are_kept_unless_told(tmp_path: Path) -> None:
    prefix = write_index(tmp_path / "p", [[1, 2]])
    with pytest.raises(DataError, match=r"p\.bin: exists already.*--overwrite"):
        write_index(tmp_path / "p", [[3]])
    assert check_index(prefix).tokens == 2
    assert check_index(write_index(tmp_path / "p", [[3]], overwrite=True)).tokens == 1


def test_leaving_early_leaves_nothing(tmp_path: Path) -> None:
    write_index(tmp_path / "p", [[1, 2]])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with (
        pytest.raises(KeyboardInterrupt),
        IndexWriter(tmp_path / "p", vocab_size=1000, overwrite=True) as writer,
    ):
        writer.add(np.arange(5), [5])
        raise KeyboardInterrupt
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_directory_that_cannot_be_made_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/p: cannot write the index"):
        write_index(tmp_path / "file" / "p", [[1]])


def test_token_type_is_megatrons() -> None:
    for size in (1, 65_499, 65_500, 65_536, 151_936):
        assert token_dtype(size) is DType.optimal_dtype(size)


def test_overwriting_replaces_indices_alone(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('[{"text": "a corpus"}]')
    with pytest.raises(DataError, match=r"p\.json: not of an index"):
        write_index(tmp_path / "p", [[1]], overwrite=True)
    assert (tmp_path / "p.json").read_text() == '[{"text": "a corpus"}]'
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    prefix = write_index(tmp_path / "q", [[1]])
    os.truncate(f"{prefix}.json", 120)  # damaged, but ours
    assert check_index(write_index(tmp_path / "q", [[1, 2]], overwrite=True)).tokens == 2


def test_one_prefix_has_one_writer(tmp_path: Path) -> None:
    with IndexWriter(tmp_path / "p", vocab_size=1000):
        with (
            pytest.raises(DataError, match="another run is writing this index"),
            IndexWriter(tmp_path / "p", vocab_size=1000, overwrite=True),
        ):
            pass
        write_index(tmp_path / "q", [[1]])  # another prefix is another matter
    assert check_index(write_index(tmp_path / "p", [[1]])).tokens == 1
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["p"] * 3 + ["q"] * 3


def test_an_index_that_appears_before_the_start_is_kept(tmp_path: Path) -> None:
    late = IndexWriter(tmp_path / "p", vocab_size=1000)
    prefix = write_index(tmp_path / "p", [[1, 2]])
    with pytest.raises(DataError, match="exists already"), late:
        pass
    assert check_index(prefix).tokens == 2


def test_temporary_names_differ_in_equal_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 7)  # as two containers may have it
    writers = [IndexWriter(tmp_path / "p", vocab_size=1000) for _ in range(2)]
    assert writers[0]._temporary(".bin") != writers[1]._temporary(".bin")


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    stale = ["p.bin.tmp-123", "p.json.tmp-0123456789abcdef", ".p.lock"]
    other = ["q.bin.tmp-123", "xp.bin.tmp-123", "p.bin.tmp-mine", "p.txt"]
    for name in stale + other:
        (tmp_path / name).write_text("x")
    write_index(tmp_path / "p", [[1]])
    assert {path.name for path in tmp_path.iterdir()} == {"p.bin", "p.idx", "p.json", *other}


def test_a_fault_while_files_are_put_in_place_says_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write_index(tmp_path / "p", [[1, 2]])

    def refuse(self: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(DataError, match=r"in its place \(Input/output error\).*earlier one is gon"):
        write_index(tmp_path / "p", [[3]], overwrite=True)
    assert not Path(f"{prefix}.idx").exists()
    assert not list(tmp_path.glob("*.tmp-*"))


@pytest.mark.parametrize("prefix", ["", "sub/", "sub/..", "."])
def test_a_prefix_needs_a_name(prefix: str) -> None:
    with pytest.raises(DataError, match="ends without a name"):
        IndexWriter(prefix, vocab_size=10)


def test_a_name_too_long_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write the index \(File name too long\)"):
        write_index(tmp_path / ("p" * 300), [[1]])
