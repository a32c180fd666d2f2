import pytest
import technical_texts
from hypothesis import given
from hypothesis import strategies as st

from megatron_cgn.corpus.lines import LINE_KINDS, tidy


def clean(text: str) -> str:
    return tidy(text, remove=LINE_KINDS)[0]


@pytest.mark.parametrize("name", technical_texts.ALL)
def test_tables_code_and_procedures_survive_byte_for_byte(name: str) -> None:
    text = technical_texts.ALL[name]
    assert tidy(text, remove=LINE_KINDS) == (text, {}, 0)


@pytest.mark.parametrize(
    "line",
    [
        "第 3 页 共 20 页",
        "第3页",
        "第三页",
        "第 3 页，共 20 页",
        "共 20 页 第 3 页",
        "- 第 3 页 -",
        "3 / 20 页",
        "页码：3/20",
        "Page 3 of 20",
        "page 3",
        "              第 3 页 共 20 页",
        "Copyright © 2011-2024 Example Ltd.",
        "Copyright (c) 2019 Example",
        "© 2020 某某公司",
        "版权所有 © 2020 某某公司",
        "某某公司 版权所有",
        "Example Ltd. All rights reserved.",
        "首页 > 新闻中心 > 联系我们",
        "首页 新闻中心 联系我们",
        "Home | About us | Contact",
        "[Home] [Search] [Help]",
        "返回顶部",
        "上一篇：某某",
        "Skip to content",
        "We use cookies to improve your experience.",
        "Please enable JavaScript to continue.",
        "京ICP备12345678号",
        "扫一扫关注微信公众号二维码",
        "您的位置：首页 - 新闻",
    ],
)
def test_furniture_goes(line: str) -> None:
    assert clean(f"检查阀门开启。\n{line}\n记录压力。") == "检查阀门开启。\n记录压力。"


@pytest.mark.parametrize(
    "line",
    [
        "详见第 3 页的说明。",
        "See page 3 of the manual.",
        "-12",
        "12",
        "3 / 20",
        "下载",
        "Search",
        "Index",
        "登录",
        "设计压力 .......... 17.2 MPa",
        "环路数 .......... 3",
        "The copyright of 2019 is with the vendor, who may change it",
        "本站使用两台主变压器。",
        "安全注入信号位置：主控室",
        "一回路 > 二回路 > 三回路",
        "1.1 | 2.2 | 3.3",
        "扫描电镜观察断口形貌",
        "       Copyright © 2022 Example.  License GPLv3+: GNU",
        "- 12 -",
        "--3--",
        "当前位置：R1 控制棒组在 200 步",
        "当前位置：P>15.5 MPa",
        "上一页：见图 3",
        "下一章：热工水力设计",
        "上一页",
        "免责声明",
        "Terms and conditions",
        "用手持终端扫描设备二维码，核对编码。",
        "乙方在本合同及其补充协议的整个履行期间内所完成的设计图纸、计算书、程序及其说明，以及由此派生的一切文件，无论是否交付，"
        "也无论以何种形式保存，除双方另有书面约定外，均由委托方享有完整的所有权、使用权和处分权，并由其"
        "登记版权所有。",
        "The viewer shows trends of all channels of the plant computer; where the browser in use "
        "refuses scripts the page stays empty, so enable JavaScript for the address of the server, "
        "restart the browser, log in again and open the trends from the list on the left.",
    ],
)
def test_what_only_resembles_furniture_stays(line: str) -> None:
    text = f"检查阀门开启。\n{line}\n记录压力。"
    assert clean(text) == text


def test_headers_and_footers_go_with_the_page_numbers_beside_them() -> None:
    pages = "\n".join(
        f"某厂 运行规程\n编号 OP-12 版本 A\n第 {i} 页 共 9 页\n步骤 {i} 开阀\n确认\n步骤 {i} 记录"
        for i in range(1, 10)
    )
    text, removed, _ = tidy(pages, remove=LINE_KINDS)
    wanted = "\n".join(f"步骤 {i} 开阀\n确认\n步骤 {i} 记录" for i in range(1, 10))
    assert text == wanted
    assert removed == {"page_numbers": 9, "running_lines": 18}


def test_headers_with_the_page_number_inside_go() -> None:
    pages = "\n".join(f"OP-12 规程 第 {i} 页 共 5 页 版本 A\n正文{i}" for i in range(1, 6))
    assert clean(pages) == "\n".join(f"正文{i}" for i in range(1, 6))


def test_form_feeds_mark_pages() -> None:
    bodies = [f"body of {i}\nand more of {i}\nend {i}" for i in range(5)]
    # The first page has no break before it: its header stays, as the title.
    wanted = "\n".join(["Manual X-1", *bodies])
    assert clean("\f".join(f"Manual X-1\n{body}" for body in bodies)) == wanted


def test_repeated_lines_far_from_page_numbers_stay() -> None:
    records = "\n".join(f"设备 {i}\n失效后果：无\n措施：无\n结论：合格" for i in range(30))
    assert clean(records) == records


def test_tables_of_contents_go_and_lists_with_leaders_stay() -> None:
    contents = "目 录\n1 总则 ........ 1\n1.1 目的 …………… 2\n\n2 系统 . . . . . 5\n附录 A ·····12"
    assert clean(f"{contents}\n正文。") == "正文。"
    falling = "泵 ........ 3\n阀 ........ 2\n罐 ........ 1"
    assert clean(falling) == falling
    two = "泵 ........ 1\n阀 ........ 2"
    assert clean(two) == two


def test_set_values_with_leaders_are_no_table_of_contents() -> None:
    values = "冷却剂温度 ........ 292\n出口温度 .......... 328\n设计温度 .......... 343"
    assert clean(f"设计参数\n{values}\n正文。") == f"设计参数\n{values}\n正文。"
    numbered = "1 入口温度 ........ 292\n2 出口温度 ........ 328\n3 设计温度 ........ 343"
    assert clean(numbered) == numbered
    # The same lines under a heading that says so are one.
    assert clean(f"目录\n{values}\n正文。") == "正文。"


def test_numbers_in_dashes_are_pages_where_they_rise_or_a_page_ends() -> None:
    bodies = ["\n".join(f"{k}.{i} 确认阀门位置并记录。" for i in range(9)) for k in range(5)]
    rising = "\n".join(f"{body}\n- {i} -  " for i, body in enumerate(bodies, 7))
    assert clean(rising) == "\n".join(bodies)
    assert clean(f"{bodies[0]}\n- 7 -\f{bodies[1]}") == f"{bodies[0]}\n{bodies[1]}"
    steps = "\n".join(f"- {i} -\n打开阀门" for i in range(1, 9))
    assert clean(steps) == steps
    values = "\n".join(f"{bodies[i]}\n- {i} -" for i in (0, 4, 3))
    assert clean(values) == values


def test_menus_down_the_page_go_only_as_a_whole() -> None:
    menu = "Home\nNews\nProducts\nSearch"
    assert clean(f"{menu}\nThe pump is running.") == "The pump is running."
    assert clean("Home\nNews\nThe pump is running.") == "Home\nNews\nThe pump is running."


def test_blanks() -> None:
    assert clean("\n\n  a  \t\n\n\n\nb\n\n") == "  a\n\nb"


def test_kinds_can_be_kept() -> None:
    text = "第 3 页\nCopyright 2020 Example"
    assert tidy(text, remove=["copyright"])[0] == "第 3 页"
    assert tidy(text, remove=[])[0] == text


_LINES = st.sampled_from(
    [
        *(
            "",
            "  ",
            "```",
            "~~~~",
            "| a | b |",
            "第 1 页",
            "第 2 页",
            "第 3 页 共 9 页",
            "Page 4",
            "\f",
        ),
        *("标题", "正文", "目录", "一 .... 1", "二 .... 2", "三 .... 9", "四 ...... 3", "正文 "),
        *(
            "首页",
            "News",
            "Search",
            "Back to top",
            "Home | News | Help",
            "© 2020 x",
            "规程 第 1 页 A",
        ),
        *("规程 第 2 页 A", "规程 第 3 页 A", "    code", "+---+", "a\fb"),
        *("- 1 -", "- 2 - ", "\n" * 8 + "- 3 -", "1 总则 .... 1", "2 泵 .... 40", "附录 .... 41"),
    ]
)


@given(st.lists(_LINES | st.text("a \n\f|`第1页"), max_size=40))
def test_tidying_twice_changes_nothing(lines: list[str]) -> None:
    once = clean("\n".join(lines))
    assert tidy(once, remove=LINE_KINDS) == (once, {}, 0)
