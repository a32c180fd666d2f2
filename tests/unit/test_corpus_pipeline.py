"""The whole pipeline, in one process."""

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from corpus_samples import no_fsync, read_shards, record, tree, write_jsonl

from megatron_cgn.config.corpus import (
    CorpusConfig,
    DecontaminateConfig,
    DeduplicateConfig,
    ReadConfig,
    RedactConfig,
    SplitConfig,
    WriteConfig,
)
from megatron_cgn.corpus import pipeline, second_pass
from megatron_cgn.corpus.manifest import one_sided
from megatron_cgn.corpus.pipeline import prepare_corpus
from megatron_cgn.corpus.sources import Source
from megatron_cgn.corpus.trace import find_documents
from megatron_cgn.corpus.work import Work
from megatron_cgn.errors import ConfigError, DataError

SMALL = CorpusConfig(
    read=ReadConfig(part_mib=0.004, max_bad=5), split=SplitConfig(validation_fraction=0.2)
)


no_waiting_for_the_disk = pytest.fixture(scope="module", autouse=True)(no_fsync)


def _sources(folder: Path) -> list[Source]:
    """Two sources of several files: duplicates within and across, bad lines, personal data."""
    domain = folder / "domain"
    for number in range(4):
        rows: list[dict[str, object] | str] = [
            {"id": f"d{number}-{row}", "text": record(number * 8 + row), "license": "MIT"}
            for row in range(8)
        ]
        write_jsonl(domain / f"{number}.jsonl", rows)
    write_jsonl(
        domain / "9.jsonl",
        [
            {"id": "d0-0", "text": record(100) + "联系人：张伟，手机13812345678。"},
            {"id": "copy", "text": record(3).replace("，", ",")},
            {"id": "tiny", "text": "短"},
            "{broken <script>",
        ],
    )
    general = write_jsonl(
        folder / "general.jsonl",
        [{"text": record(5)}, {"text": record(200)}, {"id": "d1-1", "text": record(201)}],
    )
    return [
        Source(name="domain", paths=(str(domain),)),
        Source(name="general", paths=(str(general),), classification="公开"),
    ]


def _prepare(folder: Path, output: Path, **settings: Any) -> dict[str, Any]:
    return prepare_corpus(
        _sources(folder / "in"), output=output, settings=dataclasses.replace(SMALL, **settings)
    )


def _documents(output: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(output / "documents.parquet").to_pylist()
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("made")
    return folder / "out", _prepare(folder, folder / "out")


def test_every_document_is_accounted_for(made: tuple[Path, dict[str, Any]]) -> None:
    output, manifest = made
    assert manifest["counts"]["documents"] == {"domain": 36, "general": 3}
    assert manifest["counts"]["dropped"] == {
        "domain": {"clean/too_short": 1, "duplicate/exact": 1, "read/broken_line": 1},
        "general": {"duplicate/exact": 1},
    }
    assert manifest["counts"]["renamed"] == {"domain": 1, "general": 1}
    table = _documents(output)
    assert len(table) == 39 and len({row["id"] for row in table}) == 39
    pieces = {name: read_shards(output / name) for name in ("train", "validation", "dropped")}
    assert {name: len(rows) for name, rows in pieces.items()} == {
        name: sum(row["status"] == name for row in table) for name in pieces
    }
    assert len(pieces["dropped"]) == 4 and len(pieces["validation"]) > 0


def test_the_table_tells_where_a_document_is(made: tuple[Path, dict[str, Any]]) -> None:
    output, _ = made
    for row in _documents(output):
        line = read_shards(output, row["shard"])[row["row"]]
        assert line["id"] == row["id"] and line["source"] == row["source"]
        if row["status"] == "dropped":
            assert line["reason"] == row["reason"]
        else:
            text = line["text"].encode()
            assert line["hash"] == row["hash"] == hashlib.blake2b(text, digest_size=16).hexdigest()


def test_lines_have_all_fields(made: tuple[Path, dict[str, Any]]) -> None:
    lines = {line["id"]: line for name in ("train", "validation") for line in read_shards(
        made[0] / name)}  # fmt: skip
    assert lines["d0-1"] == {
        "id": "d0-1",
        "text": record(1),
        "source": "domain",
        "license": "MIT",
        "classification": None,
        "hash": hashlib.blake2b(record(1).encode(), digest_size=16).hexdigest(),
        "language": "zh",
    }
    assert lines["general/general.jsonl#2"]["classification"] == "公开"
    (renamed,) = [name for name in lines if name.startswith("d0-0~")]
    assert lines[renamed]["text"].endswith("联系人：[姓名]，手机[手机号]。")
    assert "d0-0" in lines


def test_of_equal_documents_the_first_source_has_its_own(
    made: tuple[Path, dict[str, Any]],
) -> None:
    evidence = {line["id"]: line["evidence"] for line in read_shards(made[0] / "dropped")}
    assert evidence["general/general.jsonl#1"] == "equal to d0-5"
    assert evidence["copy"] == "equal to d0-3"


def test_what_holds_raw_text_is_for_its_owner_alone(made: tuple[Path, dict[str, Any]]) -> None:
    output, _ = made
    assert not (output / ".work").exists() and not (output / ".lock").exists()
    assert stat.S_IMODE((output / "dropped").stat().st_mode) == 0o700
    for path in (output / "dropped").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_personal_and_no_markup_gets_into_the_report(
    made: tuple[Path, dict[str, Any]],
) -> None:
    report = (made[0] / "report.html").read_text()
    assert "13812345678" not in report and "张伟" not in report
    assert "{broken &lt;script&gt;" in report and "<script" not in report
    assert "手机[手机号]" in report
    assert "http" not in report.replace("http-equiv", "")


def test_the_manifest_describes_the_files(made: tuple[Path, dict[str, Any]]) -> None:
    output, manifest = made
    assert manifest == json.loads((output / "manifest.json").read_text())
    named = {file["name"]: file for file in manifest["files"]}
    on_disk = {
        str(path.relative_to(output))
        for name in ("train", "validation", "dropped")
        for path in (output / name).iterdir()
    }
    assert set(named) == on_disk | {"documents.parquet"}
    for name, file in named.items():
        content = (output / name).read_bytes()
        assert file["bytes"] == len(content)
        assert file["digest"] == hashlib.blake2b(content, digest_size=16).hexdigest()
    inputs = [file for source in manifest["sources"] for file in source["inputs"]]
    assert [file["name"] for file in inputs] == [
        *(f"domain/{name}.jsonl" for name in (0, 1, 2, 3, 9)),
        "general/general.jsonl",
    ]


def test_the_same_input_gives_the_same_bytes_elsewhere_and_in_other_parts(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _prepare(tmp_path, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(made[0])
    _prepare(tmp_path, tmp_path / "large", read=ReadConfig(max_bad=5))
    for name in ("train", "validation", "dropped"):
        assert read_shards(tmp_path / "large" / name) == read_shards(made[0] / name)
    assert _documents(tmp_path / "large") == _documents(made[0])


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [
        (pipeline.FirstPass, "__call__", 1),
        (pipeline.FirstPass, "__call__", 3),
        (pipeline.decisions, "decide", 0),
        (pipeline.decisions, "_save_duplicates", 0),
        (second_pass.SecondPass, "__call__", 2),
        (second_pass.SecondPass, "_process", 9),
        (pipeline.ShardWriter, "__call__", 1),
        (pipeline, "write_report", 0),
        (pipeline, "publish", 0),
        (Work, "discard", 1),
    ],
)
def test_an_interrupted_run_goes_on(
    made: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    module: Any,
    name: str,
    calls: int,
) -> None:
    original: Callable[..., Any] = getattr(module, name)
    left = calls

    def until_killed(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        return original(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, name, until_killed)
        _prepare(tmp_path, tmp_path / "out")
    _prepare(tmp_path, tmp_path / "out")
    assert "going on" in caplog.text
    assert tree(tmp_path / "out") == tree(made[0])


@pytest.mark.parametrize("moves", [0, 1, 3, 6])
def test_a_kill_between_two_moves(
    made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    import megatron_cgn.corpus.plan as plan

    _prepare(tmp_path, tmp_path / "out", split=SplitConfig(validation_fraction=0.5))
    left, replace = moves, plan._move

    def until_killed(*arguments: Any) -> None:
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        replace(*arguments)

    sources = _sources(tmp_path / "in")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(plan, "_move", until_killed)
        prepare_corpus(sources, output=tmp_path / "out", settings=SMALL, overwrite=True)
    # Never both: a manifest that describes other files than are there.
    assert not (tmp_path / "out" / "manifest.json").exists()
    prepare_corpus(sources, output=tmp_path / "out", settings=SMALL)
    assert tree(tmp_path / "out") == tree(made[0])


def test_other_settings_start_anew(
    made: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def killed(*arguments: Any, **options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pipeline, "publish", killed)
        _prepare(tmp_path, tmp_path / "out", split=SplitConfig(validation_fraction=0.5))
    _prepare(tmp_path, tmp_path / "out")
    assert "other settings" in caplog.text and "anew" in caplog.text
    assert tree(tmp_path / "out") == tree(made[0])


@pytest.mark.parametrize("what", ["files", "redaction"])
def test_other_contents_of_the_settings_files_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """An evaluation file, or the key of pseudonyms, may change where the settings do not."""
    exam, key = tmp_path / "exam.jsonl", tmp_path / "key"
    write_jsonl(exam, [{"question": record(900)}])
    key.write_text("first" * 8)
    settings = {
        "decontaminate": DecontaminateConfig(evaluation_files=(str(exam),)),
        "redact": RedactConfig(replacement="pseudonym", key_file=str(key)),
    }

    def killed(*arguments: Any, **options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pipeline, "publish", killed)
        _prepare(tmp_path, tmp_path / "out", **settings)
    plan = (tmp_path / "out" / ".work" / "plan.json").read_text()
    assert "first" * 8 not in plan
    if what == "files":
        write_jsonl(exam, [{"question": record(901)}])
    else:
        key.write_text("second" * 8)
    _prepare(tmp_path, tmp_path / "out", **settings)
    assert f"other {what}:" in caplog.text


def test_other_limits_of_bad_lines_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read = dataclasses.replace(SMALL.read, max_bad=0)
    with pytest.raises(DataError) as caught:
        _prepare(tmp_path, tmp_path / "out", read=read)
    assert "1 of 3" in str(caught.value) and "--max-bad-lines" in str(caught.value)
    assert "domain/9.jsonl, line 4: not valid JSON" in str(caught.value)
    _prepare(tmp_path, tmp_path / "out")
    assert "going on" in caplog.text


@pytest.mark.parametrize(("max_bad", "stops"), [(0.02, True), (0.03, False), (1, False)])
def test_the_limit_of_bad_lines(tmp_path: Path, max_bad: float, stops: bool) -> None:
    """One line of 39 is bad."""
    read = dataclasses.replace(SMALL.read, max_bad=max_bad)
    if stops:
        with pytest.raises(DataError, match="1 of 39"):
            _prepare(tmp_path, tmp_path / "out", read=read)
    else:
        _prepare(tmp_path, tmp_path / "out", read=read)


def test_parquet(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _prepare(tmp_path, tmp_path / "out", write=WriteConfig(format="parquet"))
    for name in ("train", "validation"):
        rows = [
            row
            for path in sorted((tmp_path / "out" / name).iterdir())
            for row in pq.read_table(path).to_pylist()
        ]
        assert rows == read_shards(made[0] / name)
    assert read_shards(tmp_path / "out" / "dropped") == read_shards(made[0] / "dropped")


def test_a_corpus_is_an_input(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """What a run wrote goes through another without change."""
    prepare_corpus(
        [Source(name="domain", paths=(str(made[0] / "train"),), named=False)],
        output=tmp_path / "out",
        settings=dataclasses.replace(SMALL, split=SplitConfig(validation_fraction=0)),
    )
    assert read_shards(tmp_path / "out" / "train") == read_shards(made[0] / "train")


def test_documents_of_an_earlier_corpus_are_dropped(
    made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    new = write_jsonl(
        tmp_path / "new.jsonl",
        [{"id": "old", "text": record(2)}, {"id": "new", "text": record(300)}],
    )
    manifest = prepare_corpus(
        [Source(name="more", paths=(str(new),))],
        output=tmp_path / "out",
        settings=dataclasses.replace(
            SMALL, deduplicate=DeduplicateConfig(prior=(str(made[0] / "signatures"),))
        ),
    )
    assert manifest["counts"]["dropped"] == {"more": {"duplicate/exact": 1}}
    (dropped,) = read_shards(tmp_path / "out" / "dropped")
    assert dropped["evidence"] == f"equal to d0-2 of {made[0]}"


def test_an_earlier_corpus_is_not_replaced_by_what_it_lacks(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": record(1)}])
    output, source = tmp_path / "out", Source(name="domain", paths=(str(path),))
    prepare_corpus([source], output=output, settings=SMALL)
    before = tree(output)
    (tmp_path / "link").symlink_to(output)
    prior = DeduplicateConfig(prior=(str(tmp_path / "link" / "signatures"),))
    with pytest.raises(ConfigError, match="lies in the output"):
        prepare_corpus(
            [source],
            output=output,
            settings=dataclasses.replace(SMALL, deduplicate=prior),
            overwrite=True,
        )
    assert tree(output) == before


def test_documents_of_evaluation_files_are_dropped(tmp_path: Path) -> None:
    questions = write_jsonl(tmp_path / "exam.jsonl", [{"question": record(7)[-90:]}])
    manifest = _prepare(
        tmp_path,
        tmp_path / "out",
        decontaminate=DecontaminateConfig(evaluation_files=(str(questions),)),
    )
    reasons = manifest["counts"]["dropped"]["domain"]
    assert sum(count for reason, count in reasons.items() if reason.startswith("contam")) == 1
    (found,) = find_documents("d0-7", corpora=[tmp_path / "out"])
    assert found.row["status"] == "dropped" and found.evidence and "exam.jsonl" in found.evidence


def test_the_report_tells_what_is_not_looked_for(tmp_path: Path) -> None:
    questions = [{"question": record(7)[-90:]}, {"question": "是不是？"}, {"question": "短"}]
    path = write_jsonl(tmp_path / "exam<1>.jsonl", questions)
    _prepare(
        tmp_path,
        tmp_path / "out",
        decontaminate=DecontaminateConfig(evaluation_files=(str(path),)),
    )
    report = (tmp_path / "out" / "report.html").read_text()
    row = '<td>exam&lt;1&gt;.jsonl</td><td class="n">3</td><td class="n">2</td>'
    assert row in report


@pytest.mark.parametrize(
    ("fraction", "told"),
    [
        (0.2, {"general: nothing is held out: of its 2 documents"}),
        (0.0, set()),
        (0.99, {"domain: nothing is left to train on", "general: nothing is left to train on"}),
    ],
)
def test_a_source_on_one_side_of_the_split_is_told(
    tmp_path: Path, fraction: float, told: set[str]
) -> None:
    split = SplitConfig(validation_fraction=fraction, group_by="^(.)" if fraction > 0.9 else "")
    manifest = _prepare(tmp_path, tmp_path / "out", split=split)
    sentences = list(one_sided(manifest))
    assert len(sentences) == len(told)
    assert all(any(sentence.startswith(text) for sentence in sentences) for text in told)
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count('class="warning"') == len(told)


def test_a_fault_of_the_settings_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write.shard_mib: 0"):
        _prepare(tmp_path, tmp_path / "out", write=WriteConfig(shard_mib=0))
    missing = DecontaminateConfig(evaluation_files=("/nowhere/exam.jsonl",))
    with pytest.raises((ConfigError, DataError), match="/nowhere/exam.jsonl"):
        _prepare(tmp_path, tmp_path / "out", decontaminate=missing)
    earlier = DeduplicateConfig(prior=("/nowhere/signatures",))
    with pytest.raises(DataError, match="/nowhere/signatures"):
        _prepare(tmp_path, tmp_path / "out", deduplicate=earlier)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="thesis.txt"):
        _prepare(tmp_path, tmp_path / "out")
    (tmp_path / "out" / "thesis.txt").unlink()
    _prepare(tmp_path, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(DataError, match="--overwrite"):
        _prepare(tmp_path, tmp_path / "out")
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["file", "file/out", "x" * 300])
def test_an_output_that_cannot_be_made(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="--output"):
        _prepare(tmp_path, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_input_without_documents(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="no document"):
        prepare_corpus(
            [Source(name="a", paths=(str(tmp_path / "x.jsonl"),))],
            output=tmp_path / "out",
            settings=SMALL,
        )


def test_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"in\xff")
    os.mkdir(folder)
    for name in (b"\xfe.txt", b"\xfe.pdf"):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(record(1).encode())
    manifest = prepare_corpus(
        [Source(name="a", paths=(os.fsdecode(folder),))], output=tmp_path / "out", settings=SMALL
    )
    assert manifest["counts"]["dropped"] == {"a": {"read/damaged": 1}}
    assert [row["id"] for row in _documents(tmp_path / "out")] == ["a/\ufffd.pdf", "a/\ufffd.txt"]


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pipeline.FirstPass.__call__

    def changed(self: Any, part: Any) -> None:
        first(self, part)
        (tmp_path / "in" / "general.jsonl").write_text("{}")

    monkeypatch.setattr(pipeline.FirstPass, "__call__", changed)
    with pytest.raises(DataError, match="general.jsonl: was changed"):
        _prepare(tmp_path, tmp_path / "out", read=dataclasses.replace(SMALL.read, max_bad=9))
