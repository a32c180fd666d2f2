"""From raw documents to a checkpoint, and from a document to what consumed it and back."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_files import TinyFiles
from train_runs import Zygote, overrides

from megatron_cgn.data.taught import _table, consumed_documents
from megatron_cgn.data.trace import look_around, trace_document
from megatron_cgn.errors import DataError

ROOT = Path(__file__).parents[2]
SOURCES = {"domain": "domain_zh.jsonl", "general": "general.jsonl"}
SEQ_LENGTH, BATCH = 64, 8


@dataclass(frozen=True, slots=True)
class Chain:
    """What the commands of the README leave, one after another."""

    corpus: Path
    indexes: Path
    run: Path

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.run / "checkpoints").glob("step_*"))


def _command(tool: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, f"tools/{tool}.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def chain(tiny: TinyFiles, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    root = tmp_path_factory.mktemp("chain")
    inputs = [f"{name}=samples/{file}" for name, file in SOURCES.items()]
    _command("prepare_corpus", "--input", *inputs, "--output", root / "corpus", "--workers", 1)
    for name in SOURCES:
        shards = sorted((root / "corpus" / "train").glob(f"{name}-*.jsonl.zst"))
        prefix = root / "indexes" / name
        common = ("--tokenizer", tiny.model, "--output-prefix", prefix, "--workers", 1)
        _command("preprocess_data", "--input", *shards, *common)
    listed = ",".join(f"{{name: {name}, path: {root}/indexes/{name}}}" for name in SOURCES)
    ended = zygote.run(
        [
            "+stage=cpt",
            f"model.hf_path={tiny.model}",
            "precision=fp32",
            f"data.sources=[{listed}]",
            "data.phases=[{mix: {domain: 0.8, general: 0.2}, until: 4}, {mix: {general: 1}}]",
            f"data.seq_length={SEQ_LENGTH}",
            "train.train_iters=6",
            "train.micro_batch_size=4",
            f"train.global_batch_size={BATCH}",
            "optim.warmup_steps=0",
            "checkpoint.interval_steps=2",
            f"output_dir={root / 'run'}",
        ],
        stderr=root / "stderr",
    )
    assert ended.codes == [0], ended.stderr
    return Chain(root / "corpus", root / "indexes", root / "run")


def test_every_consumed_document_is_listed_with_its_lineage(chain: Chain) -> None:
    for number, checkpoint in enumerate(chain.checkpoints, 1):
        rows = list(consumed_documents(checkpoint))

        assert sum(row["tokens"] for row in rows) == 2 * number * BATCH * SEQ_LENGTH
        given = {
            row["id"]: row
            for file in SOURCES.values()
            for row in map(json.loads, (ROOT / "samples" / file).open(encoding="utf-8"))
        }
        for row in rows:
            assert row["license"] == given[row["id"]]["license"]
            assert row["hash"] and row["blend_source"] in SOURCES


def test_a_document_leads_to_its_shard_index_and_checkpoints(chain: Chain) -> None:
    first, last = chain.checkpoints[0], chain.checkpoints[-1]
    early = {row["id"]: row for row in consumed_documents(first)}
    late = {row["id"]: row for row in consumed_documents(last)}
    new = next(name for name in late if name not in early)

    printed = _command(
        "prepare_corpus", "trace", "--document", new, "--in", chain.corpus, chain.indexes, chain.run
    )

    lines = printed.splitlines()
    assert any("train/" in line for line in lines)
    (index,) = [line for line in lines if line.split()[0] == "index"]
    assert late[new]["index"] in index and f"document {late[new]['document']:,} of" in index
    found = {path.name: line for path in chain.checkpoints for line in lines if str(path) in line}
    assert found[first.name].endswith("not read")
    assert f"{late[new]['tokens']:,} tokens" in found[last.name]
    (plan,) = [line for line in lines if "run (plan)" in line]
    assert f"{late[new]['tokens']:,} tokens" in plan  # the last checkpoint is the whole plan


def test_the_phase_without_a_source_consumes_none_of_it(chain: Chain) -> None:
    def tokens(checkpoint: Path) -> int:
        rows = consumed_documents(checkpoint)
        return sum(row["tokens"] for row in rows if row["blend_source"] == "domain")

    second, last = chain.checkpoints[1:]
    assert second.name.endswith("4") and tokens(second) == tokens(last) > 0


def test_indexes_are_looked_for_where_they_were_read(chain: Chain, tmp_path: Path) -> None:
    """Naming the runs is enough; an index that has gone is said, not taken for unread."""
    row = next(iter(consumed_documents(chain.checkpoints[-1])))
    named = trace_document(row["id"], [chain.indexes, chain.run])

    assert trace_document(row["id"], [chain.run]) == named
    moved = tmp_path / "elsewhere"
    chain.indexes.rename(moved)
    try:
        unknown = trace_document(row["id"], [chain.run])
        found = trace_document(row["id"], [chain.run, moved])
    finally:
        moved.rename(chain.indexes)

    assert [line.split(": ")[0].split() for line in unknown] == [
        ["not", "known", str(chain.indexes / name)] for name in SOURCES
    ]
    assert len(found) == len(named) and found[1:] == named[1:]


def test_documents_of_a_validation_path_are_held_out(
    chain: Chain, tiny: TinyFiles, zygote: Zygote, tmp_path: Path
) -> None:
    sources = (
        f"{{name: domain, path: {chain.indexes}/domain, validation_path: {chain.indexes}/general}}"
    )
    arguments = overrides(
        tiny,
        tmp_path / "run",
        f"data.sources=[{sources}]",
        "data.validation_fraction=0",
        "train.validation_sequences=2",
        "train.train_iters=1",
        "optim.warmup_steps=0",
    )
    ended = zygote.run(arguments, stderr=tmp_path / "stderr")
    assert ended.codes == [0], ended.stderr
    id_ = json.loads((ROOT / "samples" / SOURCES["general"]).open(encoding="utf-8").readline())[
        "id"
    ]

    _, *uses = trace_document(id_, [chain.indexes, tmp_path / "run"])

    assert len(uses) == 2
    assert all(use.endswith("source domain: held out") for use in uses)


def test_a_checkpoint_leads_to_its_documents(chain: Chain, tmp_path: Path) -> None:
    output = tmp_path / "consumed.jsonl"
    checkpoint = chain.checkpoints[-1]

    printed = _command("prepare_corpus", "trace", "--checkpoint", checkpoint, "--output", output)

    rows = [json.loads(line) for line in output.open(encoding="utf-8")]
    assert rows == list(consumed_documents(checkpoint))
    total = printed.splitlines()[-1].split()
    assert total[-2:] == [f"{len(rows):,}", f"{6 * BATCH * SEQ_LENGTH:,}"]


def test_names_of_any_script_stay_in_their_columns(tmp_path: Path) -> None:
    """A Chinese character takes two columns of a terminal."""
    groups = Counter(
        {("核电站", "手册", "-", "内部"): 12, ("general", "web", "CC0-1.0", "-"): 1234}
    )
    lines = _table(tmp_path, groups, groups)[1:]
    wide = [sum(2 if ord(char) > 0x2E80 else 1 for char in line) for line in lines]
    assert len(lines) == 4 and len(set(wide)) == 1
    assert lines[1:3] == [
        "  general       web     CC0-1.0  -                   1,234   1,234",
        "  核电站        手册    -        内部                   12      12",
    ]


def test_indexes_that_were_moved_are_found_by_their_content(chain: Chain, tmp_path: Path) -> None:
    checkpoint = chain.checkpoints[-1]
    before = list(consumed_documents(checkpoint))
    moved = tmp_path / "elsewhere"
    chain.indexes.rename(moved)
    try:
        with pytest.raises(DataError, match="no such file"):
            list(consumed_documents(checkpoint))
        after = list(consumed_documents(checkpoint, directories=[moved]))
    finally:
        moved.rename(chain.indexes)

    assert [{**row, "index": ""} for row in before] == [{**row, "index": ""} for row in after]


@pytest.mark.parametrize(("name", "other"), [("domain", "general"), ("general", "domain")])
def test_lineage_of_another_index_is_refused(
    chain: Chain, tmp_path: Path, name: str, other: str
) -> None:
    """With more rows and with fewer: else documents would be given the wrong origin."""
    copy = shutil.copytree(chain.indexes, tmp_path / "copy")
    shutil.copy(copy / f"{other}.documents.parquet", copy / f"{name}.documents.parquet")
    with pytest.raises(DataError, match=rf"{name}.documents.parquet: belongs to another index"):
        list(consumed_documents(chain.checkpoints[-1], directories=[copy]))


def test_what_a_killed_save_left_is_not_taken_for_a_run(chain: Chain, tmp_path: Path) -> None:
    """A save writes its account first, and the file that makes it a checkpoint last."""
    whole = look_around([chain.run])
    left = chain.run / "checkpoints" / "step_0000008.partial"
    left.mkdir()
    try:
        shutil.copy(chain.run / "blend.json", left)
        assert look_around([chain.run]) == whole
    finally:
        shutil.rmtree(left)
    assert whole.runs == (chain.run,) and whole.checkpoints == tuple(chain.checkpoints)


def test_what_is_not_there_is_said(chain: Chain, tmp_path: Path) -> None:
    assert trace_document("no-such-document", [chain.indexes, chain.run]) == []
    with pytest.raises(DataError, match="neither a directory nor the prefix"):
        trace_document("x", [tmp_path / "missing"])
    with pytest.raises(DataError, match="blend.json"):
        list(consumed_documents(tmp_path))
