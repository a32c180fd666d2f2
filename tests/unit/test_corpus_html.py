from megatron_cgn.corpus.formats.html import read_html, unescape

PAGE = """<html><head><meta charset="utf-8"><title>t</title></head><body><main><article>
<h1>概述<a class="headerlink" href="#x" title="永久链接">¶</a></h1>
<p>物理设备被称为物理功能（PF），而虚拟设备被称为虚拟功能。VF的分
配可以由PF通过封装在该功能中的寄存器动态控制，对sysfs文件sriov_numvfs的写入
   将启用和禁用 <b>PCIe</b> 设备，见 a * b 和 [注] 与 &lt;x&gt;。English text goes
on here.</p>
<pre>第一
二行  nr_virtfn
</pre>
<table><tr><th>参数</th><th>值</th></tr><tr><td>一回路压力</td><td>15.5 MPa</td></tr></table>
</article></main></body></html>"""


def test_chinese_lines_are_joined_without_a_blank_and_code_stays() -> None:
    text = read_html(PAGE.encode())

    assert "VF的分配可以由PF" in text
    assert "写入将启用和禁用" in text
    assert "goes\non here" in text or "goes on here" in text
    assert "第一\n二行  nr_virtfn" in text
    assert "15.5 MPa" in text


def test_no_marks_of_permalinks_and_no_escapes() -> None:
    text = read_html(PAGE.encode())

    assert "¶" not in text and "# 概述" in text
    assert "sriov_numvfs" in text and "a * b" in text and "[注]" in text and "<x>" in text


def test_escapes_in_code_are_the_author_s() -> None:
    text = "a\\_b `c\\_d` e\\*\n```\nf\\_g\n```\nh\\<i\n"

    assert unescape(text) == "a_b `c\\_d` e*\n```\nf\\_g\n```\nh<i\n"
