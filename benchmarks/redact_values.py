"""Invented persons, numbers and look-alikes for the labelled set of `redact.py`.

Checksums are computed here, not by the code under test. Every value is written in one of the ways
people write it: widths, separators, country codes, line ends.
"""

import random
import re
import string
from collections.abc import Callable

from faker import Faker

_PROVINCES = (
    "11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 61 62 63 65"
)
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_PLATES = "京津沪渝冀豫云辽黑湘皖鲁苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼"
_COMPOUND = ("欧阳", "司马", "上官", "诸葛", "皇甫", "令狐", "慕容")
_FULL_WIDTH = {ord(c): ord(c) + 0xFEE0 for c in string.digits + string.ascii_letters + "@.-"}
_MOBILE_STARTS = (
    "130 131 132 133 134 135 136 137 138 139 147 150 151 152 153 155 156 157 158 159 166 172 173 "
    "175 176 177 178 180 181 182 183 184 185 186 187 188 189 191 193 195 198 199"
).split()
_AREAS = (
    "010 020 021 022 023 024 025 027 028 029 0755 0769 0771 0571 0574 0898 0660 0668 0411"
).split()
_CODE_ALPHABET = "0123456789ABCDEFGHJKLMNPQRTUWXY"
_CODE_WEIGHTS = (1, 3, 9, 27, 19, 26, 16, 17, 20, 29, 25, 13, 8, 24, 10, 30, 28)
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)

_NOT_NAME = (
    "通过",
    "同意",
    "合格",
    "见附件",
    "待定",
    "全部完成",
    "安全质保部",
    "技术部",
    "计划处",
    "金属监督室",
    "水工组",
    "高压试验班",
    "方可执行",
    "项目部",
    "成套公司",
    "管理员",
    "同上",
    "无",
    "不适用",
    "已完成",
    "程序要求",
    "时间安排",
    "符合要求",
    "应急指挥部",
    "全体成员",
    "解决方案",
    "施工单位",
    "和平路",
    "经营部",
    "白班",
    "关键设备",
    "常规岛",
)
_JOB = (
    "水化学工程师",
    "计算机工程师",
    "安全工程师",
    "高级工程师",
    "总工程师",
    "项目经理",
    "计划主管",
    "金属监督主管",
    "管道工程师",
    "运行值长",
    "常务副主任",
    "单元长",
    "施工班长",
    "温控工程师",
    "成本经理",
    "安全总监",
    "计划处处长",
    "党委书记",
    "白班值长",
    "主任工程师",
    "高工",
    "暖通工程师",
    "设备主任工程师",
    "时任厂长",
    "全体老师",
    "工作负责人",
    "值班主任",
    "施工",
    "员工",
)
_NOT_ENGLISH_NAME = (
    "QA Department",
    "Engineering Division",
    "IAEA Secretariat",
    "see Annex A",
    "Safety Committee",
    "N/A",
    "Nuclear Safety Office",
    "Not Applicable",
    "Technical Support",
    "Westinghouse Electric Company",
    "Maintenance Team",
    "Reactor Control System",
    "Main Feedwater Pump",
    "TBD",
)
_DEPARTMENT = (
    "运行部",
    "维修部",
    "技术部",
    "安全质保部",
    "核燃料处",
    "仪控科",
    "电气班",
    "采购中心",
    "工程公司",
    "设计院",
    "培训中心",
    "计划处",
    "金属监督室",
    "化学科",
    "水工组",
)
_SYSTEM = (
    "一回路",
    "安全壳",
    "稳压器",
    "蒸汽发生器",
    "主给水系统",
    "重要厂用水系统",
    "应急柴油机",
    "化学和容积控制系统",
    "海上风机",
    "光伏逆变器",
    "汽轮机",
    "凝汽器",
)


class Values:
    """Draws values by the name of a template's slot.

    Args:
        seed: Of everything drawn.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._chinese, self._english = Faker("zh_CN"), Faker("en_US")
        self._chinese.seed_instance(seed)
        self._english.seed_instance(seed)

    def draw(self, slot: str) -> str:
        """A value for a slot.

        Args:
            slot: Name of a kind, a look-alike or a filler.

        Returns:
            The value as it stands in the text.
        """
        method: Callable[[], str] = getattr(self, slot)
        return method()

    def like(self, *shapes: str) -> str:
        """One of some shapes: % becomes a digit from 1, # any digit, <a b c> one of the words."""
        chosen = self.random.choice(shapes)
        return re.sub("%|#|<([^>]*)>", self._piece, chosen)

    def _piece(self, match: re.Match[str]) -> str:
        if match[1] is not None:
            return self.one_of(match[1])
        return str(self.random.randint(match[0] == "%", 9))

    def digits(self, count: int) -> str:
        """So many random digits, the first not 0."""
        return str(self.random.randrange(10 ** (count - 1), 10**count))

    def number(self, first: int, last: int) -> int:
        """A number from the first to the last."""
        return self.random.randint(first, last)

    def one_of(self, words: str) -> str:
        """One of some words."""
        return self.random.choice(words.split())

    def wide(self, text: str, share: float = 0.08) -> str:
        """Sometimes the same in full-width characters."""
        return text.translate(_FULL_WIDTH) if self.random.random() < share else text

    # What has to be found.

    def name(self) -> str:
        """A Chinese name."""
        name = str(self._chinese.name())
        if self.random.random() < 0.03:
            name = self.random.choice(_COMPOUND) + name[-1]
        return name

    def loose_name(self) -> str:
        """A Chinese name that nothing announces."""
        return self.name()

    def spaced_name(self) -> str:
        """A Chinese name of two characters, set apart to the width of three."""
        name = str(self._chinese.last_name())[:1] + str(self._chinese.first_name())[:1]
        return name[0] + self.random.choice((" ", "  ", "\u3000")) + name[1]

    def english_name(self) -> str:
        """An English name, or a Chinese one in Pinyin."""
        first, last = self._english.first_name(), self._english.last_name()
        pinyin = self.like("<Wei Jian Xiaoming Li Yuhan Guoqiang> <Zhang Wang Li Chen Zhao>")
        return self.random.choice((f"{first} {last}", f"{first[0]}. {last}", pinyin))

    def id_card(self) -> str:
        """An identity number of 18 characters."""
        born = f"{self.number(1945, 2007)}{self.number(1, 12):02}{self.number(1, 28):02}"
        body = f"{self._county()}{born}{self.number(1, 999):03}"
        check = "10X98765432"[sum(int(d) * w for d, w in zip(body, _ID_WEIGHTS, strict=True)) % 11]
        number = body + (check.lower() if self.random.random() < 0.2 else check)
        style = self.random.random()
        if style < 0.65:
            return self.wide(number)
        if style < 0.9:
            return self.random.choice((" ", "-")).join((number[:6], number[6:14], number[14:]))
        cut = self.random.choice((6, 10, 14))
        return number[:cut] + "\n" + number[cut:]

    def old_id_card(self) -> str:
        """An identity number of 15 digits."""
        born = f"{self.number(45, 85)}{self.number(1, 12):02}{self.number(1, 28):02}"
        return f"{self._county()}{born}{self.number(1, 999):03}"

    def _county(self) -> str:
        return f"{self.one_of(_PROVINCES)}{self.number(1, 40):02}{self.number(1, 30):02}"

    def credit_code(self) -> str:
        """A unified social credit code."""
        code = self.like(f"<91 92 93 51 52 12 11 N2 53><{_PROVINCES}>%###")
        code += "".join(self.random.choices(_CODE_ALPHABET, k=9))
        total = sum(_CODE_ALPHABET.index(c) * w for c, w in zip(code, _CODE_WEIGHTS, strict=True))
        code += _CODE_ALPHABET[-total % 31]
        return code.lower() if self.random.random() < 0.04 else self.wide(code)

    def bank_card(self) -> str:
        """A bank card of a Chinese or foreign issuer."""
        if self.random.random() < 0.7:
            start = self.one_of("622202 621700 622848 621661 625955 622588 620522 623052 955880")
            length = 19 if start == "955880" else self.random.choice((16, 19, 19))
        else:
            start, length = self.random.choice((("4", 16), ("52", 16), ("35", 16), ("37", 15)))
        number = start + self.digits(length - 1 - len(start))
        number += _luhn(number)
        style = self.random.random()
        if style < 0.6 or length == 15:
            return self.wide(number)
        separator = " " if style < 0.9 else "-"
        return separator.join(number[i : i + 4] for i in range(0, length, 4))

    def mobile(self) -> str:
        """A mobile number."""
        start = f"<{' '.join(_MOBILE_STARTS)}>"
        plain = f"{start}########"
        shapes = [plain, plain, plain, f"+86{plain}", f"+86 {plain}", f"+86-{plain}", f"86-{plain}"]
        shapes += [f"(+86){plain}", f"0086{plain}", f"+86 {start} #### ####"]
        shapes += [f"{start}{s}####{s}####" for s in ("-", " ", "－", "\u00a0")]
        return self.wide(self.like(*shapes), 0.05)

    def phone(self) -> str:
        """A fixed telephone in China."""
        area = self.one_of(" ".join(_AREAS))
        local = "<2 3 5 6 8>###" + ("####" if area in _AREAS[:14] else "###")
        shapes = [f"{area}-{local}", f"{area}-{local}", f"({area}){local}", f"（{area}）{local}"]
        shapes += [f"{area} {local}", f"{area}－{local}", f"({area}) {local[:14]} {local[14:]}"]
        shapes += [f"+86-{area[1:]}-{local}", f"+86 {area[1:]} {local}"]
        number = self.like(*shapes, "400-%##-####", "400 %## ####")
        extension = self.like("转%###", "-%##", " 转 %##", " ext. %##")
        return number + (extension if self.random.random() < 0.15 else "")

    def local_phone(self) -> str:
        """A telephone without area code, known only by its label."""
        return self.like("<2 3 5 6 8>#######", "<2 3 5 6 8>###-####", "<2 3 5 6 8>### ####")

    def foreign_phone(self) -> str:
        """A telephone abroad."""
        return self.like(
            "+33 <1 4 6> %# ## ## ##",
            "+1-<212 415 617 919>-<2 5 7>##-####",
            "+1 (<212 415 617 919>) <2 5 7>##-####",
            "+44 20 <3 7 8>### ####",
            "+81-3-%###-####",
            "(<212 415 617 919>) <2 5 7>##-####",
        )

    def email(self) -> str:
        """An e-mail address."""
        first, last = self._english.first_name().lower(), self._english.last_name().lower()
        address = self.random.choice(
            (
                str(self._english.email()),
                str(self._chinese.email()),
                self.like(f"{first}.{last}@<cgnpc.com.cn edf.fr powerco.cn nuclear-eng.org>"),
                self.like(f"{first}_%#@<163.com qq.com 126.com mail.tsinghua.edu.cn>"),
                self.like("%########@qq.com"),
            )
        )
        if self.random.random() < 0.06:
            return address.replace("@", self.random.choice(("#", " [at] ", "(at)")))
        return self.wide(address, 0.05)

    def ip(self) -> str:
        """An address of a machine."""
        groups = [f"{self.number(4096, 65535):x}" for _ in range(3)]
        return self.random.choice(
            (
                self.host(),
                f"10.{self.number(0, 255)}.{self.number(0, 255)}.{self.number(1, 254)}",
                str(self._english.ipv4_public()),
                str(self._english.ipv6()),
                f"fe80::{groups[0]}:{groups[1]}:fe{self.number(16, 255):02x}:{groups[2]}",
            )
        )

    def host(self) -> str:
        """An address of a machine in a plant's own network, version 4."""
        network = self.one_of("10.12 192.168 172.20 172.16")
        return f"{network}.{self.number(0, 255)}.{self.number(1, 254)}"

    def mac(self) -> str:
        """A hardware address."""
        pairs = [f"{self.number(0, 255):02x}" for _ in range(5)] + [self.one_of("3c a4 b7 0e f2")]
        text = self.random.choice((":", "-")).join(pairs)
        return text.upper() if self.random.random() < 0.5 else text

    def passport(self) -> str:
        """A passport or permit number."""
        return self.like("<E G E E EA EB D P S H M>%#######")

    def plate(self) -> str:
        """A licence plate."""
        start = self.random.choice(_PLATES) + self.random.choice(_LETTERS)
        letter = self.random.choice(_LETTERS)
        ordinary = (self.like("%####"), letter + self.like("%###"), self.like(f"%#{letter}##"))
        electric = self.like("<D F>%####")
        end = electric if self.random.random() < 0.25 else self.random.choice(ordinary)
        return start + self.random.choice(("", "", "·", " ", "•")) + end

    # What looks like it and must stay.

    def tag(self) -> str:
        """An equipment tag: French trigram or KKS."""
        return self.like(
            "%<RCP RCV RIS RRI SEC ASG EAS VVP LHA>###<PO VP VN MP MT BA EX RF>",
            "%0<LAB JEC MAA PAC>%#<AA AP CT CP>###",
        )

    def date(self) -> str:
        """A date or a time."""
        y, m, d = self.number(1985, 2027), self.number(1, 12), self.number(1, 28)
        h = self.number(0, 23)
        dates = [f"{y}-{m:02}-{d:02}", f"{y}{m:02}{d:02}", f"{y}.{m:02}.{d:02}", f"{y}年{m}月{d}日"]
        dates += [f"{y}{m:02}{d:02}{h:02}1530", f"{y}-{m:02}-{d:02}T{h:02}:15:30.250Z"]
        return self.random.choice([*dates, f"{y}{m:02}{d:02}-{h:02}1530"])

    def setpoint(self) -> str:
        """A set point or a reading."""
        return self.like(
            "15.5# MPa", "<28 29 31 34>#.# ℃", "%### t/h", "1%##.## MW", "%.###############",
            "%.######E-0%", "-%#.########", "1<3 5 8>0 %##0 m³/h",
        )  # fmt: skip

    def figures(self) -> str:
        """A row of figures."""
        rows = ((3, 4, 4, 4), (4, 4, 4, 4, 4), (3, 3, 4), (6, 8, 4), (2, 2, 2, 2, 2, 2))
        separator = self.random.choice(("  ", "\t", " | ", ", "))
        return separator.join(self.digits(width) for width in self.random.choice(rows))

    def order(self) -> str:
        """A number of ten or more digits that is no telephone or card, after its label."""
        labels = ["订单号：", "物料编码 ", "流水号:", "工单编号：", "采购单号 ", "批次号："]
        labels += ["Order No. ", "S/N: ", "P/N ", "Invoice no.: "]
        mobile = f"<{' '.join(_MOBILE_STARTS)}>########"
        shapes = (mobile, "%###########", "%#########", "0##########")
        return self.random.choice(labels) + self.like(
            *shapes, "62##############", "4###############"
        )

    def part(self) -> str:
        """A part or drawing number."""
        return self.like(
            "<DWG PN SN ZK HT>-%###-%###-%##", "<A B K>%##########", "%##-%####-<A B C>##",
            "SN1<3 5 8>%########",
            "6ES7%##-1AB%#-0XA0", "<CGN GNP>%#E%#######", "E%#######",
        )  # fmt: skip

    def book(self) -> str:
        """An ISBN, ISSN, DOI or standard."""
        year = self.number(1985, 2026)
        return self.like(
            "ISBN 978-7-%##-%####-#", f"ISBN {self._english.isbn13(separator='')}",
            "ISSN %###-####", f"doi:10.%###/j.nucengdes.{year}.######", f"GB/T %####-{year}",
            f"GB %###.#-{year}", f"NB/T %####—{year}", "IEC 61513:2011", "RCC-M 2007", "HAF%##",
            f"IEEE Std %##-{year}", f"EJ/T %###-{year}",
        )  # fmt: skip

    def version(self) -> str:
        """A version or section number with four parts."""
        number = ".".join(str(self.number(0, last)) for last in (12, 20, 20, 30))
        return self.random.choice(
            (
                f"v{number}", f"版本 {number}", f"第{number}节", f"version {number}",
                f"{number} 试验准则", f"{number}-rc1", f"见 {number} 条",
            )
        )  # fmt: skip

    def digest(self) -> str:
        """A hash or another identifier of a computer."""
        bits = self.random.getrandbits(256)
        seconds = self.number(1500000000, 1790000000)
        hashes = [f"{bits:064x}", f"{bits >> 96:040x}", f"0x{bits >> 224:08x}"]
        return self.random.choice(
            [*hashes, str(self._english.uuid4()), str(seconds), str(seconds * 1000 + 517)]
        )

    def place(self) -> str:
        """Coordinates."""
        latitude, longitude = self.random.uniform(18, 52), self.random.uniform(75, 134)
        return self.like(f"{latitude:.6f}, {longitude:.6f}", "N22°##'##\" E114°##'##\"")

    def code(self) -> str:
        """A line of a program, or an address of nobody."""
        lines = ["std::vector<int>::iterator it;", "@pytest.mark.skip", "y = W@x.T + b"]
        lines += ["a[1:10:2]", "git@github.com:org/repo.git", "127.0.0.1", "255.255.255.0"]
        return self.random.choice([*lines, "time 12:30:45", "torch==2.11.0", "img@2x.png"])

    def wrong(self) -> str:
        """An identity number with a wrong checksum and no label."""
        text = re.sub(r"[\n -]", "", self.id_card())
        last = text[-1].upper().translate({wide: narrow for narrow, wide in _FULL_WIDTH.items()})
        return text[:-1] + self.random.choice([c for c in "0123456789" if c != last])

    def not_name(self) -> str:
        """What stands after the label of a person and is none."""
        return self.random.choice(_NOT_NAME)

    def job(self) -> str:
        """A title without a name."""
        return self.random.choice(_JOB)

    def not_english_name(self) -> str:
        """The same as `not_name`, in English."""
        return self.random.choice(_NOT_ENGLISH_NAME)

    # What fills the text.

    def department(self) -> str:
        """A department."""
        return self.random.choice(_DEPARTMENT)

    def system(self) -> str:
        """A system of the plant."""
        return self.random.choice(_SYSTEM)

    def company(self) -> str:
        """A company."""
        return str(self._chinese.company())

    def count(self) -> str:
        """A small number."""
        return str(self.number(1, 60))


def _luhn(number: str) -> str:
    doubled = [int(d) * (2 if i % 2 == 0 else 1) for i, d in enumerate(reversed(number))]
    return str(-sum(d - 9 if d > 9 else d for d in doubled) % 10)
