"""``tools/extend_vocab.py`` as users run it: what it writes, bad input, kills, full disks."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend

from megatron_cgn.hf.to_hf import convert_to_hf
from megatron_cgn.hf.to_megatron import convert_to_megatron
from megatron_cgn.testing import tiny_hf_model
from megatron_cgn.vocabulary import make as make_module
from megatron_cgn.vocabulary.proof import Proof

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from data_samples import byte_level_tokenizer

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "extend_vocab.py"
DEMO = ROOT / ".cache" / "smollm2-135m-instruct"
WORDS = (
    "反应堆冷却剂系统 安全壳 稳压器 蒸汽发生器 主泵 控制棒 乏燃料水池 余热排出 停堆 换料".split()
)
LINKS = "压力 温度 流量 检查 试验 维修 运行 阀门 报警 数据".split()
QUICK = ("--sweep", "0", "20", "--workers", "1", "--min-frequency", "5")

Call = Callable[..., str]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """Run the tool without a process of its own; returns what a user reads."""
    spec = importlib.util.spec_from_file_location("extend_vocab", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def run(*words: object, code: int = 0) -> str:
        capfd.readouterr()
        try:
            found = tool.main([*map(str, words)])
        except SystemExit as ended:  # argparse's own faults
            found = ended.code
        captured = capfd.readouterr()
        assert found == code, captured
        assert "Traceback" not in captured.err
        return captured.err if code else captured.out

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def _documents(count: int, *, seed: int) -> list[str]:
    draw = random.Random(seed)
    sentence = lambda: f"{draw.choice(WORDS)}{draw.choice(LINKS)}{draw.choice(WORDS)}，"  # noqa: E731
    return ["".join(sentence() for _ in range(30)) + f"第{i}号。\n" for i in range(count)]


def _write(path: Path, texts: Sequence[str], *, field: str = "text") -> Path:
    lines = [json.dumps({field: text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("corpus") / "domain.jsonl", _documents(60, seed=1))


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [f"The river runs by the city, {i} miles under a bridge. 天气很好。" for i in range(30)]
    return _write(tmp_path_factory.mktemp("general") / "general.jsonl", texts)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a byte-level tokenizer of some 400 ids, and 13 rows more."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    byte_level_tokenizer(directory)
    size = Backend.from_file(str(directory / "tokenizer.json")).get_vocab_size()
    return tiny_hf_model(directory, vocab_size=size + 13, num_hidden_layers=2)


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's tokenizer with a tiny model of its vocabulary."""
    directory = tmp_path_factory.mktemp("smol") / "model"
    tiny_hf_model(
        directory, vocab_size=49152, hidden_size=16, intermediate_size=32, num_hidden_layers=2
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, directory / name)
    return directory


def _leftovers(output: Path) -> list[str]:
    return [p.name for p in output.parent.iterdir() if p.name.startswith(f".{output.name}")]


def test_a_model_gets_the_tokens_of_its_corpus(
    tmp_path: Path, call: Call, smol: Path, corpus: Path, general: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output, terms = tmp_path / "out", tmp_path / "terms.txt"
    terms.write_text("# 设备\n反应堆冷却剂系统\n乏燃料水池\n")
    shown = call(
        "--model", smol, "--corpus", corpus, "--general", general, "--num-tokens", 80,
        "--terms", terms, "--output", output, *QUICK,
    )  # fmt: skip
    assert "FAILED" not in shown and shown.count("\nok: ") >= 10
    assert "49,152 to 49,231" in shown and f"wrote {output}" in shown
    assert not _leftovers(output)

    old, new = (AutoTokenizer.from_pretrained(str(path)) for path in (smol, output))
    assert all(new.convert_tokens_to_ids(token) == i for token, i in old.get_vocab().items())
    assert len(new) == len(old) + 80
    for term in ("反应堆冷却剂系统", "乏燃料水池"):
        assert len(new(term)["input_ids"]) == 1 < len(old(term)["input_ids"])
    held_out = "".join(_documents(20, seed=2))
    ids, before = new(held_out)["input_ids"], old(held_out)["input_ids"]
    assert new.decode(ids) == held_out and len(ids) < 0.6 * len(before)

    weights = AutoModelForCausalLM.from_pretrained(str(output)).state_dict()
    was = load_file(smol / "model.safetensors")
    for name, tensor in weights.items():
        kept = tensor[:49152] if name.startswith(("model.embed", "lm_head")) else tensor
        assert torch.equal(kept, was[name]), name
    rows = weights["model.embed_tokens.weight"]
    assert len(rows) == 49280 == json.loads((output / "config.json").read_text())["vocab_size"]
    # The old tokenizer says what each token was made of; a row is the mean of those rows.
    for token_id in (49152, 49180, 49231):
        if "\ufffd" not in (text := new.decode([token_id])):
            pieces = old(text)["input_ids"]
            expected = was["model.embed_tokens.weight"][pieces].mean(dim=0)
            assert torch.allclose(rows[token_id], expected, atol=1e-6)
    report = json.loads((output / "report.json").read_text())
    assert all(proof["ok"] for proof in report["made"]["proofs"])
    assert (output / "report.html").stat().st_size > 1000


def test_workers_change_nothing(tmp_path: Path, call: Call, tiny: Path, corpus: Path) -> None:
    common = ("--model", tiny, "--corpus", corpus, "--num-tokens", 20, *QUICK)
    call(*common, "--output", tmp_path / "a")
    call(*common, "--output", tmp_path / "b", "--workers", 2)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "ab"]
    assert files[0] == files[1] and len(files[0]) > 6


def test_a_tokenizer_without_a_model(tmp_path: Path, call: Call, tiny: Path, corpus: Path) -> None:
    source, output = tmp_path / "tokenizer", tmp_path / "out"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, source / name)
    call("--model", source, "--corpus", corpus, "--num-tokens", 20, "--output", output, *QUICK)
    old, new = (Backend.from_file(str(path / "tokenizer.json")) for path in (source, output))
    assert new.get_vocab_size() == old.get_vocab_size() + 20
    assert not (output / "model.safetensors").exists()
    assert "has no weights" in call(
        "--model", source, "--corpus", corpus, "--num-tokens", 20, "--init", "zero",
        "--output", tmp_path / "other", *QUICK, code=2,
    )  # fmt: skip


def test_a_sentencepiece_model(tmp_path: Path, call: Call, corpus: Path) -> None:
    import sentencepiece

    source, output = tmp_path / "model", tmp_path / "out"
    tiny_hf_model(source, vocab_size=600, num_hidden_layers=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["".join(WORDS + LINKS), *map("water flows {}".format, range(99))]),
        model_prefix=str(source / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (source / "tokenizer.vocab").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    shown = call(
        "--model", source, "--corpus", corpus, "--num-tokens", 20, "--output", output, *QUICK
    )
    assert "FAILED" not in shown
    processors = [
        sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
        for path in (source, output)
    ]
    assert processors[1].get_piece_size() == processors[0].get_piece_size() + 20
    text = _documents(1, seed=9)[0]
    ids = processors[1].encode(text)
    assert len(ids) < len(processors[0].encode(text))
    assert processors[1].decode(ids) == processors[0].decode(processors[0].encode(text))


def test_a_checkpoint(tmp_path: Path, call: Call, tiny: Path, corpus: Path) -> None:
    """It gets the rows that the Hugging Face model gets."""
    convert_to_megatron(tiny, tmp_path / "checkpoint")
    common = ("--corpus", corpus, "--num-tokens", 20, *QUICK)
    shown = call("--model", tmp_path / "checkpoint", "--output", tmp_path / "a", *common)
    assert "FAILED" not in shown
    call("--model", tiny, "--output", tmp_path / "b", *common)
    convert_to_hf(tmp_path / "a", tmp_path / "back")
    actual, expected = (load_file(tmp_path / n / "model.safetensors") for n in ("back", "b"))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    names = ("tokenizer.json", "vocab_extension.json")
    for name in names:
        assert (tmp_path / "a" / "hf" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_is_not_worth_it_is_not_written(
    tmp_path: Path, call: Call, tiny: Path, corpus: Path
) -> None:
    """In training on this corpus once, few of the tokens would be met often enough."""
    output = tmp_path / "out"
    shown = call(
        "--model", tiny, "--corpus", corpus, "--num-tokens", "auto", "--output", output,
        *QUICK,
    )  # fmt: skip
    assert "No extension" in shown and "nothing was written" in shown
    assert not output.exists() and not _leftovers(output)


def test_a_report_alone(tmp_path: Path, call: Call, tiny: Path, corpus: Path) -> None:
    output = tmp_path / "out"
    call("--model", tiny, "--corpus", corpus, "--report-only", "--output", output, *QUICK)
    assert sorted(p.name for p in output.iterdir()) == ["report.html", "report.json"]
    call(
        "--model", tiny, "--corpus", corpus, "--report-only", "--output", output, *QUICK,
        "--overwrite",
    )  # fmt: skip
    assert sorted(p.name for p in output.iterdir()) == ["report.html", "report.json"]


def _broken(path: Path) -> list[object]:
    path.write_bytes('{"text": "核"}\n'.encode("gb18030"))
    return ["--corpus", path]


def _named(path: Path, content: str, *words: object) -> list[object]:
    path.write_text(content, encoding="utf-8")
    return [*words, path]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (lambda p, _: ["--num-tokens", 99_999], "gives"),
        (lambda p, _: ["--num-tokens", 200_000], "more than the 100,000"),
        (lambda p, _: ["--num-tokens", 0], "at least 1"),
        (lambda p, _: ["--num-tokens", -5], "at least 1"),
        (lambda p, _: ["--sweep", -1], "at least 0"),
        (lambda p, _: _named(p / "e.jsonl", "", "--corpus"), "no document"),
        (lambda p, _: _named(p / "e.jsonl", '{"text": "   "}\n', "--corpus"), "no document"),
        (lambda p, _: ["--field", "body"], "no field 'body'; the fields are 'text'"),
        (lambda p, _: _broken(p / "gb.jsonl"), "gb.jsonl, line 1: not valid JSON"),
        (lambda p, c: ["--held-out", c], "would flatter"),
        (lambda p, c: ["--held-out", shutil.copy(c, p / "copy.jsonl")], "would flatter"),
        (lambda p, c: ["--general", c], "would flatter"),
        (lambda p, _: ["--corpus", p / "absent.jsonl"], "there is no such input"),
        (lambda p, _: ["--model", p / "absent"], "there is no such directory"),
        (lambda p, _: _named(p / "t.txt", "\n# nothing\n", "--terms"), "holds no term"),
        (
            lambda p, _: _named(p / "t.txt", "a<tool>b\n好\x00\n" + "长" * 99, "--terms"),
            "line 2, '好\\x00': it has a control character",
        ),
        (lambda p, _: _named(p / "t.txt", "a<tool>b\n", "--terms"), "added token '<tool>'"),
        (lambda p, _: _named(p / "d.txt", "/(/\n", "--deny"), "no regular expression"),
        (lambda p, _: ["--min-spread", 1000], "told apart up to"),
        (lambda p, _: ["--report-only", "--init", "zero"], "--init has no effect"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    call: Call,
    tiny: Path,
    corpus: Path,
    words: Callable[[Path, Path], list[object]],
    message: str,
) -> None:
    given = words(tmp_path, corpus)
    common: list[object] = ["--model", tiny, "--num-tokens", 20, "--output", tmp_path / "out"]
    common += [] if "--corpus" in given else ["--corpus", corpus]
    shown = call(*common, *QUICK, *given, code=2)
    assert message in shown, shown
    assert not (tmp_path / "out").exists() and not _leftovers(tmp_path / "out")


def test_several_faults_come_at_once(tmp_path: Path, call: Call, corpus: Path) -> None:
    shown = call(
        "--model", tmp_path / "absent", "--corpus", tmp_path / "no.jsonl", "--terms",
        tmp_path / "no.txt", "--output", tmp_path / "out", code=2,
    )  # fmt: skip
    assert shown.count("\n- ") == 2 and "no.txt" in shown and "no.jsonl" in shown


def test_terms_that_are_tokens_already(
    tmp_path: Path, call: Call, tiny: Path, corpus: Path
) -> None:
    terms = tmp_path / "terms.txt"
    terms.write_text("a\n安全壳\nzqxj\n")
    output = tmp_path / "out"
    call(
        "--model", tiny, "--corpus", corpus, "--report-only", "--terms", terms,
        "--output", output, *QUICK,
    )  # fmt: skip
    said = json.loads((output / "report.json").read_text())["terms"]
    ways = {"a": "existing", "安全壳": "added_token", "zqxj": "merges"}
    assert {term["text"]: term["way"] for term in said} == ways


def test_fewer_tokens_than_the_terms_need(
    tmp_path: Path, call: Call, tiny: Path, corpus: Path
) -> None:
    given = _named(tmp_path / "t.txt", "反应堆冷却剂系统\n乏燃料水池\n", "--terms")
    shown = call(
        "--model", tiny, "--corpus", corpus, "--num-tokens", 1, "--output", tmp_path / "out",
        *QUICK, *given, code=2,
    )  # fmt: skip
    assert "the first 2 of which are needed for the terms" in shown


def _word_piece(directory: Path, source: Path) -> None:
    from tokenizers import models

    Backend(models.WordPiece({"[UNK]": 0, "a": 1})).save(str(directory / "tokenizer.json"))


def _other_rows(directory: Path, source: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))


def _no_tokenizer(directory: Path, source: Path) -> None:
    (directory / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_word_piece, "a WordPiece tokenizer cannot be extended"),
        (_other_rows, "300 rows"),
        (_no_tokenizer, "no tokenizer here"),
    ],
)
def test_models_that_do_not_fit(
    tmp_path: Path,
    call: Call,
    tiny: Path,
    corpus: Path,
    damage: Callable[[Path, Path], None],
    message: str,
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny, source)
    damage(source, tiny)
    shown = call(
        "--model", source, "--corpus", corpus, "--num-tokens", 20, "--output", tmp_path / "out",
        *QUICK, code=2,
    )  # fmt: skip
    assert message in shown, shown


def test_outputs_that_hold_something(tmp_path: Path, call: Call, tiny: Path, corpus: Path) -> None:
    common = ("--model", tiny, "--corpus", corpus, "--report-only", *QUICK)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    for words, message in (
        (["--output", other, "--overwrite"], "not from this tool"),
        (["--output", tiny], "would replace"),
        (["--output", tiny.parent], "would replace"),
        (["--output", tiny / "out"], "lies in the --model"),
        (["--output", corpus], "would replace"),
    ):
        assert message in call(*common, *words, code=2)
    assert (other / "thesis.tex").read_text() == "mine"
    (other / "thesis.tex").unlink()
    call(*common, "--output", other)  # an empty directory is none that holds something
    assert "or --overwrite" in call(*common, "--output", other, code=2)
    call(*common, "--output", other, "--overwrite")


def test_what_fails_a_proof_is_not_published(
    tmp_path: Path, call: Call, tiny: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = [Proof(name="ids", ok=False, text="moved: 'a'")]
    monkeypatch.setattr(make_module, "prove_tokenizer", lambda *_, **__: failed)
    output = tmp_path / "out"
    shown = call(
        "--model", tiny, "--corpus", corpus, "--num-tokens", 20, "--output", output, *QUICK, code=1
    )
    assert "fault of the tool" in shown
    assert not output.exists() and not _leftovers(output)


def _start(*words: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(TOOL), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def _wait_for(path: Path, run: "subprocess.Popen[str]") -> None:
    while not path.exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)


def test_killed_and_interrupted(tmp_path: Path, call: Call, tiny: Path, corpus: Path) -> None:
    output = tmp_path / "out"
    words = ("--model", tiny, "--corpus", corpus, "--num-tokens", 20, "--output", output, *QUICK)
    unfinished = tmp_path / ".out.unfinished"
    killed = _start(*words)
    _wait_for(unfinished / "tokenizer" / "vocab_extension.json", killed)
    killed.kill()
    killed.communicate()
    assert not output.exists() and unfinished.exists()

    stopped = _start(*words)  # removes what the killed one left
    _wait_for(tmp_path / ".out.lock", stopped)
    while (unfinished / "tokenizer").exists():
        time.sleep(0.01)
    assert "another run is writing it" in call(*words, code=2)
    stopped.send_signal(signal.SIGTERM)
    _, errors = stopped.communicate()
    assert stopped.returncode == 130 and "interrupted; nothing was written" in errors
    assert "Traceback" not in errors
    assert not output.exists() and not _leftovers(output)


@pytest.fixture
def small_disk(tmp_path: Path, tiny: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk that lacks some bytes for a copy of the model, or has some more."""
    target = tmp_path / "disk"
    target.mkdir()
    size = sum(file.stat().st_size for file in tiny.iterdir()) + request.param
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(target)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield target
    subprocess.run(["umount", str(target)], check=True)


@pytest.mark.parametrize(
    ("small_disk", "message"),
    [(-9000, "are free on that disk"), (9000, "are free on that disk"), (90_000, "No space left")],
    indirect=["small_disk"],
)
def test_a_full_disk(small_disk: Path, call: Call, tiny: Path, corpus: Path, message: str) -> None:
    output = small_disk / "out"
    words = ("--model", tiny, "--corpus", corpus, "--num-tokens", 20, "--output", output, *QUICK)
    shown = call(*words, code=2)
    assert message in shown and ".unfinished" not in shown, shown
    assert not list(small_disk.iterdir())


def test_what_is_measured_on_is_not_counted(
    tmp_path: Path, call: Call, tiny: Path, corpus: Path
) -> None:
    def texts(*words: object) -> dict[str, dict[str, int]]:
        call("--model", tiny, "--corpus", corpus, "--report-only", "--output", tmp_path / "out",
             "--overwrite", *words, *QUICK)  # fmt: skip
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        return {name: report["texts"][name] for name in ("corpus", "domain")}

    found = texts()
    assert found["corpus"]["documents"] + found["domain"]["documents"] == 60
    assert 0 < found["domain"]["documents"] < 15
    both = [*_documents(60, seed=1)[10:15], *_documents(7, seed=5)]
    found = texts("--held-out", _write(tmp_path / "held_out.jsonl", both))
    assert (found["corpus"]["documents"], found["domain"]["documents"]) == (55, 12)


def test_a_corpus_too_small_to_hold_anything_out(tmp_path: Path, call: Call, tiny: Path) -> None:
    corpus = _write(tmp_path / "one.jsonl", ["反应堆"])
    shown = call(
        "--model", tiny, "--corpus", corpus, "--num-tokens", 20, "--output", tmp_path / "out",
        *QUICK, code=2,
    )  # fmt: skip
    assert "of its 1 documents, none" in shown and "--held-out" in shown


def test_bits_per_byte_go_into_the_report(
    tmp_path: Path, call: Call, tiny: Path, corpus: Path
) -> None:
    output = tmp_path / "out"
    call("--model", tiny, "--corpus", corpus, "--report-only", "--output", output, *QUICK)
    for name, values in (("before", (1.5, 1.25)), ("after", (2.0, 1.125))):
        lines = [json.dumps({"val/domain/bits_per_byte": value}) + "\n" for value in values]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    call("compare", "--report", output, "--before", tmp_path / "before.jsonl",
         "--after", tmp_path / "after.jsonl")  # fmt: skip
    (row,) = json.loads((output / "report.json").read_text())["bits_per_byte"]
    assert (row["before"], row["first"], row["after"]) == (1.25, 2.0, 1.125)
    assert "1.125" in (output / "report.html").read_text()
