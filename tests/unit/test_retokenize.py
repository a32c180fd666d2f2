"""An index made again with another tokenizer is the one that its documents would have given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_cgn.data.index_writer import ALL_SUFFIXES, IndexWriter
from megatron_cgn.data.indexed import check_index, map_tokens
from megatron_cgn.data.preprocess import preprocess
from megatron_cgn.data.retokenize import retokenize
from megatron_cgn.errors import DataError
from tests.unit.data_samples import TEXTS, byte_level_tokenizer, sentencepiece_tokenizer
from tests.unit.test_extend_sentencepiece import documents, train, write_source
from tokenizer.extend import open_extender
from tokenizer.extension import FILE_NAME
from tokenizer.filters import Rules
from tokenizer.words import WordCounter
from tokenizer.wrapper import Tokenizer

ROOT = Path(__file__).parents[2]
TERMS = ("一回路压力", "15.5 MPa", "primary circuit", "pressuriser")
"""All but the last become added tokens: two are cut by the pre-tokeniser, one is Chinese."""
DOCUMENTS = (
    *TEXTS,
    "核电站一回路压力约为15.5 MPa，一回路压力",
    "a primary circuit, xprimary circuits; 115.5 MPa. MPa",  # terms within words and numbers
    "<tool> and <|endoftext|> and <tool><tool>",
    "\n\n",
)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_tokenizer(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory, old: Path) -> Path:
    """The old one with 60 new ids, terms among them."""
    directory = tmp_path_factory.mktemp("extended")
    extender = open_extender(old)
    counter = WordCounter(extender.splitter(TERMS))
    counter.add([text for text in DOCUMENTS for _ in range(5)])
    extension = extender.extend(
        counter.words(),
        num_tokens=60,
        rules=Rules(min_frequency=2, min_spread=1),
        terms=TERMS,
        allow_fewer=True,
    )
    assert {term.way for term in extension.terms} == {"merges", "added_token"}
    extender.write(extension, directory)
    return directory


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = [
        json.dumps({"text": text * (1 + i % 3), "id": f"文档-{i}", "source": f"s{i % 2}"})
        for i, text in enumerate(DOCUMENTS * 20)
    ]
    path.write_text("\n".join(lines), "utf-8")
    return path


def _content(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in ALL_SUFFIXES}


@pytest.mark.parametrize("append_eod", [True, False])
def test_extended_tokenizer_gives_what_indexing_the_documents_gives(
    tmp_path: Path, old: Path, extended: Path, corpus: Path, append_eod: bool
) -> None:
    for name, tokenizer in (("old", old), ("direct", extended)):
        preprocess(
            [corpus],
            tokenizer_dir=tokenizer,
            output_prefix=tmp_path / name,
            append_eod=append_eod,
        )
    told: list[int] = []
    done = retokenize(
        tmp_path / "old",
        old_tokenizer=old,
        tokenizer=extended,
        output_prefix=tmp_path / "new",
        report=told.append,
    )
    assert _content(tmp_path / "new") == _content(tmp_path / "direct")
    assert done.extension
    assert done.old_tokens == sum(told) == check_index(tmp_path / "old").tokens
    assert done.sidecar.tokens < 0.8 * done.old_tokens


def test_proof_holds_where_a_term_cuts_what_the_old_one_had_joined(
    old: Path, extended: Path
) -> None:
    """Such documents are why expanding new tokens is not enough: this corpus has some."""
    before, after = Tokenizer.from_pretrained(old), Tokenizer.from_pretrained(extended)
    content = json.loads((extended / FILE_NAME).read_text("utf-8"))
    spelled = {token["id"]: token["old_ids"] for token in content["new_tokens"]}
    differing = [
        text
        for text in DOCUMENTS
        if [i for new in after.encode(text) for i in spelled.get(new, [new])] != before.encode(text)
    ]
    assert 0 < len(differing) < len(DOCUMENTS)


@pytest.mark.parametrize("forward", [True, False])
def test_a_tokenizer_of_another_kind(
    tmp_path: Path, old: Path, corpus: Path, forward: bool
) -> None:
    other = tmp_path / "sentencepiece"
    sentencepiece_tokenizer(other)
    first, second = (old, other) if forward else (other, old)
    for name, tokenizer in (("first", first), ("direct", second)):
        preprocess([corpus], tokenizer_dir=tokenizer, output_prefix=tmp_path / name)
    done = retokenize(
        tmp_path / "first",
        old_tokenizer=first,
        tokenizer=second,
        output_prefix=tmp_path / "new",
    )
    assert not done.extension
    assert _content(tmp_path / "new") == _content(tmp_path / "direct")


def test_an_extension_file_of_another_step_is_not_believed(
    tmp_path: Path, old: Path, extended: Path, corpus: Path
) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in extended.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    content = json.loads((extended / FILE_NAME).read_text("utf-8"))
    content["old_fingerprint"] = "0" * 32
    content["new_tokens"][0]["old_ids"] = [0]
    (changed / FILE_NAME).write_text(json.dumps(content), "utf-8")
    preprocess([corpus], tokenizer_dir=old, output_prefix=tmp_path / "old")
    preprocess([corpus], tokenizer_dir=extended, output_prefix=tmp_path / "direct")
    done = retokenize(
        tmp_path / "old", old_tokenizer=old, tokenizer=changed, output_prefix=tmp_path / "new"
    )
    assert not done.extension
    assert map_tokens(check_index(tmp_path / "new")).tolist() == (
        map_tokens(check_index(tmp_path / "direct")).tolist()
    )


def _write(prefix: Path, old: Path, documents: list[list[int]]) -> None:
    """An index with these ids, which need not be those that the tokenizer gives."""
    tokenizer = Tokenizer.from_pretrained(old)
    with IndexWriter(prefix, vocab_size=tokenizer.vocab_size) as writer:
        flat = np.array([i for ids in documents for i in ids], dtype=np.int64)
        writer.add(flat, [len(ids) for ids in documents])
        writer.finish(
            tokenizer_fingerprint=tokenizer.fingerprint(),
            tokenizer_name="old",
            eod_id=tokenizer.eod_id,
            text_bytes=1,
        )


def test_documents_that_would_change_are_counted_and_refused(
    tmp_path: Path, old: Path, extended: Path
) -> None:
    tokenizer = Tokenizer.from_pretrained(old)
    end, whole = tokenizer.eod_id, tokenizer.encode("pressuriser")
    single = [tokenizer.encode(letter)[0] for letter in "pressuriser"]
    half = tokenizer.encode("核")[:1]  # a part of a character
    assert len(whole) < len(single)
    _write(tmp_path / "p", old, [[*whole, end], [*single, end], [*whole, *half, end]])
    with pytest.raises(DataError, match=r"2 of 3 documents, the first of them number 1, cannot"):
        retokenize(
            tmp_path / "p", old_tokenizer=old, tokenizer=extended, output_prefix=tmp_path / "q"
        )
    assert not list(tmp_path.glob("*q*"))


def test_a_document_without_its_end_is_refused(tmp_path: Path, old: Path, extended: Path) -> None:
    _write(tmp_path / "p", old, [Tokenizer.from_pretrained(old).encode("pressuriser")])
    with pytest.raises(DataError, match="does not end with 0"):
        retokenize(
            tmp_path / "p", old_tokenizer=old, tokenizer=extended, output_prefix=tmp_path / "q"
        )


def test_faults_name_the_remedy(tmp_path: Path, old: Path, extended: Path, corpus: Path) -> None:
    prefix = tmp_path / "p"
    preprocess([corpus], tokenizer_dir=old, output_prefix=prefix)

    def fault(old_tokenizer: Path, tokenizer: Path, output: Path) -> str:
        with pytest.raises(DataError) as caught:
            retokenize(
                prefix, old_tokenizer=old_tokenizer, tokenizer=tokenizer, output_prefix=output
            )
        return str(caught.value)

    output = tmp_path / "q"
    assert "has the ids of tokenizer" in fault(old, old, output)
    other = byte_level_tokenizer(tmp_path / "other", vocab_size=300)
    assert "Give the directory of the one that made it" in fault(other, extended, output)
    assert "is the input" in fault(old, extended, prefix)
    preprocess([corpus], tokenizer_dir=old, output_prefix=output)
    before = _content(output)
    assert "overwrite" in fault(old, extended, output)
    assert _content(output) == before


def test_training_on_an_index_of_the_old_tokenizer_names_the_command(
    tmp_path: Path, old: Path, extended: Path, corpus: Path
) -> None:
    preprocess([corpus], tokenizer_dir=old, output_prefix=tmp_path / "p")
    fingerprint = Tokenizer.from_pretrained(extended).fingerprint()
    with pytest.raises(DataError, match="made with another tokenizer.*retokenize"):
        check_index(tmp_path / "p", tokenizer_fingerprint=fingerprint)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_extended(tmp_path: Path, kind: str) -> None:
    """Unigram pieces may cut a text elsewhere, and this one's normaliser drops spaces."""
    first, second = tmp_path / "first", tmp_path / "second"
    write_source(first, train(kind, byte_fallback=True))
    second.mkdir()
    texts = [*documents(7), " 前面有空格", "a  b", *TEXTS]
    extender = open_extender(first)
    counter = WordCounter(extender.splitter())
    counter.add(texts)
    rules = Rules(min_frequency=3, min_spread=2)
    extender.write(extender.extend(counter.words(), num_tokens=40, rules=rules), second)
    source = tmp_path / "c.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for name, tokenizer in (("old", first), ("direct", second)):
        preprocess([source], tokenizer_dir=tokenizer, output_prefix=tmp_path / name)
    done = retokenize(
        tmp_path / "old", old_tokenizer=first, tokenizer=second, output_prefix=tmp_path / "new"
    )
    assert done.extension and done.sidecar.tokens < done.old_tokens
    assert _content(tmp_path / "new") == _content(tmp_path / "direct")
    old, new = Tokenizer.from_pretrained(first), Tokenizer.from_pretrained(second)
    for text in texts:
        totals = [int(t.token_byte_lengths()[t.encode(text)].sum()) for t in (old, new)]
        assert totals[0] == totals[1]


def test_command_line(tmp_path: Path, old: Path, extended: Path, corpus: Path) -> None:
    preprocess([corpus], tokenizer_dir=old, output_prefix=tmp_path / "p")

    def run(tokenizer: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "retokenize"),
                *("--input", str(tmp_path / "p"), "--output-prefix", str(tmp_path / "q")),
                *("--old-tokenizer", str(old), "--tokenizer", str(tokenizer)),
            ],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    done = run(extended)
    assert (done.returncode, done.stderr) == (0, "")
    before, after = (check_index(tmp_path / name).tokens for name in "pq")
    change = f"{100 * (after / before - 1):+.1f} %"
    assert f"tokens before    {before:>15,} ({change})" in done.stdout
    refused = run(old)
    assert refused.returncode == 2
    assert refused.stderr.startswith("preprocess_data: ") and "Traceback" not in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("text", DOCUMENTS)
def test_old_and_new_tokens_stand_for_the_same_bytes(old: Path, extended: Path, text: str) -> None:
    """So bits per byte before and after an extension divide by the same number."""
    totals = []
    for directory in (old, extended):
        tokenizer = Tokenizer.from_pretrained(directory)
        lengths = tokenizer.token_byte_lengths()
        assert len(lengths) == tokenizer.vocab_size
        totals.append(int(lengths[tokenizer.encode(text)].sum()))
    assert totals == [len(text.encode())] * 2
