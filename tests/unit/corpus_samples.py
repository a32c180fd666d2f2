"""Small inputs for the tests of the corpus, and what is read back from an output."""

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import zstandard

PARAGRAPH = (
    "第{number}号循环水泵在{month}月的定期试验中振动偏大，检修人员更换了驱动端轴承并重新找正联轴器，"
    "随后连续运行{hours}小时，各测点的温度与振动均恢复正常，设备交回运行人员继续使用。"
)


def record(number: int) -> str:
    """A text unlike any other number's, that every rule of cleaning lets through."""
    months = (number % 12) + 1
    first = PARAGRAPH.format(number=number, month=months, hours=24 + number)
    # Characters in everyday use, in an order of its own for each number.
    words = ["汽轮机", "发电机", "冷凝器", "给水泵", "除氧器", "加热器", "调节阀", "变压器"]
    verbs = ["检查", "更换", "清洗", "校准", "润滑", "紧固", "试验", "记录"]
    state = number * 2654435761 % 2**32
    rest = []
    for _ in range(12):
        state = (state * 1103515245 + 12345) % 2**31
        rest.append(f"{verbs[state >> 8 & 7]}{words[state >> 16 & 7]}{state >> 20 & 1023}次")
    return f"{first}其后{'，'.join(rest)}。"


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object] | str]) -> Path:
    """Write rows; a text is a line as it is. A file that holds them already stays untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    content = "".join(f"{line}\n" for line in lines).encode()
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)
    return path


def read_shards(folder: Path, pattern: str = "*.jsonl.zst") -> list[dict[str, Any]]:
    """Rows of all ``.jsonl.zst`` files of a folder, by a reader that stops after one frame."""
    rows = []
    for path in sorted(folder.glob(pattern)):
        with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
            rows += [json.loads(line) for line in io.TextIOWrapper(reader, encoding="utf-8")]
    return rows


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def no_fsync() -> Iterator[None]:
    """Only a machine that fails loses what was not synced; none does in these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
