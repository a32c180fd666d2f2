"""Conversations out of files: every kind of record and file, every fault, nothing lost."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cgn.data.conversation_formats import read_record
from megatron_cgn.data.conversations import (
    Conversation,
    Fault,
    encode_conversations,
    read_conversations,
)
from megatron_cgn.errors import DataError
from tests.unit.chat_samples import chatml_tokenizer
from tokenizer.chat import ChatTemplate

TURN = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
SHARED = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
PAIR = (("user", "Q"), ("assistant", "A"))


@pytest.mark.parametrize(
    ("record", "kind", "expected"),
    [
        ({"instruction": "Q", "output": "A"}, "alpaca", PAIR),
        ({"instruction": "Q", "input": "", "output": "A", "system": ""}, "alpaca", PAIR),
        ({"instruction": "Q", "input": None, "output": "A", "history": None}, "alpaca", PAIR),
        (
            {"instruction": "翻译", "input": "泵", "output": "pump"},
            "alpaca",
            (("user", "翻译\n泵"), ("assistant", "pump")),
        ),
        ({"instruction": "", "input": "Q", "output": "A"}, "alpaca", PAIR),
        (
            {"instruction": "Q", "output": "A", "system": "S", "history": [["q", "a"]]},
            "alpaca",
            (("system", "S"), ("user", "q"), ("assistant", "a"), *PAIR),
        ),
        ({"conversations": SHARED}, "sharegpt", PAIR),
        ({"conversations": TURN}, "sharegpt", PAIR),
        ({"messages": SHARED}, "messages", PAIR),
        ({"conversations": SHARED, "system": "S"}, "sharegpt", (("system", "S"), *PAIR)),
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "user", "value": "Q"},
                    {"from": "chatgpt", "value": "A"},
                    {"from": "observation", "value": "T"},
                    {"from": "assistant", "value": "B"},
                ]
            },
            "sharegpt",
            (("system", "S"), *PAIR, ("tool", "T"), ("assistant", "B")),
        ),
        ({"messages": TURN, "tools": [], "prompt": "Q", "source": 3}, "messages", PAIR),
        ({"conversations": SHARED, "tools": "[]"}, "sharegpt", PAIR),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "!"}],
                    },
                    {"role": "assistant", "content": "A", "weight": 1, "name": "x"},
                ]
            },
            "messages",
            (("user", "Q!"), ("assistant", "A")),
        ),
        ({"prompt": "Q", "completion": "A"}, "prompt", PAIR),
        ({"prompt": TURN[:1], "completion": TURN[1:]}, "prompt", PAIR),
    ],
)
def test_records(record: dict[str, Any], kind: str, expected: tuple[tuple[str, str], ...]) -> None:
    found = read_record(record)
    assert found.kind == kind
    assert tuple((m.role, m.content) for m in found.messages) == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "expected an object, found a list"),
        (3, "expected an object, found a number"),
        (None, "expected an object, found null"),
        ({}, "no known kind, its fields being none"),
        ({"text": "x"}, "no known kind, its fields being 'text': give instruction"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "preference data"),
        ({"instruction": "x"}, "instruction lacks its output"),
        ({"instruction": "x", "output": None}, "instruction lacks its output"),
        ({"prompt": "x"}, "prompt lacks its completion"),
        (
            {"messages": TURN, "conversations": SHARED},
            r"several kinds at once \(sharegpt, messages",
        ),
        ({"instruction": "x", "output": {"a": 1}}, "output: expected a text, found an object"),
        ({"instruction": "x", "output": "y", "input": 5}, "input: expected a text, found a number"),
        ({"instruction": "x", "output": "y", "history": "q"}, "history: expected a list"),
        ({"instruction": "x", "output": "y", "history": [["q"]]}, "history, entry 1: expected"),
        ({"instruction": "x", "output": "y", "history": [["q", 1]]}, "history, entry 1: .*a text"),
        ({"messages": "x"}, "the list of messages: expected a list, found a text"),
        ({"messages": [1]}, "message 1: expected an object, found a number"),
        ({"messages": [{"text": "x"}]}, "message 1: has neither role and content nor from"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot': known are"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user"}]}, r"message 1 \(user\): expected a text, found null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"message 1 \(user\) has a part that is no text \(image_url\)",
        ),
        ({"messages": TURN, "system": 1}, "system: expected a text"),
        ({"messages": [{"role": "system", "content": ""}, *TURN], "system": "S"}, "keep one"),
        ({"messages": TURN, "tools": [{"name": "f"}]}, "field 'tools'"),
        ({"messages": TURN, "images": ["a.png"]}, "field 'images'"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "message 1 has the field 'tool_calls'",
        ),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "is a call of a tool"),
        ({"messages": [TURN[0], {**TURN[1], "weight": 0}]}, "message 2 has weight 0"),
        ({"messages": [TURN[0], {**TURN[1], "train": False}]}, "message 2 has train False"),
        ({"messages": [TURN[0], {**TURN[1], "reasoning_content": "hm"}]}, "'reasoning_content'"),
    ],
)
def test_faulty_records(record: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_record(record)


RECORDS: list[Any] = [
    {"instruction": "一回路压力？", "output": "15.5兆帕", "id": "p-1"},
    {"conversations": SHARED, "id": 7},
    {"text": "no conversation"},
    {"messages": TURN},
]


def _write(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


def _summary(path: Path, **options: Any) -> list[tuple[int, str]]:
    return [
        (record.line, record.id if isinstance(record, Conversation) else "FAULT")
        for record in read_conversations(path, **options)
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines(name: str, tmp_path: Path) -> None:
    lines = [json.dumps(record).encode() for record in RECORDS]
    content = b"\xef\xbb\xbf" + b"\n".join([lines[0], b"", *lines[1:], b"{broken", b"\xff\xfe"])
    path = _write(tmp_path / name, content + b"\r\n\n")
    assert _summary(path) == [
        (1, "p-1"),
        (3, "7"),
        (4, "FAULT"),
        (5, f"{name}:5"),
        (6, "FAULT"),
        (7, "FAULT"),
    ]
    assert _summary(path, id_prefix="qa/")[0] == (1, "qa/p-1")


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst"])
def test_a_json_array(name: str, tmp_path: Path) -> None:
    text = json.dumps([*RECORDS, 5], indent=1, ensure_ascii=False)
    path = _write(tmp_path / name, text.encode())
    lines = text.splitlines()
    starts = [n for n, line in enumerate(lines, start=1) if line.startswith((" {", " 5"))]
    ids = ["p-1", "7", "FAULT", f"{name}:{starts[3]}", "FAULT"]
    assert _summary(path) == list(zip(starts, ids, strict=True))
    assert _summary(_write(tmp_path / "empty.json", b" [ ]\n")) == []


@settings(
    max_examples=20,
    deadline=None,
    # Each example writes the file anew.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    values=st.lists(
        st.recursive(
            st.none() | st.integers() | st.text(),
            lambda v: st.lists(v) | st.dictionaries(st.text(), v),
        ),
        max_size=5,
    ),
    indent=st.sampled_from([None, 0, 2]),
)
def test_every_element_of_an_array_comes_out(
    values: list[Any], indent: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values, indent=indent))
    assert len(_summary(path)) == len(values)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'[\n{"a": 1},\n{"a" 2}\n]', 3),
        (b'[\n{"a": 1},\n{"a": 2}\n', 4),
        (b'[\n{"a": 1}\n{"a": 2}\n]', 3),
        (b'[{"a": 1},\n]', 2),
        (b'[\n{"a": 1}\n]\n{"a": 2}', 3),
        (b"[", 1),
        (b'[\n"\xff"]', 2),
    ],
)
def test_a_damaged_array_ends_the_reading(content: bytes, line: int, tmp_path: Path) -> None:
    path = _write(tmp_path / "a.json", content)
    with pytest.raises(DataError, match=rf"a\.json:{line}: "):
        list(read_conversations(path))


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
def test_tables(kind: str, tmp_path: Path) -> None:
    rows = [
        {"id": "a", "messages": TURN, "system": "S", "ballast": 1},
        {"id": None, "messages": TURN, "system": None, "ballast": 2},
        {"id": "c", "messages": None, "system": None, "ballast": 3},
    ] * 300  # more than are held at a time
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        import datasets

        path = tmp_path / "saved"
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    progress: list[int] = []
    found = list(read_conversations(path, report=progress.append))
    assert [record.line for record in found] == list(range(1, 901))
    assert isinstance(found[0], Conversation) and isinstance(found[1], Conversation)
    assert (found[0].id, found[1].id) == ("a", f"{path.name}:2")
    assert [m.role for m in found[0].messages] == ["system", "user", "assistant"]
    assert isinstance(found[899], Fault)
    size = sum(
        f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file()
    )
    assert sum(progress) == size


def test_a_table_without_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    table = pa.table({"messages": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "t.parquet")
    Dataset(table).save_to_disk(tmp_path / "saved")
    for name in ("t.parquet", "saved"):
        assert list(read_conversations(tmp_path / name)) == []


def test_a_table_without_conversations(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"]}), path)
    with pytest.raises(DataError, match=r"none of its columns \('text'\)"):
        list(read_conversations(path))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"q,a", "unknown kind of input"),
        ("a.jsonl.gz", b"no gzip", "cannot be read to its end"),
        ("a.parquet", b"no parquet", "cannot be read to its end"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        list(read_conversations(tmp_path / name))
    with pytest.raises(DataError, match="there is no such input"):
        list(read_conversations(tmp_path / "absent.jsonl"))


def test_faults_of_both_steps_come_in_order_with_file_and_line(tmp_path: Path) -> None:
    records = [
        {"messages": TURN},
        {"text": "x"},
        {"instruction": "Q", "output": " "},
        {"messages": [{"role": "user", "content": "<|im_end|>"}, TURN[1]]},
        {"messages": TURN},
    ] * 60  # more than are tokenised at a time
    path = _write(tmp_path / "a.jsonl", b"\n".join(json.dumps(r).encode() for r in records))
    chat = ChatTemplate.open(chatml_tokenizer(tmp_path / "tokenizer"))
    found = list(encode_conversations(read_conversations(path), chat=chat))
    lines = [item.line if isinstance(item, Fault) else item[0].line for item in found]
    assert lines == list(range(1, 301))
    faults = [item for item in found if isinstance(item, Fault)]
    assert [fault.line % 5 for fault in faults] == [2, 3, 4] * 60
    assert str(faults[1]).startswith(f"{path}:3: message 2 (assistant) is empty")
    usable = [item for item in found if not isinstance(item, Fault)]
    assert all(
        encoded == chat.encode(conversation.messages) for conversation, encoded in usable[:3]
    )
