import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as formats

from megatron_cgn.errors import DataError
from tokenizer.filters import Rules
from tokenizer.sentencepiece_judge import PieceJudge
from tokenizer.sentencepiece_model import (
    Piece,
    PieceModel,
    PieceType,
    descending_scores,
    placeholders,
)
from tokenizer.sentencepiece_terms import _plan_one
from tokenizer.sentencepiece_words import Cutter
from tokenizer.term_merges import TermMerges

TEXT = ["the pump feeds the loop", "the valve of the pump is open", "a loop, a pump, a valve"] * 20


@pytest.fixture(scope="module")
def content() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def parse(content: bytes) -> formats.ModelProto:
    return formats.ModelProto.FromString(content)


def test_pieces_come_after_old_ones_and_all_else_stays(content: bytes) -> None:
    # A field that no version knows, as one of a later version would be: number 3000, a varint.
    unknown = b"\xc0\xbb\x01\x07"
    model = PieceModel(content + unknown, name="x")
    new = model.extended([Piece(text="泵", score=-900.0), Piece(text="泵阀", score=-901.0)])
    before, after = parse(content), parse(new)
    assert [p.SerializeToString() for p in after.pieces[:-2]] == [
        p.SerializeToString() for p in before.pieces
    ]
    assert [(p.piece, p.score, p.type) for p in after.pieces[-2:]] == [
        ("泵", -900.0, 1),
        ("泵阀", -901.0, 1),
    ]
    assert after.normalizer_spec.SerializeToString() == before.normalizer_spec.SerializeToString()
    assert after.trainer_spec.vocab_size == len(before.pieces) + 2
    after.trainer_spec.vocab_size = before.trainer_spec.vocab_size
    assert after.trainer_spec.SerializeToString() == before.trainer_spec.SerializeToString()
    assert unknown in new
    assert sentencepiece.SentencePieceProcessor(model_proto=new).piece_to_id("泵阀") == (
        len(before.pieces) + 1
    )


def test_without_new_pieces_the_content_is_the_same(content: bytes) -> None:
    before = parse(content)
    before.trainer_spec.vocab_size = len(before.pieces)
    assert PieceModel(content, name="x").extended([]) == before.SerializeToString()


@pytest.mark.parametrize("lowest", [-31740.0, -1e9, 0.0, -16777216.0])
def test_scores_fall_in_single_precision(lowest: float) -> None:
    scores = np.array(descending_scores([-1.0, lowest, 0.0], 500), dtype=np.float32)
    assert scores[0] < np.float32(lowest)
    assert (np.diff(scores) < 0).all()
    assert np.isfinite(scores).all()


def test_placeholders_treat_text_as_added_tokens_do(content: bytes) -> None:
    model = PieceModel(content, name="x")
    size = len(model.pieces)
    filling = placeholders([("<tool>", True), None, ("[note]", False)], first_id=size)
    new = sentencepiece.SentencePieceProcessor(model_proto=model.extended(filling))
    old = sentencepiece.SentencePieceProcessor(model_proto=content)
    assert [piece.type for piece in filling] == [
        PieceType.CONTROL,
        PieceType.UNUSED,
        PieceType.USER_DEFINED,
    ]
    special = f"the <tool> pump {filling[1].text}"
    assert new.encode(special) == old.encode(special)
    assert size + 2 in new.encode("the [note] pump")


@pytest.mark.parametrize("damaged", [b"", b"\x00\x01\x02", b"{}", b"\n\x02\n\x05a"])
def test_other_files_are_refused(damaged: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"tokenizer\.model: .*Copy the file again"):
        PieceModel.read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.model: cannot be read"):
        PieceModel.read(tmp_path / "tokenizer.model")


def test_ideographs_of_numbers_are_no_digits() -> None:
    cutter = Cutter(["ab", "核心"])
    judge = PieceJudge(Rules(), cutter=cutter, reserved=set(), digits=True)
    assert judge("一回路".encode()) is None  # 一 has a numeric value
    assert judge(b"12") is not None


def test_what_is_no_number_is_joined_first_where_it_comes_twice() -> None:
    spellings = [letter.encode() for letter in "1AB2"]
    pieces = [0, 1, 2, 3, 1, 2]  # 1AB2AB
    plan = TermMerges(spellings)
    assert _plan_one(plan, pieces)
    assert len(plan.apply(pieces)) == 1
    assert not any(text.isdigit() for text in plan.spellings[4:])
