"""The training blend: proportions, epochs, order, and a cache that is never stale or half-built."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch.utils.data import Dataset

from megatron_cgn.config.schema import DataConfig, SourceConfig
from megatron_cgn.data.gpt_blend import BlendRecipe
from megatron_cgn.data.pretrain import PretrainingData, build_pretraining_data
from megatron_cgn.data.windows import Sample
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
        return build_pretraining_data(
            DataConfig(sources=sources, seq_length=SEQ, validation_fraction=fraction),
            tokenizer=self.tokenizer,
            train_sequences=sequences,
            seed=seed,
            cache_dir=self.folder / "cache",
        )


@pytest.fixture
def world(tmp_path: Path, tokenizer: Tokenizer) -> World:
    return World(tmp_path, tokenizer)


def rows(data: PretrainingData) -> list[list[int]]:
    return [data.train[i]["tokens"].tolist() for i in range(len(data.train))]  # type: ignore[arg-type]


def test_samples_are_what_the_engine_expects(world: World) -> None:
    data = world.build(20, a=1.0)
    sample = data.train[0]
    assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}
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
    data = world.build(sequences, a=4.0, b=0.9, c=0.1)
    source = np.array([row[SEQ // 2] // 10_000 for row in rows(data)])
    for end in range(50, sequences + 1, 50):
        for place, share in enumerate((0.8, 0.18, 0.02)):
            assert abs(np.sum(source[:end] == place) - share * end) < 2
    account = {entry.name: entry for entry in data.account}
    for place, name in enumerate("abc"):
        assert account[name].sequences == np.sum(source == place)
        expected = account[name].sequences * SEQ / len(world.tokens(name))
        assert account[name].epochs == pytest.approx(expected)


def test_fewer_sequences_than_sources(world: World) -> None:
    data = world.build(1, a=0.5, b=0.5)
    assert [entry.sequences for entry in data.account] == [1, 0]
    assert len(data.train) == 1  # type: ignore[arg-type]
    data = world.build(2, a=0.1, b=0.5, c=0.4)
    assert [entry.sequences for entry in data.account] == [0, 1, 1]
    assert sorted(row[0] // 10_000 for row in rows(data)) == [1, 2]
    data = world.build(10, a=1.0, b=1e-6)  # Megatron draws every source once, early on
    assert [entry.sequences for entry in data.account] == [9, 1]


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
    original = GPTDataset._get_num_epochs

    def counted(self: GPTDataset, tokens: int) -> int:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return original(self, tokens)

    monkeypatch.setattr(GPTDataset, "_get_num_epochs", counted)
    with pytest.raises(DataError, match=r"cache: cannot write the shuffled indices \(No space"):
        world.build(50, a=1.0)
    assert not list(world.folder.glob("cache/*"))
    world.build(50, a=1.0)
    assert len(calls) == 2
    world.build(50, a=1.0)
    assert len(calls) == 2
    (folder,) = (world.folder / "cache").iterdir()
    damaged = next(folder.glob("*shuffle_index.npy"))
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(DataError, match=r"pretrain-.*cannot read the shuffled indices.*Delete"):
        world.build(50, a=1.0)


def test_a_cache_that_cannot_be_written_is_a_fault(world: World) -> None:
    (world.folder / "cache").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write the shuffled indices.*data.cache_dir"):
        world.build(50, a=1.0)


def test_more_epochs_than_documents_of_a_tiny_source(world: World) -> None:
    world.documents["c"] = [[20_001, 20_002]]
    world.write("c")
    data = world.build(64, a=0.5, c=0.5)
    assert data.account[1].epochs == pytest.approx(32 * SEQ / 2)
    assert sum(row[0] > 20_000 for row in rows(data)) == 32


def test_runs_with_equal_process_ids_build_the_cache_apart(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers that share a cache: the second must not remove what the first builds."""
    folders: list[Path] = []
    original = BlendRecipe.open

    def opened(self: BlendRecipe, drawn: Sequence[int], folder: Path) -> Dataset[Sample]:
        folders.append(folder)
        if len(folders) == 1:
            world.build(50, a=1.0)
        return original(self, drawn, folder)

    monkeypatch.setattr(BlendRecipe, "open", opened)
    world.build(50, a=1.0)
    assert folders[0] != folders[1]
    assert len(list((world.folder / "cache").iterdir())) == 1
