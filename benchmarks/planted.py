"""Planted duplicates and look-alikes, for measuring deduplication.

Copies are edited until the true Jaccard similarity of their n-grams is what was asked for.
Records of one form, which differ in tags, dates and values alone, are look-alikes to keep.
"""

import random
import re
from collections.abc import Callable, Sequence

Edit = Callable[[str, float, random.Random, Sequence[str]], str]
Similarity = Callable[[str, str], float]

TOLERANCE = 0.015
_TOKEN = re.compile(r"[\u3400-\u9fff]|[^\W_]+|\s+|.", re.S)
_SENTENCE = re.compile(r"[^。！？.!?\n]*[。！？.!?\n]+|[^。！？.!?\n]+$")
# Pairs that scanners take for each other.
_CONFUSED = dict(zip("lI0O1BcehSZg", "1lOIl8ecb529", strict=True))
_CONFUSED |= dict(zip("己未土日入大目工末千", "已末士曰人太自土未干", strict=True))


def substitute(text: str, strength: float, rng: random.Random, others: Sequence[str]) -> str:
    """Replace tokens by tokens of another document."""
    pick = _other_source(rng)
    foreign = _words(pick.choice(others))
    return "".join(
        pick.choice(foreign) if _is_word(t) and rng.random() < strength else t
        for t in _TOKEN.findall(text)
    )


def insert(text: str, strength: float, rng: random.Random, others: Sequence[str]) -> str:
    """Insert tokens of another document."""
    pick = _other_source(rng)
    foreign = _words(pick.choice(others))
    return "".join(
        f"{t} {pick.choice(foreign)} " if rng.random() < strength else t
        for t in _TOKEN.findall(text)
    )


def delete(text: str, strength: float, rng: random.Random, others: Sequence[str]) -> str:
    """Delete tokens."""
    return "".join(t for t in _TOKEN.findall(text) if not (_is_word(t) and rng.random() < strength))


def scan(text: str, strength: float, rng: random.Random, others: Sequence[str]) -> str:
    """Confuse, lose and replace characters, as a scanner does."""
    pick = _other_source(rng)
    out = []
    for character in text:
        if rng.random() >= strength:
            out.append(character)
        elif character in _CONFUSED:
            out.append(_CONFUSED[character])
        elif pick.random() < 0.7 and not character.isspace():
            out.append(pick.choice(text))
    return "".join(out)


def sentences(text: str, strength: float, rng: random.Random, others: Sequence[str]) -> str:
    """Replace whole sentences by those of another document."""
    pick = _other_source(rng)
    foreign = _SENTENCE.findall(pick.choice(others)) or [pick.choice(others)]
    return "".join(
        pick.choice(foreign) if rng.random() < strength else s for s in _SENTENCE.findall(text)
    )


def reorder(text: str, strength: float, rng: random.Random, others: Sequence[str]) -> str:
    """Cut into pieces anywhere between tokens, and shuffle them."""
    pick = _other_source(rng)
    tokens = _TOKEN.findall(text)
    cuts = [0, *(i for i in range(1, len(tokens)) if rng.random() < strength), len(tokens)]
    pieces = ["".join(tokens[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    pick.shuffle(pieces)
    return "\n".join(pieces)


def frame(text: str, strength: float, rng: random.Random, others: Sequence[str]) -> str:
    """Add a header and a footer from another document."""
    size = int(strength * len(text))
    foreign = rng.choice(others)
    return f"{foreign[:size]}\n{text}\n{foreign[-size - 1 :]}"


def _other_source(rng: random.Random) -> random.Random:
    """Where what is put in is drawn from, so that more edits contain the fewer ones."""
    return random.Random(rng.random())


EDITS: dict[str, Edit] = {
    "tokens replaced": substitute,
    "tokens inserted": insert,
    "tokens deleted": delete,
    "sentences replaced": sentences,
    "pieces reordered": reorder,
    "header and footer added": frame,
    "scanner's errors": scan,
}


def plant(
    text: str,
    edit: Edit,
    *,
    target: float,
    similarity: Similarity,
    seed: int,
    others: Sequence[str],
) -> tuple[str, float] | None:
    """Edit a copy until it is as similar as wanted.

    Args:
        text: The original.
        edit: How to edit.
        target: Wanted similarity.
        similarity: Measure of two texts.
        seed: Of the edits.
        others: Documents that foreign text is from.

    Returns:
        The copy and its similarity, within `TOLERANCE`; None if none was found.
    """
    for attempt in range(4):
        low, high = 0.0, 1.0
        for _ in range(16):
            strength = (low + high) / 2
            copy = edit(text, strength, random.Random(f"{seed}/{attempt}"), others)
            found = similarity(text, copy)
            if abs(found - target) <= TOLERANCE:
                return copy, found
            low, high = (strength, high) if found > target else (low, strength)
    return None


def _is_word(token: str) -> bool:
    return token[0].isalnum()


def _words(text: str) -> list[str]:
    return [token for token in _TOKEN.findall(text) if _is_word(token)] or ["x"]


def records(kind: str, count: int, seed: int) -> list[str]:
    """Make records of one form that differ in what `FORMS` says of it.

    Args:
        kind: A key of `FORMS`.
        count: How many.
        seed: Of the values.

    Returns:
        Their texts, no two of them with the same values.
    """
    form, varying = FORMS[kind]
    rng = random.Random(f"{kind}/{seed}")
    constant = _values(random.Random(kind))
    made: dict[str, None] = {}
    while len(made) < count:
        values = _values(rng)
        made[form.format(**constant | {name: values[name] for name in varying})] = None
    return list(made)


def _values(rng: random.Random) -> dict[str, str]:
    """Draw tag, date, time, readings and so on of one record."""
    system = rng.choice(("RCV", "RRA", "ASG", "SEC", "ARE", "RIS", "EAS", "PTR"))
    kind = rng.choice(("PO", "VP", "MO", "MP", "MT", "LP"))
    return {
        "tag": f"{rng.randint(1, 4)}{system}{rng.randint(1, 999):03d}{kind}",
        "date": f"20{rng.randint(10, 26)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        "zh_date": f"20{rng.randint(10, 26)}年{rng.randint(1, 12)}月{rng.randint(1, 28)}日",
        "time": f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}",
        "pressure": f"{rng.uniform(1, 16):.2f}",
        "vibration": f"{rng.uniform(0.5, 7):.2f}",
        "temperature": f"{rng.uniform(20, 90):.1f}",
        "order": f"WO{rng.randint(10**7, 10**8 - 1)}",
        "person": "".join(rng.choice(p) for p in ("王李张刘陈杨赵黄周吴", _GIVEN, _GIVEN)),
        "remark": "".join(rng.sample(_REMARKS, 2)),
        "serial": f"SN{rng.randint(10**5, 10**6 - 1)}",
    }


_GIVEN = "伟芳娜敏静丽强磊军洋勇艳杰娟涛明超秀霞平刚桂英华玉兰飞鹏辉建国"
_REMARKS = [
    "现场发现基座有少量油迹，已擦拭，需继续跟踪。",
    "联轴器护罩螺栓缺失一颗，已补装。",
    "保温层局部破损，已提缺陷工单处理。",
    "就地压力表指示偏低，与主控显示不一致，已通知仪控校验。",
    "无异常。",
    "起动时有轻微异音，运行十分钟后消失。",
    "冷却水流量偏小，清洗滤网后恢复。",
    "更换了磨损的轴套，备件来自库存。",
]
_SHORT = (
    "设备位号{tag}，{date}执行预防性维修，工作负责人{person}，工单号{order}。"
    "检查机械密封无泄漏，润滑油位正常，出口压力{pressure}MPa，轴承振动{vibration}mm/s，轴承温度{temperature}℃，试运行合格，恢复备用。"
)
_LONG = (
    "预防性维修记录单\n工单号：{order}　设备位号：{tag}　执行日期：{zh_date}\n"
    "一、工作前准备：核对设备位号与工单一致，确认隔离措施已执行，挂牌上锁完成，工作许可证已签发，"
    "辐射防护员已测量现场剂量率并划定控制边界，工器具检定合格且在有效期内，备件经质量检验合格。\n"
    "二、工作内容：1. 拆卸联轴器护罩，测量对中偏差，偏差不大于0.05mm；"
    "2. 检查机械密封动静环表面无裂纹、无划痕；"
    "3. 更换润滑油，油品为L-TSA46，加注量12L；"
    "4. 检查轴承游隙，游隙应在0.10mm至0.18mm之间；5. 紧固地脚螺栓，力矩"
    "220N·m；6. 清洁泵体表面，检查防腐涂层完整。\n三、试验：起动后连续运行30min，出口压力"
    "{pressure}MPa，轴承振动{vibration}mm/s，轴承温度{temperature}℃，无异音，无泄漏，符合GB/T "
    "3215-2007及规程QP-101第3版的要求。\n四、结论：设备状态良好，恢复备用，工作现场已清理，隔离已解除，"
    "记录已归档。异物管控检查合格。\n工作负责人：{person}　备注：{remark}"
)
_ENGLISH = (
    "Work order {order}. Equipment {tag}. Performed on {date} at {time}. The pump was isolated and "
    "drained, the mechanical seal was inspected and found free of leaks, the coupling alignment "
    "was checked against the limit of 0.05 mm, and the oil was replaced with 12 L of ISO VG 46. "
    "During the test run of 30 minutes the discharge pressure was {pressure} MPa, the bearing "
    "vibration {vibration} mm/s and the bearing temperature {temperature} C, all within the limits "
    "of procedure QP-101 revision 3. The equipment was returned to service and the work area was "
    "cleaned. No foreign material was found. The shift supervisor was informed."
)
_SHEET = (
    "设备数据表 位号{tag} 出厂编号{serial} 型式：卧式多级离心泵 额定流量34.5m³/h 额定扬程1770m "
    "转速4480r/min 轴功率340kW 电机功率450kW 电压6600V 频率50Hz "
    "设计压力21.2MPa 设计温度121℃ 必需汽蚀余量7.6m "
    "泵体材料Z2CN18-10 叶轮材料Z5CND13-04 轴材料42CrMo4 密封型式：集装式机械密封 "
    "冷却水流量4.5m³/h 冷却水压力0.85MPa 润滑油L-TSA46 油量160L "
    "重量3850kg 抗震等级1类 安全等级2级 质保等级Q1 "
    "设计规范RCC-M-2000 检验规范GB/T 5657-2013 设计寿命40年"
)
_ALL = ("tag", "date", "zh_date", "time", "pressure", "vibration", "temperature", "order", "serial")

FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "short record, all values differ": (_SHORT, _ALL),
    "short record, all values and person differ": (_SHORT, (*_ALL, "person")),
    "short record, tag and date differ": (_SHORT, ("tag", "date")),
    "short record, tag differs": (_SHORT, ("tag",)),
    "short record, one reading differs": (_SHORT, ("pressure",)),
    "long record, all values differ": (_LONG, _ALL),
    "long record, tag and date differ": (_LONG, ("tag", "zh_date")),
    "long record, tag differs": (_LONG, ("tag",)),
    "long record, tag, date and person differ": (_LONG, ("tag", "zh_date", "person")),
    "long record, tag, date and remark differ": (_LONG, ("tag", "zh_date", "remark")),
    "long record, everything differs": (_LONG, (*_ALL, "person", "remark")),
    "English record, all values differ": (_ENGLISH, _ALL),
    "English record, tag and date differ": (_ENGLISH, ("tag", "date")),
    "English record, tag differs": (_ENGLISH, ("tag",)),
    "data sheet, tag and serial differ": (_SHEET, ("tag", "serial")),
}
