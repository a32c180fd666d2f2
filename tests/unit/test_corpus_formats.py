"""Text out of files that are one document."""

import io
import zipfile
from pathlib import Path

import pytest
from corpus_samples import record
from hypothesis import given
from hypothesis import strategies as st

from megatron_cgn.corpus.formats import Unreadable, read_file
from megatron_cgn.corpus.formats.pdf import join_pages
from megatron_cgn.corpus.formats.plain import decode

SHORT = ["核电", "安全壳", "主泵", "一回路压力为15.5 MPa。", "检修规程\n第一章 总则\n", "是"]


@pytest.mark.parametrize("text", SHORT)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_short_chinese_texts(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding)) == text


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030", "gbk"]
)
def test_encodings_of_chinese(number: int, encoding: str) -> None:
    text = f"{record(number)}\n{record(number + 1)} (see RCC-M 2018)\n"
    assert decode(text.encode(encoding)) == text


def test_traditional_chinese() -> None:
    text = "核能發電廠的反應爐冷卻水系統，應於每次大修期間進行檢查，並記錄所有異常狀況。"
    assert decode(text.encode("big5")) == text
    assert decode(text.encode("utf-16-le") + "\n ".encode("utf-16-le")) == text + "\n "


def test_rare_characters_of_gb18030() -> None:
    text = record(1) * 3 + "镕堃𠮷"
    assert decode(text.encode("gb18030")) == text


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0\ufeff")))
def test_utf8_is_never_taken_for_another(text: str) -> None:
    assert decode(text.encode()) == text


def test_line_ends() -> None:
    assert decode(b"a\r\nb\rc\n") == "a\nb\nc\n"


@pytest.mark.parametrize(
    "content",
    [
        "Betriebsanleitung für Kühlmittelpumpen, geprüft".encode("latin-1"),
        bytes(range(128, 256)) * 4,
        b"\xff\xfe" + b"abc",
        b"\xef\xbb\xbf\xff",
        "核电".encode() + b"\xff\xfe\xfd" * 5,
        "Привет, реактор".encode("cp1251"),
    ],
)
def test_what_is_in_no_known_encoding_is_no_text(content: bytes) -> None:
    with pytest.raises(Unreadable) as caught:
        decode(content)
    assert caught.value.reason == "undecodable"
    assert "UTF-8" in caught.value.evidence


def test_a_declared_encoding_is_used_where_it_fits() -> None:
    assert decode("für".encode("latin-1"), declared="iso-8859-1") == "für"
    assert decode(record(2).encode("gb18030"), declared="utf-8") == record(2)
    assert decode(record(2).encode(), declared="gb2312") == record(2)
    assert decode(record(2).encode("gb18030"), declared="no-such") == record(2)


PAGE = """<html><head><meta charset="{charset}"><title>规程</title></head><body>
<nav><a href="/">首页</a> <a href="/a">目录</a></nav>
<article><h1>主泵检修规程</h1><p>{text}</p>
<table><tr><th>参数</th><th>限值</th></tr><tr><td>振动</td><td>4.5 mm/s</td></tr></table>
<p>{text}</p></article><footer>版权所有</footer></body></html>"""


@pytest.mark.parametrize("charset", ["utf-8", "gb2312"])
def test_html(tmp_path: Path, charset: str) -> None:
    path = tmp_path / "page.html"
    path.write_bytes(PAGE.format(charset=charset, text=record(3)).encode(charset))
    text = read_file(str(path))
    assert record(3) in text and "主泵检修规程" in text
    assert "| 振动 | 4.5 mm/s |" in text and "| 参数 | 限值 |" in text


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"plain", b"<" * 1000])
def test_html_without_content(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "page.html"
    path.write_bytes(content)
    assert isinstance(read_file(str(path)), str)


def test_docx(tmp_path: Path) -> None:
    import docx

    document = docx.Document()
    document.add_heading("检修规程", 1)
    document.add_paragraph("第一段。")
    table = document.add_table(rows=2, cols=2)
    for cell, text in zip(table._cells, ["参数", "限值", "振动", "a|b"], strict=True):
        cell.text = text
    document.add_paragraph("最后一段。")
    document.save(str(tmp_path / "a.docx"))
    assert read_file(str(tmp_path / "a.docx")) == (
        "# 检修规程\n\n第一段。\n\n| 参数 | 限值 |\n| --- | --- |\n| 振动 | a\\|b |\n\n最后一段。"
    )


def _archive(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged"),
        (b"PK\x03\x04 cut", "damaged"),
        (_archive(), "damaged"),
        (_archive(document=b"<x/>"), "damaged"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "encrypted"),
    ],
)
def test_docx_that_cannot_be_read(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.docx").write_bytes(content)
    with pytest.raises(Unreadable) as caught:
        read_file(str(tmp_path / "a.docx"))
    assert caught.value.reason == reason


def _pdf(*pages: list[str], encrypt: str = "") -> bytes:
    """A PDF with lines of Latin text, one below another."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 "
               "/BaseFont /Helvetica >>"]  # fmt: skip
    kids = []
    for lines in pages:
        drawn = "".join(f"({line}) Tj 0 -14 Td " for line in lines)
        stream = f"BT /F1 10 Tf 50 750 Td {drawn}ET"
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Resources << /Font << /F1 3 0 R "
            f">> >> /Contents {len(objects)} 0 R >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    body, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n".encode()
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    trailer = (
        f"xref\n0 {len(offsets) + 1}\n0000000000 65535 f \n{table}trailer\n"
        f"<< /Size {len(offsets) + 1} /Root 1 0 R {encrypt} >>\nstartxref\n{len(body)}\n%%EOF\n"
    )
    return body + trailer.encode()


def test_pdf(tmp_path: Path) -> None:
    units = ["north", "south", "east", "west"]
    pages = [
        ["Manual, revision 2", f"The pump of the {unit} unit is inspected after each outage by",
         "the mainte-", f"nance team of the {unit}.", f"Page {number + 3} of 9"]
        for number, unit in enumerate(units)
    ]  # fmt: skip
    (tmp_path / "a.pdf").write_bytes(_pdf(*pages))
    text = read_file(str(tmp_path / "a.pdf"))
    assert text == "\n".join(
        f"The pump of the {unit} unit is inspected after each outage by the maintenance "
        f"team of the {unit}."
        for unit in units
    )


def test_pages_of_one_form_with_other_values_are_no_headers() -> None:
    values = [17, 42, 3, 99, 64]
    pages = ["\n".join(f"测点{row}读数 {n * row}" for row in range(1, 10)) for n in values]
    assert join_pages(pages) == "\n".join(pages)


# The key's check values are zeros, which no password gives.
ENCRYPT = (
    f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{'00' * 32}> /U <{'00' * 32}> >> "
    "/ID [<00> <00>]"
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged"),
        (b"%PDF-1.4\nnothing", "damaged"),
        (_pdf(["text"], encrypt=ENCRYPT), "encrypted"),
        (_pdf([], []), "no_text"),
    ],
)
def test_pdf_that_cannot_be_read(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.pdf").write_bytes(content)
    with pytest.raises(Unreadable) as caught:
        read_file(str(tmp_path / "a.pdf"))
    assert caught.value.reason == reason


def test_chinese_lines_are_joined_where_they_fill_the_page() -> None:
    first = "本规程规定了压水堆核电厂反应堆冷却剂泵的检修周期和检修项目以及验收标"
    second = "准和安全措施。"
    page = "\n".join(["主泵检修规程", first, second, "1 总则", first, second, "1.1 范围", "- 4 -"])
    assert join_pages([page]) == "\n".join(
        ["主泵检修规程", first + second, "1 总则", first + second, "1.1 范围"]
    )


def test_headers_of_most_pages_go_and_of_single_pages_stay() -> None:
    pages = [f"某核电有限公司\n第{n}节 内容{n}{'甲' * n}。\n第 {n} 页 共 5 页" for n in range(1, 6)]
    text = join_pages([*pages, "附录\n表格"])
    assert "某核电有限公司" not in text and "共 5 页" not in text
    assert all(f"第{n}节 内容{n}" in text for n in range(1, 6))
    assert text.endswith("附录\n表格")


def test_headers_of_chapters_go() -> None:
    """Each on a few pages of many, left and right pages with other ones."""
    body = ["甲乙丙丁", "戊己庚辛", "子丑寅卯", "辰巳午未"]
    pages = []
    for number in range(40):
        header = f"第{number // 8}章 概览 {number + 5}" if number % 2 else f"{number + 5} 某手册"
        lines = [f"{text}{number * 7919 % 101}项。" for text in body]
        pages.append("\n".join([header, *lines]))
    text = join_pages(pages)
    assert "概览" not in text and "手册" not in text
    assert text.count("\n") == 40 * len(body) - 1


def test_headers_with_roman_page_numbers_go() -> None:
    """On the pages before the first chapter, right above the contents' widest entries."""
    romans = ["i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x", "xi", "xii", "XIII"]
    entry = "{0}.{1} 主泵轴封检修与试验 . . . . . . . . . . . . . . . . . . {2}"
    pages = [
        "\n".join([f"某手册 {roman}", *(entry.format(page, n, 9 * page + n) for n in range(1, 9))])
        for page, roman in enumerate(romans, start=1)
    ]
    entries = [entry.format(page, n, 9 * page + n) for page in range(1, 14) for n in range(1, 9)]
    assert join_pages(pages) == "\n".join(entries)


def test_a_short_document_keeps_its_lines() -> None:
    assert join_pages(["标题\n正文。", "标题\n其他。"]) == "标题\n正文。\n标题\n其他。"


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    for suffix in (".txt", ".pdf", ".docx", ".html"):
        with pytest.raises(Unreadable):
            read_file(str(tmp_path / f"gone{suffix}"))
