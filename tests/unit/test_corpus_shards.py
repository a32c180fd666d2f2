"""Every document is where the table says, however pieces fall into shards."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from corpus_samples import no_fsync, read_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cgn.corpus.shards import ShardWriter, plan_shards, write_documents
from megatron_cgn.corpus.work import LinesWriter, Work, write_json

no_waiting_for_the_disk = pytest.fixture(scope="module", autouse=True)(no_fsync)

STAGE = "stage"
statuses = st.sampled_from(["train", "validation", "dropped"])
parts = st.lists(st.tuples(st.sampled_from("ab"), st.lists(statuses, max_size=6)), max_size=12)


def _write_part(work: Work, part: int, source: str, documents: list[str]) -> None:
    with work.writing(STAGE, part) as folder:
        pieces = {}
        with LinesWriter(folder / "documents.jsonl.zst") as table:
            rows = dict.fromkeys(("train", "validation", "dropped"), 0)
            for place, status in enumerate(documents):
                table.write(
                    dict.fromkeys(("license", "classification", "language", "raw_hash", "hash"))
                    | {"id": f"{part}-{place}", "source": source, "status": status}
                    | {"reason": None, "changes": None, "row": rows[status]}
                )
                rows[status] += 1
        for name in rows:
            with LinesWriter(folder / f"{name}.jsonl.zst") as piece:
                for place, status in enumerate(documents):
                    if status == name:
                        piece.write({"id": f"{part}-{place}"})
            pieces[name] = {"rows": piece.num_rows, "bytes": piece.num_bytes}
        write_json(folder / "tally.json", {"pieces": pieces})


@settings(max_examples=60, deadline=None)
@given(parts=parts, shard_bytes=st.integers(1, 200))
def test_places(tmp_path_factory, parts: list[tuple[str, list[str]]], shard_bytes: int) -> None:  # type: ignore[no-untyped-def]
    parts = sorted(parts, key=lambda part: part[0])  # a source's parts are consecutive
    root: Path = tmp_path_factory.mktemp("work")
    work, out = Work(root / "work"), root / "out"
    work.create()
    for place, (source, documents) in enumerate(parts):
        _write_part(work, place, source, documents)
    shards = []
    for piece in ("train", "validation", "dropped"):
        (out / piece).mkdir(parents=True)
        shards += plan_shards(
            work,
            stage=STAGE,
            piece=piece,
            sources=[source for source, _ in parts],
            suffix="jsonl.zst",
            shard_bytes=shard_bytes,
        )
    written = [ShardWriter(out)(shard) for shard in shards]
    write_documents(out / "t.parquet", work, stage=STAGE, num_parts=len(parts), shards=shards)

    table = pq.read_table(out / "t.parquet").to_pylist()
    expected = [
        (f"{part}-{place}", source, status)
        for part, (source, documents) in enumerate(parts)
        for place, status in enumerate(documents)
    ]
    assert [(row["id"], row["source"], row["status"]) for row in table] == expected
    lines = {
        name: [row["id"] for row in read_shards(out, name)]
        for name in {shard.name for shard in shards}
    }
    for row in table:
        assert lines[row["shard"]][row["row"]] == row["id"]
        assert row["shard"].startswith(f"{row['status']}/{row['source']}-")
    assert {shard.name: shard.num_rows for shard in written} == {
        name: len(rows) for name, rows in lines.items()
    }
    assert sum(map(len, lines.values())) == len(expected)
