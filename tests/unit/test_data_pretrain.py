"""The training blend: proportions, epochs, order, and a cache that is never stale or half-built."""

import os
import resource
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_cgn.config.schema import (
    DataConfig,
    FileConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from megatron_cgn.data.account import account_of
from megatron_cgn.data.blocks import HANDLES_PER_INDEX
from megatron_cgn.data.pretrain import PretrainingData, build_pretraining_data, plan_pretraining
from megatron_cgn.errors import DataError
from tests.unit.data_samples import byte_level_tokenizer, numbered_documents, write_index
from tokenizer.wrapper import Tokenizer

SEQ = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer")))


class World:
    """Three sources whose ids tell them apart, and a cache."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        rng = np.random.default_rng(0)
        self.documents = {
            name: numbered_documents(rng.integers(3, 40, count).tolist(), start=start)
            for name, count, start in (("a", 60, 0), ("b", 25, 10_000), ("c", 8, 20_000))
        }
        for name in self.documents:
            self.write(name)

    def write(self, name: str) -> None:
        write_index(
            self.folder / name,
            self.documents[name],
            vocab_size=30_000,
            fingerprint=self.tokenizer.fingerprint(),
            overwrite=True,
        )

    def tokens(self, name: str) -> list[int]:
        return [token for document in self.documents[name] for token in document]

    def build(
        self, sequences: int, *, fraction: float = 0.0, seed: int = 1, **weights: float
    ) -> PretrainingData:
        sources = tuple(
            SourceConfig(name=name, path=str(self.folder / name), weight=weight)
            for name, weight in weights.items()
        )
        data = DataConfig(sources=sources, seq_length=SEQ, validation_fraction=fraction)
        return self.build_from(data, sequences, seed=seed)

    def build_from(self, data: DataConfig, sequences: int, *, seed: int = 1) -> PretrainingData:
        train = TrainConfig(train_iters=sequences, global_batch_size=1)
        return self.build_run(RunConfig(data=data, train=train, seed=seed))

    def build_run(self, run: RunConfig) -> PretrainingData:
        return build_pretraining_data(
            plan_pretraining(run, tokenizer=self.tokenizer),
            eod_id=self.tokenizer.eod_id,
            cache_dir=self.folder / "cache",
        )


@pytest.fixture
def world(tmp_path: Path, tokenizer: Tokenizer) -> World:
    return World(tmp_path, tokenizer)


def rows(data: PretrainingData) -> list[list[int]]:
    return [data.train[i]["tokens"].tolist() for i in range(len(data.train))]


def sequences_of(data: PretrainingData) -> list[int]:
    """What each source gives, by the account."""
    return [source["sequences"] for source in account_of(data.blend)["sources"]]


def test_samples_are_what_the_engine_expects(world: World) -> None:
    data = world.build(20, a=1.0)
    sample = data.train[0]
    assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids", "source"}
    assert sample["source"].dtype == torch.int64 and sample["source"].shape == ()
    assert sample["tokens"].dtype == sample["labels"].dtype == torch.int64
    assert sample["loss_mask"].dtype == torch.float32
    assert sample["loss_mask"].tolist() == [1.0] * SEQ
    assert sample["position_ids"].tolist() == list(range(SEQ))
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    with pytest.raises(IndexError):
        data.train[20]


def test_one_epoch_reads_every_token_once(world: World) -> None:
    tokens = world.tokens("a")
    sequences = (len(tokens) - 1) // SEQ
    labels = [world.build(sequences, a=1.0).train[i]["labels"] for i in range(sequences)]
    counts = Counter(torch.cat(labels).tolist())
    assert max(counts.values()) == 1
    assert len(counts) == sequences * SEQ  # all but the first token and an incomplete tail


def test_the_second_epoch_comes_after_the_first(world: World) -> None:
    """Half an epoch more than one: nothing is read a second time before the first is over."""
    tokens = world.tokens("a")
    first = (len(tokens) - 1) // SEQ
    found = rows(world.build(first + first // 2, a=1.0))
    assert max(Counter(t for row in found[:first] for t in row).values()) == 1
    assert max(Counter(t for row in found for t in row).values()) == 2


@pytest.mark.parametrize("sequences", [100, 1000])
def test_blend_follows_the_weights_throughout(world: World, sequences: int) -> None:
    data = world.build(sequences, c=0.1, a=4.0, b=0.9)
    source = np.array([row[SEQ // 2] // 10_000 for row in rows(data)])
    for end in range(1, sequences + 1):
        for place, share in enumerate((0.8, 0.18, 0.02)):
            assert abs(np.sum(source[:end] == place) - share * end) <= 1
    assert data.source_names == ("c", "a", "b")
    for i in range(0, sequences, 7):
        assert "abc"[source[i]] == data.source_names[int(data.train[i]["source"])]
    for account in account_of(data.blend)["sources"]:
        drawn = int(np.sum(source == "abc".index(account["name"])))
        assert (account["sequences"], account["tokens"]) == (drawn, drawn * SEQ)
        assert account["epochs"] == drawn * SEQ / len(world.tokens(account["name"]))


def test_fewer_sequences_than_sources(world: World) -> None:
    assert sequences_of(world.build(1, a=0.6, b=0.4)) == [1, 0]
    data = world.build(2, a=0.1, b=0.5, c=0.4)
    assert sequences_of(data) == [0, 1, 1]
    assert sorted(row[0] // 10_000 for row in rows(data)) == [1, 2]
    assert sequences_of(world.build(10, a=1.0, b=1e-6)) == [10, 0]


def test_held_out_documents_are_never_trained_on(world: World) -> None:
    data = world.build(400, fraction=0.1, a=0.5, b=0.5)
    trained = {token for row in rows(data) for token in row}
    for name in ("a", "b"):
        count = max(1, round(0.1 * len(world.documents[name])))
        held_out = [t for document in world.documents[name][-count:] for t in document]
        windows = data.validation[name]
        assert windows.num_tokens == len(held_out)
        assert windows[0]["labels"][0] == held_out[0]
        assert windows[0]["tokens"][0] == world.tokenizer.eod_id
        assert not trained & set(held_out)
        rest = {t for document in world.documents[name][:-count] for t in document}
        assert len(rest - trained) < SEQ + 1  # several epochs: all but a tail was trained on


def test_two_epochs_of_the_domain_read_every_token_of_it_twice(world: World) -> None:
    """Up to the last window, and for each file apart, whatever else is in the mix."""
    for files in (("a",), ("a", "c")):
        configs = tuple(FileConfig(path=str(world.folder / name)) for name in files)
        data = DataConfig(
            sources=(
                SourceConfig(name="domain", files=configs),
                SourceConfig(name="general", path=str(world.folder / "b")),
            ),
            mix={"domain": 0.8, "general": 0.2},
            seq_length=SEQ,
        )
        run = RunConfig(data=data, train=TrainConfig(epochs=2, global_batch_size=1), seed=1)
        found = world.build_run(run)
        labels = torch.cat([found.train[i]["labels"] for i in range(len(found.train))])
        counts = Counter(labels.tolist())
        for name in files:
            seen = [counts[token] for token in world.tokens(name)]
            # A file's count is a whole number of windows, at most one from its two epochs.
            assert abs(2 * len(seen) - sum(seen)) <= 2 * SEQ
            assert sum(number != 2 for number in seen) <= 2 * SEQ
        domain = sum(counts[token] for name in files for token in world.tokens(name))
        tokens = sum(len(world.tokens(name)) for name in files)
        assert domain == (2 * tokens - 1) // SEQ * SEQ
        assert len(labels) - domain == pytest.approx(domain / 4, abs=SEQ)


def test_a_longer_run_begins_as_the_shorter_one(world: World) -> None:
    """Over the ends of several epochs of each source."""
    longest = rows(world.build(700, a=0.7, b=0.2, c=0.1))
    for sequences in (1, 99, 100, 350):
        assert rows(world.build(sequences, a=0.7, b=0.2, c=0.1)) == longest[:sequences]


def test_order_depends_on_the_seed_alone(world: World, tmp_path: Path) -> None:
    first = rows(world.build(100, a=0.7, b=0.3))
    assert rows(world.build(100, a=0.7, b=0.3)) == first  # from the cache
    assert rows(world.build(100, seed=2, a=0.7, b=0.3)) != first
    moved = World(tmp_path / "elsewhere", world.tokenizer)
    assert rows(moved.build(100, a=0.7, b=0.3)) == first


def test_a_rewritten_source_is_not_read_through_an_old_index(world: World) -> None:
    before = rows(world.build(50, a=1.0))
    folders = set((world.folder / "cache").iterdir())
    # As many documents and tokens, in other places: an old index would cut them wrongly.
    world.documents["a"] = world.documents["a"][::-1]
    world.write("a")
    after = rows(world.build(50, a=1.0))
    assert after != before
    boundaries = {document[-1] for document in world.documents["a"]}
    for row in after:
        assert all(b == a + 1 or a in boundaries for a, b in zip(row, row[1:], strict=False))
    assert len(set((world.folder / "cache").iterdir()) - folders) == 1


def test_the_cache_is_used_and_appears_whole(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = np.save

    def counted(file: BinaryIO, array: NDArray[np.int32]) -> None:
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        original(file, array)

    monkeypatch.setattr(np, "save", counted)
    with pytest.raises(DataError, match=r"cache: cannot write the shuffled indices \(No space"):
        world.build(50, a=1.0)
    assert not list(world.folder.glob("cache/*"))
    world.build(50, a=1.0)
    assert len(calls) == 4
    world.build(70, a=1.0)
    assert len(calls) == 4
    (folder,) = (world.folder / "cache").iterdir()
    damaged = folder / "starts.npy"
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(DataError, match=r"order-.*cannot read the shuffled indices.*Delete"):
        world.build(50, a=1.0)
    original(damaged, np.zeros((3, 2), dtype=np.int32))
    with pytest.raises(DataError, match=r"other shapes.*Delete"):
        world.build(50, a=1.0)


def test_a_cache_that_cannot_be_written_is_a_fault(world: World) -> None:
    (world.folder / "cache").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write the shuffled indices.*data.cache_dir"):
        world.build(50, a=1.0)


def test_more_epochs_than_documents_of_a_tiny_source(world: World) -> None:
    world.documents["c"] = [[20_001, 20_002]]
    world.write("c")
    data = world.build(64, a=0.5, c=0.5)
    assert sequences_of(data) == [32, 32]
    for row in rows(data):
        assert row[0] < 20_000 or set(row) == {20_001, 20_002}


def test_runs_with_equal_process_ids_build_the_cache_apart(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers that share a cache: the second must not remove what the first builds."""
    renamed: list[Path] = []
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        renamed.append(self)
        if len(renamed) == 1:
            world.build(50, a=1.0)
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert len(rows(world.build(50, a=1.0))) == 50
    assert len(set(renamed)) == 2
    assert len(list((world.folder / "cache").iterdir())) == 1


def test_files_of_a_source_and_what_they_hold_out(world: World) -> None:
    """Each file is read equally often unless weights say otherwise, and gives up its own end."""
    paths = [str(world.folder / name) for name in "bc"]
    sizes = [len(world.tokens(name)) for name in "bc"]
    plain = SourceConfig(name="both", files=tuple(FileConfig(path=path) for path in paths))
    found = world.build_from(DataConfig(sources=(plain,), seq_length=SEQ), 200)
    (source,) = account_of(found.blend)["sources"]
    for file, size in zip(source["files"], sizes, strict=True):
        assert abs(file["sequences"] - 200 * size / sum(sizes)) <= 0.5
    weighted = tuple(FileConfig(path=p, weight=w) for p, w in zip(paths, (1, 3), strict=True))
    data = DataConfig(
        sources=(SourceConfig(name="both", files=weighted),),
        seq_length=SEQ,
        validation_fraction=0.2,
    )
    found = world.build_from(data, 200)
    (source,) = account_of(found.blend)["sources"]
    assert [file["sequences"] for file in source["files"]] == [50, 150]
    held_out = [
        t for name, n in (("b", 5), ("c", 2)) for d in world.documents[name][-n:] for t in d
    ]
    windows = found.validation["both"]
    counted = [
        w["labels"][w["loss_mask"].bool()] for w in (windows[i] for i in range(len(windows)))
    ]
    assert torch.cat(counted).tolist() == held_out
    assert not {t for row in rows(found) for t in row} & set(held_out)


def test_many_indices_need_many_open_files(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stays mapped; the usual limit of 1,024 is too low for some hundreds."""
    files = tuple(
        FileConfig(
            path=write_index(
                world.folder / f"part{n}",
                numbered_documents([SEQ + 1], start=20 * n),
                fingerprint=world.tokenizer.fingerprint(),
            )
        )
        for n in range(30)
    )
    data = DataConfig(sources=(SourceConfig(name="a", files=files),), seq_length=SEQ)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        # As many as a rank of a large run has connections.
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        held += [os.open(os.devnull, os.O_RDONLY) for _ in range(1200)]
        opened = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 60, hard))
        found = world.build_from(data, 30)
        used = len(os.listdir("/proc/self/fd")) - opened
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for handle in held:
            os.close(handle)
    assert sorted(row[0] // 20 for row in rows(found)) == list(range(30))
    assert 60 < used <= 30 * HANDLES_PER_INDEX
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200, 300))
    with pytest.raises(DataError, match=r"30 indices need about 338 open files.* 300 .*merge"):
        world.build_from(data, 30)
