"""Words of a corpus: the same whatever the number of processes, and of the documents asked for."""

import gzip
import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_cgn.data.readers import check_inputs
from megatron_cgn.errors import DataError
from megatron_cgn.vocabulary import count
from megatron_cgn.vocabulary.count import count_words
from tokenizer.splitters import ByteLevelSplitter
from tokenizer.words import Words

TEXTS = [f"reactor core {n % 7} 堆芯冷却，第{n}号机组 valve{n}\n" * (1 + n % 5) for n in range(300)]
SPLITTER = ByteLevelSplitter(
    {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "added_tokens": [],
    }
)


def plain(texts: list[str]) -> Counter[str]:
    return Counter(word for text in texts for word in SPLITTER(text))


def counted(words: Words) -> dict[str, int]:
    return dict(zip(words.spellings, words.counts.tolist(), strict=True))


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def assert_same(one: Words, other: Words) -> None:
    assert one.spellings == other.spellings
    np.testing.assert_array_equal(one.counts, other.counts)
    np.testing.assert_array_equal(one.sketches, other.sketches)
    assert (one.text_bytes, one.documents) == (other.text_bytes, other.documents)


def keep_even(text: str) -> bool:
    return len(text) % 2 == 0


def test_every_kind_of_input_is_counted(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", TEXTS[:100])
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(write(tmp_path / "b", TEXTS[100:150]).read_bytes()))
    dense = tmp_path / "c.jsonl.zst"
    content = write(tmp_path / "c", TEXTS[150:200]).read_bytes()
    dense.write_bytes(zstandard.ZstdCompressor().compress(content))
    table = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": TEXTS[200:]}), table)
    inputs = [lines, packed, dense, table]
    used: list[int] = []
    words = count_words(inputs, split=SPLITTER, report=used.append)
    assert counted(words) == plain(TEXTS)
    assert (words.documents, words.text_bytes) == (300, sum(len(t.encode()) for t in TEXTS))
    assert sum(used) == check_inputs(inputs)


def test_processes_do_not_change_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / f"{n}.jsonl", TEXTS[n::3] * 40) for n in range(3)]
    monkeypatch.setattr(count, "_TASK_BYTES", 100_000)  # several tasks for each process
    size = sum(len(text.encode()) for text in TEXTS) * 40
    for limit in (None, size // 2):
        one, two = (
            count_words(paths, split=SPLITTER, workers=n, max_bytes=limit, keep=keep_even)
            for n in (1, 2)
        )
        assert_same(one, two)


def test_only_documents_asked_for_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    words = count_words([path], split=SPLITTER, keep=keep_even)
    assert counted(words) == plain([text for text in TEXTS if keep_even(text)])


def test_a_corpus_beyond_the_limit_is_sampled_by_document(tmp_path: Path) -> None:
    texts = [f"word{n} " + "x " * 200 for n in range(2000)]
    path = write(tmp_path / "a.jsonl", texts)
    size = sum(len(text.encode()) for text in texts)
    used: list[int] = []
    samples = [
        count_words([path], split=SPLITTER, max_bytes=size // 4, seed=seed, report=used.append)
        for seed in (0, 1)
    ]
    assert sum(used) == 2 * check_inputs([path])
    chosen = [{w for w in sample.spellings if w.isdigit()} for sample in samples]
    for sample in samples:
        assert sample.text_bytes == pytest.approx(size / 4, rel=0.15)
        # Documents are taken whole.
        assert counted(sample)[" x"] == 200 * sample.documents
    # Another seed, another sample; neither the other's rest.
    assert 0.15 < len(chosen[0] & chosen[1]) / len(chosen[0]) < 0.35
    told: list[int] = []
    again = count_words([path], split=SPLITTER, max_bytes=size // 4, sampled=told.append)
    assert told == [size]
    assert_same(samples[0], again)
    # The order of the documents does not matter.
    turned = write(tmp_path / "b.jsonl", texts[::-1])
    assert_same(again, count_words([turned], split=SPLITTER, max_bytes=size // 4))


def test_a_limit_that_is_large_enough_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(write(tmp_path / "a", TEXTS).read_bytes()))
    size = sum(len(text.encode()) for text in TEXTS)
    everything = count_words([path], split=SPLITTER)
    assert path.stat().st_size < size  # so the file's own size says nothing
    told: list[int] = []
    same = count_words([path], split=SPLITTER, max_bytes=size, sampled=told.append)
    assert_same(same, everything)
    assert told == []
    fewer = count_words([path], split=SPLITTER, max_bytes=size // 2)
    assert 0 < fewer.documents < 300


def test_nothing_to_count_is_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["", "  \n"])
    with pytest.raises(DataError, match=r"a\.jsonl: no documents to count words of"):
        count_words([path], split=SPLITTER)
    with pytest.raises(DataError, match="no such input"):
        count_words([tmp_path / "none.jsonl"], split=SPLITTER)
    with pytest.raises(DataError, match="no field 'content'"):
        count_words([write(path, TEXTS)], split=SPLITTER, field="content")


class Wrong(ByteLevelSplitter):
    """Takes its fast way to be right although it is not."""

    def _prepare(self) -> None:
        super()._prepare()
        if self.fast:
            self._cut_plain = lambda text: [text]

    def _compare(self, text: str) -> None:
        if "\n" in text and "堆芯" in text:  # as if the texts made to be hard did not show it
            super()._compare(text)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_splitter_found_wrong_on_the_corpus_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    wrong = Wrong({"pre_tokenizer": json.loads(SPLITTER._parts)["pre_tokenizer"]})
    assert wrong.fast and wrong("a b") == ["a b"]
    used: list[int] = []
    with caplog.at_level(logging.WARNING):
        words = count_words([path], split=wrong, workers=workers, report=used.append)
    assert counted(words) == plain(TEXTS)
    assert "slow way" in caplog.text
    assert sum(used) == path.stat().st_size
