"""Extended SentencePiece tokenizers, opened by the sentencepiece library and as fast tokenizers."""

import io
import json
import math
import pickle
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as formats
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, Unigram

from megatron_cgn.errors import DataError
from tokenizer.extend import open_extender
from tokenizer.extension import FILE_NAME, Extension, NewToken
from tokenizer.filters import Rules
from tokenizer.hard_texts import hard_texts
from tokenizer.sentencepiece_unigram import unigram_scores
from tokenizer.sentencepiece_words import Cutter
from tokenizer.words import WordCounter, Words
from tokenizer.wrapper import Tokenizer

RULES = Rules(min_frequency=3, min_spread=2)
GENERAL = "的 一 是 在 有 我 国 人 大 中 上 个 和 系 统 运 行 压 力 温 度 水 电 站 安 全".split()
ENGLISH = "the pump valve system water pressure is open in of to and a loop flow feeds".split()
DOMAIN = "核电站 反应堆 冷却剂 稳压器 蒸汽发生器 安全壳 一回路 控制棒 堆芯 主泵 应急柴油机".split()
NEW_ENGLISH = "pressurizer reactor coolant containment depressurization".split()


def sentences(words: Sequence[str], *, seed: int, count: int, joint: str) -> list[str]:
    source = random.Random(seed)
    return [joint.join(source.choices(words, k=source.randint(4, 14))) for _ in range(count)]


def documents(seed: int, count: int = 60) -> list[str]:
    """Texts of the domain: Chinese with terms, English, digits, line ends and runs of spaces."""
    source = random.Random(seed)
    found = []
    for number in range(count):
        chinese = sentences([*GENERAL, *DOMAIN * 3], seed=seed * 1000 + number, count=4, joint="")
        english = sentences(
            [*ENGLISH, *NEW_ENGLISH], seed=seed * 1000 + number + 500, count=2, joint=" "
        )
        lines = [*chinese, *english, f"{source.randint(1, 9999)}号机组 15.5 MPa (DNBR≥1.3)"]
        source.shuffle(lines)
        found.append("，".join(lines[:3]) + "。\n    " + "\n".join(lines[3:]))
    return found


def train(kind: str, *, byte_fallback: bool) -> bytes:
    model = io.BytesIO()
    text = [
        *sentences(GENERAL, seed=1, count=300, joint=""),
        *sentences(ENGLISH, seed=2, count=300, joint=" "),
        "0 1 2 3 4 5 6 7 8 9 . , ( ) ≥",
    ]
    plain = kind == "bpe"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        model_type=kind,
        vocab_size=520 if byte_fallback else 260,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=byte_fallback,
        split_digits=True,
        normalization_rule_name="identity" if plain else "nmt_nfkc",
        remove_extra_whitespaces=not plain,
        allow_whitespace_only_pieces=plain,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def fast_version(content: bytes, *, added: bool) -> Backend:
    """What the fast tokenizer of a SentencePiece model has to be, made here piece by piece."""
    model = formats.ModelProto.FromString(content)
    fallback = model.trainer_spec.byte_fallback
    if model.trainer_spec.model_type == 1:
        scores = [(piece.piece, piece.score) for piece in model.pieces]
        backend = Backend(Unigram(scores, unk_id=0, byte_fallback=fallback))
        charsmap = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
        backend.normalizer = normalizers.Sequence(
            [charsmap, normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        )
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    else:
        vocab = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
        normal = {piece.piece for piece in model.pieces if piece.type == 1}
        merges = [
            (-piece.score, piece.piece[:cut], piece.piece[cut:])
            for piece in model.pieces
            if piece.type == 1
            for cut in range(1, len(piece.piece))
            if piece.piece[:cut] in normal and piece.piece[cut:] in normal
        ]
        merges.sort(key=lambda merge: merge[0])
        backend = Backend(
            BPE(
                vocab,
                [(left, right) for _, left, right in merges],
                unk_token="<unk>",
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    backend.add_special_tokens(special)
    if added:
        backend.add_special_tokens([AddedToken("<pad>", normalized=False)])
        backend.add_tokens([AddedToken("[注]", normalized=False)])
    return backend


def write_source(directory: Path, content: bytes, *, added: bool = False) -> Path:
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(content)
    fast_version(content, added=added).save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("t") / "bpe", train("bpe", byte_fallback=True))


@pytest.fixture(scope="module", params=[True, False], ids=["bytes", "unk"])
def unigram(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = train("unigram", byte_fallback=request.param)
    return write_source(tmp_path_factory.mktemp("t") / "unigram", content)


def count(directory: Path, terms: Sequence[str] = (), seed: int = 3) -> Words:
    counter = WordCounter(open_extender(directory).splitter(terms))
    counter.add(documents(seed))
    return counter.words()


def extend(directory: Path, num_tokens: int, terms: Sequence[str] = ()) -> Extension:
    return open_extender(directory).extend(
        count(directory, terms), num_tokens=num_tokens, rules=RULES, terms=terms
    )


def write(
    source: Path, extension: Extension, target: Path, num_tokens: int | None = None
) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    target.mkdir()
    open_extender(source).write(extension, target, num_tokens=num_tokens)
    slow = sentencepiece.SentencePieceProcessor(model_file=str(target / "tokenizer.model"))
    return Tokenizer.from_pretrained(target), slow


def opened(source: Path) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    slow = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    return Tokenizer.from_pretrained(source), slow


def alone(slow: sentencepiece.SentencePieceProcessor, piece: str) -> list[int]:
    """Encode a piece as it stands, without the space that is put before a text."""
    model = formats.ModelProto.FromString(slow.serialized_model_proto())
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    bare = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    ids: list[int] = bare.encode(piece.replace("▁", " "))
    return ids


def test_bpe_new_ids_stand_for_what_the_old_tokenizer_gave(bpe: Path, tmp_path: Path) -> None:
    extension = extend(bpe, 60)
    new, _ = write(bpe, extension, tmp_path / "new")
    old, _ = opened(bpe)
    stands_for = {token.id: token.old_ids for token in extension.new_tokens}
    texts = [*documents(3), *documents(4), *hard_texts(old.added_tokens())]
    changed = 0
    for before, after in zip(old.encode_batch(texts), new.encode_batch(texts), strict=True):
        assert [i for j in after for i in stands_for.get(j, (j,))] == before
        assert new.decode(after) == old.decode(before)
        changed += before != after
    assert changed > 100


def test_bpe_slow_and_fast_files_give_equal_ids(bpe: Path, tmp_path: Path) -> None:
    old, old_slow = opened(bpe)
    new, new_slow = write(bpe, extend(bpe, 60), tmp_path / "new")
    texts = [*documents(3), *documents(4), *hard_texts(old.added_tokens())]
    # Some texts (NUL, invalid code points) the two libraries read differently, old or new.
    same = [t for t in texts if old.encode(t) == old_slow.encode(t)]
    assert len(same) > 0.9 * len(texts)
    assert [t for t in same if new.encode(t) != new_slow.encode(t)] == []


def test_bpe_counts_are_those_of_the_extended_tokenizer(bpe: Path, tmp_path: Path) -> None:
    extension = extend(bpe, 60)
    new, _ = write(bpe, extension, tmp_path / "new")
    old, _ = opened(bpe)
    texts = documents(3)
    saved = sum(
        len(before) - len(after)
        for before, after in zip(old.encode_batch(texts), new.encode_batch(texts), strict=True)
    )
    # A merge saves one token; a character that was bytes all but one of them.
    expected = sum(
        t.frequency * (len(t.old_ids) - 1 if len(t.token) == 1 else 1) for t in extension.new_tokens
    )
    assert saved == expected
    assert "堆" in {t.token for t in extension.new_tokens if len(t.old_ids) == 3}


def test_bpe_every_new_piece_is_reached_and_every_old_one_stays(bpe: Path, tmp_path: Path) -> None:
    extension = extend(bpe, 60)
    _, slow = write(bpe, extension, tmp_path / "new")
    _, old = opened(bpe)
    for token in extension.new_tokens:
        assert slow.id_to_piece(token.id) == token.token
        assert alone(slow, token.token) == [token.id]
    assert [slow.id_to_piece(i) for i in range(len(old))] == [
        old.id_to_piece(i) for i in range(len(old))
    ]
    assert [slow.get_score(i) for i in range(len(old))] == [
        old.get_score(i) for i in range(len(old))
    ]
    assert all(slow.is_byte(i) == old.is_byte(i) for i in range(len(old)))
    assert all(slow.is_control(i) == old.is_control(i) for i in range(len(old)))


@pytest.mark.parametrize("kept", [0, 7, 23])
def test_the_first_tokens_are_an_extension_too(bpe: Path, tmp_path: Path, kept: int) -> None:
    extension = extend(bpe, 40)
    cut, cut_slow = write(bpe, extension, tmp_path / "cut", kept)
    written = json.loads((tmp_path / "cut" / FILE_NAME).read_text())
    old, _ = opened(bpe)
    assert cut.vocab_size == old.vocab_size + kept
    assert written["new_fingerprint"] == cut.fingerprint()
    assert len(written["new_tokens"]) == kept
    if kept:
        assert extend(bpe, kept).new_tokens == extension.new_tokens[:kept]
    else:
        assert cut.fingerprint() == old.fingerprint()
    texts = documents(4)
    stands_for = {token.id: token.old_ids for token in extension.new_tokens}
    for before, after in zip(old.encode_batch(texts), cut.encode_batch(texts), strict=True):
        assert [i for j in after for i in stands_for.get(j, (j,))] == before
    assert cut.encode_batch(texts) == cut_slow.encode(texts)


def test_files_without_tokenizer_json_are_converted_alike(bpe: Path, tmp_path: Path) -> None:
    source = tmp_path / "slow"
    source.mkdir()
    (source / "tokenizer.model").write_bytes((bpe / "tokenizer.model").read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    extension = extend(source, 40)
    new, slow = write(source, extension, tmp_path / "new")
    assert not (tmp_path / "new" / "tokenizer.json").exists()
    assert new.fingerprint() == extension.new_fingerprint
    assert [t.token for t in extension.new_tokens] == [t.token for t in extend(bpe, 40).new_tokens]
    chinese = [line.strip() for text in documents(4) for line in text.split("\n")]
    assert new.encode_batch(chinese) == slow.encode(chinese)


def test_all_else_in_the_directory_stays(bpe: Path, tmp_path: Path) -> None:
    source = write_source(tmp_path / "s", (bpe / "tokenizer.model").read_bytes())
    backend = Backend.from_file(str(source / "tokenizer.json"))
    backend.enable_truncation(77)
    backend.save(str(source / "tokenizer.json"))
    (source / "model.safetensors").write_bytes(b"not a tokenizer's")
    write(source, extend(source, 10), tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        FILE_NAME,
    }
    before, after = (
        json.loads((d / "tokenizer.json").read_text()) for d in (source, tmp_path / "new")
    )
    old, new = before.pop("model"), after.pop("model")
    assert after == before
    assert after["truncation"]["max_length"] == 77
    assert new["merges"][: len(old["merges"])] == old["merges"]
    assert {k: v for k, v in new.items() if k not in ("vocab", "merges")} == {
        k: v for k, v in old.items() if k not in ("vocab", "merges")
    }


def test_a_fast_file_alone_is_extended_alike(bpe: Path, tmp_path: Path) -> None:
    source = write_source(tmp_path / "s", (bpe / "tokenizer.model").read_bytes())
    (source / "tokenizer.model").unlink()
    extension = extend(source, 30)
    assert extension.new_tokens == extend(bpe, 30).new_tokens
    (tmp_path / "new").mkdir()
    open_extender(source).write(extension, tmp_path / "new")
    assert Tokenizer.from_pretrained(tmp_path / "new").fingerprint() == extension.new_fingerprint
    assert not (tmp_path / "new" / "tokenizer.model").exists()


def test_ids_of_added_tokens_stay_and_new_ones_follow(tmp_path: Path) -> None:
    source = write_source(tmp_path / "s", train("bpe", byte_fallback=True), added=True)
    old, old_slow = opened(source)
    assert old.vocab_size == len(old_slow) + 2
    extension = extend(source, 30)
    new, slow = write(source, extension, tmp_path / "new")
    assert extension.old_vocab_size == old.vocab_size
    assert [slow.id_to_piece(i) for i in (len(old_slow), len(old_slow) + 1)] == ["<pad>", "[注]"]
    assert slow.id_to_piece(old.vocab_size) == extension.new_tokens[0].token
    # The one that is not special is found in text, the special one never.
    text = "反应堆[注]冷却剂<pad>核电站"
    note, pad = len(old_slow) + 1, len(old_slow)
    for ids in (old.encode(text), new.encode(text), slow.encode(text)):
        assert note in ids
        assert pad not in ids


def test_unigram_pieces_are_reached_and_old_scores_stay(unigram: Path, tmp_path: Path) -> None:
    extension = extend(unigram, 50)
    new, slow = write(unigram, extension, tmp_path / "new")
    old, old_slow = opened(unigram)
    for token in extension.new_tokens:
        assert slow.id_to_piece(token.id) == token.token
        assert alone(slow, token.token) == [token.id]
    assert [slow.get_score(i) for i in range(len(old_slow))] == [
        old_slow.get_score(i) for i in range(len(old_slow))
    ]
    lowest = min(old_slow.get_score(i) for i in range(len(old_slow)))
    assert all(lowest <= slow.get_score(t.id) <= 0 for t in extension.new_tokens)
    texts = documents(4)
    before, after = old.encode_batch(texts), new.encode_batch(texts)
    if old_slow.is_byte(3):
        assert sum(map(len, after)) < 0.8 * sum(map(len, before))
    else:  # what was unknown has pieces now
        assert sum(ids.count(0) for ids in after) < 0.5 * sum(ids.count(0) for ids in before)
    same = [t for t in texts if old.encode(t) == old_slow.encode(t)]
    assert len(same) > 0.9 * len(texts)
    assert [t for t in same if new.encode(t) != slow.encode(t)] == []


def test_unigram_text_of_other_words_keeps_its_ids(unigram: Path, tmp_path: Path) -> None:
    extension = extend(unigram, 50)
    new, _ = write(unigram, extension, tmp_path / "new")
    old, _ = opened(unigram)
    texts = sentences(ENGLISH, seed=9, count=50, joint=" ")
    pieces = [token.token for token in extension.new_tokens]
    free = [t for t in texts if not any(p in "▁" + t.replace(" ", "▁") for p in pieces)]
    assert len(free) > 5
    assert new.encode_batch(free) == old.encode_batch(free)


def test_unigram_first_tokens_have_the_same_scores(unigram: Path, tmp_path: Path) -> None:
    extension = extend(unigram, 40)
    _, whole = write(unigram, extension, tmp_path / "whole")
    _, cut = write(unigram, extension, tmp_path / "cut", 15)
    for token in extension.new_tokens[:15]:
        assert cut.get_score(token.id) == whole.get_score(token.id)
        assert alone(cut, token.token) == [token.id]


def test_scores_are_log_probabilities_raised_where_others_would_win() -> None:
    def token(number: int, text: str, frequency: int, origin: str = "corpus") -> NewToken:
        return NewToken(
            id=number,
            token=text,
            text=text,
            old_ids=(0,),
            frequency=frequency,
            spread=1,
            origin=origin,  # type: ignore[arg-type]
        )

    old = {"a": -2.0, "b": -3.0, "c": -9.0, "d": -12.0}
    tokens = [token(9, "ab", 100), token(10, "cd", 10), token(11, "abcd", 1)]
    scores = unigram_scores(tokens, old=old, corpus_tokens=1000)
    # ab: ln(100/1000) beats -5. cd: ln(10/1000) beats -21. abcd: ln(1/1000) does not beat ab + cd,
    # whose product is the same, so it is 0.1 * (1 + log10(2)) above that.
    raised = math.log(0.1) + math.log(0.01) + 0.1301
    assert scores == pytest.approx([math.log(0.1), math.log(0.01), raised], abs=1e-4)
    # Never below the lowest old score.
    assert unigram_scores([token(9, "dd", 1)], old=old, corpus_tokens=10**9) == [-12.0]
    assert unigram_scores([token(9, "ab", 1, "term")], old=old, corpus_tokens=1000) == [-2.0]


@pytest.mark.parametrize(
    ("kind", "byte_fallback"), [("bpe", True), ("unigram", True), ("unigram", False)]
)
def test_terms_become_single_pieces(kind: str, byte_fallback: bool, tmp_path: Path) -> None:
    source = write_source(tmp_path / "s", train(kind, byte_fallback=byte_fallback))
    # To one of them 蒸 is a single unknown token, which is no piece of it.
    terms = ["蒸汽发生器", "15号机组", "reactor coolant", "应急柴油机", "DNBR", "蒸", "pump"]
    extension = extend(source, 90, terms)
    new, slow = write(source, extension, tmp_path / "new")
    assert [t.text for t in extension.terms] == terms
    for term in extension.terms:
        assert new.encode(term.text) == [term.id]
        assert slow.encode(term.text) == [term.id]
        assert alone(slow, term.text) == [slow.piece_to_id(term.text.replace(" ", "▁"))]
    ways = {term.text: term.way for term in extension.terms}
    assert ways["蒸汽发生器"] == "piece"
    by_text = {term.text: term for term in extension.terms}
    steam = sum(text.count("蒸汽发生器") for text in documents(3))
    assert by_text["蒸汽发生器"].occurrences == steam > 0
    assert by_text["蒸汽发生器"].whole == steam
    # Numbers stay as they are cut: no step towards 15号机组 is a number.
    assert not [t for t in extension.new_tokens if t.token.strip("▁").isnumeric()]
    assert new.encode("1515")[1:] == opened(source)[0].encode("1515")[1:]


def test_a_term_that_is_a_piece_costs_nothing(bpe: Path) -> None:
    # Han and Latin characters of the vocabulary with and without a space in front.
    old, slow = opened(bpe)
    both = [
        slow.id_to_piece(i)[1:]
        for i in range(len(slow))
        if len(slow.id_to_piece(i)) > 1
        and slow.id_to_piece(i)[0] == "▁"
        and slow.id_to_piece(i)[1:].isalpha()
        and slow.piece_to_id(slow.id_to_piece(i)[1:]) != slow.unk_id()
    ]
    assert both
    extension = extend(bpe, 10, both[:1])
    assert [(term.text, term.way) for term in extension.terms] == [(both[0], "existing")]
    assert extension.new_tokens == extend(bpe, 10).new_tokens


def test_terms_that_cannot_be_are_all_named(bpe: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_extender(bpe).splitter(["泵", " ", "a</s>b", "x▁y", "bad\x07", "\ud800"])
    message = str(caught.value)
    for part in ("it is empty", "'</s>'", "'▁'", "control character", "surrogate"):
        assert part in message
    assert "'泵'" not in message


def test_terms_need_their_ids(bpe: Path) -> None:
    with pytest.raises(DataError, match=r"terms take more than the 2 new ids"):
        extend(bpe, 2, ["蒸汽发生器"])


def test_a_cut_through_the_terms_is_refused(bpe: Path, tmp_path: Path) -> None:
    extension = extend(bpe, 40, ["蒸汽发生器"])
    with pytest.raises(DataError, match=r"num_tokens: 3, but the terms alone take"):
        write(bpe, extension, tmp_path / "new", 3)


def test_too_little_text_says_how_many_there_are(bpe: Path) -> None:
    with pytest.raises(DataError, match=r"num_tokens: 100,000 new tokens .* give [\d,]+ that"):
        extend(bpe, 100_000)
    extender = open_extender(bpe)
    fewer = extender.extend(count(bpe), num_tokens=100_000, rules=RULES, allow_fewer=True)
    assert 50 < len(fewer.new_tokens) < 100_000


def test_another_tokenizers_extension_is_not_written(bpe: Path, tmp_path: Path) -> None:
    foreign = replace(extend(bpe, 5), old_fingerprint="0" * 32)
    with pytest.raises(DataError, match="not the tokenizer that was extended"):
        write(bpe, foreign, tmp_path / "new")


def test_files_that_disagree_are_refused(bpe: Path, tmp_path: Path) -> None:
    source = write_source(tmp_path / "s", (bpe / "tokenizer.model").read_bytes())
    model = formats.ModelProto.FromString((source / "tokenizer.model").read_bytes())
    first = next(i for i, piece in enumerate(model.pieces) if piece.type == 1)
    text, other = model.pieces[first].piece, model.pieces[first + 1].piece
    model.pieces[first].piece, model.pieces[first + 1].piece = other, text
    (source / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=f"has '{other}' as id {first}, the fast tokenizer as"):
        open_extender(source)


def test_words_are_cut_without_any_effect_on_the_encoding(bpe: Path) -> None:
    old, slow = opened(bpe)
    splitter = pickle.loads(pickle.dumps(open_extender(bpe).splitter()))
    model = formats.ModelProto.FromString(slow.serialized_model_proto())
    model.normalizer_spec.add_dummy_prefix = False
    bare = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    for text in documents(5):
        words = list(splitter(text))
        assert "".join(words) == "▁" + text.replace(" ", "▁")
        assert [i for word in words for i in bare.encode(word.replace("▁", " "))] == slow.encode(
            text
        )
        assert len(words) > 20


def test_cutter_cuts_between_classes_that_no_piece_joins() -> None:
    cutter = Cutter(["▁t", "he", "▁核", "x2", "));"])
    cut = [list(cutter.cut(t)) for t in ("▁the▁核电x27the", "电,the", "a)); ▁▁b", "")]
    assert cut == [
        ["▁the", "▁核电", "x27", "the"],
        ["电", ",", "the"],
        ["a", ")); ", "▁▁b"],
        [],
    ]
