"""Proofs of an extended tokenizer: they hold for a right one, and each fails for its own fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_cgn.vocabulary.proof import Proof, judge
from megatron_cgn.vocabulary.proof_tokenizer import prove_tokenizer
from tests.unit import test_extend_sentencepiece as spm
from tests.unit.data_samples import TEXTS, byte_level_tokenizer
from tokenizer.extension import FILE_NAME, Extension, NewToken, Term
from tokenizer.wrapper import Tokenizer

DOMAIN = ["The turbine hall\nand the valve of the turbine.", "核电站一回路 turbine", *TEXTS]
NEW = [("t", "u"), ("tu", "r"), ("b", "k"), ("q", "z"), ("tur", "bk")]
"""Merges of the extended tokenizer, of letters that the tiny tokenizer keeps apart."""

Edit = Callable[[Path, dict[str, Any]], None]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("old")
    byte_level_tokenizer(directory)
    _write_slow_files(directory, _read(directory))
    return directory


def _read(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "tokenizer.json").read_text())
    return content


def _write_slow_files(directory: Path, content: dict[str, Any]) -> None:
    model = content["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (directory / "merges.txt").write_text("\n".join(lines))


def _extended(old: Path, new: Path, *, edit: Edit = lambda _, __: None) -> Extension:
    """Extend by hand: merges and their tokens behind the old ones, all added tokens in place."""
    content = _read(old)
    first = Tokenizer.from_pretrained(old).vocab_size
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    vocab |= {token["content"]: token["id"] for token in content["added_tokens"]}
    tokens = []
    for left, right in NEW:
        assert left in vocab and right in vocab and left + right not in vocab
        vocab[left + right] = first + len(tokens)
        merges.append([left, right])
        tokens.append(
            NewToken(
                id=first + len(tokens),
                token=left + right,
                text=left + right,
                old_ids=(),
                frequency=1,
                spread=1,
                origin="corpus",
            )
        )
    new.mkdir()
    _write_slow_files(new, content)
    config = (old / "tokenizer_config.json").read_bytes()
    (new / "tokenizer_config.json").write_bytes(config)
    edit(new, content)
    (new / "tokenizer.json").write_text(json.dumps(content))
    return Extension(
        old_vocab_size=first, new_tokens=tuple(tokens), old_fingerprint="", new_fingerprint=""
    )


def _proofs(old: Path, new: Path, extension: Extension) -> dict[str, Proof]:
    general = ["A river, a city and a book."]
    proofs = prove_tokenizer(old, new, extension, domain=DOMAIN, general=general)
    return {proof.name: proof for proof in proofs}


def test_a_right_extension_is_proven(tmp_path: Path, old: Path) -> None:
    extension = _extended(old, tmp_path / "new")
    proofs = _proofs(old, tmp_path / "new", extension)
    assert all(proof.ok for proof in proofs.values()), [str(p) for p in proofs.values()]
    first, count = extension.old_vocab_size, len(extension.new_tokens)
    assert f"are {first:,} to {first + count - 1:,}" in proofs["ids"].text
    assert "all 2 added tokens (1 special)" in proofs["options"].text
    assert "tokenizer.json, vocab.json, merges.txt, tokenizer_config.json" in proofs["files"].text
    assert count == len(NEW)
    assert f"each of {count} new tokens" in proofs["reachable"].text
    assert "same ids" in proofs["fast tokenizer"].text


def _swap_ids(directory: Path, content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    _write_slow_files(directory, content)


def _one_token_more(directory: Path, content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["unasked"] = max(vocab.values()) + 1
    _write_slow_files(directory, content)


def _merge_first(directory: Path, content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges.insert(0, merges.pop())
    _write_slow_files(directory, content)


def _without_merge(directory: Path, content: dict[str, Any]) -> None:
    del content["model"]["merges"][-1]
    _write_slow_files(directory, content)


def _special_no_more(directory: Path, content: dict[str, Any]) -> None:
    content["added_tokens"][0]["special"] = False


def _added_token_more(directory: Path, content: dict[str, Any]) -> None:
    token = dict(content["added_tokens"][1])
    last = max(content["model"]["vocab"].values())
    content["added_tokens"].append(token | {"content": "turbk", "id": last})


def _ignore_merges(directory: Path, content: dict[str, Any]) -> None:
    content["model"]["ignore_merges"] = True


def _other_pre_tokenizer(directory: Path, content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def _lower_case(directory: Path, content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def _short_vocab_json(directory: Path, content: dict[str, Any]) -> None:
    vocab = dict(list(content["model"]["vocab"].items())[:-1])
    (directory / "vocab.json").write_text(json.dumps(vocab))


def _short_merges(directory: Path, content: dict[str, Any]) -> None:
    file = directory / "merges.txt"
    file.write_text("\n".join(file.read_text().split("\n")[:-2]))


def _other_eos(directory: Path, content: dict[str, Any]) -> None:
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<tool>"}')


def _no_slow_files(directory: Path, content: dict[str, Any]) -> None:
    (directory / "vocab.json").unlink()


@pytest.mark.parametrize(
    ("edit", "fails"),
    [
        (_swap_ids, {"ids", "old texts"}),
        (_one_token_more, {"ids"}),
        (_merge_first, {"options"}),
        (_without_merge, {"reachable"}),
        (_special_no_more, {"options"}),
        (_added_token_more, {"options"}),
        (_ignore_merges, {"options"}),
        (_other_pre_tokenizer, {"options", "decoding"}),
        (_lower_case, {"options", "decoding"}),
        (_short_vocab_json, {"files"}),
        (_short_merges, {"files"}),
        (_other_eos, {"files"}),
        (_no_slow_files, {"files"}),
    ],
)
def test_a_fault_is_found(tmp_path: Path, old: Path, edit: Edit, fails: set[str]) -> None:
    extension = _extended(old, tmp_path / "new", edit=edit)
    proofs = _proofs(old, tmp_path / "new", extension)
    assert fails <= {name for name, proof in proofs.items() if not proof.ok}
    assert str(proofs[min(fails)]).startswith("FAILED: ")


def test_general_text_that_takes_more_tokens_is_found(tmp_path: Path, old: Path) -> None:
    new = tmp_path / "new"

    def without_old_merges(directory: Path, content: dict[str, Any]) -> None:
        del content["model"]["merges"][:20]

    proofs = _proofs(old, new, _extended(old, new, edit=without_old_merges))
    assert not proofs["other text"].ok
    assert not proofs["old texts"].ok


def test_a_term_may_be_an_added_token(tmp_path: Path, old: Path) -> None:
    """What is wanted as an added token is no change; its id is among the new ones."""

    def add(directory: Path, content: dict[str, Any]) -> None:
        _added_token_more(directory, content)

    new = tmp_path / "new"
    extension = _extended(old, new, edit=add)
    last = extension.new_tokens[4]
    assert last.token == "turbk"
    term = Term(text="turbk", way="added_token", id=last.id, occurrences=2, whole=2)
    content = _read(new)
    content["added_tokens"][-1]["id"] = last.id
    (new / "tokenizer.json").write_text(json.dumps(content))
    fields = {n: getattr(extension, n) for n in ("old_vocab_size", "new_tokens")}
    extension = Extension(**fields, old_fingerprint="", new_fingerprint="", terms=(term,))
    assert _proofs(old, new, extension)["options"].ok


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Extension]:
    """A SentencePiece model without bytes, for which many characters are unknown; and extended."""
    root = tmp_path_factory.mktemp("unigram")
    source = spm.write_source(root / "old", spm.train("unigram", byte_fallback=False))
    spm.write(source, spm.extend(source, 60, ("应急柴油机组", "AP1000 型")), root / "new")
    said = json.loads((root / "new" / FILE_NAME).read_text(encoding="utf-8"))
    return source, root / "new", Extension.from_json(said, name="new")


def test_a_unigram_model_may_learn_characters(unigram: tuple[Path, Path, Extension]) -> None:
    old, new, extension = unigram
    text = "核电站的压力"
    before, after = (Tokenizer.from_pretrained(path) for path in (old, new))
    assert before.decode(before.encode(text)) != text == after.decode(after.encode(text))
    # "sss" is ss|s or s|ss with the same score: the slow and the fast tokenizer choose apart.
    slow = sentencepiece.SentencePieceProcessor(model_file=str(new / "tokenizer.model"))
    tied = "s sss制棒棒"
    assert slow.encode(tied) != after.encode(tied)
    domain = [*spm.documents(9, count=4), text, tied]
    proofs = prove_tokenizer(old, new, extension, domain=domain)
    assert all(proof.ok for proof in proofs), list(map(str, proofs))


def test_a_unigram_model_may_not_forget_them(
    unigram: tuple[Path, Path, Extension], tmp_path: Path
) -> None:
    old, new, extension = unigram
    damaged = Path(shutil.copytree(new, tmp_path / "new"))
    content = _read(damaged)
    forget = {"type": "Replace", "pattern": {"String": "的"}, "content": ""}
    content["decoder"]["decoders"].insert(0, forget)
    for piece in content["model"]["vocab"][20:80]:
        piece[1] -= 20.0
    (damaged / "tokenizer.json").write_text(json.dumps(content))
    domain = spm.documents(9, count=4)
    proofs = {p.name: p for p in prove_tokenizer(old, damaged, extension, domain=domain)}
    assert not any(proofs[name].ok for name in ("decoding", "options", "files"))


def test_many_examples_are_cut() -> None:
    wrong = [f"token{i}" * 20 for i in range(8)]
    text = judge("ids", wrong, good="", bad="moved").text
    assert text.startswith("moved: 'token0token0") and text.endswith(" and 3 more")
    assert len(text) < 300
