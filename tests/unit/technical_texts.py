"""Texts such as plants have, all of which must come through cleaning as they are.

They were written for these tests: no figure or name in them is of a real plant.
"""

import random

PROCEDURE_ZH = """3.2 启动前检查

1. 确认 1RCP001PO 冷却水阀 1RRI031VN 在开启位置。
2. 确认 1RCP001PO 轴封注入流量在 1.5～2.5 m³/h 之间。
3. 确认主控室无 1RCP001AA 报警。
   a) 如有报警，执行规程 I-RCP-001；
   b) 如报警不消失，返回步骤 1。
4. 确认一回路压力大于 2.4 MPa（表压），温度小于 180℃。
注意：严禁在轴封注入中断的情况下启动主泵。"""

ALARMS_ZH = """报警号 名称 定值 处理
1RCP001AA 主泵 A 轴封泄漏流量高 >300 L/h 见卡片 1
1RCP002AA 主泵 B 轴封泄漏流量高 >300 L/h 见卡片 1
1RCP003AA 主泵 C 轴封泄漏流量高 >300 L/h 见卡片 1
1RCP011AA 主泵 A 电机绕组温度高 >120℃ 见卡片 2
1RCP012AA 主泵 B 电机绕组温度高 >120℃ 见卡片 2
1RCP013AA 主泵 C 电机绕组温度高 >120℃ 见卡片 2
1RCV001AA 容控箱液位低 <0.8 m 见卡片 3
1RCV002AA 容控箱压力高 >0.35 MPa 见卡片 3
1ASG001AA 辅助给水箱液位低 <5.2 m 见卡片 4"""

ALARMS_EN = """ALARM LIST  PANEL 5
RCP-A SEAL LEAKOFF FLOW HIGH      300 L/h
RCP-B SEAL LEAKOFF FLOW HIGH      300 L/h
RCP-C SEAL LEAKOFF FLOW HIGH      300 L/h
SG-A NARROW RANGE LEVEL LOW-LOW   13 %
SG-B NARROW RANGE LEVEL LOW-LOW   13 %
PRZR PRESS HIGH RX TRIP           16.5 MPa
CVCS LETDOWN HX OUTLET TEMP HIGH  57 degC
DG-1 LUBE OIL PRESSURE LOW        0.2 MPa"""

PARAMETERS = """| 参数 | 符号 | 数值 | 单位 |
|------|:----:|-----:|------|
| 堆芯额定热功率 | Q | 2895 | MW |
| 一回路压力 | p | 15.5 | MPa |
| 冷却剂平均温度 | T_avg | 310.0 | ℃ |
| 冷却剂流量 | G | 6.82×10⁴ | m³/h |
| 燃料富集度 | e | 4.45 | % |
| 线功率密度 | q | 186 | W/cm |"""

NUMBERS = """时间/s  压力/MPa  温度/℃  流量/(kg/s)
0.0  15.50  292.7  4743
1.0  15.42  292.9  4740
2.0  15.31  293.4  4731
5.0  14.87  295.0  4698
10.0  13.92  298.2  4611
20.0  12.40  301.7  4402"""

RST = """Materials
=========

+-----------+---------+----------+
| Nuclide   | Percent | Type     |
+===========+=========+==========+
| U235      |    4.45 | wo       |
+-----------+---------+----------+
| U238      |   95.55 | wo       |
+-----------+---------+----------+

=====  =====  ======
A      B      A or B
=====  =====  ======
False  False  False
True   False  True
=====  =====  ======

.. code-block:: python

    fuel = openmc.Material(name="uo2")
    fuel.add_nuclide("U235", 0.03)
    if fuel.depletable:
        print("| not | a | table |")"""

CODE = """使用如下脚本读取测点：

```python
def read(path):
    with open(path) as f:   
        for line in f:


            yield line.rstrip("\\n")   # 第 1 页
Page 3 of 20
首页
```

结束。以上脚本仅供检修人员离线使用。"""

FORMULAE = r"""由六因子公式 k = εpfηP₁P₂ 得到有效增殖系数，其中 ²³⁵U 的热中子裂变截面为 585 b。
停堆后衰变热按下式估算：P/P₀ = 0.0622·[t^(-0.2) − (t+T)^(-0.2)]，t≥10 s。
$$\frac{1}{v}\frac{\partial \phi}{\partial t} = \nabla \cdot D \nabla \phi - \Sigma_a \phi + S$$
反应 ¹⁰B(n,α)⁷Li 放出 2.31 MeV；N_A = 6.022×10²³ mol⁻¹，½ 寿期换料，①②③ 号棒组，Ⅲ级安全壳。"""

RECORD = """设备编码：2SEC001PO    工单号：WO-20230415-017
缺陷描述：巡检发现 2SEC001PO 驱动端轴承振动 7.8 mm/s，超过 7.1 mm/s 报警值。
处理：更换轴承 6316/C3，复测振动 2.1 mm/s，合格。
备件：轴承 2 件；密封圈 1 件
结论：合格"""

ENGLISH = """5.3 Loss of residual heat removal

If both trains are lost with the vessel head removed, start a charging pump, align it to the
refuelling water storage tank, and raise the level to at least 7.0 m above the flange. Do not
exceed 60 °C. Evacuate the reactor building if the level falls below mid-loop for 10 minutes."""

NUCLIDES = """裂变产物及锕系核素清单：
锶-90、钇-90、锆-95、铌-95、钼-99、锝-99、钌-106、铑-106、碲-132、碘-131、氙-133、铯-137、钡-140、镧-140、
铈-144、镨-144、钷-147、钐-151、铕-154、钍-232、镤-233、铀-235、镎-237、钚-239、镅-241、锔-244、锎-252、
氚、氪-85、钴-60、锰-54、锑-124、铊、铋、钋-210、氡-222、镭-226。联氨（肼）、氢氧化锂与硼酸单列。"""

MESSAGE = """读保持寄存器的请求和应答（功能码 03，低字节在前的 CRC-16）：
01 03 00 00 00 0A C5 CD
01 03 14 00 01 00 02 00 03 00 04 00 05 00 06 00 07 00 08 00 09 00 0A 9F 2D"""

ALL = {
    name: text
    for name, text in globals().items()
    if name.isupper() and isinstance(text, str) and not name.startswith("_")
}


def _lists() -> dict[str, str]:
    """Draw long lists, whose lines are much alike."""
    rng = random.Random(0)
    tag = lambda system, kind: f"{rng.randrange(1, 9)}{system}{rng.randrange(999):03}{kind}"  # noqa: E731
    quantities = ("轴封泄漏流量", "电机绕组温度", "轴承温度", "油位", "振动")
    lines = {
        "records": [
            f"设备编码：{tag('SEC', 'PO')}    工单号：WO-{rng.randrange(10**8)}\n"
            f"缺陷：驱动端轴承振动 {rng.random() * 9:.1f} mm/s，超过 7.1 mm/s 报警值。\n"
            f"处理：更换轴承 6316/C3，复测 {rng.random() * 3:.1f} mm/s，合格。\n"
            "备件：轴承 2 件；密封圈 1 件\n结论：合格"
            for _ in range(100)
        ],
        "alarms": [
            f"{tag('RCP', 'AA')} 主泵 {rng.choice('ABC')} {rng.choice(quantities)}高 "
            f"定值 {rng.randrange(400)} 见卡片 {rng.randrange(90)}"
            for _ in range(300)
        ],
        "steps": [
            f"{i}. 确认阀门 {tag('RRI', 'VN')} 在开启位置，并在检查单上签字。" for i in range(200)
        ],
        "table": ["| 序号 | 设备 | 结果 |", "|---|---|---|"]
        + [f"| {i} | 阀门 | 合格 |" for i in range(300)],
        "columns": [f"{i:4}  阀门  合格" for i in range(300)],
        "tags": [f"10LAB{i % 90 + 10} AA{i:03} 主给水隔离阀 DN400" for i in range(300)],
        "core map": [f"{a}{b:02} 组件 {a}{b}" for a in "ABCDEFGH" for b in range(1, 16)],
        "log": [
            f"2023-04-15 08:{i // 60:02}:{i % 60:02} INFO pump A running, flow {rng.randrange(99)}"
            for i in range(400)
        ],
    }
    return {name: "\n".join(each) for name, each in lines.items()}


LISTS = _lists()
