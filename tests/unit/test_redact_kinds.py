"""What is found of each kind and what is left, example by example.

Numbers are invented or published as examples: 11010519491231002X is the one of GB 11643 itself,
91350100M000100Y43 the one of GB 32100, 4111111111111111 the card industry's.
"""

import pytest

from megatron_cgn.config.corpus import RedactConfig
from megatron_cgn.corpus.document import Document
from megatron_cgn.corpus.redact import Redactor, mask

REDACTOR = Redactor(RedactConfig())
WITH_ADDRESSES = Redactor(RedactConfig(kinds=("address",)))

# What has to be found stands between ⟦ and ⟧.
FOUND = [
    ("id_card", "身份证号码：⟦11010519491231002X⟧。"),
    ("id_card", "持⟦11010519491231002x⟧入厂"),
    ("id_card", "（⟦110105 19491231 002X⟧）"),
    ("id_card", "编号1 ⟦110105-19491231-002X⟧"),
    ("id_card", "身份证 ⟦110105194912\n31002X⟧"),
    ("id_card", "⟦１１０１０５１９４９１２３１００２Ｘ⟧"),
    ("id_card", "身份证：⟦110105491231002⟧"),
    # One wrong digit, but the label says what it is.
    ("id_card", "身份证号：⟦110105194912310021⟧"),
    ("credit_code", "信用代码⟦91350100M000100Y43⟧"),
    ("credit_code", "统一社会信用代码：⟦91 3501 00 M000100Y43⟧"),
    ("credit_code", "税号：⟦440300123456789⟧"),
    ("bank_card", "卡号 ⟦4111 1111 1111 1111⟧"),
    ("bank_card", "⟦4111-1111-1111-1111⟧"),
    ("bank_card", "还款到⟦6222021234567890128⟧"),
    ("bank_card", "开户行：中国银行；账号：⟦4400 1234 5678 9012⟧"),
    ("bank_card", "IBAN ⟦GB82 WEST 1234 5698 7654 32⟧"),
    ("passport", "护照号码：⟦E12345678⟧"),
    ("passport", "Passport No. ⟦EA1234567⟧"),
    ("passport", "港澳通行证 ⟦H1234567⟧"),
    ("licence_plate", "车牌⟦粤B12345⟧"),
    ("licence_plate", "停放⟦粤B·D12345⟧、"),
    ("licence_plate", "⟦沪AF12345⟧（新能源）"),
    ("licence_plate", "挂车⟦桂A1234挂⟧"),
    ("mobile", "13800138000".join(("致电⟦", "⟧。"))),
    ("mobile", "⟦+86 138-0013-8000⟧"),
    ("mobile", "⟦0086 13800138000⟧"),
    ("mobile", "⟦(+86)13800138000⟧"),
    ("mobile", "Tel⟦13800138000⟧"),
    ("mobile", "电话：⟦一三八零零一三八零零零⟧"),
    ("mobile", "手机⟦138001\n38000⟧"),
    ("phone", "⟦0755-84430000⟧"),
    ("phone", "⟦（0755）84430000⟧"),
    ("phone", "⟦+86-10-62345678-8012⟧"),
    ("phone", "座机 ⟦010 6234 5678 转 802⟧"),
    ("phone", "热线⟦400-820-8820⟧"),
    ("phone", "电话：⟦84430000⟧"),
    ("phone", "传真 ⟦075584430000⟧"),
    ("phone", "⟦+33 1 42 34 56 78⟧"),
    ("phone", "⟦(212) 555-0123⟧"),
    ("email", "发⟦zhang.san@cgnpc.com.cn⟧。"),
    ("email", "⟦ｚｈａｎｇ＠ｃｇｎ．ｃｏｍ⟧"),
    ("email", "⟦zhang [at] cgn [dot] com⟧"),
    ("email", "⟦zhang at cgn dot com⟧"),
    ("email", "⟦zhang#cgn.com⟧"),
    ("ip", "服务器 ⟦10.1.2.3⟧"),
    ("ip", "⟦192.168.1.20⟧:8080"),
    ("ip", "http://⟦10.8.8.8⟧/"),
    ("ip", "⟦2001:db8:0:1:1:1:1:1⟧"),
    ("ip", "⟦fe80::1ff:fe23:4567:890a⟧"),
    ("mac", "MAC：⟦00:1A:2B:3C:4D:5E⟧"),
    ("mac", "⟦00-1a-2b-3c-4d-5e⟧"),
    ("mac", "物理地址 ⟦001a.2b3c.4d5e⟧"),
    ("name", "编制：⟦王建国⟧　审核：⟦李伟⟧"),
    ("name", "姓名 | ⟦欧阳修文⟧ | 男"),
    ("name", "联系人：⟦李　伟⟧"),
    ("name", "联系人为⟦张三⟧，"),
    ("name", "参会人员：⟦张三⟧、⟦李四⟧（设备部）、工程部、⟦王五⟧"),
    ("name", "| 姓名 | 部门 |\n|---|---|\n| ⟦张三⟧ | 设备部 |\n| ⟦李四⟧ | 安全处 |"),
    ("name", "姓名\t部门\n⟦张三⟧\t设备部"),
    ("name", "部门\t姓名\r\n设备部\t⟦张三⟧\r\n"),
    ("name", "请⟦王⟧先生和⟦赵丽⟧女士到场"),
    ("name", "由⟦赵云龙⟧负责"),
    ("name", "⟦陈明⟧指出，"),
    ("name", "主持人：⟦王建国⟧。会上⟦王建国⟧要求"),
    ("name", "户名：⟦阿卜杜·热合曼⟧"),
    ("name", "吊装指挥：⟦王杨⟧　司索工：⟦陈兰英⟧　吊车"),
    ("name", "风险执行人：⟦钟涛⟧；申诉人⟦钟涛⟧，"),
    ("name", "夜班 ⟦费旭⟧（签字）"),
    ("name", "Best regards,\n⟦Wei Zhang⟧\nSenior Engineer"),
    ("name", "根据⟦司马龙⟧主任的要求"),
    ("name", "姓　　名：⟦张三⟧"),
    ("name", "**联 系 人**：⟦李四⟧"),
    ("name", "负责人：⟦李兰娟⟧ ⟦盛吉芳⟧ ⟦黄建荣⟧\n地理位置"),
    ("name", "请⟦李⟧总、⟦王⟧工、⟦赵⟧主任参加"),
    ("name", "Prepared by: ⟦J. Smith⟧, ⟦Wei Zhang⟧"),
    ("name", "Mr. ⟦Smith⟧ and Dr. ⟦Anne O'Neill⟧"),
    ("name", "**Author**: ⟦Jean-Pierre Dupont⟧"),
]

KEPT = [
    # Numbers of the right shape with a wrong checksum, or none at all.
    "记录 110105194912310021",
    "4111111111111112",
    "91350100M000100Y44",
    "流水 110105491231002",
    "订单号：13800138000",
    "S/N 13800138000",
    "物料编码：4111111111111111",
    "P/N 0755-84430000",
    "A13800138000",
    "PN-13800138000",
    "3.13800138000",
    "138001380001",
    "12800138000",
    "时间戳 1700000000123",
    "130 2000 3500 4200",
    "20261123-103000",
    "GB/T 12345-2018，EJ/T 8415-1999，IEEE Std 603-2018",
    "电话会议纪要 EJ/T 8415-1999",
    "ISBN 978-7-302-51108-9，ISSN 1000-1234",
    "doi:10.1016/j.nucengdes.2020.110743",
    "3.1.2.4 试验准则",
    "第10.1.2.3节，版本 10.8.8.8",
    "v1.2.3.4-rc1",
    "127.0.0.1 255.255.255.0 0.0.0.0",
    "12:30:45 std::vector a[1:10:2]",
    "2026-11-23 10:30:45",
    "AA:BB:CC:DD:EE:FF:00:11:22:33",
    "d41d8cd98f00b204e9800998ecf8427e",
    "550e8400-e29b-41d4-a716-446655440000",
    "1RCP001PO 10LAB45AA426 KZ-0755-84430000",
    "22.547000, 114.085947 1.234567890123456E-05",
    "git@github.com:a/b.git W@x.shape @pytest.mark img@2x.png",
    "更新A12345 最新B12345",
    "审核：通过　批准：同意　编制：技术部",
    "负责人：安全质保部；联系人：高压试验班",
    "经审核批准方可执行，负责编制安全措施",
    "审核：全部完成",
    "高级工程师、总工程师和项目经理参加，由计划处负责",
    "会议指出，公司强调，任务要求",
    "值长应及时汇报主任",
    "Approved by: QA Department. Contact: Customer Service",
    "written by the Monte Carlo code, followed by Figure 3",
    "| Name | Value |\n|---|---|\n| Monte Carlo | 3 |",
    "E12345678 阀门",
    "审核：社交媒体检测标记；入驻审核：设置审核状态",
    "负责人：全栈 Agent，起草：WorkBuddy",
    "申请：安全通道；设计：高温高压；记录：温度、压力",
    "高工、员工、施工、汇总",
    "开户行：工商银行，司索工：合格，员工安全",
    "2.83-2.12 3.51.98.32 2.03",
    "serial AF:A2:8B:B9:33:AD:DA:AC",
    "深圳市福田区深南大道2002号",
]


@pytest.mark.parametrize(("kind", "marked"), FOUND)
def test_found(kind: str, marked: str) -> None:
    text = marked.replace("⟦", "").replace("⟧", "")
    expected = [piece.partition("⟧")[0] for piece in marked.split("⟦")[1:]]
    findings = REDACTOR.find(text)
    assert [text[finding.start : finding.end] for finding in findings] == expected
    assert {finding.kind for finding in findings} == {kind}


@pytest.mark.parametrize("text", KEPT)
def test_kept(text: str) -> None:
    assert [(f.kind, text[f.start : f.end]) for f in REDACTOR.find(text)] == []


def test_addresses_are_found_if_asked_for() -> None:
    text = "住址：深圳市福田区深南大道2002号3栋12层。"
    (finding,) = WITH_ADDRESSES.find(text)
    assert text[finding.start : finding.end] == "深圳市福田区深南大道2002号3栋12层"


def test_replacements_are_counted_and_the_rest_stays() -> None:
    document = Document(id="a", text="甲：13800138000，乙：13900139000，a@b.com\n", source="s")
    outcome = REDACTOR(document)
    assert outcome.text == "甲：[手机号]，乙：[手机号]，[邮箱]\n"
    assert outcome.changes == {"redact/mobile": 2, "redact/email": 1}
    assert outcome.reason is None


def test_a_document_of_too_many_findings_is_dropped_if_asked_for() -> None:
    document = Document(id="a", text="13800138000 和 13900139000", source="s")
    assert Redactor(RedactConfig(max_findings=2))(document).text is not None
    outcome = Redactor(RedactConfig(max_findings=1))(document)
    assert outcome.text is None
    assert outcome.reason == "redact/too_many"
    assert outcome.evidence == "2 findings; at most redact.max_findings=1"


def test_ignored_values_stay_however_they_are_written() -> None:
    redactor = Redactor(RedactConfig(ignore=("400-820-8820", "Info@CGN.com")))
    text = "热线400 820 8820、４００－８２０－８８２０，info@cgn.com，400-820-8821"
    assert [text[f.start : f.end] for f in redactor.find(text)] == ["400-820-8821"]


def test_only_the_kinds_asked_for() -> None:
    redactor = Redactor(RedactConfig(kinds=("phone",)))
    text = "13800138000，0755-84430000，a@b.com"
    assert [finding.kind for finding in redactor.find(text)] == ["phone"]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("13800138000", "13*********"),
        ("王建国", "***"),
        ("a@bc", "a***"),
        ("x" * 40, "xxx" + "*" * 37),
    ],
)
def test_masking(text: str, masked: str) -> None:
    assert mask(text) == masked
