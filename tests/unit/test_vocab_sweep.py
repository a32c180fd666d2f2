import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from megatron_cgn.errors import ConfigError, DataError
from megatron_cgn.vocabulary.held_out import CHINESE, LATIN, OTHER, HeldOut, language, read_held_out
from megatron_cgn.vocabulary.prefix import first_ids, first_tokens_only
from megatron_cgn.vocabulary.sweep import ALL, Sweep, SweepPoint, sweep, usable_sizes
from megatron_cgn.vocabulary.uses import Counter, SampledWords, sample_words
from tokenizer.extension import Extension, NewToken, Term
from tokenizer.joined_pairs import byte_characters
from tokenizer.words import WordCounter, Words
from tokenizer.wrapper import Tokenizer

SPECIAL = "<|endoftext|>"


class HandMade:
    """An extender whose merges are given: what `sweep` needs, without what chooses them."""

    kind = "byte_level_bpe"

    def __init__(self, root: Path, merges: Sequence[tuple[str, str]]) -> None:
        self._merges = list(merges)
        self._write(root, 0)
        self.tokenizer = Tokenizer.from_pretrained(root)

    def extension(self) -> Extension:
        old = {letter: place for place, letter in enumerate(byte_characters())}
        pieces: dict[str, tuple[int, ...]] = {letter: (place,) for letter, place in old.items()}
        tokens = []
        for place, (left, right) in enumerate(self._merges):
            pieces[left + right] = pieces[left] + pieces[right]
            tokens.append(
                NewToken(
                    id=257 + place,
                    token=left + right,
                    text=left + right,
                    old_ids=pieces[left + right],
                    frequency=1,
                    spread=1,
                    origin="corpus",
                )
            )
        return Extension(
            old_vocab_size=257, new_tokens=tuple(tokens), old_fingerprint="", new_fingerprint=""
        )

    def write(
        self, extension: Extension, directory: Path, *, num_tokens: int | None = None
    ) -> None:
        assert num_tokens
        self._write(directory, num_tokens)

    def _write(self, directory: Path, size: int) -> None:
        vocabulary = {letter: place for place, letter in enumerate(byte_characters())}
        vocabulary[SPECIAL] = 256
        for place, (left, right) in enumerate(self._merges[:size]):
            vocabulary[left + right] = 257 + place
        backend = Backend(models.BPE(vocabulary, self._merges[:size]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([SPECIAL])
        directory.mkdir(parents=True, exist_ok=True)
        backend.save(str(directory / "tokenizer.json"))


@pytest.fixture
def extender(tmp_path: Path) -> HandMade:
    # The words of these texts: ab, abc and xy.
    return HandMade(tmp_path / "old", [("a", "b"), ("ab", "c"), ("x", "y")])


def held_out(*texts: str) -> HeldOut:
    return HeldOut(
        texts=texts,
        languages=tuple(map(language, texts)),
        documents=len(texts),
        text_bytes=sum(len(text.encode()) for text in texts),
        paths=("held_out.jsonl",),
    )


def measured(extender: HandMade, **options: Any) -> Sweep:
    texts = held_out("abc abc ab", "水xy")
    return sweep(extender, extension=extender.extension(), domain=texts, **options)  # type: ignore[arg-type]


def test_every_size_is_measured_with_its_own_tokenizer(extender: HandMade) -> None:
    found = measured(extender, sizes=(3, 1, 2))
    assert [point.num_tokens for point in found.points] == [0, 1, 2, 3]
    # "abc abc ab" has 10 bytes and thus 10 tokens at first; "水xy" has 5.
    assert [point.domain[ALL].tokens for point in found.points] == [15, 12, 10, 9]
    assert [point.domain[LATIN].tokens for point in found.points] == [10, 7, 5, 5]
    assert [point.domain[CHINESE].tokens for point in found.points] == [5, 5, 5, 4]
    figures = found.points[0].domain[ALL]
    assert (figures.documents, figures.characters, figures.text_bytes) == (2, 13, 15)
    assert [point.vocab_size for point in found.points] == [257, 258, 259, 260]


def test_uses_are_those_of_the_final_encoding(extender: HandMade) -> None:
    points = measured(extender, sizes=(1, 3)).points
    assert points[1].uses.tolist() == [3]
    # Two of the three "ab" are now inside "abc"; the space in front stays apart.
    assert points[2].uses.tolist() == [1, 2, 1]


def test_general_text_is_measured_too(extender: HandMade) -> None:
    found = measured(extender, general=held_out("xyxy"), sizes=(3,))
    assert [point.general[ALL].tokens for point in found.points] == [4, 2]
    assert measured(extender, sizes=(3,)).points[0].general == {}


def test_longer_documents_are_counted(tmp_path: Path) -> None:
    class Forgetful(HandMade):
        """Loses its first merge when it is extended: no real extender does."""

        def _write(self, directory: Path, size: int) -> None:
            all_merges = self._merges
            self._merges = all_merges[1:] if size else all_merges[:1]
            super()._write(directory, len(self._merges))
            self._merges = all_merges

    extender = Forgetful(tmp_path / "old", [("a", "b"), ("x", "y"), ("c", "d")])
    assert extender.tokenizer.vocab_size == 258
    extension = extender.extension()
    extension = replace(extension, old_vocab_size=258, new_tokens=extension.new_tokens[1:2])
    found = sweep(
        extender,  # type: ignore[arg-type]
        extension=extension,
        domain=held_out("ab", "xy"),
        general=held_out("ab ab", "xy"),
        sizes=(1,),
    )
    assert found.points[1].general[ALL].longer_documents == 1
    assert found.points[0].general[ALL].longer_documents == 0


def test_the_words_of_the_corpus_are_counted_by_weight(extender: HandMade) -> None:
    counter = WordCounter(str.split)
    counter.add(["abc abc ab", "abc q"])
    point = measured(extender, words=counter.words(), sizes=(2,)).points[1]
    assert point.corpus_uses is not None
    assert point.corpus_uses.tolist() == [1.0, 3.0]
    assert point.corpus_tokens == 5.0


def test_the_largest_extension_only_joins_old_tokens(extender: HandMade) -> None:
    found = measured(extender, sizes=(1, 3)).agreement
    assert (found.num_tokens, found.documents, found.differing, found.lossy) == (3, 2, 0, 0)


def test_a_wrong_record_of_old_ids_is_found(extender: HandMade) -> None:
    extension = extender.extension()
    wrong = replace(extension.new_tokens[1], old_ids=(1, 2))
    extension = replace(
        extension, new_tokens=(extension.new_tokens[0], wrong, extension.new_tokens[2])
    )
    found = sweep(
        extender,  # type: ignore[arg-type]
        extension=extension,
        domain=held_out("abc", "xy"),
        sizes=(3,),
    )
    assert found.agreement.differing == 1


def test_the_beginning_of_an_extension_is_what_its_files_would_be(
    extender: HandMade, tmp_path: Path
) -> None:
    for size in (3, 1):
        extender.write(extender.extension(), tmp_path / str(size), num_tokens=size)
    largest = Tokenizer.from_pretrained(tmp_path / "3")
    made = first_tokens_only(largest.definition(), 258, name="first")
    assert made.fingerprint() == Tokenizer.from_pretrained(tmp_path / "1").fingerprint()
    assert made.encode("abc xy") == [257, *b"c xy"]


def test_the_beginning_drops_merges_that_need_later_tokens() -> None:
    definition = {
        "model": {
            "vocab": {"a": 0, "b": 1, "c": 2, "abc": 3, "ab": 4, "bc": 5},
            "merges": ["a b", ["b", "c"], "ab c", "a bc"],
        },
        "added_tokens": [{"id": 2}, {"id": 6}],
    }
    assert first_ids(definition, 5) == {
        "model": {"vocab": {"a": 0, "b": 1, "c": 2, "abc": 3, "ab": 4}, "merges": ["a b", "ab c"]},
        "added_tokens": [{"id": 2}],
    }
    pieces = {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": []}
    assert first_ids(pieces, 1)["model"]["vocab"] == [["a", -1.0]]


def test_further_sizes_are_chosen_by_what_was_measured(extender: HandMade) -> None:
    seen: list[list[int]] = []

    def further(points: Sequence[SweepPoint]) -> list[int]:
        seen.append([point.domain[ALL].tokens for point in points])
        return [2, 3, 9]

    found = measured(extender, sizes=(1, 3), further=further)
    assert seen == [[15, 12, 9]]
    assert [point.domain[ALL].tokens for point in found.points] == [15, 12, 10, 9]
    assert [len(point.examples) for point in found.points] == [len(found.examples)] * 4


def test_progress_tells_every_tokenizer(extender: HandMade) -> None:
    told: list[tuple[int, int]] = []
    measured(extender, sizes=(1, 2), progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_sizes_hold_the_old_vocabulary_and_stop_at_the_largest(extender: HandMade) -> None:
    extension = extender.extension()
    assert usable_sizes(extension, (2, 1, 2)) == [0, 1, 2]
    assert usable_sizes(extension, (2, 10_000, 20_000)) == [0, 2, 3]
    term = Term(text="abc", way="merges", id=258, occurrences=2, whole=2)
    assert usable_sizes(replace(extension, terms=(term,)), (0, 1, 2, 3)) == [0, 2, 3]
    with pytest.raises(ConfigError, match="-5"):
        usable_sizes(extension, (1, -5))


def words_of(counts: dict[str, int]) -> Words:
    return Words(
        spellings=list(counts),
        counts=np.array(list(counts.values()), dtype=np.int64),
        sketches=np.ones(len(counts), dtype=np.uint64),
        text_bytes=100,
        documents=1,
    )


def test_words_that_fit_are_taken_as_they_are() -> None:
    sampled = sample_words(words_of({"aa": 5, "bb": 1}), max_bytes=4)
    assert sampled.spellings == ["aa", "bb"]
    assert sampled.weights.tolist() == [5.0, 1.0]


def test_words_that_do_not_fit_are_sampled_with_weights() -> None:
    counts = {"aa": 9, "bb": 8} | {f"{n:02}": 1 for n in range(8)}
    sampled = sample_words(words_of(counts), max_bytes=8)
    # Four bytes for the two most frequent; of the sixteen bytes left every fourth word.
    assert sampled.spellings == ["aa", "bb", "00", "04"]
    assert sampled.weights.tolist() == [9.0, 8.0, 4.0, 4.0]
    assert sampled.weights.sum() == sum(counts.values())


def test_counting_goes_on_with_the_original_where_the_fast_encoder_errs(
    extender: HandMade, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizer.fast import FastEncoder, NotEqual

    def fail(*arguments: object) -> None:
        raise NotEqual("for the test")

    monkeypatch.setattr(FastEncoder, "prove", fail)
    counter = Counter(extender.tokenizer, old_vocab_size=257, kind="byte_level_bpe")
    lengths, uses = counter.texts(["abc", "水", ""])
    assert lengths.tolist() == [3, 3, 0]
    assert uses.tolist() == []
    tokens, _ = counter.words(SampledWords(spellings=["ab"], weights=np.array([7.0])))
    assert tokens == 14.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("反应堆冷却剂系统", CHINESE),
        ("安装 REACTOR COOLANT PUMP (RCP-001) 时", CHINESE),
        ("The reactor coolant pump. 泵", LATIN),
        ("ひらがなだけのぶんしょうです", OTHER),
        ("12345 --- 67", OTHER),
        ("Реактор", OTHER),
    ],
)
def test_language_goes_by_script(text: str, expected: str) -> None:
    assert language(text) == expected


def write_lines(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_small_held_out_files_are_kept_whole(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["一回路", "", "pump"])
    found = read_held_out([path])
    assert sorted(found.texts) == ["pump", "一回路"]
    assert (found.documents, found.text_bytes, found.sampled) == (2, 13, False)
    assert dict(zip(found.texts, found.languages, strict=True)) == {"一回路": "zh", "pump": "en"}


def test_large_held_out_files_are_sampled_within_bounds(tmp_path: Path) -> None:
    texts = [f"document {n} " + "x" * (n % 50) for n in range(400)]
    first = read_held_out([write_lines(tmp_path / "a.jsonl", texts)], max_bytes=5000)
    assert first.documents == 400
    assert first.sampled
    assert 4000 < sum(map(len, first.texts)) <= 5000
    turned = [
        write_lines(tmp_path / "b.jsonl", texts[200:]),
        write_lines(tmp_path / "c.jsonl", texts[:200][::-1]),
    ]
    assert read_held_out(turned, max_bytes=5000).texts == first.texts


def test_only_wanted_documents_are_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["keep a", "drop", "keep b"])
    found = read_held_out([path], keep=lambda text: text.startswith("keep"))
    assert sorted(found.texts) == ["keep a", "keep b"]
    assert found.documents == 2
    with pytest.raises(DataError, match="no document"):
        read_held_out([path], keep=lambda text: False)
