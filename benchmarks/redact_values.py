"""Invented persons, numbers and look-alikes for the labelled set of `redact.py`.

Checksums are computed here, not by the code under test. Every value is written in one of the ways
people write it: widths, separators, country codes, line ends.
"""

import random
import string
from collections.abc import Callable

from faker import Faker

_PROVINCES = (
    "11 12 13 14 15 21 22 23 31 32 33 34 35 36 37 41 42 43 44 45 46 50 51 52 53 61 62 63 65"
)
_COMPOUND = ("欧阳", "司马", "上官", "诸葛", "皇甫", "令狐", "慕容")
_FULL_WIDTH = {ord(c): ord(c) + 0xFEE0 for c in string.digits + string.ascii_letters + "@.-"}
_MOBILE_STARTS = (
    "130 131 132 133 134 135 136 137 138 139 147 150 151 152 153 155 156 157 158 159 166 172 173 "
    "175 176 177 178 180 181 182 183 184 185 186 187 188 189 191 193 195 198 199"
).split()
_AREAS = (
    "010 020 021 022 023 024 025 027 028 029 0755 0769 0771 0571 0574 0898 0660 0668 0411".split()
)
_CODE_ALPHABET = "0123456789ABCDEFGHJKLMNPQRTUWXY"
_CODE_WEIGHTS = (1, 3, 9, 27, 19, 26, 16, 17, 20, 29, 25, 13, 8, 24, 10, 30, 28)
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


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

    def digits(self, count: int) -> str:
        """So many random digits, the first not 0."""
        return str(self.random.randrange(10 ** (count - 1), 10**count))

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

    def spaced_name(self) -> str:
        """A Chinese name of two characters, set apart to the width of three."""
        name = str(self._chinese.last_name())[:1] + str(self._chinese.first_name())[:1]
        return name[0] + self.random.choice((" ", "  ", "\u3000")) + name[1]

    def english_name(self) -> str:
        """An English name, or a Chinese one in Pinyin."""
        first, last = self._english.first_name(), self._english.last_name()
        pinyin = f"{self.one_of('Wei Jian Xiaoming Li Yuhan Guoqiang')} {self.one_of('Zhang Wang Li Chen Zhao')}"
        return self.random.choice((f"{first} {last}", f"{first[0]}. {last}", pinyin))

    def id_card(self) -> str:
        """An identity number of 18 characters."""
        year, month, day = (
            self.random.randint(1945, 2007),
            self.random.randint(1, 12),
            self.random.randint(1, 28),
        )
        body = f"{self.one_of(_PROVINCES)}{self.random.randint(1, 40):02}{self.random.randint(1, 30):02}"
        body += f"{year}{month:02}{day:02}{self.random.randint(1, 999):03}"
        check = "10X98765432"[sum(int(d) * w for d, w in zip(body, _ID_WEIGHTS, strict=True)) % 11]
        number = body + (check.lower() if self.random.random() < 0.2 else check)
        groups = (number[:6], number[6:14], number[14:])
        style = self.random.random()
        if style < 0.65:
            return self.wide(number)
        if style < 0.9:
            return self.random.choice((" ", "-")).join(groups)
        cut = self.random.choice((6, 10, 14))
        return number[:cut] + "\n" + number[cut:]

    def old_id_card(self) -> str:
        """An identity number of 15 digits."""
        number = f"{self.one_of(_PROVINCES)}{self.random.randint(1, 40):02}{self.random.randint(1, 30):02}"
        number += f"{self.random.randint(45, 85)}{self.random.randint(1, 12):02}{self.random.randint(1, 28):02}"
        return number + f"{self.random.randint(1, 999):03}"

    def credit_code(self) -> str:
        """A unified social credit code."""
        code = self.one_of("91 92 93 51 52 12 11 N2 53") + self.one_of(_PROVINCES) + self.digits(4)
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
        number = self.one_of(" ".join(_MOBILE_STARTS)) + self.digits(8)
        a, b, c = number[:3], number[3:7], number[7:]
        return self.random.choice(
            (
                number, number, number, self.wide(number, 0.5), f"{a}-{b}-{c}", f"{a} {b} {c}", f"+86{number}",
                f"+86 {number}", f"+86-{number}", f"86-{number}", f"(+86){number}", f"+86 {a} {b} {c}",
                f"0086{number}", f"{a}－{b}－{c}", f"{a}\u00a0{b}\u00a0{c}",
            )
        )  # fmt: skip

    def phone(self) -> str:
        """A fixed telephone in China."""
        area, local = self.one_of(" ".join(_AREAS)), self.one_of("2 3 5 6 8")
        local += self.digits(7 if area in _AREAS[:14] else 6)
        short = area[1:]
        number = self.random.choice(
            (
                f"{area}-{local}", f"{area}-{local}", f"({area}){local}", f"（{area}）{local}", f"{area} {local}",
                f"+86-{short}-{local}", f"+86 {short} {local}", f"({area}) {local[:4]} {local[4:]}",
                f"{area}－{local}", f"400-{self.digits(3)}-{self.digits(4)}", f"400 {self.digits(3)} {self.digits(4)}",
            )
        )  # fmt: skip
        extension = self.random.choice(
            (
                f"转{self.digits(4)}",
                f"-{self.digits(3)}",
                f" 转 {self.digits(3)}",
                f" ext. {self.digits(3)}",
            )
        )
        return number + (extension if self.random.random() < 0.15 else "")

    def local_phone(self) -> str:
        """A telephone without area code, known only by its label."""
        local = self.one_of("2 3 5 6 8") + self.digits(7)
        return self.random.choice((local, f"{local[:4]}-{local[4:]}", f"{local[:4]} {local[4:]}"))

    def foreign_phone(self) -> str:
        """A telephone abroad."""
        return self.random.choice(
            (
                f"+33 {self.one_of('1 4 6')} {self.digits(2)} {self.digits(2)} {self.digits(2)} {self.digits(2)}",
                f"+1-{self.random.randint(212, 919)}-{self.random.randint(200, 999)}-{self.digits(4)}",
                f"+1 ({self.random.randint(212, 919)}) {self.random.randint(200, 999)}-{self.digits(4)}",
                f"+44 20 {self.digits(4)} {self.digits(4)}", f"+81-3-{self.digits(4)}-{self.digits(4)}",
                f"({self.random.randint(212, 919)}) {self.random.randint(200, 999)}-{self.digits(4)}",
            )
        )  # fmt: skip

    def email(self) -> str:
        """An e-mail address."""
        address = self.random.choice(
            (
                str(self._english.email()), str(self._chinese.email()),
                f"{self._english.first_name().lower()}.{self._english.last_name().lower()}@{self.one_of('cgnpc.com.cn edf.fr powerco.cn nuclear-eng.org')}",
                f"{self._english.user_name()}_{self.digits(2)}@{self.one_of('163.com qq.com 126.com mail.tsinghua.edu.cn')}",
                f"{self.digits(9)}@qq.com",
            )
        )  # fmt: skip
        if self.random.random() < 0.06:
            return address.replace("@", self.random.choice(("#", " [at] ", "(at)")))
        return self.wide(address, 0.05)

    def ip(self) -> str:
        """An address of a machine."""
        r = self.random.randint
        return self.random.choice(
            (
                f"192.168.{r(0, 255)}.{r(1, 254)}", f"10.{r(0, 255)}.{r(0, 255)}.{r(1, 254)}",
                f"172.{r(16, 31)}.{r(0, 255)}.{r(1, 254)}", str(self._english.ipv4_public()), str(self._english.ipv6()),
                f"fe80::{r(4096, 65535):x}:{r(4096, 65535):x}:fe{r(16, 255):02x}:{r(4096, 65535):x}",
            )
        )  # fmt: skip

    def host(self) -> str:
        """An address of a machine, version 4."""
        r = self.random.randint
        return f"{self.one_of('10.12 192.168 172.20')}.{r(0, 255)}.{r(1, 254)}"

    def mac(self) -> str:
        """A hardware address."""
        pairs = [f"{self.random.randint(0, 255):02x}" for _ in range(5)] + [
            self.one_of("3c a4 b7 0e f2")
        ]
        text = self.random.choice((":", "-")).join(pairs)
        return text.upper() if self.random.random() < 0.5 else text

    def passport(self) -> str:
        """A passport or permit number."""
        return self.one_of("E G E E EA EB D P S H M") + self.digits(8)

    def plate(self) -> str:
        """A licence plate."""
        letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
        start = self.random.choice(
            "京津沪渝冀豫云辽黑湘皖鲁苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼"
        ) + self.random.choice(letters)
        ends = (
            self.digits(5),
            self.random.choice(letters) + self.digits(4),
            self.digits(2) + self.random.choice(letters) + self.digits(2),
        )
        electric = self.random.choice("DF") + self.digits(5)
        end = electric if self.random.random() < 0.25 else self.random.choice(ends)
        return start + self.random.choice(("", "", "·", " ", "•")) + end

    # What looks like it and must stay.

    def tag(self) -> str:
        """An equipment tag: French trigram or KKS."""
        return self.random.choice(
            (
                f"{self.random.randint(1, 8)}{self.one_of('RCP RCV RIS RRI SEC ASG EAS VVP LHA')}{self.random.randint(1, 999):03}{self.one_of('PO VP VN MP MT BA EX RF')}",
                f"{self.random.randint(1, 4)}0{self.one_of('LAB JEC MAA PAC')}{self.random.randint(10, 99)}{self.one_of('AA AP CT CP')}{self.random.randint(1, 999):03}",
            )
        )  # fmt: skip

    def date(self) -> str:
        """A date or a time."""
        y, m, d, h = (
            self.random.randint(1985, 2027),
            self.random.randint(1, 12),
            self.random.randint(1, 28),
            self.random.randint(0, 23),
        )
        return self.random.choice(
            (f"{y}-{m:02}-{d:02}", f"{y}{m:02}{d:02}", f"{y}.{m:02}.{d:02}", f"{y}年{m}月{d}日", f"{y}{m:02}{d:02}{h:02}1530", f"{y}-{m:02}-{d:02}T{h:02}:15:30.250Z", f"{y}{m:02}{d:02}-{h:02}1530")
        )  # fmt: skip

    def setpoint(self) -> str:
        """A set point or a reading."""
        return self.random.choice(
            (
                f"15.5{self.digits(1)} MPa", f"{self.random.randint(280, 345)}.{self.digits(1)} ℃", f"{self.digits(4)} t/h", f"1{self.digits(3)}.{self.digits(2)} MW",
                f"{self.digits(1)}.{self.digits(15)}", f"{self.digits(1)}.{self.digits(6)}E-0{self.digits(1)}", f"-{self.digits(2)}.{self.digits(8)}", f"1{self.one_of('3 5 8')}0 {self.digits(3)}0 m³/h",
            )
        )  # fmt: skip

    def figures(self) -> str:
        """A row of figures."""
        widths = self.random.choice(
            ((3, 4, 4, 4), (4, 4, 4, 4, 4), (3, 3, 4), (6, 8, 4), (2, 2, 2, 2, 2, 2))
        )
        return self.random.choice(("  ", "\t", " | ", ", ")).join(self.digits(w) for w in widths)

    def order(self) -> str:
        """A number of eleven or more digits that is no telephone, after its label."""
        label = self.random.choice(
            (
                "订单号：",
                "物料编码 ",
                "流水号:",
                "工单编号：",
                "采购单号 ",
                "批次号：",
                "Order No. ",
                "S/N: ",
                "P/N ",
                "Invoice no.: ",
            )
        )
        return label + self.random.choice(
            (
                self.one_of(" ".join(_MOBILE_STARTS)) + self.digits(8),
                self.digits(12),
                self.digits(10),
                "0" + self.digits(10),
                "62" + self.digits(14),
                "4" + self.digits(15),
            )
        )

    def part(self) -> str:
        """A part or drawing number."""
        return self.random.choice(
            (
                f"{self.one_of('DWG PN SN ZK HT')}-{self.digits(4)}-{self.digits(4)}-{self.digits(3)}", f"{self.one_of('A B K')}{self.digits(11)}",
                f"{self.digits(3)}-{self.digits(5)}-{self.one_of('A B C')}{self.digits(2)}", f"6ES7{self.digits(3)}-1AB{self.digits(2)}-0XA0", f"{self.one_of('CGN GNP')}{self.digits(2)}E{self.digits(8)}",
                f"SN1{self.one_of('3 5 8')}{self.digits(9)}", f"E{self.digits(8)}",
            )
        )  # fmt: skip

    def book(self) -> str:
        """An ISBN, ISSN, DOI or standard."""
        return self.random.choice(
            (
                f"ISBN 978-7-{self.digits(3)}-{self.digits(5)}-{self.digits(1)}", f"ISBN {self._english.isbn13(separator='')}", f"ISSN {self.digits(4)}-{self.digits(4)}",
                f"doi:10.{self.digits(4)}/j.nucengdes.{self.random.randint(2001, 2026)}.{self.digits(6)}", f"GB/T {self.digits(5)}-{self.random.randint(1990, 2025)}", f"GB {self.digits(4)}.{self.digits(1)}-2016",
                f"NB/T {self.digits(5)}—2019", "IEC 61513:2011", "RCC-M 2007", f"HAF{self.digits(3)}", f"IEEE Std {self.digits(3)}-2018", f"EJ/T {self.digits(4)}-1999",
            )
        )  # fmt: skip

    def version(self) -> str:
        """A version or section number with four parts."""
        r = self.random.randint
        number = f"{r(1, 12)}.{r(0, 20)}.{r(0, 20)}.{r(0, 30)}"
        return self.random.choice(
            (
                f"v{number}",
                f"版本 {number}",
                f"第{number}节",
                f"version {number}",
                f"{number} 试验准则",
                f"{number}-rc1",
                f"见 {number} 条",
            )
        )

    def digest(self) -> str:
        """A hash or another identifier of a computer."""
        return self.random.choice(
            (
                f"{self.random.getrandbits(160):040x}", f"{self.random.getrandbits(256):064x}", str(self._english.uuid4()), f"0x{self.random.getrandbits(32):08x}",
                str(self.random.randint(1500000000000, 1790000000000)), str(self.random.randint(1500000000, 1790000000)),
            )
        )  # fmt: skip

    def place(self) -> str:
        """Coordinates."""
        return self.random.choice(
            (
                f"{self.random.uniform(18, 52):.6f}, {self.random.uniform(75, 134):.6f}",
                f"N22°{self.digits(2)}'{self.digits(2)}\" E114°{self.digits(2)}'{self.digits(2)}\"",
            )
        )

    def code(self) -> str:
        """A line of a program."""
        return self.random.choice(
            (
                "std::vector<int>::iterator it;",
                "@pytest.mark.skip",
                "y = W@x.T + b",
                "a[1:10:2]",
                "git@github.com:org/repo.git",
                "127.0.0.1",
                "255.255.255.0",
                "time 12:30:45",
                "torch==2.11.0",
                "img@2x.png",
            )
        )

    def wrong(self) -> str:
        """An identity or card number with a wrong checksum and no label."""
        text = self.id_card().replace("\n", "").replace(" ", "").replace("-", "")
        last = text[-1].upper().translate({v: k for k, v in _FULL_WIDTH.items()})
        return text[:-1] + self.random.choice([c for c in "0123456789" if c != last])

    def not_name(self) -> str:
        """What stands after the label of a person and is none."""
        return self.one_of(
            "通过 同意 合格 见附件 待定 全部完成 安全质保部 技术部 计划处 金属监督室 水工组 高压试验班 方可执行 项目部 成套公司 管理员 同上 无 不适用 已完成 程序要求 时间安排 符合要求 应急指挥部 全体成员 解决方案 施工单位 和平路 经营部 白班 关键设备 常规岛"
        )

    def job(self) -> str:
        """A title without a name."""
        return self.one_of(
            "水化学工程师 计算机工程师 安全工程师 高级工程师 总工程师 项目经理 计划主管 金属监督主管 管道工程师 运行值长 常务副主任 单元长 施工班长 温控工程师 成本经理 安全总监 计划处处长 党委书记 白班值长 主任工程师 高工 暖通工程师 设备主任工程师 时任厂长 全体老师 工作负责人 值班主任 施工 员工"
        )

    def not_english_name(self) -> str:
        """The same in English."""
        return self.random.choice(
            (
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
        )

    # What fills the text.

    def company(self) -> str:
        """A company."""
        return str(self._chinese.company())

    def english_company(self) -> str:
        """A company."""
        return str(self._english.company())

    def department(self) -> str:
        """A department."""
        return self.one_of(
            "运行部 维修部 技术部 安全质保部 核燃料处 仪控科 电气班 采购中心 工程公司 设计院 培训中心 计划处 金属监督室 化学科 水工组"
        )

    def system(self) -> str:
        """A system of the plant."""
        return self.one_of(
            "一回路 安全壳 稳压器 蒸汽发生器 主给水系统 重要厂用水系统 应急柴油机 化学和容积控制系统 海上风机 光伏逆变器 汽轮机 凝汽器"
        )

    def count(self) -> str:
        """A small number."""
        return str(self.random.randint(1, 60))


def _luhn(number: str) -> str:
    doubled = [int(d) * (2 if i % 2 == 0 else 1) for i, d in enumerate(reversed(number))]
    return str(-sum(d - 9 if d > 9 else d for d in doubled) % 10)
