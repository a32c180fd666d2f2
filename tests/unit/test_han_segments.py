"""Cuts at ideographs change no ids, whatever the tokens; the table of pieces gives back its own."""

import itertools
import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tokenizer import han_segments
from tokenizer.han_cuts import CannotCut, HanCuts, _unreachable
from tokenizer.han_segments import Flat, HanSegments
from tokenizer.joined_pairs import byte_characters
from tokenizer.segment_table import UNKNOWN, IdLists, SegmentTable

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"llama3": LLAMA3, "qwen": LLAMA3.replace("{1,3}", ""), "gpt2": None}
# 核 and 格, 电 and 甴, 的 and 盄 share two bytes with each other at one end or the other.
HAN = "核格电甴的盄㐀中丽一"
OTHERS = "，。·“a's1２\n\r <é\u0301𠀀\x00\u3000"
ENDING = {"bytes": byte_characters()}


def spell(data: bytes) -> str:
    return "".join(ENDING["bytes"][byte] for byte in data)


def random_backend(kind: str, *, seed: int, num_merges: int, ignore_merges: bool) -> Backend:
    """A BPE of merges that respect neither characters nor frequency."""
    source = random.Random(seed)
    vocabulary = {character: i for i, character in enumerate(byte_characters())}
    merges: list[tuple[str, str]] = []
    seen = {bytes([byte]) for byte in range(256)}
    while len(merges) < num_merges:
        mixed = "".join(source.choices(HAN, k=4)) + source.choice(OTHERS) + source.choice(HAN)
        data = mixed.encode()
        start = source.randrange(len(data) - 1)
        end = min(len(data), start + source.choice((2, 3, 3, 4, 6, 6, 9)))
        token = data[start:end]
        splits = [(token[:k], token[k:]) for k in range(1, len(token))]
        known = [(a, b) for a, b in splits if a in seen and b in seen]
        if token in seen or not known:
            continue
        seen.add(token)
        left, right = source.choice(known)
        merges.append((spell(left), spell(right)))
        vocabulary[spell(token)] = len(vocabulary)
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    pattern = PATTERNS[kind]
    if pattern is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if kind == "qwen":
        backend.normalizer = normalizers.NFC()
    return backend


def definition_of(backend: Backend) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(backend.to_str())
    return content


def units(text: str) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.frombuffer(text.encode("utf-16-le"), dtype="<u2")


def ids_of(backend: Backend, texts: list[str]) -> list[list[int]]:
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def slow_encoder(backend: Backend) -> Any:
    def encode(utf8: Any) -> Flat:
        ids = ids_of(backend, [text.decode() for text in utf8])
        flat = np.array(list(itertools.chain.from_iterable(ids)), dtype=np.uint32)
        return flat, np.array([len(i) for i in ids], dtype=np.int64)

    return encode


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("kind", PATTERNS)
def test_every_cut_leaves_the_ids_as_they_are(kind: str, ignore_merges: bool) -> None:
    """Every place of random texts, with tokens that begin and end within characters."""
    cut = 0
    for seed in range(8):
        backend = random_backend(
            kind, seed=seed, num_merges=10 + 20 * seed, ignore_merges=ignore_merges
        )
        cuts = HanCuts(definition_of(backend))
        source = random.Random(seed)
        for _ in range(60):
            pools = source.choice((HAN, HAN + OTHERS, HAN * 3 + OTHERS, HAN[:3] + OTHERS[:8]))
            text = "".join(source.choices(pools, k=source.randint(2, 12)))
            raw = text.encode("utf-16-le")
            for place in cuts.find(units(text)).tolist():
                halves = [
                    raw[: 2 * place].decode("utf-16-le"),
                    raw[2 * place :].decode("utf-16-le"),
                ]
                whole, first, second = ids_of(backend, [text, *halves])
                assert first + second == whole, (seed, text, place)
                cut += 1
    assert cut > 500


@pytest.mark.parametrize("seed", range(6))
def test_ideographs_stay_together_where_a_token_could_join_them_and_only_there(seed: int) -> None:
    backend = random_backend("llama3", seed=seed, num_merges=20 + 20 * seed, ignore_merges=False)
    tokens = [
        bytes(map(byte_characters().index, token))
        for token in backend.get_vocab()
        if len(token) > 1
    ]
    splits = [(token[:k], token[k:]) for token in tokens for k in range(1, len(token))]

    def joined(a: bytes, b: bytes) -> bool:
        return any(
            (a.endswith(left) or left.endswith(a)) and (b.startswith(right) or right.startswith(b))
            for left, right in splits
        )

    cuts = HanCuts(definition_of(backend))
    found = {True: 0, False: 0}
    for a, b in itertools.product(HAN, HAN):
        expected = joined(a.encode(), b.encode())
        assert (len(cuts.find(units(a + b))) == 0) is expected, a + b
        found[expected] += 1
    assert min(found.values()) > 3


def test_pieces_that_are_tokens_without_merges_are_not_brought_about() -> None:
    """中核 is a token that merges never make: a first takes its middle. Alone, it would be it."""
    characters = byte_characters()
    vocabulary = {character: i for i, character in enumerate(characters)}
    core = "中核".encode()
    merges = [(spell(core[2:3]), spell(core[3:4])), (spell(core[:1]), spell(core[1:2]))]
    merges += [(spell(core[:2]), spell(core[2:3]))]
    for left, right in [*merges, (spell(core[:3]), spell(core[3:]))]:
        vocabulary[left + right] = len(vocabulary)
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    definition = definition_of(backend)
    assert _unreachable(definition["model"]) == ["中核"]
    alone, longer, rest = ids_of(backend, ["中核", "中核电", "电"])
    assert alone + rest != longer  # what a cut would do
    assert HanCuts(definition).find(units("中核电")).tolist() == []
    assert HanCuts(definition).find(units("电电")).tolist() == [1]


def test_unknown_tokenizers_are_refused() -> None:
    backend = random_backend("llama3", seed=0, num_merges=9, ignore_merges=False)
    definition = definition_of(backend)
    with pytest.raises(CannotCut, match="normalizer is NFKC"):
        HanCuts(definition | {"normalizer": {"type": "NFKC"}})
    with pytest.raises(CannotCut, match="pre-tokenizer is neither"):
        HanCuts(definition | {"pre_tokenizer": {"type": "Whitespace"}})
    with pytest.raises(CannotCut, match="pre-tokenizer is neither"):
        HanCuts(definition | {"pre_tokenizer": None})
    token = {"id": 900, "content": "<核电>", "special": False}
    with pytest.raises(CannotCut, match="'<核电>' has ideographs"):
        HanCuts(definition | {"added_tokens": [token]})
    HanCuts(definition | {"added_tokens": [token | {"special": True}]})  # never taken for one


TEXTS = st.lists(
    st.text(st.sampled_from(HAN * 4 + OTHERS) | st.characters(exclude_categories=["Cs"])).filter(
        bool
    ),
    min_size=1,
    max_size=5,
)
BACKENDS = {
    kind: random_backend(kind, seed=5, num_merges=80, ignore_merges=False) for kind in PATTERNS
}
SEGMENTS = {
    kind: HanSegments(HanCuts(definition_of(backend)), slow_encoder(backend))
    for kind, backend in BACKENDS.items()
}


def encode(segments: HanSegments, texts: list[str]) -> list[list[int]]:
    ids, lengths = segments.encode(texts, [text.encode() for text in texts])
    assert len(lengths) == len(texts) and lengths.sum() == len(ids)
    ends = np.cumsum(lengths)
    return [ids[end - n : end].tolist() for end, n in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize("kind", PATTERNS)
@settings(max_examples=150, deadline=None)
@given(texts=TEXTS)
def test_texts_in_pieces_have_the_ids_of_the_whole(kind: str, texts: list[str]) -> None:
    """In batches, with a table that grows from example to example and begins anew at times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(han_segments, "_MOST_PIECES", 60)
        patch.setattr(han_segments, "_BATCH", 12)
        assert encode(SEGMENTS[kind], texts) == ids_of(BACKENDS[kind], texts)
    assert SEGMENTS[kind].num_pieces <= 60 + 30 * 12


def test_pieces_come_from_the_table_the_second_time() -> None:
    asked: list[bytes] = []

    def counted(utf8: Any) -> Flat:
        asked.extend(utf8)
        return slow_encoder(BACKENDS["qwen"])(utf8)  # type: ignore[no-any-return]

    segments = HanSegments(HanCuts(definition_of(BACKENDS["qwen"])), counted)
    texts = ["中\n一的1", "\x00", "𠀀" * 9, "\ud7ff中"]
    first = encode(segments, texts)
    assert len(asked) > 4
    asked.clear()
    assert encode(segments, texts) == first
    assert asked == [("𠀀" * 9).encode()]  # too long for the table


@pytest.mark.parametrize("words", [1, 2])
def test_the_table_is_a_dictionary(words: int) -> None:
    """Against a dict, in steps, with keys that differ in one word alone."""
    source = np.random.default_rng(0)
    table, truth = SegmentTable(words=words), dict[tuple[int, ...], int]()
    for step in range(12):
        drawn = source.integers(1, (400 if words == 1 else 40) + 30 * step, size=(150, words))
        fresh = sorted({tuple(key) for key in drawn.tolist()} - truth.keys())
        keys = np.array(fresh, dtype=np.uint64).T
        assert (table.find(keys) == UNKNOWN).all()
        codes = source.integers(-(1 << 30), 1 << 30, size=len(fresh)).astype(np.int32)
        table.add(keys, codes)
        truth |= dict(zip(fresh, codes.tolist(), strict=True))
    assert table.count == len(truth)
    known = [*truth, *truth]
    source.shuffle(known)
    absent = [key for key in itertools.product(range(1, 900), *[range(1, 60)] * (words - 1))]
    absent = [key for key in absent if key not in truth]
    codes = table.find(np.array([*known, *absent], dtype=np.uint64).T)
    assert codes[: len(known)].tolist() == [truth[tuple(map(int, key))] for key in known]
    assert (codes[len(known) :] == UNKNOWN).all()


def test_codes_stand_for_their_ids() -> None:
    source = random.Random(0)
    lists, kept, codes = IdLists(), list[list[int]](), list[int]()
    for _ in range(30):
        for keep in (True, False):
            fresh = [
                source.choices(range(1 << 17), k=source.choice((0, 1, 1, 2, 9))) for _ in "abcd" * 9
            ]
            flat = np.array([i for ids in fresh for i in ids], dtype=np.uint32)
            counts = np.array([len(ids) for ids in fresh], dtype=np.int64)
            given = lists.put(flat, counts, keep=keep).tolist()
            places = [source.randrange(len(kept)) for _ in range(40)] if kept else []
            texts = [*fresh, *(kept[i] for i in places)]
            asked = np.array([*given, *(codes[i] for i in places)], dtype=np.int32)
            ends = [10, 10, 36, len(texts)]
            ids, lengths = lists.read(asked, np.array(ends))
            assert ids.tolist() == [i for text in texts for i in text]
            starts = [0, *ends]
            expected = [sum(map(len, texts[a:b])) for a, b in itertools.pairwise(starts)]
            assert lengths.tolist() == expected
            if keep:
                kept, codes = kept + fresh, codes + given
    ids, lengths = lists.read(np.array([5, 6, 7], dtype=np.int32), np.array([1, 3]))
    assert (ids.tolist(), lengths.tolist()) == ([5, 6, 7], [1, 2])
